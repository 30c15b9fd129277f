// dk and dv of a chunk in one tile: bfloat16, dqk up to 256. outputs.cuh has the formulas.
//
// dk and dv read the same panels of v, dh and dc. Here each is loaded once. After T1 = k q^T and P1 come, for every 64
// columns x of dv,
//   T2 += v_x dh_x^T,  dk += v_x dc_x^T,  dv_x = w (k dc_x) + P1 dh_x, written out at once,
// and behind them P2 and dk = w (dk + dn) + P2 q. Only q is loaded twice.
//
// A tile's stages, 32 KiB each, four in the ring:
//   q, columns 0-127; q, columns 128-255
//   for each x: v_x and dh_x, then dc_x (not where it is zero)
//   q, tokens 64-127; q, tokens 0-63
// k stays in a place of its own until the sums k . dk are made.
//
// Two warpgroups of 64 rows each. A thread's accumulators are 128 of dk, 32 of dv_x and 48 of T2: the 64 x 64 block on
// the diagonal, and half of the full block, which belongs to the rows of group 0. Group 1 makes its columns 96-127 and
// leaves P2 of them in shared memory. All of P is there: registers are too few.
//
// Shared memory: ring 128 KiB, k 64, P 24 (P1, then P2: three blocks of 64 x 64), rows on their way out 8, gates 2.
// A tile at dv 512: 25,600 clocks of the tensor pipes; 704 KiB in, 192 out.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/hopper/output_epilogue.cuh"
#include "cuda/mlstm/hopper/output_state.cuh"

namespace flash_xlstm::cuda::hopper {

struct ChunkShared {
  static constexpr int num_stages = 4, panels_k = 4;
  alignas(1024) unsigned char stage[num_stages][2 * ab_bytes];
  unsigned char k[panels_k][ab_bytes];
  unsigned char p[3][box_bytes];            // rows 0-63: columns 0-63, 64-127; rows 64-127: columns 64-127
  unsigned char own[consumer_warps][1024];  // of each warp: 16 rows x 32 columns to memory. Of a group's first: dn
  float2 col_log[chunk_tokens];
  float col_inv_d[chunk_tokens], col_delta[chunk_tokens];
  uint64_t full[num_stages], empty[num_stages];
  uint64_t full_k, empty_k, full_gates, empty_gates;
  uint64_t p1_done, p2_half;  // group 0 has read P1; group 1 has written its half of P2's full block
};
static_assert(sizeof(ChunkShared) <= 232448);

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
  const auto load_box = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col, int from) {
    ptx::tma_load(to, &map, full, col, tile.head, from, tile.row);
  };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col) {  // 128 tokens x 64
    load_box(to, map, full, col, token);
    load_box(to + box_bytes, map, full, col, token + box);
  };
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage();
    for (int y = 0; y < 2; ++y) load_rows(to + y * ab_bytes, maps.q, &sh.full[ring.stage()], (half * 2 + y) * box);
    ++ring.used;
  }
  ptx::mbarrier_wait(&sh.empty_k, parity ^ 1);
  ptx::mbarrier_arrive_expect(&sh.full_k, ChunkShared::panels_k * ab_bytes);
  for (int y = 0; y < ChunkShared::panels_k; ++y) load_rows(sh.k[y], maps.k, &sh.full_k, y * box);
  const int dv = static_cast<int>(w.p.dv);
  for (int x = 0; x * box < dv; ++x) {
    unsigned char* to = begin_stage();
    load_rows(to, maps.v, &sh.full[ring.stage()], x * box);
    load_rows(to + ab_bytes, maps.dh, &sh.full[ring.stage()], x * box);
    ++ring.used;
    if (!tile.has_state) continue;
    to = begin_stage();
    for (int y = 0; y < ChunkShared::panels_k; ++y) {
      ptx::tma_load(to + y * box_bytes, &maps.c, &sh.full[ring.stage()], 0, w.block_index(y, x) * box, tile.item);
    }
    ++ring.used;
  }
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage();
    for (int y = 0; y < ChunkShared::panels_k; ++y) {
      load_box(to + y * box_bytes, maps.q, &sh.full[ring.stage()], y * box, token + Roles<Output::dk>::half_begin(half));
    }
    ++ring.used;
  }
}

// A warp: alpha, 1 / d and delta of the tile's tokens.
__device__ __forceinline__ void load_chunk_gates(const OutputArgs& args, ChunkShared& sh, const Tile& tile,
                                                 int parity) {
  const Work& w = args.w;
  const int64_t item = static_cast<int64_t>(tile.item) * chunk_tokens;
  ptx::mbarrier_wait(&sh.empty_gates, parity ^ 1);
#pragma unroll
  for (int x = threadIdx.x % 32; x < chunk_tokens; x += 32) {
    sh.col_log[x] = w.alpha[item + x];
    sh.col_inv_d[x] = w.p.scale * w.inv_d[item + x], sh.col_delta[x] = w.p.scale * w.delta[item + x];
  }
  arrive_once(&sh.full_gates);
}

// Writes 16 rows a warp, 32 columns at a time through shared memory, 16 bytes a lane. `to`: of the row lane / 4, at
// column lane % 4 * 8. rows, columns: how many there are. token: elements from a row to the next.
template <typename T, int count>
__device__ __forceinline__ void store_rows(const ChunkShared& sh, int warp, const float (&out)[count], T* to,
                                           int64_t token, int rows, int columns, uint32_t& odd) {
  const int lane = lane_again();
  unsigned char* const part = const_cast<unsigned char*>(sh.own[warp]);
  // The 16-byte pieces of neighbouring rows lie in different banks.
  const auto part_at = [&](int row, int chunk16) { return part + row * 64 + (chunk16 ^ (row / 2 % 4)) * 16; };
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
      ptx::stmatrix_x4(part_at(lane % 16, y * 2 + lane / 16), two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
    const bool has_columns = x * 32 + lane % 4 * 8 < columns;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      if (y * 8 + lane / 4 < rows && has_columns) {
        __stcs(reinterpret_cast<uint4*>(to + y * 8 * token + x * 32),
               *reinterpret_cast<const uint4*>(part_at(y * 8 + lane / 4, lane % 4)));
      }
    }
  }
}

// T becomes P, in place. 8 `groups` columns from `begin` on. is_dk: P2, else P1. to_diagonal: as in Scores.
template <bool is_dk, bool masked, int groups>
__device__ __forceinline__ void weigh_chunk(const Gates<Output::dk>& gates, int pos, int begin, int to_diagonal,
                                            float (&t)[groups * 4]) {
  float2 cols_inv_d{}, cols_delta{};
  gates.for_decays<groups>(pos, begin, [&](int c, int r, int y, float d) {
    float& x = t[c * 4 + r * 2 + y];
    if (r == 0 && y == 0) {
      cols_inv_d = pair_at(gates.col_inv_d, begin + c * 8 + pos * 2);
      if constexpr (is_dk) cols_delta = pair_at(gates.col_delta, begin + c * 8 + pos * 2);
    }
    float value = x * (y ? cols_inv_d.y : cols_inv_d.x);
    if constexpr (is_dk) value += y ? cols_delta.y : cols_delta.x;
    value *= d;
    if (masked && to_diagonal + r * 8 - c * 8 - y > 0) value = 0.0f;
    x = value;
  });
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

template <int group, typename T>
__device__ __forceinline__ void make_rows(const OutputArgs& args, ChunkShared& sh, ChunkRing& ring, const Tile& tile,
                                          int parity) {
  constexpr int diagonal = group * box, half = box + group * 32;  // T2's blocks: first columns
  const Work& w = args.w;
  const ThreadPlace<Output::dk, 256, false> me(args, tile);
  const int lane = me.lane, first_row = group * box + me.warp % 4 * 16, dv = static_cast<int>(w.p.dv);
  const int to_diagonal = me.warp % 4 * 16 + me.quad - me.pos * 2;
  const auto row = [&](int r) { return first_row + me.quad + r * 8; };
  const auto group_barrier = [] { ptx::named_barrier(1 + group, 128); };
  Gates<Output::dk> gates;
  gates.col_logs = sh.col_log, gates.col_inv_d = sh.col_inv_d, gates.col_delta = sh.col_delta;
  gates.alpha_last = w.alpha_last[tile.item];
#pragma unroll
  for (int r = 0; r < 2; ++r) gates.row_log[r] = w.beta[me.item + row(r)];
  gates.set_state_factor();
  const float factor[2] = {gates.state_factor[0], gates.state_factor[1]};
  const int64_t first_token = tile.row * w.layout.seq + tile.first + first_row + lane / 4;  // may be none
  const int rows = tile.length - first_row;
  const auto block_of = [&](int x) { return ptx::shared_address(sh.p[x]); };

  {  // T1, P1
    float t_diagonal[32], t_full[32];  // group 1 leaves the latter
#pragma unroll
    for (int x = 0; x < 32; ++x) t_diagonal[x] = t_full[x] = 0.0f;
    ptx::mbarrier_wait(&sh.full_k, parity);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      wait_for_stage(sh, ring);
      ptx::wgmma_fence();
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const uint32_t k = ptx::shared_address(sh.k[x * 2 + y]) + group * box_bytes;
        const uint32_t q = stage_address(sh, ring.stage()) + y * ab_bytes;
#pragma unroll
        for (int kk = 0; kk < box / 16; ++kk) {
          const uint64_t a = ptx::wgmma_descriptor(k + kk * 32);
          ptx::Wgmma<T, 64>::template a_shared<false>(
              t_diagonal, a, ptx::wgmma_descriptor(q + group * box_bytes + kk * 32), true);
          if constexpr (group == 0) {
            ptx::Wgmma<T, 64>::template a_shared<false>(t_full, a, ptx::wgmma_descriptor(q + box_bytes + kk * 32),
                                                        true);
          }
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      release(sh, ring.stage());
      ++ring.used;
    }
    ptx::hold(t_diagonal);
    ptx::hold(t_full);
    ptx::mbarrier_wait(&sh.full_gates, parity);
    weigh_chunk<false, true, 8>(gates, me.pos, diagonal, to_diagonal, t_diagonal);
    if constexpr (group == 0) weigh_chunk<false, false, 8>(gates, me.pos, box, 0, t_full);
    group_barrier();  // all warps' products with the last P2 are done
    put_p<T, 8>(sh.p[group * 2], 0, t_diagonal);
    if constexpr (group == 0) put_p<T, 8>(sh.p[1], 0, t_full);
    ptx::fence_async_shared();
    group_barrier();
  }

  uint32_t odd_dv = 0, odd_dk = 0;
  float dk[128], t_diagonal[32], t_half[16];
#pragma unroll
  for (int x = 0; x < 128; ++x) dk[x] = 0.0f;
#pragma unroll
  for (int x = 0; x < 32; ++x) t_diagonal[x] = 0.0f;
#pragma unroll
  for (int x = 0; x < 16; ++x) t_half[x] = 0.0f;
  {
    float out[32];
    T* to = out_row<Output::dv, T>(args, tile, first_token, dv) + lane % 4 * 8;
    const auto clear = [&] {
#pragma unroll
      for (int x = 0; x < 32; ++x) out[x] = 0.0f;
    };
    const auto add_scores = [&](uint32_t v) {  // T2
#pragma unroll
      for (int kk = 0; kk < box / 16; ++kk) {
        const uint32_t dh = v + ab_bytes + kk * 32;
        ptx::Wgmma<T, 64>::template a_shared<false>(t_diagonal,
                                                    ptx::wgmma_descriptor(v + group * box_bytes + kk * 32),
                                                    ptx::wgmma_descriptor(dh + group * box_bytes), true);
        ptx::Wgmma<T, 32>::template a_shared<false>(t_half, ptx::wgmma_descriptor(v + kk * 32),
                                                    ptx::wgmma_descriptor(dh + half * 128), true);
      }
    };
    const auto add_inside = [&](uint32_t dh) {  // P1 dh_x
#pragma unroll
      for (int b = group; b < 2; ++b) {  // columns 64 b ..
#pragma unroll
        for (int kk = 0; kk < box / 16; ++kk) {
          ptx::Wgmma<T, 64>::template a_shared<true>(
              out, ptx::wgmma_descriptor(block_of(group + b) + kk * 32),
              ptx::wgmma_descriptor(dh + b * box_bytes + kk * 2048, box_bytes), true);
        }
      }
    };
    const auto write = [&](int left) {
      store_rows<T>(sh, me.warp, out, to, args.dv_token, rows, left, odd_dv);
      to += box;
    };
    if (tile.has_state) {
#pragma unroll 1
      for (int left = dv; left > 0; left -= box) {
        wait_for_stage(sh, ring);
        const uint32_t v = stage_address(sh, ring.stage());
        ++ring.used;
        wait_for_stage(sh, ring);
        const uint32_t c = stage_address(sh, ring.stage());
        clear();
        ptx::hold(out);
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < ChunkShared::panels_k * box / 16; ++kk) {
          const uint32_t k = ptx::shared_address(sh.k[kk / 4]) + group * box_bytes + kk % 4 * 32;
          ptx::Wgmma<T, 64>::template a_shared<true>(out, ptx::wgmma_descriptor(k),
                                                     ptx::wgmma_descriptor(c + kk * 2048, box_bytes), true);
        }
        ptx::wgmma_commit();
        add_scores(v);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::hold(out);
#pragma unroll
        for (int x = 0; x < 32; ++x) ptx::mul_in_place(out[x], factor[x / 2 % 2]);
        ptx::hold(out);
        ptx::wgmma_fence();
        add_inside(v + ab_bytes);
        ptx::wgmma_commit();
#pragma unroll
        for (int kk = 0; kk < box / 16; ++kk) {
          ptx::Wgmma<T, 256>::template a_shared<false>(dk, ptx::wgmma_descriptor(v + group * box_bytes + kk * 32),
                                                       ptx::wgmma_descriptor(c + kk * 32), true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::hold(out);
        write(left);
        ptx::wgmma_wait<0>();
        release(sh, (ring.used - 1) % ChunkShared::num_stages);
        release(sh, ring.stage());
        ++ring.used;
      }
    } else {
#pragma unroll 1
      for (int left = dv; left > 0; left -= box) {
        const uint32_t v = stage_address(sh, ring.stage());
        wait_for_stage(sh, ring);
        clear();
        ptx::hold(out);
        ptx::wgmma_fence();
        add_inside(v + ab_bytes);
        ptx::wgmma_commit();
        add_scores(v);
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
  }
  if constexpr (group == 0) arrive_once(&sh.p1_done);

  // dk: dn, the sums for the gates, P2 q.
  float across[2] = {0.0f, 0.0f};
  if (tile.has_state) {
    float* const dn = reinterpret_cast<float*>(sh.own[group * 4]);
    group_barrier();  // the first warp's rows are out
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int col = x * 128 + me.thread % 128;
      dn[col] = col < me.columns ? w.n[tile.item * w.layout.dqk + col] : 0.0f;
    }
    group_barrier();
#pragma unroll
    for (int c = 0; c < 32; ++c) {
      const float2 n = pair_at(dn, c * 8 + me.pos * 2);
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
    for (int x = 0; x < 4; x += 2) for_dots_of_stage<T, 2>(me, sh.k[x], x * 8, k_dots(across, dk));
  }
  arrive_once(&sh.empty_k);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(across[r]);
    if (me.pos == 0) w.k_dk[me.item + row(r)] = factor[r] == 0.0f ? 0.0f : sum;
  }

  weigh_chunk<true, true, 8>(gates, me.pos, diagonal, to_diagonal, t_diagonal);
  if constexpr (group == 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) gates.row_log[r] = w.beta[me.item + row(r) - box];
  }
  weigh_chunk<true, false, 4>(gates, me.pos, half, 0, t_half);
  arrive_once(&sh.empty_gates);
  group_barrier();  // all warps' products with P1 are done
  put_p<T, 8>(sh.p[group * 2], 0, t_diagonal);
  if constexpr (group == 1) ptx::mbarrier_wait(&sh.p1_done, parity);
  put_p<T, 4>(sh.p[1], group * 4, t_half);
  ptx::fence_async_shared();
  if constexpr (group == 1) arrive_once(&sh.p2_half);
  group_barrier();

  const auto add_inside = [&](int block, int stage) {
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, 256>::template a_shared<true>(
          dk, ptx::wgmma_descriptor(block_of(block) + kk * 32),
          ptx::wgmma_descriptor(stage_address(sh, stage) + kk * 2048, box_bytes), true);
    }
    ptx::wgmma_commit();
  };
  wait_for_stage(sh, ring);
  const int late = ring.stage();
  ++ring.used;
  wait_for_stage(sh, ring);
  const int early = ring.stage();
  ++ring.used;
  if constexpr (group == 0) ptx::mbarrier_wait(&sh.p2_half, parity);
  ptx::hold(dk);
  ptx::wgmma_fence();
  add_inside(1 + group, late);
  if constexpr (group == 0) add_inside(0, early);
  ptx::wgmma_wait<0>();
  ptx::hold(dk);
  release(sh, late);
  release(sh, early);
  store_rows<T>(sh, me.warp, dk, out_row<Output::dk, T>(args, tile, first_token, me.columns) + lane % 4 * 8,
                args.out_token, rows, me.columns, odd_dk);
  if (__any_sync(all_lanes, (odd_dv & 0x7fff7fffu) != 0)) {
    __syncwarp();
    mend_rows<Output::dv, 1024, T>(args, tile, first_row, float2{}, float2{});
  }
  if (__any_sync(all_lanes, (odd_dk & 0x7fff7fffu) != 0)) {
    __syncwarp();
    mend_rows<Output::dk, 256, T>(args, tile, first_row, float2{}, float2{});
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
    ptx::mbarrier_init(&sh.empty_k, consumer_warps);
    ptx::mbarrier_init(&sh.full_gates, 1);
    ptx::mbarrier_init(&sh.empty_gates, consumer_warps);
    ptx::mbarrier_init(&sh.p1_done, 4);
    ptx::mbarrier_init(&sh.p2_half, 4);
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
  };
  ChunkRing ring;
  const int warp = __shfl_sync(all_lanes, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= consumer_warps) {
    ptx::fewer_registers<24>();
    if (warp == consumer_warps) {
      if (threadIdx.x % 32 != 0) return;
      for_tiles([&](const Tile& tile, int parity) { produce_chunk(args, sh, ring, tile, parity); });
    } else if (warp == consumer_warps + 1) {
      for_tiles([&](const Tile& tile, int parity) { load_chunk_gates(args, sh, tile, parity); });
    }
  } else {
    ptx::more_registers<240>();
    if (warp < consumer_warps / 2) {
      for_tiles([&](const Tile& tile, int parity) { make_rows<0, T>(args, sh, ring, tile, parity); });
    } else {
      for_tiles([&](const Tile& tile, int parity) { make_rows<1, T>(args, sh, ring, tile, parity); });
    }
  }
}

}  // namespace flash_xlstm::cuda::hopper
