// The four outputs that have a row per token, by one design: h, dq, dk, dv of one chunk (128 tokens) of one head.
//
//   output  rows   A   B   T = A B^T       state S (at the chunk's)   Z    out row
//   h       t      q   k   q_t . k_j       c (start)  q_t S           v    (sum_j P_tj v_j + a_t S-term) scale / d_t
//   dq      t      dh  v   dh_t . v_j      c (start)  S dh_t          k    (sum_j P_tj k_j + a_t S-term + n-term) scale
//   dk      j      v   dh  dh_t . v_j      dc (end)   S v_j           q    sum_t P_jt q_t + w_j (S-term + dn)
//   dv      j      k   q   q_t . k_j       dc (end)   k_j S           dh   sum_t P_jt dh_t + w_j S-term
//
// where, with D_tj = exp(b_t - b_j + i_j - m_t):  P = D T (h);  D (T / d_t + delta_t) (dq; dk with scale);
// scale D T / d_t (dv).  1 / d_t is applied in float32, never to an operand.
//
// A persistent block works through tiles of 128 rows by tile_n columns. A producer warp streams operands by TMA through
// a ring of stages: 64-wide panels of A and B, then of A and S, then Z in two halves of 64 tokens. It prefetches the
// next tile while the two consumer warpgroups (64 rows each) finish the last. The warpgroups share no data and wait
// only for the ring, so the arithmetic of one overlaps the products of the other. A warpgroup
//   makes T in float32 registers: the diagonal 64 x 64 block of its own rows' tokens and, where its rows reach the
//     other 64 tokens, the full block of those;
//   turns T into P, rounded into fragments of an A operand;
//   makes out = A S (64 x tile_n), scales its rows, and adds P Z.
//
// dq makes out = A S first, then both tiles q k^T and dh v^T, because u needs exact products:
//   u_t d_t / scale = sum_j D_tj (q_t . k_j) (dh_t . v_j) + g_t q_t . (c dh_t).
// With these, numerator and normalizer cancel where h does not depend on their common scale: dn, df and dm are such
// differences. delta and e follow from u. The last term runs over all of dqk, so a tile makes the other column tiles'
// A S too, before its own.
//
// The gates' gradients are sums of q . dq and k . dk. dq and dk write the shares that cross the chunk's boundary, from
// their float32 accumulators. The shares from within the chunk all but cancel where forget gates are nearly shut. So
// dq's kernel sums them over rows and columns of the exact tile
//   Y_tj = scale D_tj (q_t . k_j) (dh_t . v_j / d_t + delta_t).
//
// h's kernel makes s_t from float32: row sums of P before rounding, plus q . n. n is a sum of three 16-bit numbers that
// are loaded beside S.
//
// A product turns 0 times NaN or infinity into NaN. So what is not finite in Z, T or S reaches elements that do not
// depend on it. mend_rows recomputes the elements that are not finite, one by one. Finite results do not pay for it.
//
// float16: P and the states may leave its range. A row of P and its state term are scaled by a power of two to below 1.
// A chunk's state is kept scaled by a power of two (Work::state_log).
//
// Small heads (up to 64 x 64, bfloat16) are bound by the latency of a tile's chain of waits. There (SmallShared)
//   the gates come through the ring;
//   an operand that serves twice is loaded once: A for T and S, dk's operands for dv;
//   P stays in registers;
//   two blocks that make h share an SM.
// h's kernel also starts beside the states' kernel, as far as SMs have room, and takes tiles in the order in which the
// states are written. k and v, which both kernels read, are then still in the L2 cache, and the tail of one kernel
// overlaps the start of the other.
//
// Shared memory at tile_n 256: 4 stages of 48 KiB (A 16, B 16 or S 32; or Z 32; h: 1 more for n), and 24 KiB for P and
// for output rows in the epilogue. dq: 3 stages, and 64 KiB for D (q k^T) and dh v^T.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/hopper/work.h"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::hopper {

enum class Output { h, dq, dk, dv };

struct OutputArgs {
  Work w;
  Maps maps;
  void* out;  // (batch, seq, heads, columns); dv beside dk has its own
  void* dv;
  int64_t out_token, dv_token;  // dq, dk, dv: elements from a token to the next; h is contiguous
  const float* s;  // dq: the forward's; null: not normalized
  const float* m;  // h, dq: (batch, seq, heads); null: 0
  float* s_out;    // h; null: not wanted
  Strided dh;      // dq, dk, dv
  int tiles;       // column tiles of a row; dk and dv: of dk, and of both
  int tiles_of_both;
};

constexpr int consumer_warps = 8;
constexpr int output_threads = (consumer_warps + 4) * 32;
constexpr int ab_bytes = 2 * box_bytes;

// One tile of an output: a chunk of one head by tile_n columns.
struct Tile {
  int row, first, length;  // the chunk's row of the batch, first token, tokens
  int item, head, index;   // index: of the column tile
  bool has_state;          // else it is all zeros: nothing of it is read
};

// Where an output's row of a token begins. `token`: of all rows of the batch.
template <Output output, typename T>
__device__ __forceinline__ T* out_row(const OutputArgs& args, const Tile& tile, int64_t token, int64_t columns) {
  if constexpr (output == Output::h)
    return static_cast<T*>(args.out) + (token * args.w.layout.heads + tile.head) * columns;
  else if constexpr (output == Output::dv)
    return static_cast<T*>(args.dv) + token * args.dv_token + tile.head * columns;
  else
    return static_cast<T*>(args.out) + token * args.out_token + tile.head * columns;
}

template <Output output, int tile_n>
struct OutputShared {
  static constexpr bool is_small = false;
  static constexpr int blocks_per_processor = 1, consumer_registers = 240;
  static constexpr bool is_h = output == Output::h, is_dq = output == Output::dq;
  static constexpr int stage_bytes = ab_bytes + (tile_n == 64 ? 2 : tile_n / box) * box_bytes;
  static constexpr int n_bytes = 8 * box * 2;
  static constexpr int num_stages = is_dq ? 3 : 4;
  alignas(1024) unsigned char stage[num_stages][stage_bytes];
  alignas(1024) unsigned char n_parts[is_h ? num_stages : 1][n_bytes];
  // Of each warp. First P of the diagonal block (dq: D (q k^T) of it), then output rows in the epilogue.
  alignas(16) unsigned char own[consumer_warps][is_dq ? 4096 : 2048];
  // Of each warp of the group that has a full block: the same of that block (dq: and its dh v^T).
  alignas(16) unsigned char own_full[consumer_warps / 2][is_dq ? 8192 : 2048];
  float column_sum[is_dq ? 2 : 1][is_dq ? consumer_warps : 1][box];
  // Of the columns' tokens, a copy for each group.
  float2 col_log[2][chunk_tokens];  // beta, or alpha
  float col_inv_d[2][is_h || is_dq ? 1 : chunk_tokens], col_delta[2][is_h || is_dq ? 1 : chunk_tokens];
  float n[2][is_h ? 2 : tile_n];
  uint64_t full[num_stages], empty[num_stages];
};

// Small tiles, of heads up to 64 x 64: `blocks` blocks share an SM. A stage holds one operand. The stage of S also
// holds the gates and the Tile. dk and dv of a chunk are made one after the other from operands that are loaded once.
template <int blocks>
struct SmallShared {
  static constexpr bool is_small = true;
  static constexpr int blocks_per_processor = blocks, consumer_registers = blocks == 2 ? 104 : 240;
  static constexpr int stage_bytes = ab_bytes, num_stages = blocks == 2 ? 6 : 12;
  // In the stage of S.
  static constexpr int n_bytes = 8 * box * 2, log_bytes = chunk_tokens * sizeof(float2);
  static constexpr int float_bytes = chunk_tokens * sizeof(float);
  static constexpr int n_at = box_bytes, alpha_at = n_at + n_bytes, beta_at = alpha_at + log_bytes;
  static constexpr int inv_d_at = beta_at + log_bytes, delta_at = inv_d_at + float_bytes;
  static constexpr int tile_at = delta_at + float_bytes;
  alignas(1024) unsigned char stage[num_stages][stage_bytes];
  alignas(16) unsigned char own[consumer_warps][1024];  // of each warp: output rows in the epilogue
  uint64_t full[num_stages], empty[num_stages];
};

// The stages of a small tile's operands, from its first one on. h: q, k, c, v; dk and dv: v, dh, dc, k, q.
template <Output output>
struct SmallStages {
  static constexpr int a = output == Output::dv ? 3 : 0, b = output == Output::dv ? 4 : 1, s = 2;
  static constexpr int z = output == Output::dv ? 1 : output == Output::dk ? 4 : 3;
  static constexpr int gate_rows = 3;                    // dk: k
  static constexpr bool is_last = output != Output::dk;  // dv comes after dk and still needs the stages
  static constexpr int count = output == Output::h ? 4 : 5;
};

// Keeps `sum` 0 as long as all elements of `two` have been finite.
template <typename T>
__device__ __forceinline__ void note_odd(uint32_t& sum, uint32_t two) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(two), "r"(0u));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(two), "r"(0u));
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(all_lanes, x, 1);
  return x + __shfl_xor_sync(all_lanes, x, 2);
}

// Eight sums over the lanes of equal lane % 4; lane 4 x + p gets the x-th.
__device__ __forceinline__ float column_sums(const float (&x)[8], int quad) {
  float four[4], two[2];
#pragma unroll
  for (int y = 0; y < 4; ++y) {
    const float kept = quad & 4 ? x[y + 4] : x[y], given = quad & 4 ? x[y] : x[y + 4];
    four[y] = kept + __shfl_xor_sync(all_lanes, given, 16);
  }
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const float kept = quad & 2 ? four[y + 2] : four[y], given = quad & 2 ? four[y] : four[y + 2];
    two[y] = kept + __shfl_xor_sync(all_lanes, given, 8);
  }
  const float kept = quad & 1 ? two[1] : two[0], given = quad & 1 ? two[0] : two[1];
  return kept + __shfl_xor_sync(all_lanes, given, 4);
}

template <Output output>
struct Roles {
  static constexpr bool rows_are_t = output == Output::h || output == Output::dq;
  static constexpr bool inner_is_dqk = output == Output::h || output == Output::dv;
  static constexpr bool gate_sums = output == Output::dq || output == Output::dk;
  static constexpr bool state_rows_are_k = inner_is_dqk;  // S lies as [k][n]
  // First token of Z's first and second half. The half that all rows reach comes first: j's first or t's last tokens.
  __device__ static constexpr int half_begin(int half) { return (half == 0) == rows_are_t ? 0 : box; }
  // Whether the group's rows reach both halves.
  __device__ static bool reaches_both(int group) { return group == (rows_are_t ? 1 : 0); }
};

// The place in the ring. Producer and consumers advance theirs alike.
template <int num_stages>
struct RingState {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// Waits for the stage that is `ahead` stages after the ring's place, and gives its index.
template <typename Shared>
__device__ __forceinline__ int wait_for_stage(Shared& sh, RingState<Shared::num_stages> ring, int ahead) {
#pragma unroll
  for (int x = 0; x < ahead; ++x) ring.advance();
  ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
  return ring.stage;
}

// How many column tiles' A S a tile makes, and which one comes x-th: its own is the last.
template <Output output>
__device__ __forceinline__ int state_tile_count(const OutputArgs& args) {
  return output == Output::dq ? args.tiles : 1;
}
__device__ __forceinline__ int state_tile(const OutputArgs& args, const Tile& tile, int count, int x) {
  const int index = tile.index + 1 + x;
  return x == count - 1 ? tile.index : index < args.tiles ? index : index - args.tiles;
}

template <Output output>
__device__ __forceinline__ const CUtensorMap& a_of(const Maps& maps) {
  return output == Output::h ? maps.q : output == Output::dq ? maps.dh : output == Output::dk ? maps.v : maps.k;
}
template <Output output>
__device__ __forceinline__ const CUtensorMap& b_of(const Maps& maps) {
  return output == Output::h ? maps.k : output == Output::dq ? maps.v : output == Output::dk ? maps.dh : maps.q;
}
template <Output output>
__device__ __forceinline__ const CUtensorMap& z_of(const Maps& maps) {
  return output == Output::h ? maps.v : output == Output::dq ? maps.k : output == Output::dk ? maps.q : maps.dh;
}

template <Output output, int tile_n, typename Shared>
__device__ __forceinline__ void produce(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile) {
  using R = Roles<output>;
  const Work& w = args.w;
  const Maps& maps = args.maps;
  const int token = tile.first, row = tile.row, head = tile.head, item = tile.item;
  const auto begin_stage = [&](int bytes) {
    ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
    ptx::mbarrier_arrive_expect(&sh.full[ring.stage], bytes);
    return sh.stage[ring.stage];
  };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& map, int col) {  // 128 tokens x 64
    uint64_t* full = &sh.full[ring.stage];
    ptx::tma_load(to, &map, full, col, head, token, row);
    ptx::tma_load(to + box_bytes, &map, full, col, head, token + box, row);
  };
  const CUtensorMap &a = a_of<output>(maps), &b = b_of<output>(maps), &z = z_of<output>(maps);
  constexpr int boxes_n = tile_n / box;
  const int64_t inner = R::inner_is_dqk ? w.p.dqk : w.p.dv;
  const auto load_ab = [&](const CUtensorMap& left, const CUtensorMap& right, int64_t width) {
    for (int k = 0; k < width; k += box) {
      unsigned char* to = begin_stage(2 * ab_bytes);
      load_rows(to, left, k);
      load_rows(to + ab_bytes, right, k);
      ring.advance();
    }
  };
  const auto load_state = [&](int index) {
    if (!tile.has_state) return;
    const int col0 = index * tile_n;
    // From the last panel of A to the first: the last ones, just read for T, are still in the L2 cache.
    for (int k = (static_cast<int>(inner) - 1) / box * box; k >= 0; k -= box) {
      unsigned char* to = begin_stage(ab_bytes + boxes_n * box_bytes + (output == Output::h ? Shared::n_bytes : 0));
      uint64_t* full = &sh.full[ring.stage];
      load_rows(to, a, k);
      for (int x = 0; x < boxes_n; ++x) {
        unsigned char* s = to + ab_bytes + x * box_bytes;
        if constexpr (R::state_rows_are_k) {
          ptx::tma_load(s, &maps.c, full, 0, w.block_index(k / box, col0 / box + x) * box, item);
        } else {
          ptx::tma_load(s, &maps.c, full, 0, w.block_index(col0 / box + x, k / box) * box, item);
        }
      }
      if constexpr (output == Output::h) ptx::tma_load(sh.n_parts[ring.stage], &maps.n_parts, full, k, 0, item);
      ring.advance();
    }
    if constexpr (R::gate_sums) {  // q for q . dq, k for k . dk
      for (int x = 0; x < boxes_n; x += 2) {
        unsigned char* to = begin_stage((boxes_n == 1 ? 1 : 2) * ab_bytes);
        for (int y = 0; y < (boxes_n == 1 ? 1 : 2); ++y) {
          load_rows(to + y * ab_bytes, output == Output::dq ? maps.q : maps.k, col0 + (x + y) * box);
        }
        ring.advance();
      }
    }
  };
  if constexpr (output == Output::dq) {
    const int count = state_tile_count<output>(args);
    for (int x = 0; x < count; ++x) load_state(state_tile(args, tile, count, x));
    load_ab(maps.q, maps.k, w.p.dqk);
    load_ab(a, b, inner);
  } else {
    load_ab(a, b, inner);
    load_state(tile.index);
  }
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage(boxes_n * box_bytes);
    for (int x = 0; x < boxes_n; ++x) {
      ptx::tma_load(to + x * box_bytes, &z, &sh.full[ring.stage], tile.index * tile_n + x * box, head,
                    token + R::half_begin(half), row);
    }
    ring.advance();
  }
}

// The same for a small tile of h, or of dk and dv. It also sends the Tile, so that consumers need not compute it.
template <Output output, typename Shared>
__device__ __forceinline__ void produce_small(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                              const Tile& tile) {
  constexpr bool is_h = output == Output::h;
  const Maps& maps = args.maps;
  const auto wait_for_stage = [&] { ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1); };
  const auto load_rows = [&](const CUtensorMap& map) {  // 128 tokens x 64
    unsigned char* const to = sh.stage[ring.stage];
    uint64_t* full = &sh.full[ring.stage];
    ptx::mbarrier_arrive_expect(full, ab_bytes);
    ptx::tma_load(to, &map, full, 0, tile.head, tile.first, tile.row);
    ptx::tma_load(to + box_bytes, &map, full, 0, tile.head, tile.first + box, tile.row);
    ring.advance();
  };
  if constexpr (is_h) {  // the flag also means that q, k, v are written: the states' kernel has waited for them
    const int* const flag = args.w.state_flags + tile.item;
    while (ptx::load_acquire(flag) == 0) __nanosleep(50);
    ptx::fence_async();  // orders the states' stores before this thread's TMA loads
  }
  wait_for_stage();
  load_rows(is_h ? maps.q : maps.v);
  wait_for_stage();
  load_rows(is_h ? maps.k : maps.dh);

  wait_for_stage();
  unsigned char* const to = sh.stage[ring.stage];
  uint64_t* full = &sh.full[ring.stage];
  *reinterpret_cast<Tile*>(to + Shared::tile_at) = tile;
  ptx::fence_async_shared();  // orders this store before the TMA's next write to the stage
  const auto load_item = [&](int offset, const CUtensorMap& map) {
    ptx::tma_load(to + offset, &map, full, 0, 0, tile.item);
  };
  constexpr int gate_bytes = 2 * Shared::log_bytes + (is_h ? 0 : 2 * Shared::float_bytes);
  constexpr int state_bytes = box_bytes + (is_h ? Shared::n_bytes : box * static_cast<int>(sizeof(float)));
  ptx::mbarrier_arrive_expect(full, gate_bytes + (tile.has_state ? state_bytes : 0));
  load_item(Shared::alpha_at, maps.alpha);
  load_item(Shared::beta_at, maps.beta);
  if constexpr (!is_h) {
    load_item(Shared::inv_d_at, maps.inv_d);
    load_item(Shared::delta_at, maps.delta);
  }
  if (tile.has_state) {
    load_item(0, maps.c);
    load_item(Shared::n_at, is_h ? maps.n_parts : maps.n);
  }
  ring.advance();

  wait_for_stage();
  load_rows(is_h ? maps.v : maps.k);
  if constexpr (!is_h) {
    wait_for_stage();
    load_rows(maps.q);
  }
}

// Recomputes, one by one in float32, those elements of the warp's 16 written rows (from `first_row` on) that are not
// finite. Masked tokens and tokens of weight 0 are left out, whatever they hold. inv_d, delta: dq's, of rows quad and
// quad + 8. Slow, so rows and columns that are rightly not finite are skipped early.
template <Output output, int tile_n, typename T>
__device__ __noinline__ void mend_rows(const OutputArgs& args, const Tile& tile, int first_row, float2 inv_d,
                                       float2 delta) {
  using R = Roles<output>;
  const Work& w = args.w;
  const MlstmProblem& p = w.p;
  const int lane = threadIdx.x % 32;
  const int64_t at = static_cast<int64_t>(tile.item) * chunk_tokens;
  const int columns = static_cast<int>(R::inner_is_dqk ? p.dv : p.dqk);
  const int inner = static_cast<int>(R::inner_is_dqk ? p.dqk : p.dv);
  const Strided& a = output == Output::h ? p.q : output == Output::dq ? args.dh : output == Output::dk ? p.v : p.k;
  const Strided& b = output == Output::h ? p.k : output == Output::dq ? p.v : output == Output::dk ? args.dh : p.q;
  const Strided& z = output == Output::h ? p.v : output == Output::dq ? p.k : output == Output::dk ? p.q : args.dh;
  const auto row_of = [&](const Strided& t, int token) {
    return static_cast<const T*>(t.data) + tile.row * t.batch + (tile.first + token) * t.seq + tile.head * t.head;
  };
  const auto state_at = [&](int col, int k) {
    const int row = R::state_rows_are_k ? k : col, column = R::state_rows_are_k ? col : k;
    const auto* block = reinterpret_cast<const T*>(w.block(tile.item, row / box, column / box));
    return to_float(block[row % box * box + ((column % box / 8) ^ (row % 8)) * 8 + column % 8]);
  };
  const float2 m_start = w.m_start[tile.item], alpha_last = w.alpha_last[tile.item];
  const float* const log = R::rows_are_t ? w.state_log : w.grad_log;
  const float state_scale = log == nullptr ? 1.0f : fast_exp2(log[tile.item]);
  const float* const n = w.n + tile.item * w.layout.dqk;
  constexpr int groups = tile_n / 32;
  const int col0 = tile.index * tile_n + lane;

  // Columns whose state is not finite. Where a row depends on the state, these elements are rightly not finite.
  unsigned state_odd = 0;
  for (int g = 0; g < groups; ++g) {
    if (col0 + g * 32 >= columns || !tile.has_state) continue;
    float sum = R::gate_sums ? n[col0 + g * 32] * 0.0f : 0.0f;
#pragma unroll 8
    for (int k = 0; k < inner; ++k) sum += state_at(col0 + g * 32, k) * 0.0f;
    if (!(sum == 0.0f)) state_odd |= 1u << g;
  }
  for (int r = 0; r < 16; ++r) {
    const int row = first_row + r;
    const float row_inv_d = __shfl_sync(all_lanes, r < 8 ? inv_d.x : inv_d.y, r % 8 * 4);
    const float row_delta = __shfl_sync(all_lanes, r < 8 ? delta.x : delta.y, r % 8 * 4);
    if (row >= tile.length) continue;
    const int64_t token = (tile.row * p.seq + tile.first + row) * p.heads + tile.head;
    T* const out = out_row<output, T>(args, tile, tile.row * p.seq + tile.first + row, columns);
    const float2 row_log = (R::rows_are_t ? w.alpha : w.beta)[at + row];
    const float row_factor = !tile.has_state ? 0.0f
                             : R::rows_are_t ? fast_exp2(log_sum(row_log, m_start))
                                             : fast_exp2(log_difference(alpha_last, row_log));
    // P of the tokens 32 x + lane, and whether their weight is other than 0.
    float weights[chunk_tokens / 32], sum = 0.0f;
    unsigned takes_part[chunk_tokens / 32];
    bool own_is_odd = false;
    for (int x = 0; x < chunk_tokens / 32; ++x) {
      const int other = x * 32 + lane, t = R::rows_are_t ? row : other, j = R::rows_are_t ? other : row;
      const float d = j <= t && t < tile.length ? fast_exp2(log_difference(w.alpha[at + t], w.beta[at + j])) : 0.0f;
      takes_part[x] = __ballot_sync(all_lanes, d != 0.0f);
      float value = 0.0f;
      if (d != 0.0f) {
        const T *left = row_of(a, row), *right = row_of(b, other);
#pragma unroll 8
        for (int k = 0; k < inner; ++k) value += to_float(left[k]) * to_float(right[k]);
        if constexpr (output == Output::dq) value = value * row_inv_d + row_delta;
        if constexpr (output == Output::dk) value = p.scale * (value * w.inv_d[at + t] + w.delta[at + t]);
        if constexpr (output == Output::dv) value *= p.scale * w.inv_d[at + t];
        value *= d;
      }
      weights[x] = value;
      sum += value;
      own_is_odd |= other == row && !(value * 0.0f == 0.0f);
    }
    float factor = output == Output::dq ? p.scale : 1.0f;
    if constexpr (output == Output::h) {
      if (row_factor != 0.0f) {
        for (int k = lane; k < inner; k += 32) sum += row_factor * to_float(row_of(a, row)[k]) * n[k];
      }
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
      sum *= p.scale;
      factor = p.scale * Normalizer(sum, args.m == nullptr ? 0.0f : args.m[token], p.eps, p.normalize).inverse;
      if (tile.index == 0 && lane == 0 && args.s_out != nullptr) args.s_out[token] = sum;
    }
    if (__any_sync(all_lanes, own_is_odd)) continue;  // this reaches the whole row
    for (int g = 0; g < groups; ++g) {
      const int col = col0 + g * 32;
      const bool odd = col < columns && !(to_float(out[col]) * 0.0f == 0.0f) &&
                       !(row_factor != 0.0f && state_odd >> g & 1u) && to_float(row_of(z, row)[col]) * 0.0f == 0.0f;
      if (__ballot_sync(all_lanes, odd) == 0) continue;
      const int safe_col = odd ? col : 0;
      float value = 0.0f;
      for (int x = 0; x < chunk_tokens / 32; ++x) {
        for (int y = 0; y < 32; ++y) {
          const float weight = __shfl_sync(all_lanes, weights[x], y);
          if (takes_part[x] >> y & 1u) value += weight * to_float(row_of(z, x * 32 + y)[safe_col]);
        }
      }
      if (!odd) continue;
      if (row_factor != 0.0f) {
        float term = 0.0f;
#pragma unroll 8
        for (int k = 0; k < inner; ++k) term += to_float(row_of(a, row)[k]) * state_at(col, k);
        term *= state_scale;
        if constexpr (output == Output::dq) term = term * row_inv_d + row_delta * n[col];
        if constexpr (output == Output::dk) term += n[col];
        value += row_factor * term;
      }
      out[col] = from_float<T>(value * factor);
    }
  }
}

// Small tiles: `out` has T's registers.
template <bool is_small, int count>
__device__ __forceinline__ auto& out_registers(float (&own)[count], float (&t)[32]) {
  if constexpr (is_small)
    return t;
  else
    return own;
}

template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void consume(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile) {
  using R = Roles<output>;
  constexpr bool gate_sums = R::gate_sums, is_h = output == Output::h, is_dq = output == Output::dq;
  constexpr bool is_dk = output == Output::dk, is_dv = output == Output::dv, is_half = std::is_same_v<T, half>;
  constexpr bool is_small = Shared::is_small;
  // Whether there are registers to load gates before the products and to use them after.
  constexpr bool reads_early = tile_n <= 128;
  const Work& w = args.w;
  const Layout& l = w.layout;
  const int thread = threadIdx.x, group = thread / 128, warp = thread / 32, lane = thread % 32;
  const int quad = lane / 4, pos = lane % 4;
  const int64_t at = static_cast<int64_t>(tile.item) * chunk_tokens;
  const int col0 = tile.index * tile_n;
  const int columns = static_cast<int>(R::inner_is_dqk ? w.p.dv : w.p.dqk);
  const int64_t inner = R::inner_is_dqk ? w.p.dqk : w.p.dv;
  // Small tiles: by shuffles, so that the compiler knows them to be warp-uniform. It serializes wgmma behind a branch
  // that may not be.
  const bool reaches_both = R::reaches_both(is_small ? __shfl_sync(all_lanes, group, 0) : group);
  const bool has_state = is_small ? __shfl_sync(all_lanes, tile.has_state ? 1 : 0, 0) != 0 : tile.has_state;
  const int rows[2] = {group * 64 + (warp % 4) * 16 + quad, group * 64 + (warp % 4) * 16 + quad + 8};
  const int diagonal = group * box, full = box - diagonal;  // first columns of the blocks

  // The gates are loaded here and used after the first products. Small tiles: most gates come through the ring.
  float2 row_log[2] = {}, col_log{};
  if constexpr (!is_small) {
    row_log[0] = (R::rows_are_t ? w.alpha : w.beta)[at + rows[0]];
    row_log[1] = (R::rows_are_t ? w.alpha : w.beta)[at + rows[1]];
  }
  const float2 m_start = w.m_start[tile.item], alpha_last = w.alpha_last[tile.item];
  const float state_log = is_half ? (R::rows_are_t ? w.state_log : w.grad_log)[tile.item] : 0.0f;
  if constexpr (!is_small) col_log = (R::rows_are_t ? w.beta : w.alpha)[at + thread % 128];
  float inv_d_of_col = 0.0f, delta_of_col = 0.0f, n_of_col[2] = {0.0f, 0.0f};
  if constexpr ((is_dk || is_dv) && !is_small) inv_d_of_col = w.p.scale * w.inv_d[at + thread % 128];
  if constexpr (is_dk && !is_small) delta_of_col = w.p.scale * w.delta[at + thread % 128];
  if constexpr (gate_sums && !is_small) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int c = thread % 128 + x * 128;
      if (c < tile_n && col0 + c < columns) n_of_col[x] = w.n[tile.item * l.dqk + col0 + c];
    }
  }
  // In shared memory: of the columns' tokens, and n of the output's columns.
  const float2* col_logs = nullptr;
  const float *col_inv_d = nullptr, *col_delta = nullptr, *n_of_out = nullptr;
  if constexpr (!is_small) {
    col_logs = sh.col_log[group], col_inv_d = sh.col_inv_d[group], col_delta = sh.col_delta[group];
    n_of_out = sh.n[group];
  }
  const auto share_gates = [&] {
    if constexpr (!is_small) {
      ptx::named_barrier(1 + group, 128);  // all have read the last tile's
      sh.col_log[group][thread % 128] = col_log;
      if constexpr (is_dk || is_dv) sh.col_inv_d[group][thread % 128] = inv_d_of_col;
      if constexpr (is_dk) sh.col_delta[group][thread % 128] = delta_of_col;
      if constexpr (gate_sums) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          if (thread % 128 + x * 128 < tile_n) sh.n[group][thread % 128 + x * 128] = n_of_col[x];
        }
      }
      ptx::named_barrier(1 + group, 128);
    }
  };
  const auto pair_at = [&](const float* from, int col) { return *reinterpret_cast<const float2*>(from + col); };

  const auto scaled_pair_at = [&](const float* from, int col) {  // larger tiles scale before they store
    float2 two = pair_at(from, col);
    if constexpr (is_small) two.x *= w.p.scale, two.y *= w.p.scale;
    return two;
  };

  const auto m_at = [&](int64_t token) { return args.m == nullptr ? 0.0f : args.m[token]; };
  float m_of_row[2] = {0.0f, 0.0f}, s_of_row[2] = {0.0f, 0.0f};
  const int64_t first_token = (tile.row * l.seq + tile.first) * l.heads + tile.head;
  const auto token_index = [&](int row) -> int64_t {
    if constexpr (is_small) return first_token + row * static_cast<int>(l.heads);  // fewer registers and instructions
    return (tile.row * l.seq + tile.first + row) * l.heads + tile.head;
  };
  if constexpr (reads_early && (is_h || is_dq)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows[r] < tile.length) m_of_row[r] = m_at(token_index(rows[r]));
      if (is_dq && args.s != nullptr && rows[r] < tile.length) s_of_row[r] = args.s[token_index(rows[r])];
    }
  }
  const auto stage_address = [&](int s) { return ptx::shared_address(sh.stage[s]); };
  const auto release = [&](int s) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&sh.empty[s]);
  };
  // Issues the products of one panel after another. A stage is released once the next panel's products are issued.
  // Accumulators start from zeros that are written: an accumulator that a product reads only on a condition would keep
  // its registers from tile to tile.
  const auto for_panels = [&](int width, auto&& issue) {
    int last = 0;
    for (int k = 0; k < width; k += box) {
      ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
      ptx::wgmma_fence();
      issue(stage_address(ring.stage));
      ptx::wgmma_commit();
      if (k > 0) {
        ptx::wgmma_wait<1>();
        release(last);
      }
      last = ring.stage;
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    if (width > 0) release(last);
  };
  // T, or q k^T, over the 64 columns from `begin` on.
  const auto block_product = [&](float (&to)[32], int begin, uint32_t stage, uint32_t stage_b, bool adds) {
    const uint32_t right = stage_b + begin / box * box_bytes;
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, 64>::template a_shared<false>(to, ptx::wgmma_descriptor(stage + group * box_bytes + kk * 32),
                                                  ptx::wgmma_descriptor(right + kk * 32), adds || kk > 0);
    }
  };
  // Both groups make both blocks, though one of them needs only the diagonal one. Behind a branch the compiler would
  // serialize the products, because registers are too few.
  const auto product_both = [&](float (&to0)[32], float (&to1)[32], int64_t width) {
#pragma unroll
    for (int x = 0; x < 32; ++x) to0[x] = to1[x] = 0.0f;
    for_panels(static_cast<int>(width), [&](uint32_t stage) {
      block_product(to0, diagonal, stage, stage + ab_bytes, true);
      block_product(to1, full, stage, stage + ab_bytes, true);
    });
    ptx::hold(to0);
    ptx::hold(to1);
  };
  // Small tiles: waits for one of the tile's stages.
  const auto small_stage = [&](int index) { return wait_for_stage(sh, ring, index); };

  // Row minus column of this thread's first element of the diagonal block. The columns of pair c are c * 8 further on.
  const int to_diagonal = (warp % 4) * 16 + quad - pos * 2;
  const auto reaches = [&](int c, int r, int y) {
    const int ahead = to_diagonal + r * 8 - c * 8 - y;
    return R::rows_are_t ? ahead >= 0 : ahead <= 0;
  };
  // Calls f(pair of columns c, row r, y of the pair, D).
  const auto for_decays = [&](int begin, auto&& f) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 logs = *reinterpret_cast<const float4*>(col_logs + begin + c * 8 + pos * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const float2 col = y ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y);
          f(c, r, y, fast_exp2(R::rows_are_t ? log_difference(row_log[r], col) : log_difference(col, row_log[r])));
        }
      ptx::keep_order();
    }
  };

  [[maybe_unused]] uint32_t p_diagonal[4][4], p_full[4][4];  // small tiles: P as fragments
  float inv_d[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};  // dq
  float row_sum[2] = {0.0f, 0.0f}, row_inside[2] = {0.0f, 0.0f};
  float* const own_weights = reinterpret_cast<float*>(sh.own[warp]) + lane;  // dq
  float* own_full_weights = nullptr;
  if constexpr (!is_small) own_full_weights = reinterpret_cast<float*>(sh.own_full[warp % 4]) + lane;
  float* const own_full_t = own_full_weights + 1024;
  // T, of which t(x) is an element, becomes P in place.
  const auto weigh = [&](auto&& t, int begin, auto masked) {
    [[maybe_unused]] float2 cols_inv_d{}, cols_delta{};
    [[maybe_unused]] float inside[16] = {};
    for_decays(begin, [&](int c, int r, int y, float d) {
      float& x = t(c * 4 + r * 2 + y);
      if constexpr (is_dk || is_dv) {
        if (r == 0 && y == 0) cols_inv_d = scaled_pair_at(col_inv_d, begin + c * 8 + pos * 2);
      }
      if constexpr (is_dk) {
        if (r == 0 && y == 0) cols_delta = scaled_pair_at(col_delta, begin + c * 8 + pos * 2);
      }
      float value = x;
      if constexpr (is_dq) value = value * inv_d[r] + delta[r];
      if constexpr (is_dk) value = value * (y ? cols_inv_d.y : cols_inv_d.x) + (y ? cols_delta.y : cols_delta.x);
      if constexpr (is_dv) value *= y ? cols_inv_d.y : cols_inv_d.x;
      if constexpr (is_dq) {
        const float weight = (masked ? own_weights : own_full_weights)[(c * 4 + r * 2 + y) * 32];
        const float within = weight == 0.0f ? 0.0f : weight * value;
        row_inside[r] += within;
        inside[c * 2 + y] += within;
      }
      value *= d;
      if (masked && !reaches(c, r, y)) value = 0.0f;
      if constexpr (is_h) row_sum[r] += value;
      x = value;
    });
    if constexpr (is_dq) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float of_column[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) of_column[c] = inside[c * 2 + y];
        sh.column_sum[masked ? 0 : 1][warp][quad * 8 + pos * 2 + y] = column_sums(of_column, quad);
      }
    }
  };
  // float16: rows of P below 1.
  float down[2] = {1.0f, 1.0f}, up[2] = {1.0f, 1.0f};
  const auto fragments = [&](uint32_t (&p)[4][4], auto&& t) {
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = t(c * 4 + r * 2), b = t(c * 4 + r * 2 + 1);
        p[c / 2][c % 2 * 2 + r] = is_half ? pack<T>(a * down[r], b * down[r]) : pack<T>(a, b);
      }
  };
  const auto scale_rows = [&](auto&& t0, auto&& t1) {
    if constexpr (is_half) {
      float most[2] = {0.0f, 0.0f};
#pragma unroll
      for (int x = 0; x < 32; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], fabsf(t0(x)));
      if (reaches_both) {
#pragma unroll
        for (int x = 0; x < 32; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], fabsf(t1(x)));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(all_lanes, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(all_lanes, most[r], 2));
        const int exponent = min(max((__float_as_int(most[r]) >> 23) - 126, -60), 126);
        down[r] = __int_as_float((127 - exponent) << 23), up[r] = __int_as_float((127 + exponent) << 23);
      }
    }
  };

  float tile_t[32], second[32];  // the diagonal block and the full one
  const auto of_diagonal = [&](int x) -> float& { return tile_t[x]; };
  const auto of_full = [&](int x) -> float& { return is_dq ? own_full_t[x * 32] : second[x]; };
  float own_out[tile_n / 2];
  float (&out)[tile_n / 2] = out_registers<is_small>(own_out, tile_t);
  float q_n[4];
  const auto state_product = [&] {
#pragma unroll
    for (int x = 0; x < tile_n / 2; ++x) out[x] = 0.0f;
    if constexpr (is_h) q_n[0] = q_n[1] = q_n[2] = q_n[3] = 0.0f;
    for_panels(tile.has_state ? static_cast<int>(inner) : 0, [&](uint32_t stage) {
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        const uint64_t a = ptx::wgmma_descriptor(stage + group * box_bytes + kk * 32);
        const uint32_t s = stage + ab_bytes;
        if constexpr (R::state_rows_are_k) {
          ptx::Wgmma<T, tile_n>::template a_shared<true>(out, a, ptx::wgmma_descriptor(s + kk * 2048, box_bytes), true);
        } else {
          ptx::Wgmma<T, tile_n>::template a_shared<false>(out, a, ptx::wgmma_descriptor(s + kk * 32), true);
        }
        if constexpr (is_h && !is_small) {
          ptx::Wgmma<T, 8>::template a_shared<false>(
              q_n, a, ptx::wgmma_descriptor(ptx::shared_address(sh.n_parts[ring.stage]) + kk * 32), true);
        }
      }
    });
    ptx::hold(out);
    if constexpr (is_h) ptx::hold(q_n);
  };
  // Calls f(column group, row 0 or 1, two neighbours of q's or k's row) for this thread's part of them.
  const auto for_dots = [&](auto&& f) {
    if (!tile.has_state) return;
#pragma unroll
    for (int x = 0; x < tile_n / box; x += 2) {
      int stage = ring.stage;
      if constexpr (is_small) {
        stage = small_stage(SmallStages<output>::gate_rows);
      } else {
        ptx::mbarrier_wait(&sh.full[stage], ring.parity);
      }
      const unsigned char* const from = sh.stage[stage] + rows[0] * 128 + pos * 4;
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // both rows have quad in their address's low bits
        const unsigned char* const at_c = from + (c ^ quad) * 16;
#pragma unroll
        for (int y = 0; y < (tile_n == box ? 1 : 2); ++y)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            f((x + y) * 8 + c, r, unpack<T>(*reinterpret_cast<const uint32_t*>(at_c + y * ab_bytes + r * 8 * 128)));
          }
        ptx::keep_order();
      }
      if constexpr (!is_small) {
        release(ring.stage);
        ring.advance();
      }
    }
  };

  const int64_t shares_stride = l.max_chunks * l.heads * chunk_tokens;
  // The state's weight in the rows.
  float state_factor[2];
  const auto set_state_factor = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state_factor[r] =
          R::rows_are_t ? fast_exp2(log_sum(row_log[r], m_start)) : fast_exp2(log_difference(alpha_last, row_log[r]));
    }
  };
  if constexpr (!reads_early) set_state_factor();
  const float state_up = is_half ? fast_exp2(state_log) : 1.0f;
  float across[2] = {0.0f, 0.0f};

  if constexpr (is_dq) {
    if constexpr (!reads_early) share_gates();
    float all_dots[2] = {0.0f, 0.0f}, dot_out[2], dot_n[2];
    const int count = state_tile_count<output>(args);
#pragma unroll 1
    for (int x = 0; x < count; ++x) {
      state_product();
      if (reads_early && x == 0) share_gates();
      dot_out[0] = dot_out[1] = dot_n[0] = dot_n[1] = 0.0f;
      for_dots([&](int c, int r, float2 q) {
        const float2 n = pair_at(n_of_out, c * 8 + pos * 2);
        // In place: the compiler would move the sums behind the loop, and only the last are used there.
        ptx::fma_in_place(dot_out[r], q.x, out[c * 4 + r * 2]);
        ptx::fma_in_place(dot_out[r], q.y, out[c * 4 + r * 2 + 1]);
        ptx::fma_in_place(dot_n[r], q.x, n.x);
        ptx::fma_in_place(dot_n[r], q.y, n.y);
      });
#pragma unroll
      for (int r = 0; r < 2; ++r) all_dots[r] += dot_out[r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      all_dots[r] = quad_sum(all_dots[r]) * state_up, dot_out[r] = quad_sum(dot_out[r]) * state_up;
      dot_n[r] = quad_sum(dot_n[r]);
    }

    // D (q k^T) goes to shared memory, to a place of each thread's own.
    product_both(tile_t, second, w.p.dqk);
    if constexpr (reads_early) set_state_factor();
    for_decays(diagonal, [&](int c, int r, int y, float d) {
      const int x = c * 4 + r * 2 + y;
      own_weights[x * 32] = d == 0.0f || !reaches(c, r, y) ? 0.0f : d * tile_t[x];
    });
    if (reaches_both) {
      for_decays(full, [&](int c, int r, int y, float d) {
        const int x = c * 4 + r * 2 + y;
        own_full_weights[x * 32] = d == 0.0f ? 0.0f : d * second[x];
      });
    }
    product_both(tile_t, second, inner);
    float u_inside[2] = {0.0f, 0.0f};
    const auto add_u = [&](int x, float qk, float gv) { u_inside[x % 4 / 2] += qk == 0.0f ? 0.0f : qk * gv; };
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      add_u(x, own_weights[x * 32], tile_t[x]);
      if (x % 8 == 7) ptx::keep_order();
    }
    if (reaches_both) {
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        add_u(x, own_full_weights[x * 32], second[x]);
        own_full_t[x * 32] = second[x];
        if (x % 8 == 7) ptx::keep_order();
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = rows[r];
      const float sum =
          w.p.scale * (quad_sum(u_inside[r]) + (state_factor[r] == 0.0f ? 0.0f : state_factor[r] * all_dots[r]));
      float e = 0.0f;
      if (row < tile.length) {
        const int64_t token = token_index(row);
        const float s = reads_early ? s_of_row[r] : args.s == nullptr ? 0.0f : args.s[token];
        const Normalizer d(s, reads_early ? m_of_row[r] : m_at(token), w.p.eps, w.p.normalize);
        const float u = sum * d.inverse;
        inv_d[r] = d.inverse;
        delta[r] = d.sign == 0.0f ? 0.0f : -u * d.inverse * d.sign;
        e = w.p.input_gate == InputGate::exponential ? -u * w.p.eps * d.inverse : 0.0f;
      }
      if (pos == 0 && tile.index == 0) w.inv_d[at + row] = inv_d[r], w.delta[at + row] = delta[r], w.e[at + row] = e;
      const float of_c = state_factor[r] * inv_d[r], of_n = state_factor[r] * delta[r];
      across[r] = w.p.scale * ((of_c == 0.0f ? 0.0f : of_c * dot_out[r]) + (of_n == 0.0f ? 0.0f : of_n * dot_n[r]));
    }
    weigh(of_diagonal, diagonal, std::true_type{});
    if (reaches_both) weigh(of_full, full, std::false_type{});
  } else if constexpr (is_small) {
    using At = SmallStages<output>;
    const int stage_a = small_stage(At::a), stage_b = small_stage(At::b);
    // False, but the compiler does not know it. So T's second block and `out` reuse the registers of the first block.
    // Zeros written ahead would take registers of their own, and spill.
    const bool adds = args.tiles_of_both < 0;
    const auto make_t = [&](int begin, bool is_first) {
      if (is_first) {
#pragma unroll
        for (int x = 0; x < 32; ++x) tile_t[x] = 0.0f;
      }
      ptx::wgmma_fence();
      block_product(tile_t, begin, stage_address(stage_a), stage_address(stage_b), is_first || adds);
      ptx::wgmma_commit();
    };
    make_t(diagonal, true);
    const int stage_s = small_stage(At::s);
    const auto logs_at = [&](int offset) { return reinterpret_cast<const float2*>(sh.stage[stage_s] + offset); };
    const float2* const row_logs = logs_at(R::rows_are_t ? Shared::alpha_at : Shared::beta_at);
    col_logs = logs_at(R::rows_are_t ? Shared::beta_at : Shared::alpha_at);
    col_inv_d = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::inv_d_at);
    col_delta = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::delta_at);
    n_of_out = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::n_at);
    row_log[0] = row_logs[rows[0]], row_log[1] = row_logs[rows[1]];
    set_state_factor();
    ptx::wgmma_wait<0>();
    ptx::hold(tile_t);
    weigh(of_diagonal, diagonal, std::true_type{});
    fragments(p_diagonal, of_diagonal);
    // Both groups make the full block's products, though only one needs them: see product_both.
    make_t(full, false);
#pragma unroll
    for (int x = 0; x < 16; ++x) p_full[x / 4][x % 4] = 0u;
    ptx::wgmma_wait<0>();
    ptx::hold(tile_t);
    if constexpr (At::is_last) release(stage_b);
    if (reaches_both) {
      weigh(of_diagonal, full, std::false_type{});
      fragments(p_full, of_diagonal);
    }

    if (!has_state) {
#pragma unroll
      for (int x = 0; x < tile_n / 2; ++x) out[x] = 0.0f;
    }
    if constexpr (is_h) q_n[0] = q_n[1] = q_n[2] = q_n[3] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < (has_state ? 1 : 0); ++k) {
      const uint32_t s = stage_address(stage_s);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        const uint64_t a = ptx::wgmma_descriptor(stage_address(stage_a) + group * box_bytes + kk * 32);
        if constexpr (R::state_rows_are_k) {
          ptx::Wgmma<T, tile_n>::template a_shared<true>(out, a, ptx::wgmma_descriptor(s + kk * 2048, box_bytes),
                                                         adds || kk > 0);
        } else {
          ptx::Wgmma<T, tile_n>::template a_shared<false>(out, a, ptx::wgmma_descriptor(s + kk * 32), adds || kk > 0);
        }
        if constexpr (is_h) {
          ptx::Wgmma<T, 8>::template a_shared<false>(q_n, a, ptx::wgmma_descriptor(s + Shared::n_at + kk * 32), true);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    }
    ptx::hold(out);
    if constexpr (is_h) ptx::hold(q_n);
    release(stage_a);
  } else {
    product_both(tile_t, second, inner);
    share_gates();
    if constexpr (reads_early) set_state_factor();
    weigh(of_diagonal, diagonal, std::true_type{});
    if (reaches_both) weigh(of_full, full, std::false_type{});
  }
  // P goes to shared memory while the state's product runs: registers are too few for both. dq's came first.
  uint4 *own_p = nullptr, *own_full_p = nullptr;
  if constexpr (!is_small) {
    scale_rows(of_diagonal, of_full);
    own_p = reinterpret_cast<uint4*>(sh.own[warp]) + lane;
    own_full_p = reinterpret_cast<uint4*>(sh.own_full[warp % 4]) + lane;
  }
  if constexpr (!is_dq && !is_small) {
    uint32_t p[4][4];
    fragments(p, of_diagonal);
#pragma unroll
    for (int x = 0; x < 4; ++x) own_p[x * 32] = make_uint4(p[x][0], p[x][1], p[x][2], p[x][3]);
    if (reaches_both) {
      fragments(p, of_full);
#pragma unroll
      for (int x = 0; x < 4; ++x) own_full_p[x * 32] = make_uint4(p[x][0], p[x][1], p[x][2], p[x][3]);
    }
    state_product();
  }

  // Scales the state's term; adds those of dn and n.
  float n_share[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (is_h) n_share[r] = state_factor[r] * state_up * quad_sum(q_n[r * 2] + q_n[r * 2 + 1]);
    const float of_c = (is_dq ? state_factor[r] * inv_d[r] : state_factor[r]) * state_up * down[r];
    const float of_n = (is_dq ? state_factor[r] * delta[r] : state_factor[r]) * down[r];
#pragma unroll
    for (int c = 0; c < tile_n / 8; ++c) {
      float2 n{};
      if constexpr (is_small && gate_sums) {
        if (has_state) n = pair_at(n_of_out, c * 8 + pos * 2);
      } else if constexpr (gate_sums) {
        n = pair_at(n_of_out, c * 8 + pos * 2);
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float& x = out[c * 4 + r * 2 + y];
        ptx::mul_in_place(x, of_c);
        if constexpr (gate_sums) ptx::fma_in_place(x, of_n, y ? n.y : n.x);
      }
      if (c % 8 == 7) ptx::keep_order();
    }
  }
  if constexpr (is_dk) {
    for_dots([&](int c, int r, float2 k) {
      across[r] = fmaf(k.y, out[c * 4 + r * 2 + 1], fmaf(k.x, out[c * 4 + r * 2], across[r]));
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(across[r]) * up[r];
      across[r] = state_factor[r] == 0.0f ? 0.0f : sum;
    }
  }

  if constexpr (is_small) {  // P Z
    using At = SmallStages<output>;
    const int stage_z = small_stage(At::z);
    const auto add_product = [&](const uint32_t (&p)[4][4], int begin) {
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        ptx::Wgmma<T, tile_n>::template a_registers<true>(
            out, p[kk], ptx::wgmma_descriptor(stage_address(stage_z) + begin / box * box_bytes + kk * 2048, box_bytes),
            true);
      }
    };
    ptx::hold(out);
    ptx::wgmma_fence();
    add_product(p_diagonal, diagonal);
    add_product(p_full, reaches_both ? full : diagonal);  // else zeros times rows that the output depends on anyway
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    if constexpr (At::is_last) release(stage_z);
  } else {
    const int first = ring.stage, first_parity = ring.parity;
    ring.advance();
    const int last = ring.stage, last_parity = ring.parity;
    ring.advance();
    const auto add_product = [&](const uint4* from, auto&& t, bool is_first) {
      uint32_t p[4][4];
      if constexpr (is_dq) {
        fragments(p, t);
      } else {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const uint4 four = from[x * 32];
          p[x][0] = four.x, p[x][1] = four.y, p[x][2] = four.z, p[x][3] = four.w;
        }
      }
      ptx::mbarrier_wait(&sh.full[is_first ? first : last], is_first ? first_parity : last_parity);
      ptx::hold(out);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        ptx::Wgmma<T, tile_n>::template a_registers<true>(
            out, p[kk], ptx::wgmma_descriptor(stage_address(is_first ? first : last) + kk * 2048, box_bytes), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::hold(out);
    };
    add_product(own_p, of_diagonal, !reaches_both);
    if (reaches_both) add_product(own_full_p, of_full, true);
    ptx::mbarrier_wait(&sh.full[last], last_parity);  // one group does not read it, but releases it in order
    release(first);
    release(last);
  }

  float factor[2] = {up[0], up[1]};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows[r];
    if constexpr (is_h) {
      const float s = w.p.scale * (quad_sum(row_sum[r]) + n_share[r]);
      factor[r] *= w.p.scale;
      if (row < tile.length) {
        const int64_t token = token_index(row);
        factor[r] *= Normalizer(s, reads_early ? m_of_row[r] : m_at(token), w.p.eps, w.p.normalize).inverse;
        if (tile.index == 0 && pos == 0 && args.s_out != nullptr) args.s_out[token] = s;
      }
    }
    if constexpr (is_dq) factor[r] *= w.p.scale;
    if constexpr (gate_sums) {
      float* const shares = (is_dq ? w.q_dq : w.k_dk) + at + row;
      if (pos == 0) shares[tile.index * shares_stride] = across[r];
    }
    if constexpr (is_dq) {
      const float inside = w.p.scale * quad_sum(row_inside[r]);
      if (pos == 0 && tile.index == 0) w.q_dq[w.dq_tiles * shares_stride + at + row] = inside;
    }
  }
  if constexpr (is_dq) {
    // Column sums: of the diagonal block for the group's own tokens, of the full block for the other group's.
    ptx::named_barrier(1 + group, 128);
    const int block = thread % 128 / box, token = (block == 0 ? diagonal : full) + thread % box;
    float sum = 0.0f;
    if (block == 0 || reaches_both) {
      for (int x = 0; x < 4; ++x) sum += sh.column_sum[block][group * 4 + x][thread % box];
    }
    if (tile.index == 0) w.k_dk[(w.dk_tiles + block) * shares_stride + at + token] = w.p.scale * sum;
  }

  unsigned char* const part = sh.own[warp];
  // The epilogue: rows go through shared memory, 16 rows x 64 columns (small tiles: 32) a warp at a time, then 16 bytes
  // a lane to memory.
  constexpr int part_cols = is_small ? box / 2 : box, lanes_a_row = part_cols / 8, rows_a_store = 32 / lanes_a_row;
  constexpr int stores = 16 / rows_a_store;
  T* to[stores];  // of the rows that this lane writes to; null where there is none
#pragma unroll
  for (int y = 0; y < stores; ++y) {
    const int row = group * 64 + (warp % 4) * 16 + y * rows_a_store + lane / lanes_a_row;
    to[y] = is_h ? static_cast<T*>(args.out) + token_index(row) * columns
                 : out_row<output, T>(args, tile, tile.row * l.seq + tile.first + row, columns);
    to[y] += col0 + lane % lanes_a_row * 8;
    if (row >= tile.length) to[y] = nullptr;
  }
  // The 16-byte pieces of neighbouring rows lie in different banks.
  const auto part_at = [&](int row, int chunk16) {
    return part + row * part_cols * 2 + (chunk16 ^ (is_small ? row / 2 % 4 : row % 8)) * 16;
  };
  uint32_t odd = 0;
#pragma unroll
  for (int x = 0; x < tile_n / part_cols; ++x) {
    __syncwarp();
#pragma unroll
    for (int y = 0; y < part_cols / 16; ++y) {
      const int i = (x * (part_cols / 16) + y) * 8;
      const int row = lane % 16, chunk16 = y * 2 + lane / 16;
      uint32_t two[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        two[z] = pack<T>(out[i + z * 2] * factor[z % 2], out[i + z * 2 + 1] * factor[z % 2]);
        note_odd<T>(odd, two[z]);
      }
      ptx::stmatrix_x4(part_at(row, chunk16), two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
#pragma unroll
    for (int y = 0; y < stores; ++y) {
      const int row = y * rows_a_store + lane / lanes_a_row, chunk16 = lane % lanes_a_row;
      if (to[y] != nullptr && col0 + x * part_cols + chunk16 * 8 < columns) {
        __stcs(reinterpret_cast<uint4*>(to[y] + x * part_cols), *reinterpret_cast<const uint4*>(part_at(row, chunk16)));
      }
    }
  }
  if (__any_sync(all_lanes, (odd & 0x7fff7fffu) != 0)) {
    __syncwarp();
    mend_rows<output, tile_n, T>(args, tile, group * 64 + (warp % 4) * 16, make_float2(inv_d[0], inv_d[1]),
                                 make_float2(delta[0], delta[1]));
  }
  if constexpr (is_small) {
    using At = SmallStages<output>;
    if constexpr (At::is_last) {
      release(small_stage(At::s));  // it also holds the Tile, which was in use
#pragma unroll
      for (int x = 0; x < At::count; ++x) ring.advance();
    }
  }
}

// What a kernel makes: one output, or dk and dv together. dk's and dv's tiles of one chunk share most operands in L2.
template <Output output, int tile_n, typename T>
struct One {
  using Shared = OutputShared<output, tile_n>;
  static constexpr bool is_h = output == Output::h, rows_are_t = Roles<output>::rows_are_t, follows_states = false;
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile) {
    produce<output, tile_n>(args, sh, ring, tile);
  }
  __device__ static void consume_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile) {
    consume<output, tile_n, T>(args, sh, ring, tile);
  }
};
template <int tile_dqk, int tile_dv, typename T>
struct DkAndDv {
  using Shared = OutputShared<Output::dk, (tile_dqk > tile_dv ? tile_dqk : tile_dv)>;
  static constexpr bool is_h = false, rows_are_t = false, follows_states = false;
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      Tile tile) {
    if (tile.index < args.tiles) {
      produce<Output::dk, tile_dqk>(args, sh, ring, tile);
    } else {
      tile.index -= args.tiles;
      produce<Output::dv, tile_dv>(args, sh, ring, tile);
    }
  }
  __device__ static void consume_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      Tile tile) {
    if (tile.index < args.tiles) {
      consume<Output::dk, tile_dqk, T>(args, sh, ring, tile);
    } else {
      tile.index -= args.tiles;
      consume<Output::dv, tile_dv, T>(args, sh, ring, tile);
    }
  }
};

// Small tiles: of h, or of dk and dv.
template <int blocks, Output first, Output... others>
struct Small {
  using Shared = SmallShared<blocks>;
  using Ring = RingState<Shared::num_stages>;
  static constexpr bool is_h = first == Output::h, rows_are_t = Roles<first>::rows_are_t;
  static constexpr bool follows_states = first == Output::h;  // starts beside the states' kernel
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, Ring& ring, const Tile& tile) {
    produce_small<first>(args, sh, ring, tile);
  }
  // A tile without tokens is the end.
  __device__ static void produce_end(Shared& sh, Ring ring) {
    for (int x = 0; x < SmallStages<first>::s; ++x) ring.advance();
    ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
    reinterpret_cast<Tile*>(sh.stage[ring.stage] + Shared::tile_at)->length = 0;
    ptx::mbarrier_arrive(&sh.full[ring.stage]);
  }
  __device__ static bool consume_tile(const OutputArgs& args, Shared& sh, Ring& ring) {
    const int stage = wait_for_stage(sh, ring, SmallStages<first>::s);
    const Tile& tile = *reinterpret_cast<const Tile*>(sh.stage[stage] + Shared::tile_at);
    if (__shfl_sync(all_lanes, tile.length, 0) == 0) return false;
    consume<first, box, bf16>(args, sh, ring, tile);
    (consume<others, box, bf16>(args, sh, ring, tile), ...);
    return true;
  }
};

template <typename Makes>
__global__ void __launch_bounds__(output_threads, Makes::Shared::blocks_per_processor)
    outputs_kernel(const __grid_constant__ OutputArgs args) {
  using Shared = typename Makes::Shared;
  constexpr int num_stages = Shared::num_stages;
  extern __shared__ unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes + ptx::bytes_to_align<1024>(shared_bytes));
  const Layout& l = args.w.layout;
  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(&sh.full[s], 1);
      ptx::mbarrier_init(&sh.empty[s], consumer_warps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  if constexpr (!Makes::follows_states) wait_for_earlier_kernels();

  const auto tile_of = [&](const Chunk& chunk, int head, int index) {
    const bool is_empty = Makes::rows_are_t ? chunk.is_first && args.w.starts_empty
                                            : chunk.is_last && args.w.ends_empty;
    return Tile{.row = static_cast<int>(chunk.row),
                .first = static_cast<int>(chunk.first),
                .length = chunk.length,
                .item = static_cast<int>(chunk.chunk * l.heads) + head,
                .head = head,
                .index = index,
                .has_state = !is_empty};
  };
  // The states' kernel has written h of sequences that are left out.
  const auto has_no_tiles = [&](const Chunk& chunk) { return Makes::is_h && is_left_out(args.w.p, chunk.seq); };
  // Tiles of one chunk and head go to neighbouring blocks, which share its rows in the L2 cache. Where the number of
  // blocks is a multiple of the number of tiles, a block would always get the same column tile: long ones only (dk's)
  // or short ones only (dv's). So the assignment shifts by one from round to round.
  const auto for_tiles = [&](auto&& f) {
    const int heads = static_cast<int>(l.heads), tiles = args.tiles_of_both, blocks = static_cast<int>(gridDim.x);
    const int count = static_cast<int>(l.max_chunks) * heads * tiles;
    const bool take_turns = blocks % tiles == 0;
    int round = 0;
    for (int index = blockIdx.x; index < count; index += blocks, ++round) {
      const int item = index / tiles, chunk_index = item / heads;
      Chunk chunk;
      if (!l.locate(chunk_index, chunk)) break;
      if (has_no_tiles(chunk)) continue;
      // The round is the same for all tiles of an item.
      const int turn = take_turns ? (index - item * tiles + round) % tiles : index - item * tiles;
      f(tile_of(chunk, item - chunk_index * heads, turn));
    }
  };
  // Tiles in the order in which their states are written, each to the block that asks next. Packed: in chunk order.
  const auto for_tiles_in_turn = [&](auto&& f) {
    const Work& w = args.w;
    const auto heads = static_cast<unsigned>(l.heads);
    const bool packed = l.first_chunk != nullptr;
    const auto segments = static_cast<unsigned>(packed ? 1 : w.segments);
    const auto chunks = static_cast<unsigned>(packed ? l.max_chunks : l.chunks_per_seq);
    const auto rows = static_cast<unsigned>(packed ? 1 : l.num_seqs);
    const unsigned per_segment = ceil_div(chunks, segments), side_by_side = segments * rows * heads;
    const unsigned count = per_segment * side_by_side;
    int* const taken = w.state_flags + w.num_state_flags - 1;
    for (unsigned index = blockIdx.x; index < count;) {
      const unsigned next = gridDim.x + static_cast<unsigned>(atomicAdd(taken, 1));  // early, to hide its latency
      const unsigned step = index / side_by_side;
      unsigned rest = index - step * side_by_side;
      const unsigned head = rest % heads;
      rest /= heads;
      const unsigned row = rest % rows, in_row = rest / rows * per_segment + step;
      index = next;
      if (in_row >= chunks) continue;
      Chunk chunk;
      if (!l.locate(int64_t{row} * chunks + in_row, chunk) || has_no_tiles(chunk)) continue;
      f(tile_of(chunk, static_cast<int>(head), 0));
    }
  };
  RingState<num_stages> ring;
  if (threadIdx.x >= consumer_warps * 32) {
    ptx::fewer_registers<24>();
    if (threadIdx.x != consumer_warps * 32) return;
    const auto produce_tile = [&](const Tile& tile) { Makes::produce_tile(args, sh, ring, tile); };
    if constexpr (Makes::follows_states) {
      for_tiles_in_turn(produce_tile);
      Makes::produce_end(sh, ring);
    } else {
      for_tiles(produce_tile);
    }
  } else {
    ptx::more_registers<Shared::consumer_registers>();
    if constexpr (Makes::follows_states) {
      while (Makes::consume_tile(args, sh, ring)) {
      }
      wait_for_earlier_kernels();  // a kernel that waits for this one has then waited for the states' too
    } else if constexpr (Shared::is_small) {
      const int64_t chunks = l.first_chunk == nullptr ? l.max_chunks : l.first_chunk[l.num_seqs];
      const int count = static_cast<int>(chunks * l.heads) * args.tiles_of_both;
      for (int index = blockIdx.x; index < count; index += gridDim.x) {
        Makes::consume_tile(args, sh, ring);
      }
    } else {
      for_tiles([&](const Tile& tile) { Makes::consume_tile(args, sh, ring, tile); });
    }
  }
}

// `tiles` column tiles a chunk.
template <typename Makes>
cudaError_t launch_outputs(OutputArgs args, int64_t tiles, cudaStream_t stream) {
  static Prepared prepared;
  const auto kernel = outputs_kernel<Makes>;
  const int bytes = sizeof(typename Makes::Shared) + 1024;  // to align
  int resident = 0;
  const cudaError_t status = prepared.resident_blocks(kernel, output_threads, bytes, resident);
  if (status != cudaSuccess) return status;
  args.tiles_of_both = static_cast<int>(tiles);
  const int64_t count = args.w.layout.max_chunks * args.w.layout.heads * tiles;
  if (count > std::numeric_limits<int>::max() - resident) return cudaErrorInvalidConfiguration;  // 2^31 tiles
  return launch_early(kernel, dim3(static_cast<unsigned>(count < resident ? count : resident)), dim3(output_threads),
                      bytes, 1, stream, args);
}

template <Output output, typename T>
cudaError_t launch_one(OutputArgs args, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = ceil_div(columns, column_tile(columns));
  args.tiles = static_cast<int>(tiles);
  switch (column_tile(columns)) {
    case 64: return launch_outputs<One<output, 64, T>>(args, tiles, stream);
    case 128: return launch_outputs<One<output, 128, T>>(args, tiles, stream);
    default: return launch_outputs<One<output, 256, T>>(args, tiles, stream);
  }
}

}  // namespace flash_xlstm::cuda::hopper
