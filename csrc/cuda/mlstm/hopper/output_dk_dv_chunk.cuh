// dk and dv of a chunk in one tile: bfloat16, dqk up to 256. outputs.cuh has the formulas.
//
// dk and dv read the same panels of v, dh and dc. Here each is loaded once. After T1 = k q^T and P1 come, for every 64
// columns x of dv,
//   T2 += v_x dh_x^T,  dk += v_x dc_x^T,  dv_x = w (k dc_x) + P1 dh_x, written out at once,
// and behind them P2 and dk = w (dk + dn) + P2 q. Only q is loaded twice.
//
// A tile's stages, 32 KiB each, four in the ring:
//   q, columns 0-127; q, columns 128-255
//   for each x: dc_x (not where it is zero), then v_x and dh_x
//   q, tokens 64-127; q, tokens 0-63
// k has a place of its own, which is free once the last k dc_x is made: the sums k . dk are made of v_x . (k dc_x) and
// k . dn.
//
// Two warpgroups of 64 rows each. A thread's accumulators are 128 of dk, 32 of dv_x and 48 of T (T1, then T2): the 64 x
// 64 block on the diagonal, and half of the full block, which belongs to the rows of group 0. Group 1 makes its columns
// 96-127 and leaves P of them in shared memory. All of P is there: registers are too few. Three more warps bring the
// gates.
//
// Shared memory: ring 128 KiB, k 64, P 24 (P1, then P2: three blocks of 64 x 64), rows on their way out 8, gates 3.
// A tile at dv 512: 25,600 clocks of the tensor pipes; 704 KiB in, 192 out.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/hopper/output_epilogue.cuh"
#include "cuda/mlstm/hopper/output_state.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace flash_xlstm::cuda::hopper {

// What the consumers need to know of a tile.
struct ChunkTile {
  Tile tile;  // item < 0: there are no more
  float2 alpha_last;
  void *dk, *dv;  // of the tile's first token
};

struct ChunkShared {
  static constexpr int num_stages = 4, panels_k = 4;
  alignas(1024) unsigned char stage[num_stages][2 * ab_bytes];
  unsigned char k[panels_k][ab_bytes];
  unsigned char p[3][box_bytes];            // rows 0-63: columns 0-63, 64-127; rows 64-127: columns 64-127
  unsigned char own[consumer_warps][1024];  // of each warp: 16 rows x 32 columns to memory. Behind the panels: Late
  float2 col_log[chunk_tokens], row_log[chunk_tokens];
  float col_inv_d[chunk_tokens];
  ChunkTile tile[2];
  uint64_t full[num_stages], empty[num_stages];
  uint64_t full_k, empty_k, full_tile, full_gates, empty_gates, full_late, empty_late;
  uint64_t p_half, p_free;  // group 1 has written its half of P's full block; group 0 has read the block

  // What is wanted behind the panels, in the place of the first two warps' rows.
  struct Late {
    float dn[256], delta[chunk_tokens], k_dn[chunk_tokens];
  };
  __device__ Late& late() { return *reinterpret_cast<Late*>(own); }
};
static_assert(sizeof(ChunkShared) <= 232448 && sizeof(ChunkShared::Late) == 2 * 1024);

// The place in the ring, in one register.
struct ChunkRing {
  unsigned used = 0;
  __device__ int stage() const { return used % ChunkShared::num_stages; }
  __device__ int parity() const { return used / ChunkShared::num_stages % 2; }
};
__device__ __forceinline__ void wait_for_stage(ChunkShared& sh, const ChunkRing& ring) {
  ptx::mbarrier_wait(&sh.full[ring.stage()], ring.parity());
}
// Of this thread, not to be kept in a register.
__device__ __forceinline__ int lane_again() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Of a stage, in units of 16 bytes, for descriptors. By a shuffle, so that the compiler knows it to be warp-uniform.
__device__ __forceinline__ uint32_t uniform_place(const ChunkShared& sh, int stage) {
  return __shfl_sync(all_lanes, stage_address(sh, stage) >> 4, 0);
}
// wgmma_descriptor of a place in units of 16 bytes, in 32 bits: it never reaches bit 16.
__device__ __forceinline__ uint64_t rows_at(uint32_t place) {
  return uint64_t{0x40000040} << 32 | (place + (1u << 16));
}
__device__ __forceinline__ uint64_t transposed_at(uint32_t place) {
  return uint64_t{0x40000040} << 32 | (place + (static_cast<uint32_t>(box_bytes / 16) << 16));
}

__device__ __forceinline__ void arrive_once(uint64_t* barrier) {  // of a warp
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

__device__ __forceinline__ void produce_chunk(const OutputArgs& args, ChunkShared& sh, ChunkRing& ring,
                                              const Tile& tile, int parity) {
  const Work& w = args.w;
  const Maps& maps = args.maps;
  const int token = tile.first;
  const auto begin_stage = [&] {
    ptx::mbarrier_wait(&sh.empty[ring.stage()], ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect(&sh.full[ring.stage()], 2 * ab_bytes);
    return sh.stage[ring.stage()];
  };
  const auto load_box = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col, int from,
                            uint64_t hint = ptx::evict_first) {
    ptx::tma_load(to, &map, full, col, tile.head, from, tile.row, hint);
  };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col,
                             uint64_t hint = ptx::evict_first) {  // 128 tokens x 64
    load_box(to, map, full, col, token, hint);
    load_box(to + box_bytes, map, full, col, token + box, hint);
  };
  ptx::mbarrier_wait(&sh.empty_k, parity ^ 1);
  ptx::mbarrier_arrive_expect(&sh.full_k, ChunkShared::panels_k * ab_bytes);
  for (int y = 0; y < ChunkShared::panels_k; ++y) load_rows(sh.k[y], maps.k, &sh.full_k, y * box);
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage();
    for (int y = 0; y < 2; ++y) {
      load_rows(to + y * ab_bytes, maps.q, &sh.full[ring.stage()], (half * 2 + y) * box,
                ptx::evict_last);  // read twice
    }
    ++ring.used;
  }
  const int dv = static_cast<int>(w.p.dv);
  for (int x = 0; x * box < dv; ++x) {
    unsigned char* to;
    if (tile.has_state) {
      to = begin_stage();
      for (int y = 0; y < ChunkShared::panels_k; ++y) {
        ptx::tma_load(to + y * box_bytes, &maps.c, &sh.full[ring.stage()], 0, w.block_index(y, x) * box, tile.item);
      }
      ++ring.used;
    }
    to = begin_stage();
    load_rows(to, maps.v, &sh.full[ring.stage()], x * box);
    load_rows(to + ab_bytes, maps.dh, &sh.full[ring.stage()], x * box);
    ++ring.used;
  }
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage();
    for (int y = 0; y < ChunkShared::panels_k; ++y) {
      load_box(to + y * box_bytes, maps.q, &sh.full[ring.stage()], y * box,
               token + Roles<Output::dk>::half_begin(half));
    }
    ++ring.used;
  }
}

// Three warps bring what the consumers need beside the ring. They load a tile's numbers before the last tile's are done
// with.
// alpha, and where the tile lies.
template <typename T>
__device__ __forceinline__ void load_tile(const OutputArgs& args, ChunkShared& sh, const Tile& tile, int parity) {
  const Work& w = args.w;
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(tile.item) * chunk_tokens;
  float2 alpha[4];
#pragma unroll
  for (int x = 0; x < 4; ++x) alpha[x] = w.alpha[item + x * 32 + lane];
  const float2 last = w.alpha_last[tile.item];
  ptx::mbarrier_wait(&sh.empty_gates, parity ^ 1);
#pragma unroll
  for (int x = 0; x < 4; ++x) sh.col_log[x * 32 + lane] = alpha[x];
  if (lane == 0) {
    const int64_t token = tile.row * w.layout.seq + tile.first;
    ChunkTile& to = sh.tile[parity];
    to.tile = tile, to.alpha_last = last;
    to.dk = out_row<Output::dk, T>(args, tile, token, static_cast<int>(w.p.dqk));
    to.dv = out_row<Output::dv, T>(args, tile, token, static_cast<int>(w.p.dv));
  }
  ptx::mbarrier_arrive(&sh.full_tile);
}

// second: 1 / d, dn, k . dn of the chunk's second half. Else beta, delta, k . dn of its first half.
template <bool second, typename T>
__device__ __forceinline__ void load_chunk_gates(const OutputArgs& args, ChunkShared& sh, const Tile& tile,
                                                 int parity) {
  const Work& w = args.w;
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(tile.item) * chunk_tokens;
  if constexpr (second) {
    float inv_d[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) inv_d[x] = w.p.scale * w.inv_d[item + x * 32 + lane];
    ptx::mbarrier_wait(&sh.empty_gates, parity ^ 1);
#pragma unroll
    for (int x = 0; x < 4; ++x) sh.col_inv_d[x * 32 + lane] = inv_d[x];
  } else {
    float2 beta[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) beta[x] = w.beta[item + x * 32 + lane];
    ptx::mbarrier_wait(&sh.empty_gates, parity ^ 1);
#pragma unroll
    for (int x = 0; x < 4; ++x) sh.row_log[x * 32 + lane] = beta[x];
  }
  ptx::mbarrier_arrive(&sh.full_gates);

  // A lane has eight columns of dn and of each row of k. Four rows at a time; of row 4 x + lane / 8 the lane x % 8 of
  // eight keeps the sum.
  float dn[8], sums[2] = {0.0f, 0.0f}, delta[second ? 1 : 4];
  const int columns = static_cast<int>(w.p.dqk);
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    dn[x] = tile.has_state && lane * 8 + x < columns ? w.n[tile.item * w.layout.dqk + lane * 8 + x] : 0.0f;
  }
  if constexpr (!second) {
#pragma unroll
    for (int x = 0; x < 4; ++x) delta[x] = w.p.scale * w.delta[item + x * 32 + lane];
  }
  ptx::mbarrier_wait(&sh.full_k, parity);
  if (tile.has_state) {
    const unsigned char* const k = sh.k[lane / 8] + (second ? box_bytes : 0);
#pragma unroll 1
    for (int x = 0; x < 16; ++x) {
      float four[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        const int row = x * 4 + y;
        const uint4 eight = *reinterpret_cast<const uint4*>(k + row * 128 + ((lane ^ row) % 8) * 16);
        const float2 a = unpack<T>(eight.x), b = unpack<T>(eight.y), c = unpack<T>(eight.z), d = unpack<T>(eight.w);
        four[y] = fmaf(a.y, dn[1], a.x * dn[0]);
        four[y] = fmaf(b.y, dn[3], fmaf(b.x, dn[2], four[y]));
        four[y] = fmaf(c.y, dn[5], fmaf(c.x, dn[4], four[y]));
        four[y] = fmaf(d.y, dn[7], fmaf(d.x, dn[6], four[y]));
      }
      float two[2];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float kept = lane & 16 ? four[y + 2] : four[y], given = lane & 16 ? four[y] : four[y + 2];
        two[y] = kept + __shfl_xor_sync(all_lanes, given, 16);
      }
      const float kept = lane & 8 ? two[1] : two[0], given = lane & 8 ? two[0] : two[1];
      float sum = kept + __shfl_xor_sync(all_lanes, given, 8);
      sum += __shfl_xor_sync(all_lanes, sum, 4);
      sum += __shfl_xor_sync(all_lanes, sum, 2);
      sum += __shfl_xor_sync(all_lanes, sum, 1);
      if (x == lane % 8) sums[0] = sum;
      if (x == lane % 8 + 8) sums[1] = sum;
    }
  }
  arrive_once(&sh.empty_k);
  ptx::mbarrier_wait(&sh.empty_late, parity);
  ChunkShared::Late& late = sh.late();
#pragma unroll
  for (int x = 0; x < 2; ++x) late.k_dn[(second ? box : 0) + (x * 8 + lane % 8) * 4 + lane / 8] = sums[x];
  if constexpr (second) {
    *reinterpret_cast<float4*>(late.dn + lane * 8) = make_float4(dn[0], dn[1], dn[2], dn[3]);
    *reinterpret_cast<float4*>(late.dn + lane * 8 + 4) = make_float4(dn[4], dn[5], dn[6], dn[7]);
  } else {
#pragma unroll
    for (int x = 0; x < 4; ++x) late.delta[x * 32 + lane] = delta[x];
  }
  ptx::mbarrier_arrive(&sh.full_late);
}

__device__ __forceinline__ void store_if(bool wanted, void* to, const uint4& x) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(wanted))
      : "memory");
}

// Writes 16 rows a warp, 32 columns at a time through shared memory, 16 bytes a lane. `to`: of the row lane / 4, at
// column lane % 4 * 8. rows, columns: how many there are. token: elements from a row to the next.
template <typename T, int count>
__device__ __forceinline__ void store_rows(const ChunkShared& sh, int warp, const float (&out)[count], T* to,
                                           int64_t token, int rows, int columns, uint32_t& odd) {
  const int lane = lane_again();
  const uint32_t part = ptx::shared_address(sh.own[0]) + warp * 1024;
  // The 16-byte pieces of neighbouring rows lie in different banks.
  const auto part_at = [&](int row, int chunk16) { return part + row * 64 + (chunk16 ^ (row / 2 % 4)) * 16; };
  const uint32_t in = part_at(lane % 16, lane / 16), from = part_at(lane / 4, lane % 4);  // + 8 rows: the same banks
  T* const below = to + 8 * token;
  const bool wanted[2] = {lane / 4 < rows, lane / 4 + 8 < rows};
  columns -= lane % 4 * 8;
#pragma unroll
  for (int x = 0; x < count / 16; ++x) {
    __syncwarp();
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      uint32_t two[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        const int i = x * 16 + y * 8 + z * 2;
        two[z] = pack<T>(out[i], out[i + 1]);
        note_odd<T>(odd, two[z]);
      }
      ptx::stmatrix_x4(in ^ (y * 32), two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      store_if(wanted[y] && x * 32 < columns, (y ? below : to) + x * 32, ptx::load_shared_16(from + y * 512));
    }
  }
}

// Two numbers from shared memory, or zeros: nothing is read then.
__device__ __forceinline__ float2 pair_if(bool wanted, uint32_t shared) {
  float2 two;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@p ld.shared.v2.f32 {%0, %1}, [%2];\n}\n"
      : "=&f"(two.x), "=&f"(two.y)
      : "r"(shared), "r"(static_cast<int>(wanted))
      : "memory");
  return two;
}

// T becomes P, in place. 8 `groups` columns from `begin` on, rows `row` and row + 8. is_dk: P2, else P1. to_diagonal:
// as in Scores.
template <bool masked, int groups>
__device__ __forceinline__ void weigh_chunk(ChunkShared& sh, bool is_dk, int row, int begin, int to_diagonal,
                                            float (&t)[groups * 4]) {
  const float2 row_log[2] = {sh.row_log[row], sh.row_log[row + 8]};
#pragma unroll
  for (int c = 0; c < groups; ++c) {
    const int col = begin + c * 8;
    const float4 logs = *reinterpret_cast<const float4*>(sh.col_log + col);
    const float2 inv_d = pair_at(sh.col_inv_d, col);
    const float2 delta = pair_if(is_dk, ptx::shared_address(sh.late().delta + col));
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float& x = t[c * 4 + r * 2 + y];
        const float d =
            fast_exp2(log_difference(y ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y), row_log[r]));
        // In place: the compiler would keep masks and results in registers of their own.
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x) : "f"(y ? inv_d.y : inv_d.x), "f"(y ? delta.y : delta.x));
        ptx::mul_in_place(x, d);
        if constexpr (masked) {
          asm volatile("{\n.reg .pred p;\nsetp.gt.s32 p, %1, %2;\n@p mov.b32 %0, 0;\n}\n"
                       : "+f"(x)
                       : "r"(to_diagonal), "r"(c * 8 + y - r * 8));
        }
      }
    if (c % 2 == 1) ptx::keep_order();
  }
}

// Writes 8 `groups` columns of P, from the column group `first` on, as the TMA would.
template <typename T, int groups>
__device__ __forceinline__ void put_p(unsigned char* block, int first, const float (&t)[groups * 4]) {
  const int lane = threadIdx.x % 32;
  unsigned char* const row = block + (threadIdx.x / 32 % 4 * 16 + lane % 16) * 128;
#pragma unroll
  for (int y = 0; y < groups / 2; ++y) {
    uint32_t two[4];
#pragma unroll
    for (int z = 0; z < 4; ++z) two[z] = pack<T>(t[y * 8 + z * 2], t[y * 8 + z * 2 + 1]);
    ptx::stmatrix_x4(row + ((first + y * 2 + lane / 16) ^ (lane % 8)) * 16, two[0], two[1], two[2], two[3]);
  }
}

// The consumers' way. Both groups run the same instructions, which should fit the instruction caches: P1 and P2 are
// made by the same ones too.
template <typename T>
__device__ __forceinline__ void consume_chunks(const OutputArgs& args, ChunkShared& sh, const int group) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pos = lane % 4;
  const int row_in_block = warp % 4 * 16 + quad, to_diagonal = row_in_block - pos * 2;
  const int dv = static_cast<int>(args.w.p.dv), dqk = static_cast<int>(args.w.p.dqk);
  // Places in shared memory are in units of 16 bytes.
  constexpr int ab = ab_bytes / 16, box_place = box_bytes / 16;
  const int group_rows = group * box_place;                   // to the group's rows
  const int half_rows = box_place + group * (32 * 128 / 16);  // to the columns of T's half of the full block
  const uint32_t k_place = ptx::shared_address(sh.k[0]) >> 4;
  const uint32_t diagonal_p = ptx::shared_address(sh.p[0]) >> 4, full_p = diagonal_p + box_place + group_rows;
  const auto group_barrier = [&] { ptx::named_barrier(1 + group, 128); };
  ChunkRing ring;
  float dk[128], t_diagonal[32], t_half[16];
  uint32_t odd_dv = 0;
  const auto add_scores = [&](uint32_t a, uint32_t b) {  // of a panel
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, 64>::template a_shared<false>(t_diagonal, rows_at(a + group_rows + kk * 2),
                                                  rows_at(b + group_rows + kk * 2), true);
      ptx::Wgmma<T, 32>::template a_shared<false>(t_half, rows_at(a + kk * 2), rows_at(b + half_rows + kk * 2), true);
    }
  };
  const auto clear_dk = [&] {
#pragma unroll
    for (int x = 0; x < 128; ++x) dk[x] = 0.0f;
  };
  const auto clear_scores = [&] {
#pragma unroll
    for (int x = 0; x < 32; ++x) t_diagonal[x] = 0.0f;
#pragma unroll
    for (int x = 0; x < 16; ++x) t_half[x] = 0.0f;
    ptx::hold(t_diagonal);
    ptx::hold(t_half);
  };

  clear_dk();
  bool has_last = false;
  for (int parity = 0;; parity ^= 1, has_last = true) {
    ptx::mbarrier_wait(&sh.full_tile, parity);
    const ChunkTile &tile = sh.tile[parity], &last = sh.tile[parity ^ 1];
    const bool has_tile = __shfl_sync(all_lanes, tile.tile.item, 0) >= 0;
    // T1, while the last tile's dk is written. Not behind branches, where the compiler would serialize products: behind
    // the last tile T1 is made of what there is, before the first one no rows are written.
    clear_scores();
    if (has_tile) ptx::mbarrier_wait(&sh.full_k, parity);
    if (has_tile) wait_for_stage(sh, ring);
    const uint32_t q = uniform_place(sh, ring.stage());
    ++ring.used;
    if (has_tile) wait_for_stage(sh, ring);
    const uint32_t q_late = uniform_place(sh, ring.stage());
    ptx::wgmma_fence();
    add_scores(k_place, q);
    add_scores(k_place + ab, q + ab);
    add_scores(k_place + 2 * ab, q_late);
    add_scores(k_place + 3 * ab, q_late + ab);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // or the compiler would wait for T1 before dk is read
    ptx::hold(dk);
    uint32_t odd_dk = 0;
    store_rows<T>(sh, warp, dk, static_cast<T*>(last.dk) + (warp * 16 + lane / 4) * args.out_token + lane % 4 * 8,
                  args.out_token, has_last ? last.tile.length - warp * 16 : 0, dqk, odd_dk);
    ptx::wgmma_wait<0>();
    ptx::hold(t_diagonal);
    ptx::hold(t_half);
    if (__any_sync(all_lanes, (odd_dv & 0x7fff7fffu) != 0)) {
      __syncwarp();
      mend_rows<Output::dv, 1024, T>(args, last.tile, warp * 16, float2{}, float2{});
    }
    if (__any_sync(all_lanes, (odd_dk & 0x7fff7fffu) != 0)) {
      __syncwarp();
      mend_rows<Output::dk, 256, T>(args, last.tile, warp * 16, float2{}, float2{});
    }
    if (!has_tile) break;
    release(sh, (ring.used - 1) % ChunkShared::num_stages);
    release(sh, ring.stage());
    ++ring.used;
    clear_dk();
    odd_dv = 0;
    ptx::mbarrier_wait(&sh.full_gates, parity);

    const bool has_state = __shfl_sync(all_lanes, tile.tile.has_state ? 1 : 0, 0) != 0;
#pragma unroll 1
    for (int is_dk = 0; is_dk < 2; ++is_dk) {
      weigh_chunk<true, 8>(sh, is_dk != 0, group * box + row_in_block, group * box + pos * 2, to_diagonal, t_diagonal);
      weigh_chunk<false, 4>(sh, is_dk != 0, row_in_block, box + group * 32 + pos * 2, 0, t_half);
      if (is_dk) ptx::mbarrier_arrive(&sh.empty_gates);
      group_barrier();  // all warps' products with the last P are done
      put_p<T, 8>(sh.p[group * 2], 0, t_diagonal);
      if (group == 1) ptx::mbarrier_wait(&sh.p_free, is_dk ^ 1);
      put_p<T, 4>(sh.p[1], group * 4, t_half);
      ptx::fence_async_shared();
      if (group == 1) arrive_once(&sh.p_half);
      group_barrier();
      if (group == 0) ptx::mbarrier_wait(&sh.p_half, is_dk);
      if (is_dk) break;

      // The panels.
      clear_scores();
      float out[32], factor[2], across[2] = {0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        factor[r] = fast_exp2(log_difference(tile.alpha_last, sh.row_log[group * box + row_in_block + r * 8]));
      }
      const int rows = tile.tile.length - warp * 16;
      T* to = static_cast<T*>(tile.dv) + (warp * 16 + lane / 4) * args.dv_token + lane % 4 * 8;
      const auto add_inside = [&](uint32_t dh, bool adds) {  // P1 dh_x
#pragma unroll
        for (int kk = 0; kk < box / 16; ++kk) {
          ptx::Wgmma<T, 64>::template a_shared<true>(out, rows_at(full_p + kk * 2),
                                                     transposed_at(dh + box_place + kk * 128), adds || kk > 0);
        }
        if (group == 0) {
#pragma unroll
          for (int kk = 0; kk < box / 16; ++kk) {
            ptx::Wgmma<T, 64>::template a_shared<true>(out, rows_at(diagonal_p + kk * 2), transposed_at(dh + kk * 128),
                                                       true);
          }
        }
      };
      const auto write = [&](int left) {
        store_rows<T>(sh, warp, out, to, args.dv_token, rows, left, odd_dv);
        to += box;
      };
      if (has_state) {
#pragma unroll 1
        for (int left = dv; left > 0; left -= box) {
          wait_for_stage(sh, ring);
          const uint32_t c = uniform_place(sh, ring.stage());
          ++ring.used;
          wait_for_stage(sh, ring);
          const uint32_t v = uniform_place(sh, ring.stage());
          ptx::wgmma_fence();
#pragma unroll
          for (int kk = 0; kk < ChunkShared::panels_k * box / 16; ++kk) {
            ptx::Wgmma<T, 64>::template a_shared<true>(out, rows_at(k_place + group_rows + kk / 4 * ab + kk % 4 * 2),
                                                       transposed_at(c + kk * 128), kk > 0);
          }
          ptx::wgmma_commit();
#pragma unroll
          for (int kk = 0; kk < box / 16; ++kk) {
            ptx::Wgmma<T, 256>::template a_shared<false>(dk, rows_at(v + group_rows + kk * 2), rows_at(c + kk * 2),
                                                         true);
          }
          ptx::wgmma_commit();
          add_scores(v, v + ab);
          ptx::wgmma_commit();
          ptx::wgmma_wait<2>();
          ptx::hold(out);
          if (left <= box) arrive_once(&sh.empty_k);
          // v . (k dc): the state's share of k . dk.
          const uint32_t v_row = (v + group_rows) * 16 + (warp % 4 * 16 + lane % 16) * 128;
#pragma unroll
          for (int y = 0; y < 4; ++y) {
            uint32_t two[4];
            ptx::ldmatrix_x4<false>(two, v_row + (((y * 2 + lane / 16) ^ (lane % 8)) * 16));
#pragma unroll
            for (int z = 0; z < 4; ++z) {
              const float2 pair = unpack<T>(two[z]);
              ptx::fma_in_place(across[z % 2], pair.x, out[y * 8 + z * 2]);
              ptx::fma_in_place(across[z % 2], pair.y, out[y * 8 + z * 2 + 1]);
            }
          }
#pragma unroll
          for (int x = 0; x < 32; ++x) ptx::mul_in_place(out[x], factor[x / 2 % 2]);
          ptx::hold(out);
          ptx::wgmma_fence();
          add_inside(v + ab, true);
          ptx::wgmma_commit();
          ptx::wgmma_wait<2>();  // dc has been read
          release(sh, (ring.used - 1) % ChunkShared::num_stages);
          ptx::wgmma_wait<0>();
          ptx::hold(out);
          release(sh, ring.stage());
          ++ring.used;
          write(left);
        }
      } else {
        arrive_once(&sh.empty_k);
#pragma unroll 1
        for (int left = dv; left > 0; left -= box) {
          wait_for_stage(sh, ring);
          const uint32_t v = uniform_place(sh, ring.stage());
          ptx::wgmma_fence();
          add_inside(v + ab, false);
          ptx::wgmma_commit();
          add_scores(v, v + ab);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::hold(out);
          release(sh, ring.stage());
          ++ring.used;
          write(left);
        }
      }
      ptx::hold(dk);
      ptx::hold(t_diagonal);
      ptx::hold(t_half);
      if (warp < 2) ptx::mbarrier_arrive(&sh.empty_late);
      if (group == 0) arrive_once(&sh.p_free);

      // dk: dn, the sums for the gates.
      ptx::mbarrier_wait(&sh.full_late, parity);
      float sums[2] = {0.0f, 0.0f};
      if (has_state) {
        const ChunkShared::Late& late = sh.late();
#pragma unroll
        for (int c = 0; c < 32; ++c) {
          const float2 n = pair_at(late.dn, c * 8 + pos * 2);
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int y = 0; y < 2; ++y) {
              float& x = dk[c * 4 + r * 2 + y];
              ptx::mul_in_place(x, factor[r]);
              ptx::fma_in_place(x, factor[r], y ? n.y : n.x);
            }
          if (c % 8 == 7) ptx::keep_order();
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float sum = quad_sum(across[r]) + late.k_dn[group * box + row_in_block + r * 8];
          sums[r] = factor[r] == 0.0f ? 0.0f : factor[r] * sum;
        }
      }
      float* const shares =
          args.w.k_dk + static_cast<int64_t>(tile.tile.item) * chunk_tokens + group * box + row_in_block;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (pos == 0) shares[r * 8] = sums[r];
      }
    }

    // P2 q
    const auto add_inside = [&](uint32_t p, uint32_t q) {
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        ptx::Wgmma<T, 256>::template a_shared<true>(dk, rows_at(p + kk * 2), transposed_at(q + kk * 128), true);
      }
    };
    wait_for_stage(sh, ring);
    const int late = ring.stage();
    ++ring.used;
    wait_for_stage(sh, ring);
    const int early = ring.stage();
    ++ring.used;
    const uint32_t late_q = uniform_place(sh, late), early_q = uniform_place(sh, early);
    ptx::hold(dk);
    ptx::wgmma_fence();
    add_inside(full_p, late_q);
    if (group == 0) add_inside(diagonal_p, early_q);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(dk);
    release(sh, late);
    release(sh, early);
    if (group == 0) arrive_once(&sh.p_free);
  }
}

template <typename T>
__global__ void __launch_bounds__(output_threads, 1) dk_dv_chunk_kernel(const __grid_constant__ OutputArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  ChunkShared& sh = *reinterpret_cast<ChunkShared*>(shared_bytes);
  if (ptx::shared_address(shared_bytes) % 1024 != 0) asm volatile("trap;");  // so addresses are constants
  const Layout& l = args.w.layout;
  if (threadIdx.x == 0) {
    for (int s = 0; s < ChunkShared::num_stages; ++s) {
      ptx::mbarrier_init(&sh.full[s], 1);
      ptx::mbarrier_init(&sh.empty[s], consumer_warps);
    }
    ptx::mbarrier_init(&sh.full_k, 1);
    ptx::mbarrier_init(&sh.empty_k, consumer_warps + 2);
    // Of what ordinary stores write every thread arrives: racecheck tracks threads.
    ptx::mbarrier_init(&sh.full_tile, 32);
    ptx::mbarrier_init(&sh.full_gates, 2 * 32);
    ptx::mbarrier_init(&sh.empty_gates, consumer_warps * 32);
    ptx::mbarrier_init(&sh.full_late, 2 * 32);
    ptx::mbarrier_init(&sh.empty_late, 2 * 32);
    ptx::mbarrier_init(&sh.p_half, 4);
    ptx::mbarrier_init(&sh.p_free, 4);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_earlier_kernels();

  // Tiles of one chunk's heads go to neighbouring blocks.
  const auto for_tiles = [&](auto&& f) {
    const int heads = static_cast<int>(l.heads), count = static_cast<int>(l.max_chunks) * heads;
    int parity = 0;
    for (int index = blockIdx.x; index < count; index += gridDim.x, parity ^= 1) {
      const int chunk_index = index / heads;
      Chunk chunk;
      if (!l.locate(chunk_index, chunk)) break;
      const Tile tile{.row = static_cast<int>(chunk.row),
                      .first = static_cast<int>(chunk.first),
                      .length = chunk.length,
                      .item = index,
                      .head = index - chunk_index * heads,
                      .index = 0,
                      .has_state = !(chunk.is_last && args.w.ends_empty)};
      f(tile, parity);
    }
    return parity;
  };
  const int warp = __shfl_sync(all_lanes, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= consumer_warps) {
    ptx::fewer_registers<24>();
    if (warp == consumer_warps) {
      if (threadIdx.x % 32 != 0) return;
      ChunkRing ring;
      for_tiles([&](const Tile& tile, int parity) { produce_chunk(args, sh, ring, tile, parity); });
      return;
    }
    if (warp == consumer_warps + 1) {
      const int end = for_tiles([&](const Tile& tile, int parity) { load_tile<T>(args, sh, tile, parity); });
      ptx::mbarrier_wait(&sh.empty_gates, end ^ 1);
      if (threadIdx.x % 32 == 0) sh.tile[end].tile.item = -1;
      ptx::mbarrier_arrive(&sh.full_tile);
    } else if (warp == consumer_warps + 2) {
      for_tiles([&](const Tile& tile, int parity) { load_chunk_gates<false, T>(args, sh, tile, parity); });
    } else {
      for_tiles([&](const Tile& tile, int parity) { load_chunk_gates<true, T>(args, sh, tile, parity); });
    }
  } else {
    ptx::more_registers<240>();
    consume_chunks<T>(args, sh, warp / 4);
  }
}

}  // namespace flash_xlstm::cuda::hopper
