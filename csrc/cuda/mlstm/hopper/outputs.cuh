// The four outputs that have a row per token, by one design: h, dq, dk, dv of one chunk (128 tokens) of one head.
//
//   output  rows   A   B   T = A B^T        state S (at the chunk's)   Z    out row
//   h       t      q   k   q_t . k_j        c (start)  q_t S           v    (sum_j P_tj v_j + a_t S-term) / d_t
//   dq      t      dh  v   dh_t . v_j       c (start)  S dh_t          k    sum_j P_tj k_j + a_t (S-term) + delta n
//   dk      j      v   dh  dh_t . v_j       dc (end)   S v_j           q    sum_t P_jt q_t + w_j (S-term + dn)
//   dv      j      k   q   q_t . k_j        dc (end)   k_j S           dh   sum_t P_jt dh_t + w_j S-term
//
// where, with D_tj = exp(b_t - b_j + i_j - m_t):  P = scale D T (h);  scale D (T / d_t + delta_t) (dq, dk);
// scale D T / d_t (dv).  1 / d_t is applied in float32, never to an operand.
//
// A persistent block works through tiles of 128 rows by tile_n columns. Its producer warp streams 64-wide panels of A
// and B, then of A and S, then Z in two halves of 64 tokens, through a ring of stages, and runs ahead into the next
// tile while the two consumer warpgroups (64 rows each) finish the last. They make T (64 x 128, of which one warpgroup
// needs half) in float32 registers, then out = A S (64 x tile_n); then turn T into P in registers, round it into the
// fragments of an A operand, and add P Z.
//
// dq first makes both tiles, q k^T and dh v^T, for u from exact products:
//   u_t d_t = sum_j scale D_tj (q_t . k_j) (dh_t . v_j) + scale g_t q_t . (c dh_t)
// so that numerator and normalizer cancel where h does not depend on their common scale (dn, df and dm are such
// differences); delta and e follow. The gates' gradients are sums of q . dq and k . dk: dq and dk leave what comes from
// across the chunk's boundary, from their float32 accumulators; what comes from within the chunk, differences of which
// all but cancel where forget gates are nearly shut, dq's kernel sums over rows and columns of the exact tile
//   Y_tj = scale D_tj (q_t . k_j) (dh_t . v_j / d_t + delta_t).
//
// s_t of h comes from float32: row sums of P before it is rounded, and q . n with n as a sum of three bfloat16 beside
// S.
//
// Shared memory at tile_n 256: 4 stages of 48 KiB (A 16, B 16 or S 32; or Z 32; h: 1 more for n), 16 KiB to write rows
// out.
#pragma once

#include <array>
#include <atomic>

#include "cuda/mlstm/hopper/work.h"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::hopper {

enum class Output { h, dq, dk, dv };

struct OutputArgs {
  Work w;
  Maps maps;
  void* out;  // contiguous (batch, seq, heads, columns); dv beside dk has its own
  void* dv;
  const float* s;  // dq: the forward's
  const float* m;  // h, dq: (batch, seq, heads)
  float* s_out;    // h
  Strided dh;      // dv
  int tiles;       // column tiles of a row; dk and dv: of dk, and of both
  int tiles_of_both;
};

constexpr int consumer_warps = 8;
constexpr int output_threads = (consumer_warps + 4) * 32;
constexpr int ab_bytes = 2 * box_bytes;

template <Output output, int tile_n>
struct OutputShared {
  static constexpr int stage_bytes = ab_bytes + (tile_n == 64 ? 2 : tile_n / box) * box_bytes;
  static constexpr int n_bytes = 8 * box * 2;
  static constexpr int num_stages = output == Output::dq ? 3 : 4;
  alignas(1024) unsigned char stage[num_stages][stage_bytes];
  alignas(1024) unsigned char n_parts[num_stages][n_bytes];
  union {
    bf16 rows[consumer_warps][16 * box];
    float parked[output == Output::dq ? 4 : 1][32 * 128];
  };
  float2 alpha[2][chunk_tokens], beta[2][chunk_tokens];
  float inv_d[2][chunk_tokens], delta[2][chunk_tokens];
  float n[2][tile_n];
  float column_sum[consumer_warps][box];  // dq
  uint64_t full[num_stages], empty[num_stages];
};

__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <Output output>
struct Roles {
  static constexpr bool rows_are_t = output == Output::h || output == Output::dq;
  static constexpr bool inner_is_dqk = output == Output::h || output == Output::dv;
  static constexpr bool gate_sums = output == Output::dq || output == Output::dk;
  static constexpr bool state_rows_are_k = inner_is_dqk;  // S lies as [k][n]
  // The columns of T in halves of 64. Half 0, the first tokens as j or the last as t, is reached from all rows; half 1
  // from the rows of its own tokens only, which one warpgroup has.
  __device__ static constexpr int half_begin(int half) { return (half == 0) == rows_are_t ? 0 : box; }
  __device__ static bool reaches_both(int group) { return group == (rows_are_t ? 1 : 0); }
};

// One tile of an output: a chunk of one head by tile_n columns.
struct Tile {
  int row, first, length;  // the chunk's row of the batch, first token, tokens
  int item, head, index;   // index: of the column tile
};

// Where the ring stands; producer and consumers walk it alike.
template <int num_stages>
struct RingState {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

template <Output output, int tile_n, typename Shared>
__device__ __forceinline__ void produce(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile) {
  using R = Roles<output>;
  const Work& w = args.w;
  const Maps& maps = args.maps;
  const int token = tile.first, row = tile.row, head = tile.head, item = tile.item, col0 = tile.index * tile_n;
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
  const CUtensorMap& a = output == Output::h    ? maps.q
                         : output == Output::dq ? maps.dh
                         : output == Output::dk ? maps.v
                                                : maps.k;
  const CUtensorMap& b = output == Output::h    ? maps.k
                         : output == Output::dq ? maps.v
                         : output == Output::dk ? maps.dh
                                                : maps.q;
  const CUtensorMap& z = output == Output::h    ? maps.v
                         : output == Output::dq ? maps.k
                         : output == Output::dk ? maps.q
                                                : maps.dh;
  constexpr int boxes_n = tile_n / box;
  const auto load_ab = [&](const CUtensorMap& left, const CUtensorMap& right, int64_t inner) {
    for (int k = 0; k < inner; k += box) {
      unsigned char* to = begin_stage(2 * ab_bytes);
      load_rows(to, left, k);
      load_rows(to + ab_bytes, right, k);
      ring.advance();
    }
  };
  const int64_t inner = R::inner_is_dqk ? w.p.dqk : w.p.dv;
  if constexpr (output == Output::dq) load_ab(maps.q, maps.k, w.p.dqk);
  load_ab(a, b, inner);
  // From the last panel of A to the first: the last ones are still in the L2 cache.
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
  if constexpr (R::gate_sums) {  // the rows that dq and dk are multiplied by for the gates
    for (int x = 0; x < boxes_n; x += 2) {
      unsigned char* to = begin_stage((boxes_n == 1 ? 1 : 2) * ab_bytes);
      for (int y = 0; y < (boxes_n == 1 ? 1 : 2); ++y) {
        load_rows(to + y * ab_bytes, output == Output::dq ? maps.q : maps.k, col0 + (x + y) * box);
      }
      ring.advance();
    }
  }
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage(boxes_n * box_bytes);
    for (int x = 0; x < boxes_n; ++x) {
      ptx::tma_load(to + x * box_bytes, &z, &sh.full[ring.stage], col0 + x * box, head, token + R::half_begin(half),
                    row);
    }
    ring.advance();
  }
}

// Adds what is not finite in Z to those of the warp's written rows that depend on it.
template <Output output, int tile_n>
__device__ __noinline__ void add_odd(const OutputArgs& args, const Tile& tile, const float2* alpha,
                                     const float2* beta) {
  using R = Roles<output>;
  const MlstmProblem& p = args.w.p;
  const Strided& z = output == Output::h ? p.v : output == Output::dq ? p.k : output == Output::dk ? p.q : args.dh;
  const int64_t columns = R::inner_is_dqk ? p.dv : p.dqk;
  const int first_row = threadIdx.x / 32 * 16;
  for (int64_t col = tile.index * tile_n + threadIdx.x % 32; col < min(columns, int64_t{tile.index + 1} * tile_n);
       col += 32) {
    const bf16* const from =
        static_cast<const bf16*>(z.data) + tile.row * z.batch + tile.first * z.seq + tile.head * z.head + col;
    for (int token = 0; token < tile.length; ++token) {
      const float value = __bfloat162float(from[token * z.seq]);
      if (isfinite(value)) continue;
      for (int row = first_row; row < min(first_row + 16, tile.length); ++row) {
        const int t = R::rows_are_t ? row : token, j = R::rows_are_t ? token : row;
        if (j > t || fast_exp2(log_difference(alpha[t], beta[j])) == 0.0f) continue;
        bf16& element = static_cast<bf16*>(
            output == Output::dv
                ? args.dv
                : args.out)[((tile.row * p.seq + tile.first + row) * p.heads + tile.head) * columns + col];
        element = __float2bfloat16_rn(__bfloat162float(element) + value);
      }
    }
  }
}

template <Output output, int tile_n, typename Shared>
__device__ __forceinline__ void consume(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile, int buffer) {
  using R = Roles<output>;
  constexpr bool gate_sums = R::gate_sums;
  const Work& w = args.w;
  const Layout& l = w.layout;
  const int thread = threadIdx.x, group = thread / 128, warp = thread / 32, lane = thread % 32;
  const int quad = lane / 4, pos = lane % 4;
  const int64_t at = static_cast<int64_t>(tile.item) * chunk_tokens;
  const int col0 = tile.index * tile_n;
  const int columns = static_cast<int>(R::inner_is_dqk ? w.p.dv : w.p.dqk);

  // The chunk's gates, on their way to shared memory; used after the first products.
  constexpr bool reads_tokens = output == Output::dk || output == Output::dv;
  float2 log_value = (group == 0 ? w.alpha : w.beta)[at + thread % 128];
  float token_value = 0.0f, n_value[2] = {0.0f, 0.0f};
  if constexpr (reads_tokens) token_value = (group == 0 ? w.inv_d : w.delta)[at + thread % 128];
  if constexpr (gate_sums) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int c = thread + x * 256;
      if (c < tile_n && col0 + c < columns) n_value[x] = w.n[tile.item * l.dqk + col0 + c];
    }
  }
  const float2 m_start = w.m_start[tile.item], alpha_last = w.alpha_last[tile.item];
  const int rows[2] = {group * 64 + (warp % 4) * 16 + quad, group * 64 + (warp % 4) * 16 + quad + 8};
  float2 row_log[2] = {};  // alpha, or beta, of the rows; the columns have the other
  const float2* const col_logs = R::rows_are_t ? sh.beta[buffer] : sh.alpha[buffer];
  const auto decay = [&](int r, int col, float2 col_log) {  // D, 0 where j > t
    const bool reaches = R::rows_are_t ? col <= rows[r] : rows[r] <= col;
    return reaches
               ? fast_exp2(R::rows_are_t ? log_difference(row_log[r], col_log) : log_difference(col_log, row_log[r]))
               : 0.0f;
  };
  const auto pair_at = [&](const float* from, int col) { return *reinterpret_cast<const float2*>(from + col); };

  const auto share_gates = [&] {
    (group == 0 ? sh.alpha : sh.beta)[buffer][thread % 128] = log_value;
    if constexpr (reads_tokens) (group == 0 ? sh.inv_d : sh.delta)[buffer][thread % 128] = token_value;
    if constexpr (gate_sums) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (thread + x * 256 < tile_n) sh.n[buffer][thread + x * 256] = n_value[x];
      }
    }
    ptx::named_barrier(1, consumer_warps * 32);
    for (int r = 0; r < 2; ++r) row_log[r] = (R::rows_are_t ? sh.alpha : sh.beta)[buffer][rows[r]];
  };

  const auto token_index = [&](int row) { return (tile.row * l.seq + tile.first + row) * l.heads + tile.head; };
  const auto stage_address = [&](int s) { return ptx::shared_address(sh.stage[s]); };
  const auto release = [&](int s) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&sh.empty[s]);
  };
  // Issues a panel after another; a stage is given back once the next panel's products have been issued.
  const auto for_panels = [&](int inner, auto&& issue) {
    int last = 0;
    for (int k = 0; k < inner; k += box) {
      ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
      ptx::wgmma_fence();
      issue(stage_address(ring.stage), k == 0);
      ptx::wgmma_commit();
      if (k > 0) {
        ptx::wgmma_wait<1>();
        release(last);
      }
      last = ring.stage;
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    release(last);
  };
  // T, or q k^T, over the columns of one half.
  const auto half_product = [&](float (&to)[32], int half, uint32_t stage, bool first) {
    const uint32_t right = stage + ab_bytes + R::half_begin(half) / box * box_bytes;
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<64>::template a_shared<false>(to, ptx::wgmma_descriptor(stage + group * box_bytes + kk * 32),
                                               ptx::wgmma_descriptor(right + kk * 32), !first || kk > 0);
    }
  };
  const auto product_one = [&](float (&to)[32], int64_t inner) {
    for_panels(static_cast<int>(inner), [&](uint32_t stage, bool first) { half_product(to, 0, stage, first); });
    ptx::hold(to);
  };
  const auto product_both = [&](float (&to0)[32], float (&to1)[32], int64_t inner) {
    for_panels(static_cast<int>(inner), [&](uint32_t stage, bool first) {
      half_product(to0, 0, stage, first);
      half_product(to1, 1, stage, first);
    });
    ptx::hold(to0);
    ptx::hold(to1);
  };

  // T. The second half waits in shared memory, each thread's own, until out needs no more registers: where the warps
  // will write rows out, which no warp does between share_gates and the check of the second half of Z.
  float u_inside[2] = {0.0f, 0.0f};
  const auto weight_qk = [&](float (&qk)[32], int half) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int col = R::half_begin(half) + c * 8 + pos * 2;
      const float4 logs = *reinterpret_cast<const float4*>(col_logs + col);  // of two columns
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        ptx::scale_in_place(qk[c * 4 + x], decay(x / 2, col + x % 2,
                                                 x % 2 ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y)));
      }
      ptx::keep_order();
    }
  };
  // Arrays of 32 floats wait in shared memory, each thread's own.
  const auto park = [&](const float (&from)[32], int slot) {
#pragma unroll
    for (int x = 0; x < 32; ++x) sh.parked[slot][x * 128 + thread % 128] = from[x];
  };
  const auto parked = [&](int slot, int x) { return sh.parked[slot][x * 128 + thread % 128]; };
  const auto add_u = [&](int x, float qk, float gv) { u_inside[x % 4 / 2] += qk == 0.0f ? 0.0f : qk * gv; };
  const int64_t inner = R::inner_is_dqk ? w.p.dqk : w.p.dv;
  float tile_t[32], second[32];  // no third array: the compiler gives each accumulator registers of its own
  const bool reaches_both = R::reaches_both(group);
  if constexpr (output == Output::dq) {
    // Both groups make both halves: for want of registers the compiler would serialize the products of a branch.
    product_both(tile_t, second, w.p.dqk);
    share_gates();
    weight_qk(tile_t, 0);
    weight_qk(second, 1);
    park(tile_t, reaches_both ? 1 : 2);
    if (reaches_both) park(second, 3);
    product_both(tile_t, second, inner);
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      add_u(x, parked(reaches_both ? 1 : 2, x), tile_t[x]);
      if (reaches_both) add_u(x, parked(3, x), second[x]);
      if (x % 8 == 7) ptx::keep_order();
    }
  } else if (reaches_both) {
    product_both(tile_t, second, inner);
    share_gates();
  } else {
    product_one(tile_t, inner);
    share_gates();
  }
  if (reaches_both) park(second, 0);

  float out[tile_n / 2];
  float q_n[4];
  for_panels(static_cast<int>(inner), [&](uint32_t stage, bool first) {
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      const uint64_t a = ptx::wgmma_descriptor(stage + group * box_bytes + kk * 32);
      const uint32_t s = stage + ab_bytes;
      if constexpr (R::state_rows_are_k) {
        ptx::Wgmma<tile_n>::template a_shared<true>(out, a, ptx::wgmma_descriptor(s + kk * 2048, box_bytes),
                                                    !first || kk > 0);
      } else {
        ptx::Wgmma<tile_n>::template a_shared<false>(out, a, ptx::wgmma_descriptor(s + kk * 32), !first || kk > 0);
      }
      if constexpr (output == Output::h) {
        ptx::Wgmma<8>::template a_shared<false>(
            q_n, a, ptx::wgmma_descriptor(ptx::shared_address(sh.n_parts[ring.stage]) + kk * 32), !first || kk > 0);
      }
    }
  });
  ptx::hold(out);
  if constexpr (output == Output::h) ptx::hold(q_n);

  // The state's term, and dn's and n's; dq: u, delta and e.
  float inv_d[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f}, across[2] = {0.0f, 0.0f}, n_share[2] = {0.0f, 0.0f};
  // Calls f(column group, row 0 or 1, two neighbours of q's or k's row) for this thread's part of them.
  const auto for_dots = [&](auto&& f) {
#pragma unroll
    for (int x = 0; x < tile_n / box; x += 2) {
      ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
      const unsigned char* const from = sh.stage[ring.stage] + rows[0] * 128 + pos * 4;
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // both rows have quad in their address's low bits
        const unsigned char* const at_c = from + (c ^ quad) * 16;
#pragma unroll
        for (int y = 0; y < (tile_n == box ? 1 : 2); ++y)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            f((x + y) * 8 + c, r,
              __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at_c + y * ab_bytes + r * 8 * 128)));
          }
        ptx::keep_order();
      }
      release(ring.stage);
      ring.advance();
    }
  };
  float dot_out[2] = {0.0f, 0.0f}, dot_n[2] = {0.0f, 0.0f};
  if constexpr (gate_sums) {
    for_dots([&](int c, int r, float2 x) {
      const float2 n = pair_at(sh.n[buffer], c * 8 + pos * 2);
      dot_out[r] += x.x * out[c * 4 + r * 2] + x.y * out[c * 4 + r * 2 + 1];
      dot_n[r] += x.x * n.x + x.y * n.y;
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) dot_out[r] = quad_sum(dot_out[r]), dot_n[r] = quad_sum(dot_n[r]);
  }
  float factors[2], n_factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows[r];
    const float row_scale = R::rows_are_t ? w.p.scale * fast_exp2(log_sum(row_log[r], m_start))
                                          : fast_exp2(log_difference(alpha_last, row_log[r]));
    if constexpr (output == Output::dq) {
      const float sum = w.p.scale * quad_sum(u_inside[r]) + (row_scale == 0.0f ? 0.0f : row_scale * dot_out[r]);
      float e = 0.0f;
      if (row < tile.length) {
        const int64_t token = token_index(row);
        const Normalizer d(args.s[token], args.m[token], w.p.eps);
        const float u = sum * d.inverse;
        inv_d[r] = d.inverse;
        delta[r] = d.sign == 0.0f ? 0.0f : -u * d.inverse * d.sign;
        e = -u * w.p.eps * d.inverse;
      }
      if (pos == 0) w.inv_d[at + row] = inv_d[r], w.delta[at + row] = delta[r], w.e[at + row] = e;
    }
    factors[r] = output == Output::dq ? row_scale * inv_d[r] : row_scale;
    n_factors[r] = output == Output::dq ? row_scale * delta[r] : row_scale;
    if constexpr (gate_sums) {
      across[r] = (factors[r] == 0.0f ? 0.0f : factors[r] * dot_out[r]) +
                  (n_factors[r] == 0.0f ? 0.0f : n_factors[r] * dot_n[r]);
    }
    if constexpr (output == Output::h) n_share[r] = row_scale * quad_sum(q_n[r * 2] + q_n[r * 2 + 1]);
  }
#pragma unroll
  for (int c = 0; c < tile_n / 8; ++c) {
    const float2 n = gate_sums ? pair_at(sh.n[buffer], c * 8 + pos * 2) : float2{};
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      ptx::scale_in_place(out[c * 4 + x], factors[x / 2]);
      if constexpr (gate_sums) {
        ptx::fma_in_place(out[c * 4 + x], n_factors[x / 2], x % 2 ? n.y : n.x);
      }
    }
    if (c % 8 == 7) ptx::keep_order();
  }

  // P, masked to j <= t, a half of the columns at a time, and its product with that half of Z. A weight of exactly 0
  // gives 0, whatever k or v hold there.
  float row_sum[2] = {0.0f, 0.0f}, row_inside[2] = {0.0f, 0.0f};
  const int64_t shares_stride = l.max_chunks * l.heads * chunk_tokens;
  bool z_was_odd = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool reaches = half == 0 || reaches_both;
    uint32_t p[4][4];
    if (reaches) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int col = R::half_begin(half) + c * 8 + pos * 2;
        const float4 logs = *reinterpret_cast<const float4*>(col_logs + col);
        float2 col_inv_d{}, col_delta{};
        float column_inside[2] = {0.0f, 0.0f};
        if constexpr (output == Output::dk || output == Output::dv) col_inv_d = pair_at(sh.inv_d[buffer], col);
        if constexpr (output == Output::dk) col_delta = pair_at(sh.delta[buffer], col);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float two[2];
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const int x = c * 4 + r * 2 + y;
            const float d = decay(r, col + y, y ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y));
            float value = half == 0 ? tile_t[x] : parked(0, x);
            const float value_inv_d = output == Output::dq ? inv_d[r] : y ? col_inv_d.y : col_inv_d.x;
            const float value_delta = output == Output::dq ? delta[r] : y ? col_delta.y : col_delta.x;
            if constexpr (gate_sums) value = value * value_inv_d + value_delta;
            if constexpr (output == Output::dq) {
              const float weight = w.p.scale * parked(half == 1 ? 3 : reaches_both ? 1 : 2, x);
              const float inside = weight == 0.0f ? 0.0f : weight * value;
              row_inside[r] += inside;
              column_inside[y] += inside;
            }
            if constexpr (output == Output::dv) value *= value_inv_d;
            two[y] = d == 0.0f ? 0.0f : w.p.scale * d * value;
            row_sum[r] += two[y];
          }
          p[c / 2][c % 2 * 2 + r] = pack_bf16(two[0], two[1]);
        }
        if constexpr (output == Output::dq) {
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            for (int d = 4; d < 32; d *= 2) column_inside[y] += __shfl_xor_sync(0xffffffffu, column_inside[y], d);
          }
          if (quad == 0) {
            *reinterpret_cast<float2*>(&sh.column_sum[warp][c * 8 + pos * 2]) =
                make_float2(column_inside[0], column_inside[1]);
          }
        }
        ptx::keep_order();
      }
    }
    ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
    unsigned char* const z = sh.stage[ring.stage];
    // A product takes 0 times NaN or infinity as NaN, so an element of Z that is not finite would reach rows that do
    // not depend on it: it is taken out of Z, and the rows that do depend on it take it below. This is rare; looking
    // for it is not.
    __nv_bfloat162 odd = __float2bfloat162_rn(0.0f);
#pragma unroll 2
    for (int x = thread; x < tile_n * 8; x += consumer_warps * 32) {
      const uint4 four = reinterpret_cast<const uint4*>(z)[x];
      const __nv_bfloat162 zero = __float2bfloat162_rn(0.0f);
      odd = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&four.x), zero, odd);
      odd = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&four.y), zero, odd);
      odd = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&four.z), zero, odd);
      odd = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&four.w), zero, odd);
    }
    const bool any_odd = __hisnan(odd.x) || __hisnan(odd.y);
    if (ptx::named_barrier_or(1, consumer_warps * 32, any_odd)) {
      z_was_odd = true;
      ptx::named_barrier(1, consumer_warps * 32);
      for (int x = thread; x < tile_n * box; x += consumer_warps * 32) {
        bf16& element = reinterpret_cast<bf16*>(z)[x];
        if (!isfinite(__bfloat162float(element))) element = __float2bfloat16_rn(0.0f);
      }
      ptx::fence_async_shared();
      ptx::named_barrier(1, consumer_warps * 32);
    }
    if constexpr (output == Output::dq) {  // all warps are past a barrier; the next one is before the next half's sums
      if (thread < box) {
        float sum = 0.0f;
        for (int x = half == 0 ? 0 : consumer_warps / 2; x < consumer_warps; ++x) sum += sh.column_sum[x][thread];
        w.k_dk[w.dk_tiles * shares_stride + at + R::half_begin(half) + thread] = sum;
      }
      if (half == 0) ptx::named_barrier(1, consumer_warps * 32);
    }
    if (reaches) {
      ptx::hold(out);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        ptx::Wgmma<tile_n>::template a_registers<true>(
            out, p[kk], ptx::wgmma_descriptor(ptx::shared_address(z) + kk * 2048, box_bytes), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::hold(out);
    }
    release(ring.stage);
    ring.advance();
  }

  float factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows[r];
    if constexpr (output == Output::h) {
      const float s = quad_sum(row_sum[r]) + n_share[r];
      if (row < tile.length) {
        const int64_t token = token_index(row);
        factor[r] = Normalizer(s, args.m[token], w.p.eps).inverse;
        if (tile.index == 0 && pos == 0) args.s_out[token] = s;
      }
    }
    if constexpr (gate_sums) {
      float* const shares = (output == Output::dq ? w.q_dq : w.k_dk) + at + row;
      if (pos == 0) shares[tile.index * shares_stride] = across[r];
    }
    if constexpr (output == Output::dq) {
      const float inside = quad_sum(row_inside[r]);
      if (pos == 0) w.q_dq[w.dq_tiles * shares_stride + at + row] = inside;
    }
  }

  // Rows go out through shared memory, 16 rows x 64 columns a warp at a time, 16 bytes a lane.
  bf16* const to = static_cast<bf16*>(output == Output::dv ? args.dv : args.out);
  bf16* const part = sh.rows[warp];
#pragma unroll
  for (int x = 0; x < tile_n / box; ++x) {
    __syncwarp();
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int i = (x * 4 + y) * 8;
      const int row = lane % 16, chunk16 = y * 2 + lane / 16;
      ptx::stmatrix_x4(part + row * box + ((chunk16 ^ (row % 8)) * 8),
                       pack_bf16(out[i] * factor[0], out[i + 1] * factor[0]),
                       pack_bf16(out[i + 2] * factor[1], out[i + 3] * factor[1]),
                       pack_bf16(out[i + 4] * factor[0], out[i + 5] * factor[0]),
                       pack_bf16(out[i + 6] * factor[1], out[i + 7] * factor[1]));
    }
    __syncwarp();
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int row = y * 4 + lane / 8, chunk16 = lane % 8, col = col0 + x * box + chunk16 * 8;
      const int token = group * 64 + (warp % 4) * 16 + row;
      if (token < tile.length && col < columns) {
        __stcs(reinterpret_cast<uint4*>(to + token_index(token) * columns + col),
               *reinterpret_cast<const uint4*>(part + row * box + ((chunk16 ^ (row % 8)) * 8)));
      }
    }
  }
  if (z_was_odd) {
    __syncwarp();
    add_odd<output, tile_n>(args, tile, sh.alpha[buffer], sh.beta[buffer]);
  }
}

// What a kernel makes: one output, or dk and dv together, whose tiles of one chunk share much of what they read.
template <Output output, int tile_n>
struct One {
  using Shared = OutputShared<output, tile_n>;
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile) {
    produce<output, tile_n>(args, sh, ring, tile);
  }
  __device__ static void consume_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile, int buffer) {
    consume<output, tile_n>(args, sh, ring, tile, buffer);
  }
};
template <int tile_dqk, int tile_dv>
struct DkAndDv {
  using Shared = OutputShared<Output::dk, (tile_dqk > tile_dv ? tile_dqk : tile_dv)>;
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
                                      Tile tile, int buffer) {
    if (tile.index < args.tiles) {
      consume<Output::dk, tile_dqk>(args, sh, ring, tile, buffer);
    } else {
      tile.index -= args.tiles;
      consume<Output::dv, tile_dv>(args, sh, ring, tile, buffer);
    }
  }
};

template <typename Makes>
__global__ void __launch_bounds__(output_threads, 1) outputs_kernel(const __grid_constant__ OutputArgs args) {
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

  // Tiles of one chunk and head go to neighbouring blocks, which share its rows in the L2 cache. They take turns from
  // round to round: where the number of blocks is a multiple of that of tiles, a block would have tiles of one kind
  // only, all the long ones (dk's) or all the short ones (dv's).
  const auto for_tiles = [&](auto&& f) {
    const int heads = static_cast<int>(l.heads), tiles = args.tiles_of_both;
    int buffer = 0;
    for (int64_t index = blockIdx.x; index < l.max_chunks * heads * tiles; index += gridDim.x, buffer ^= 1) {
      const int item = static_cast<int>(index / tiles), chunk_index = item / heads;
      Chunk chunk;
      if (!l.locate(chunk_index, chunk)) break;
      const int64_t round = gridDim.x % tiles == 0 ? index / gridDim.x : 0;  // the same for all tiles of an item
      const int turn = static_cast<int>((index % tiles + round) % tiles);
      f(Tile{static_cast<int>(chunk.row), static_cast<int>(chunk.first), chunk.length, item, item - chunk_index * heads,
             turn},
        buffer);
    }
  };
  RingState<num_stages> ring;
  if (threadIdx.x >= consumer_warps * 32) {
    ptx::fewer_registers<24>();
    if (threadIdx.x != consumer_warps * 32) return;
    for_tiles([&](const Tile& tile, int) { Makes::produce_tile(args, sh, ring, tile); });
  } else {
    ptx::more_registers<240>();
    for_tiles([&](const Tile& tile, int buffer) { Makes::consume_tile(args, sh, ring, tile, buffer); });
  }
}

// Sets a kernel up on the current device, once, and says how many of its blocks run at once there.
class Prepared {
 public:
  template <typename Kernel>
  cudaError_t resident_blocks(Kernel kernel, int threads, int bytes, int& blocks) {
    int device = 0, processors = 0, per_processor = 0;
    if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    std::atomic<int>* known = device < max_devices ? &known_[device] : nullptr;
    if (known != nullptr && (blocks = known->load(std::memory_order_acquire)) > 0) return cudaSuccess;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status == cudaSuccess) {
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, bytes);
    }
    blocks = processors * per_processor;
    if (status == cudaSuccess && known != nullptr) known->store(blocks, std::memory_order_release);
    return status;
  }

 private:
  static constexpr int max_devices = 64;
  std::array<std::atomic<int>, max_devices> known_{};
};

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
  kernel<<<static_cast<unsigned>(count < resident ? count : resident), output_threads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <Output output>
cudaError_t launch_one(const OutputArgs& args, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = ceil_div(columns, column_tile(columns));
  switch (column_tile(columns)) {
    case 64: return launch_outputs<One<output, 64>>(args, tiles, stream);
    case 128: return launch_outputs<One<output, 128>>(args, tiles, stream);
    default: return launch_outputs<One<output, 256>>(args, tiles, stream);
  }
}

}  // namespace flash_xlstm::cuda::hopper
