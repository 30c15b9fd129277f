// The sLSTM's forward on Hopper: all tokens in one launch. tile.cuh says which warp owns what.
//
// R is the stationary operand of mma.sync m16n8k16. A warp holds the 32 rows of its group's gates as fragments: up to
// 16 k tiles in registers (128 registers), the rest in shared memory in fragment order. The other operand is the
// rounded h_{t-1}. Every block has all of it in shared memory, double-buffered, a row of the batch contiguous.
//
// From dim 264 on two warps share a group, each with half of k. The registers of 8 warps hold all of a block's R up to
// dim 512, those of 12 warps half of it at 768. Each warp sums its half of k for all n tiles. Through shared memory it
// gives the other warp the sums of that warp's cells, and goes on with its own.
//
// A step of a warp:
//   x_t + b                    from the warp's own ring, which cp.async fills some steps ahead (ldmatrix.trans)
//   wait for h_{t-1}           cluster: an mbarrier that counts the bytes of all groups; one block: a named barrier
//   R h_{t-1}                  k in independent chains of accumulators
//   sums of the other half     where two warps share a group: a named barrier of the two
//   the cell                   in registers; c, n, m and the unrounded h stay there
//   h_t to every block         rounded, transposed by movmatrix, 16 bytes (a row's 8 units) a store; in a cluster by
//                              st.async, which completes on the receiver's mbarrier
//   h_t and what is kept       to memory, off the critical path
//
// Two buffers of h are enough. A block writes h_{t+1} over h_{t-1} after it has received all of h_t. Each group of h_t
// was sent by a warp that had read h_{t-1} and had the sums of the other warp of its group. The buffer of sums is
// guarded by the barrier of the two warps. In each block thread 0 rearms the mbarrier before its own warp sends. Nobody
// can send what the rearmed barrier counts before this block has sent.
#include "cuda/slstm/hopper/hopper.h"
#include "cuda/slstm/hopper/tile.cuh"

namespace flash_xlstm::cuda::slstm_hopper {
namespace {

// `halves` warps share a group. With k_extra a warp has as many k tiles in shared memory as in registers.
template <int k_registers, int n_tiles, int halves, bool k_extra>
struct Layout {
  static constexpr int max_warps = k_extra ? 12 : 8;
  static constexpr int stages = k_extra ? 2 : 4;  // of x
  static constexpr int rows = n_tiles * rows_a_tile;
  static constexpr int extra_tiles = k_extra ? k_registers : 0, half_tiles = k_registers + extra_tiles;  // of k, a warp
  // Elements of a row of h. The 16 bytes of padding spread rows over the banks.
  static constexpr int pitch = halves * half_tiles * 16 + 8, h_bytes = rows * pitch * 2;
  static constexpr int x_offset = header_bytes + 2 * h_bytes;
  static constexpr int cell_tiles = n_tiles > halves ? n_tiles / halves : 1;
  static constexpr int x_bytes = cell_tiles * fragment_bytes;  // a warp and stage: 4 gates x 8 rows x 8 units
  static constexpr int sums_bytes = halves == 1 ? 0 : cell_tiles * 2 * fragment_bytes;  // that a warp gives away

  __host__ __device__ static int sums_offset(const Geometry& g) { return x_offset + g.warps * stages * x_bytes; }
  __host__ __device__ static int weights_offset(const Geometry& g) { return sums_offset(g) + g.warps * sums_bytes; }
  __host__ __device__ static int total(const Geometry& g) {
    return weights_offset(g) + g.warps * extra_tiles * 2 * fragment_bytes;
  }
};

// The fragment of gates 2 pair and 2 pair + 1 of a group's 8 units, of k tile `k_tile`.
template <typename T, typename W>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const SlstmProblem& p, int64_t head, int group, int pair,
                                             int k_tile) {
  const int lane = threadIdx.x % 32;
  const W* weights = static_cast<const W*>(p.weights);
  const int64_t unit = group * units_a_group + lane / 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t gate = 2 * pair + r % 2, in = k_tile * 16 + r / 2 * 8 + lane % 4 * 2;
    const W* from = weights + ((gate * p.heads + head) * p.dim + unit) * p.dim + in;
    a[r] = in < p.dim ? pack<T>(to_float(from[0]), to_float(from[1])) : 0u;
  }
}

template <typename T, int k_registers, int n_tiles, int halves, bool k_extra>
__global__ void __launch_bounds__(Layout<k_registers, n_tiles, halves, k_extra>::max_warps * 32, 1)
    forward_kernel(const __grid_constant__ SlstmForward params, const __grid_constant__ Geometry g) {
  using Shared = Layout<k_registers, n_tiles, halves, k_extra>;
  constexpr int stages = Shared::stages, rows = Shared::rows, cell_tiles = Shared::cell_tiles;
  // Independent chains of products for each n tile and pair of gates. 8 in all hide the tensor cores' latency. With 12
  // warps, three a scheduler, 2 nearly do, and more would spill.
  constexpr int chains = k_extra ? 1 : std::max(1, 4 / n_tiles);
  extern __shared__ uint4 shared[];
  char* base = reinterpret_cast<char*>(shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(base);
  SlstmRow* row_table = reinterpret_cast<SlstmRow*>(base + rows_offset);
  T* h_buffers = reinterpret_cast<T*>(base + header_bytes);
  constexpr int pitch = Shared::pitch, extra_tiles = Shared::extra_tiles;

  const SlstmProblem& p = params.p;
  const bool alone = g.cluster == 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rank = alone ? 0 : ptx::cluster_rank();
  const int64_t tile = blockIdx.x / g.cluster, head = tile % p.heads, first_row = tile / p.heads * rows;
  const int local_group = warp % g.block_groups, half = halves == 1 ? 0 : warp / g.block_groups;
  const int group = rank * g.block_groups + local_group;
  const bool active = group < g.groups;
  // The n tiles of this warp's cells are first_tile and on; those of the other half's are other_tile and on.
  const bool has_cells = n_tiles >= halves || half == 0;
  const int first_tile = n_tiles >= halves ? half * cell_tiles : 0, other_tile = (1 - half) * cell_tiles;
  const int first_k = half * Shared::half_tiles;
  const int active_threads = 32 * min(g.warps, g.groups);  // where the block is alone
  const int64_t unit = group * units_a_group + lane / 4;
  const uint32_t step_bytes = g.groups * n_tiles * rows_a_tile * 16;

  // --- start: rows, h_0, barriers, R
  if (threadIdx.x < rows) row_table[threadIdx.x] = slstm_row(p, first_row + threadIdx.x);
  for (int x = threadIdx.x; x < 2 * rows * pitch; x += blockDim.x) {
    const int row = x / pitch, column = x % pitch;
    const bool within = row < rows && column < p.dim;
    h_buffers[x] = from_float<T>(within ? initial(p.h0, p, first_row + row, head, column) : 0.0f);
  }
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      ptx::mbarrier_init(&full[b], 1);
      ptx::mbarrier_arrive_expect(&full[b], step_bytes);
    }
    ptx::fence_barrier_init();
  }
  uint32_t weights[k_registers][2][4];
  char* extra_weights = base + Shared::weights_offset(g) + warp * extra_tiles * 2 * fragment_bytes + lane * 16;
  if (active) {
    const auto load_all = [&](auto zero) {
      using W = decltype(zero);
#pragma unroll
      for (int k = 0; k < k_registers; ++k) {
        load_weights<T, W>(weights[k][0], p, head, group, 0, first_k + k);
        load_weights<T, W>(weights[k][1], p, head, group, 1, first_k + k);
      }
      for (int x = 0; x < 2 * extra_tiles; ++x) {
        uint32_t a[4];
        load_weights<T, W>(a, p, head, group, x % 2, first_k + k_registers + x / 2);
        *reinterpret_cast<uint4*>(extra_weights + x * fragment_bytes) = make_uint4(a[0], a[1], a[2], a[3]);
      }
    };
    if (p.weight_dtype == DType::float32)
      load_all(float{});
    else
      load_all(T{});
  }
  if (alone)
    __syncthreads();
  else
    ptx::cluster_barrier();

  int longest = 0;
  for (int r = 0; r < rows; ++r) longest = max(longest, static_cast<int>(row_table[r].length));

  if (active) {
    // --- this thread's part: rows 2 quad and the next of the cell; row lane % 8, gate lane / 8 of x; row lane / 4 of h
    SlstmUnit state[cell_tiles][2];
    int length[cell_tiles][2];
    const T* x_from[cell_tiles];
    T* h_to[cell_tiles];
    const auto row_length = [&](int nt, int row) {
      return static_cast<int>(row_table[(first_tile + nt) * rows_a_tile + row].length);
    };
#pragma unroll
    for (int nt = 0; nt < cell_tiles; ++nt) {
      const int first = (first_tile + nt) * rows_a_tile;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int local = first + 2 * quad + j;
        const int64_t row = first_row + local;
        length[nt][j] = static_cast<int>(row_table[local].length);
        state[nt][j] = {.h = initial(p.h0, p, row, head, unit),
                        .c = initial(p.c0, p, row, head, unit),
                        .n = initial(p.n0, p, row, head, unit),
                        .m = initial(p.m0, p, row, head, unit)};
      }
      const SlstmRow of_x = row_table[first + lane % 8], of_h = row_table[first + lane / 4];
      x_from[nt] = static_cast<const T*>(params.x) + of_x.batch * params.x_batch + of_x.start * params.x_seq +
                   lane / 8 * params.x_gate + head * params.x_head + group * units_a_group;
      h_to[nt] = static_cast<T*>(params.h) + ((of_h.batch * p.seq + of_h.start) * p.heads + head) * p.dim +
                 group * units_a_group;
    }
    const int width = static_cast<int>(p.heads * p.dim);  // a token's h
    float bias[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      bias[gate] = load_as_float(p.bias, (gate * p.heads + head) * p.dim + unit, p.bias_dtype);
    }
    char* x_ring = base + Shared::x_offset + warp * stages * Shared::x_bytes + lane * 16;
    const auto prefetch = [&](int t) {
#pragma unroll
      for (int nt = 0; has_cells && nt < cell_tiles; ++nt) {
        const bool there = t < row_length(nt, lane % 8);
        ptx::cp_async_16(x_ring + (t % stages * cell_tiles + nt) * fragment_bytes,
                         there ? x_from[nt] : static_cast<const T*>(params.x), there ? 16 : 0);
        x_from[nt] += params.x_seq;
      }
      ptx::cp_async_commit();
    };
    char* sums = base + Shared::sums_offset(g) + lane * 16;
    // This thread sends its row of h to peers quad, quad + 4, ...
    uint32_t peer[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) peer[x] = alone ? 0 : ptx::peer_address(base, min(quad + 4 * x, g.cluster - 1));

    for (int t = 0; t < stages - 1; ++t) prefetch(t);
#pragma unroll 1
    for (int t = 0; t < longest; ++t) {
      __syncwarp();  // other lanes have read the stage that is refilled
      prefetch(t + stages - 1);
      ptx::cp_async_wait<stages - 1>();
      __syncwarp();
      float acc[chains][2][n_tiles][4] = {};  // this warp's n tiles come first
#pragma unroll
      for (int nt = 0; has_cells && nt < cell_tiles; ++nt) {
        uint32_t x[4];
        ptx::ldmatrix_x4<true>(x, x_ring + (t % stages * cell_tiles + nt) * fragment_bytes);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const float2 pair = unpack<T>(x[gate]);
          acc[0][gate / 2][nt][gate % 2 * 2] = pair.x + bias[gate];
          acc[0][gate / 2][nt][gate % 2 * 2 + 1] = pair.y + bias[gate];
        }
      }

      if (!alone && t > 0) {
        ptx::mbarrier_wait_cluster(&full[t % 2], ((t - 1) / 2) % 2);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(&full[t % 2], step_bytes);
      }
      const T* h = h_buffers + (t % 2) * rows * pitch + lane % 8 * pitch + first_k * 16 + lane / 8 * 8;
      const T* h_own = h + first_tile * rows_a_tile * pitch;
      const T* h_other = h + (other_tile - cell_tiles) * rows_a_tile * pitch;
      const auto multiply = [&](int k, const uint32_t (*a)[2][4]) {
#pragma unroll
        for (int nt = 0; nt < n_tiles; ++nt) {
          uint32_t b[4];
          ptx::ldmatrix_x4<false>(b, (nt < cell_tiles ? h_own : h_other) + nt * rows_a_tile * pitch + k * 16);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            mma<T>(acc[k % chains][pair][nt], a[0][pair], b[0], b[1]);
            mma<T>(acc[(k + 1) % chains][pair][nt], a[1][pair], b[2], b[3]);
          }
        }
      };
#pragma unroll
      for (int k = 0; k < k_registers; k += 2) {
        multiply(k, weights + k);
        // Alternates with the registers' tiles, so that loads overlap products.
        if constexpr (k_extra) {
          uint32_t extra[2][2][4];
#pragma unroll
          for (int y = 0; y < 4; ++y) load_16_bytes(extra[y / 2][y % 2], extra_weights + (2 * k + y) * fragment_bytes);
          multiply(k_registers + k, extra);
        }
      }
#pragma unroll
      for (int c = 1; c < chains; ++c) {
#pragma unroll
        for (int x = 0; x < 2 * n_tiles * 4; ++x) acc[0][x / 4 % 2][x / 8][x % 4] += acc[c][x / 4 % 2][x / 8][x % 4];
      }
      if constexpr (halves == 2) {
        const auto place = [&](int of_half, int nt, int pair) {
          const int of_warp = of_half * g.block_groups + local_group;
          return reinterpret_cast<float4*>(sums + of_warp * Shared::sums_bytes + (nt * 2 + pair) * fragment_bytes);
        };
        constexpr int given = n_tiles == 1 ? 0 : cell_tiles;  // the first tile of the other's
#pragma unroll
        for (int x = 0; x < 2 * cell_tiles; ++x) {
          if (n_tiles == 1 && half == 0) break;
          const float (&from)[4] = acc[0][x % 2][given + x / 2];
          *place(half, x / 2, x % 2) = make_float4(from[0], from[1], from[2], from[3]);
        }
        ptx::named_barrier(2 + local_group, 64);
        if (has_cells) {
#pragma unroll
          for (int x = 0; x < 2 * cell_tiles; ++x) {
            const float4 more = *place(1 - half, x / 2, x % 2);
            float (&to)[4] = acc[0][x % 2][x / 2];
            to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
          }
        }
        ptx::named_barrier(2 + local_group, 64);  // both have read the sums
        if (!has_cells) continue;
      }

      SlstmUnitKept kept[cell_tiles][2];
      T* h_next = h_buffers + (t + 1) % 2 * rows * pitch + (first_tile * rows_a_tile + lane / 4) * pitch +
                  group * units_a_group;
#pragma unroll
      for (int nt = 0; nt < cell_tiles; ++nt) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float gates[4];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) gates[gate] = acc[0][gate / 2][nt][gate % 2 * 2 + j];
          const SlstmUnit before = state[nt][j];
          kept[nt][j] = slstm_unit<FastMath>(gates[0], gates[1], gates[2], gates[3], state[nt][j]);
          if (t >= length[nt][j]) state[nt][j] = before;
        }
        // Of row lane / 4: this thread's two units, then all 8 of the group.
        const uint32_t mine = ptx::transpose_8x8(pack<T>(state[nt][0].h, state[nt][1].h));
        uint32_t word[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) word[x] = __shfl_sync(all_lanes, mine, lane - quad + x);
        T* to = h_next + nt * rows_a_tile * pitch;
        if (alone) {
          if (quad == 0) *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
        } else if (t + 1 < longest) {
          const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<char*>(to) - base);
          const uint32_t barrier = (t + 1) % 2 * sizeof(uint64_t);
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            if (quad + 4 * x < g.cluster) {
              ptx::store_async(peer[x] + offset, peer[x] + barrier, word[0], word[1], word[2], word[3]);
            }
          }
        }
        if (quad == 3 && t < row_length(nt, lane / 4)) {
          *reinterpret_cast<uint4*>(h_to[nt]) = make_uint4(word[0], word[1], word[2], word[3]);
        }
        h_to[nt] += width;
      }
      if (alone) ptx::named_barrier(1, active_threads);

      if (params.kept != nullptr) {
#pragma unroll
        for (int nt = 0; nt < cell_tiles; ++nt) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (t >= length[nt][j]) continue;
            const SlstmRow& at = row_table[(first_tile + nt) * rows_a_tile + 2 * quad + j];
            float* to = params.kept + ((at.batch * p.seq + at.start + t) * p.heads + head) * slstm_kept * p.dim + unit;
#pragma unroll
            for (int x = 0; x < slstm_kept; ++x) to[x * p.dim] = kept[nt][j].value[x];
          }
        }
      }
    }

    ptx::cp_async_wait<0>();
    if (params.h_last != nullptr && has_cells) {
#pragma unroll
      for (int nt = 0; nt < cell_tiles; ++nt) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int64_t row = first_row + (first_tile + nt) * rows_a_tile + 2 * quad + j;
          if (row >= p.rows) continue;
          const int64_t to = (row * p.heads + head) * p.dim + unit;
          params.h_last[to] = state[nt][j].h, params.c_last[to] = state[nt][j].c;
          params.n_last[to] = state[nt][j].n, params.m_last[to] = state[nt][j].m;
        }
      }
    }
  }
  __syncwarp();
  if (!alone) ptx::cluster_barrier();  // no block leaves while others may store to it
}

// A launch that serves a problem; kernel == nullptr: none.
struct Choice {
  void (*kernel)(SlstmForward, Geometry) = nullptr;
  Geometry g{};
  int n_tiles = 0, shared_bytes = 0;
  int64_t cost = 0;
};

template <typename T, int k_registers, int n_tiles, int halves, bool k_extra>
void consider(Choice& best, const SlstmProblem& p, const Geometry& g) {
  static KnownClusters known;
  auto* kernel = forward_kernel<T, k_registers, n_tiles, halves, k_extra>;
  const int bytes = Layout<k_registers, n_tiles, halves, k_extra>::total(g);
  const int active = active_clusters(kernel, g.cluster, 32 * g.warps, bytes, known);
  if (active == 0) return;
  const int64_t cost = launch_cost(p, n_tiles, active);
  if (best.kernel == nullptr || cost < best.cost) {
    best = {.kernel = kernel, .g = g, .n_tiles = n_tiles, .shared_bytes = bytes, .cost = cost};
  }
}

template <typename T>
Choice choose(const SlstmProblem& p) {
  Choice best;
  Geometry g{};
  g.groups = static_cast<int>(p.dim / units_a_group);
  const auto spread = [&](int block_groups, int halves) {
    g.block_groups = block_groups, g.warps = halves * block_groups;
    g.cluster = ceil_div(g.groups, block_groups);
  };
  if (p.dim <= 64) {
    spread(std::min(8, g.groups), 1);
    consider<T, 4, 1, 1, false>(best, p, g);
    consider<T, 4, 2, 1, false>(best, p, g);
    consider<T, 4, 4, 1, false>(best, p, g);
  } else if (p.dim <= 128) {
    spread(8, 1);
    consider<T, 8, 1, 1, false>(best, p, g);
    consider<T, 8, 2, 1, false>(best, p, g);
  } else if (p.dim <= 256) {
    spread(4, 1);
    consider<T, 16, 1, 1, false>(best, p, g);
    consider<T, 16, 2, 1, false>(best, p, g);
  } else if (p.dim <= 512) {
    spread(4, 2);
    consider<T, 16, 1, 2, false>(best, p, g);
    consider<T, 16, 2, 2, false>(best, p, g);
    consider<T, 16, 4, 2, false>(best, p, g);
  } else {
    spread(6, 2);
    consider<T, 12, 1, 2, true>(best, p, g);
    consider<T, 12, 2, 2, true>(best, p, g);
  }
  return best;
}

Choice choose(const SlstmForward& params) {
  const SlstmProblem& p = params.p;
  const bool fits = p.dtype != DType::float32 && p.dim % units_a_group == 0 && p.dim <= max_dim &&
                    p.seq < (1ll << 31) && p.heads * p.dim < (1ll << 28) && params.x_batch % 8 == 0 &&
                    params.x_seq % 8 == 0 && params.x_gate % 8 == 0 && params.x_head % 8 == 0 && aligned_16(params.x) &&
                    aligned_16(params.h);
  if (!fits) return {};
  return p.dtype == DType::bfloat16 ? choose<bf16>(p) : choose<half>(p);
}

}  // namespace

bool serves(const SlstmForward& params) { return choose(params).kernel != nullptr; }

cudaError_t forward(const SlstmForward& params, cudaStream_t stream) {
  const Choice best = choose(params);
  if (best.kernel == nullptr) return cudaErrorInvalidConfiguration;
  return launch(best.kernel, params, best.g, params.p.heads * row_tiles(params.p, best.n_tiles), best.shared_bytes,
                stream);
}

}  // namespace flash_xlstm::cuda::slstm_hopper
