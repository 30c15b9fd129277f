// The sLSTM's backward on Hopper: all tokens, from the last to the first, in one launch (tile.cuh: who owns what). It
// gives dx and the initial state's gradients; dR and db are one product over all tokens afterwards (weights.cu).
//
// R^T is the stationary operand: a block has the rows of its own units' gates, 32 a warp, as k, and all inputs as m. So
// dx stays within the block, and what blocks exchange are float32 parts of dh_{t-1} = R^T dx_t, each sent to the block
// that owns the units; it adds the parts in the order of the blocks. A warp has every m_warps-th m tile (16 inputs) and
// `k_tiles` k tiles: up to 32 fragments in registers, further m tiles in shared memory in fragment order.
//
// A step of a warp:
//   what the forward kept, dh_t   from the warp's own ring, filled by cp.async some steps ahead
//   wait for parts of R^T dx_{t+1}, add and clip them
//   the cell backwards            in registers, where the state's gradient stays
//   dx_t to the block             rounded, transposed by stmatrix, a row of the batch contiguous; the block's barrier
//   R^T dx_t                      parts to their owners: asynchronous stores that count on the receiver's barrier
//                                 (a cluster), or plain ones and the block's barrier
//   dx_t to memory                off the path
//
// Parts and dx are double-buffered. A block sends parts for step s + 2 once it has all parts for step s + 1, and every
// warp that sent those had passed the barrier of its block behind the reading of the parts for step s. Barriers are
// rearmed as in the forward.
#include "cuda/slstm/hopper/hopper.h"
#include "cuda/slstm/hopper/tile.cuh"

namespace flash_xlstm::cuda::slstm_hopper {
namespace {

constexpr int plane_bytes = rows_a_tile * units_a_group * 4;  // of one kept value: 8 rows x 8 units
constexpr int dh_offset = slstm_kept * plane_bytes, ring_bytes = dh_offset + rows_a_tile * units_a_group * 2;

// A warp's share of R^T: m_tiles (and g.extra more) x k_tiles; `k_parts` warps share an m tile.
template <int m_tiles, int k_tiles, int k_parts, int n_tiles, bool m_extra>
struct Layout {
  static constexpr int stages = n_tiles == 1 ? 5 : n_tiles == 2 ? 4 : 3;
  static constexpr int rows = n_tiles * rows_a_tile;

  __host__ __device__ static int dx_pitch(const Geometry& g) { return 32 * g.warps + 8; }  // elements
  __host__ __device__ static int dx_bytes(const Geometry& g) { return rows * dx_pitch(g) * 2; }
  __host__ __device__ static int sources(const Geometry& g) { return g.cluster * k_parts; }
  // Of one buffer: [source][pair of groups][n tile] fragments.
  __host__ __device__ static int parts_bytes(const Geometry& g) {
    return sources(g) * (g.warps / 2) * n_tiles * fragment_bytes;
  }
  __host__ __device__ static int parts_offset(const Geometry& g) { return header_bytes + 2 * dx_bytes(g); }
  __host__ __device__ static int ring_offset(const Geometry& g) { return parts_offset(g) + 2 * parts_bytes(g); }
  __host__ __device__ static int weights_offset(const Geometry& g) {
    return ring_offset(g) + g.warps * stages * n_tiles * ring_bytes;
  }
  __host__ __device__ static int total(const Geometry& g) {
    return weights_offset(g) + g.warps * g.extra * k_tiles * fragment_bytes;
  }
};

// The fragment of inputs [16 m_tile, + 16) and of the block's local gate rows [16 k_tile, + 16): row r of the block is
// unit r % 8 of gate r / 8 % 4 of group r / 32.
template <typename T, typename W>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const SlstmProblem& p, int64_t head, int first_group,
                                             int m_tile, int k_tile) {
  const int lane = threadIdx.x % 32;
  const W* weights = static_cast<const W*>(p.weights);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t in = m_tile * 16 + r % 2 * 8 + lane / 4;
    const int row = k_tile * 16 + r / 2 * 8 + lane % 4 * 2;
    const int64_t gate = row / 8 % 4, out = (first_group + row / 32) * units_a_group + row % 8;
    const W* from = weights + ((gate * p.heads + head) * p.dim + out) * p.dim + in;
    a[r] = in < p.dim && out < p.dim ? pack<T>(to_float(from[0]), to_float(from[p.dim])) : 0u;
  }
}

template <typename T, int m_tiles, int k_tiles, int k_parts, int n_tiles, bool m_extra>
__global__ void __launch_bounds__(max_warps * 32, 1)
    backward_kernel(const __grid_constant__ SlstmBackward params, const __grid_constant__ Geometry g) {
  using Shared = Layout<m_tiles, k_tiles, k_parts, n_tiles, m_extra>;
  constexpr int stages = Shared::stages, rows = Shared::rows;
  constexpr int chains = m_tiles * n_tiles >= 4 ? 1 : m_tiles * n_tiles >= 2 ? 2 : 4;  // along k, to hide latency
  extern __shared__ uint4 shared[];
  char* base = reinterpret_cast<char*>(shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(base);
  SlstmRow* row_table = reinterpret_cast<SlstmRow*>(base + rows_offset);
  T* dx_buffers = reinterpret_cast<T*>(base + header_bytes);
  const int dx_pitch = Shared::dx_pitch(g), sources = Shared::sources(g), parts_bytes = Shared::parts_bytes(g);
  const int pairs = g.warps / 2;  // of groups, a block

  const SlstmProblem& p = params.p;
  const bool alone = g.cluster == 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rank = alone ? 0 : ptx::cluster_rank();
  const int64_t tile = blockIdx.x / g.cluster, head = tile % p.heads, first_row = tile / p.heads * rows;
  const int first_group = rank * g.warps, group = first_group + warp;
  const bool active = group < g.groups;  // of the cell; every warp takes part in the product
  const int64_t unit = group * units_a_group + lane / 4;
  const int m_warps = g.warps / k_parts, m_first = warp % m_warps, k_part = warp / m_warps;
  const int m_count = (g.groups + 1) / 2;
  const uint32_t step_bytes = sources * ((min(g.warps, g.groups - first_group) + 1) / 2) * n_tiles * fragment_bytes;

  // --- start: rows, barriers, R^T
  if (threadIdx.x < rows) row_table[threadIdx.x] = slstm_row(p, first_row + threadIdx.x);
  for (int x = threadIdx.x; x < 2 * rows * dx_pitch; x += blockDim.x) dx_buffers[x] = from_float<T>(0.0f);
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      ptx::mbarrier_init(&full[b], 1);
      ptx::mbarrier_arrive_expect(&full[b], step_bytes);
    }
    ptx::fence_barrier_init();
  }
  uint32_t weights[m_tiles][k_tiles][4];
  char* extra_weights = base + Shared::weights_offset(g) + warp * g.extra * k_tiles * fragment_bytes + lane * 16;
  const auto load_all = [&](auto zero) {
    using W = decltype(zero);
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int k = 0; k < k_tiles; ++k) {
        load_weights<T, W>(weights[m][k], p, head, first_group, m * m_warps + m_first, k_part * k_tiles + k);
      }
    }
    for (int x = 0; m_extra && x < g.extra * k_tiles; ++x) {
      uint32_t a[4];
      load_weights<T, W>(a, p, head, first_group, (m_tiles + x / k_tiles) * m_warps + m_first,
                         k_part * k_tiles + x % k_tiles);
      *reinterpret_cast<uint4*>(extra_weights + x * fragment_bytes) = make_uint4(a[0], a[1], a[2], a[3]);
    }
  };
  if (p.weight_dtype == DType::float32)
    load_all(float{});
  else
    load_all(T{});
  if (alone)
    __syncthreads();
  else
    ptx::cluster_barrier();

  int longest = 0;
  for (int r = 0; r < rows; ++r) longest = max(longest, static_cast<int>(row_table[r].length));

  // --- this thread's part of the cell: unit lane / 4, rows 2 quad and the next
  SlstmUnitGradient grad[n_tiles][2];
  int length[n_tiles][2];
  const auto kept_at = [&](const SlstmRow& at, int64_t t) {
    return params.kept + ((at.batch * p.seq + at.start + t) * p.heads + head) * slstm_kept * p.dim;
  };
  if (active) {
#pragma unroll
    for (int nt = 0; nt < n_tiles; ++nt) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int local = nt * rows_a_tile + 2 * quad + j;
        const int64_t row = first_row + local;
        const SlstmRow at = row_table[local];
        length[nt][j] = static_cast<int>(at.length);
        const float c =
            at.length > 0 ? kept_at(at, at.length - 1)[kept_c * p.dim + unit] : initial(p.c0, p, row, head, unit);
        const float n =
            at.length > 0 ? kept_at(at, at.length - 1)[kept_n * p.dim + unit] : initial(p.n0, p, row, head, unit);
        SlstmUnitGradient& to = grad[nt][j];
        to.dh = initial(params.dh_last, p, row, head, unit);
        to.dc = initial(params.dc_last, p, row, head, unit);
        to.dn = initial(params.dn_last, p, row, head, unit);
        to.excess = initial(params.dm_last, p, row, head, unit) - (to.dc * c + to.dn * n);
      }
    }
  }

  // Step s takes token longest - 1 - s. Into stage s % stages: what was kept of it and dh. c and n of the token before
  // are the next stage's; before the first token they are the initial state.
  char* ring = base + Shared::ring_offset(g) + warp * stages * n_tiles * ring_bytes;
  const auto prefetch = [&](int s) {
    const int t = longest - 1 - s;
#pragma unroll
    for (int nt = 0; active && nt < n_tiles; ++nt) {
      char* to = ring + (s % stages * n_tiles + nt) * ring_bytes;
#pragma unroll
      for (int x = 0; x < 3; ++x) {
        const int chunk = x * 32 + lane, plane = chunk / 16, row = chunk / 2 % 8, half = chunk % 2;
        const SlstmRow& at = row_table[nt * rows_a_tile + row];
        const float* from = params.kept;
        bool there = t >= 0 && t < at.length;
        if (there) {
          from = kept_at(at, t) + plane * p.dim + group * units_a_group + half * 4;
        } else if (t == -1 && plane >= kept_c && p.c0 != nullptr && first_row + nt * rows_a_tile + row < p.rows) {
          there = true;
          from = (plane == kept_c ? p.c0 : p.n0) + ((first_row + nt * rows_a_tile + row) * p.heads + head) * p.dim +
                 group * units_a_group + half * 4;
        }
        ptx::cp_async_16(to + chunk * 16, from, there ? 16 : 0);
      }
      if (lane < rows_a_tile) {
        const SlstmRow& at = row_table[nt * rows_a_tile + lane];
        const bool there = params.dh != nullptr && t >= 0 && t < at.length;
        const T* from = static_cast<const T*>(params.dh) + at.batch * params.dh_batch + (at.start + t) * params.dh_seq +
                        head * params.dh_head + group * units_a_group;
        ptx::cp_async_16(to + dh_offset + lane * 16, there ? static_cast<const void*>(from) : params.kept,
                         there ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  };

  // Adds the parts of R^T dx that the other warps and blocks sent for step s.
  const auto add_parts = [&](int s) {
    if (!alone) {
      ptx::mbarrier_wait_cluster(&full[s % 2], ((s - 1) / 2) % 2);
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(&full[s % 2], step_bytes);
    }
    if (!active) return;
    const char* parts = base + Shared::parts_offset(g) + s % 2 * parts_bytes + lane * 16 + warp % 2 * 8;
#pragma unroll
    for (int nt = 0; nt < n_tiles; ++nt) {
      float2 sum = make_float2(0.0f, 0.0f);
      for (int source = 0; source < sources; ++source) {
        const float2 part =
            *reinterpret_cast<const float2*>(parts + ((source * pairs + warp / 2) * n_tiles + nt) * fragment_bytes);
        sum.x += part.x, sum.y += part.y;
      }
      // Of token longest - s, whose gradient this is: nothing where the row had ended.
      if (longest - s < length[nt][0]) grad[nt][0].dh += clip_gradient(sum.x, params.clip);
      if (longest - s < length[nt][1]) grad[nt][1].dh += clip_gradient(sum.y, params.clip);
    }
  };

  const int source = rank * k_parts + k_part;
  // Part `acc` of the inputs of m tile `m_tile`, for step s.
  const auto send = [&](int s, int m_tile, int nt, const float (&acc)[4]) {
    const int owner = m_tile / pairs;
    const int offset = Shared::parts_offset(g) + s % 2 * parts_bytes +
                       ((source * pairs + m_tile % pairs) * n_tiles + nt) * fragment_bytes + lane * 16;
    if (alone) {
      *reinterpret_cast<float4*>(base + offset) = make_float4(acc[0], acc[1], acc[2], acc[3]);
      return;
    }
    ptx::store_async(ptx::peer_address(base + offset, owner), ptx::peer_address(&full[s % 2], owner),
                     __float_as_uint(acc[0]), __float_as_uint(acc[1]), __float_as_uint(acc[2]),
                     __float_as_uint(acc[3]));
  };

  for (int s = 0; s < stages - 1; ++s) prefetch(s);
#pragma unroll 1
  for (int s = 0; s < longest; ++s) {
    const int t = longest - 1 - s;
    __syncwarp();  // the stage that is filled now was read by other lanes
    prefetch(s + stages - 1);
    ptx::cp_async_wait<stages - 2>();  // stages s and s + 1
    __syncwarp();
    if (s > 0) add_parts(s);
    T* dx_tile = dx_buffers + s % 2 * rows * dx_pitch;
    if (active) {
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) {
        const char* here = ring + (s % stages * n_tiles + nt) * ring_bytes;
        const char* before = ring + ((s + 1) % stages * n_tiles + nt) * ring_bytes;
        float dx[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = (2 * quad + j) * units_a_group + lane / 4;
          float kept[slstm_kept];
#pragma unroll
          for (int x = 0; x < slstm_kept; ++x) kept[x] = reinterpret_cast<const float*>(here + x * plane_bytes)[at];
          const float c = reinterpret_cast<const float*>(before + kept_c * plane_bytes)[at];
          const float n = reinterpret_cast<const float*>(before + kept_n * plane_bytes)[at];
          // A row that has not begun yet, seen from the end, is as if all of it were padding.
          if (t >= length[nt][j]) kept[kept_forget] = -1.0f;
          grad[nt][j].dh += to_float(reinterpret_cast<const T*>(here + dh_offset)[at]);
          slstm_unit_backward<FastMath>(kept, c, n, grad[nt][j], dx[j]);
        }
        T* to = dx_tile + (nt * rows_a_tile + lane % 8) * dx_pitch + warp * 32 + lane / 8 * 8;
        ptx::stmatrix_x4_transposed(to, pack<T>(dx[0][0], dx[1][0]), pack<T>(dx[0][1], dx[1][1]),
                                    pack<T>(dx[0][2], dx[1][2]), pack<T>(dx[0][3], dx[1][3]));
      }
    }
    __syncthreads();

    float acc[chains][m_tiles][n_tiles][4] = {};
    const T* b_from = dx_tile + lane % 8 * dx_pitch + k_part * k_tiles * 16 + lane / 8 * 8;
#pragma unroll
    for (int k = 0; k < k_tiles; k += 2) {
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) {
        uint32_t b[4];
        ptx::ldmatrix_x4<false>(b, b_from + nt * rows_a_tile * dx_pitch + k * 16);
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
          mma<T>(acc[k % chains][m][nt], weights[m][k], b[0], b[1]);
          mma<T>(acc[(k + 1) % chains][m][nt], weights[m][k + 1], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
      const int m_tile = m * m_warps + m_first;
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) {
        float sum[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sum[r] = acc[0][m][nt][r];
#pragma unroll
          for (int c = 1; c < chains; ++c) sum[r] += acc[c][m][nt][r];
        }
        if (m_tile < m_count) send(s + 1, m_tile, nt, sum);
      }
    }
    if constexpr (m_extra) {
#pragma unroll 1
      for (int x = 0; x < g.extra; ++x) {
        const int m_tile = (m_tiles + x) * m_warps + m_first;
        if (m_tile >= m_count) break;
        float part[2][n_tiles][4] = {};
#pragma unroll
        for (int k = 0; k < k_tiles; k += 2) {
          uint32_t a[2][4];
          load_16_bytes(a[0], extra_weights + (x * k_tiles + k) * fragment_bytes);
          load_16_bytes(a[1], extra_weights + (x * k_tiles + k + 1) * fragment_bytes);
#pragma unroll
          for (int nt = 0; nt < n_tiles; ++nt) {
            uint32_t b[4];
            ptx::ldmatrix_x4<false>(b, b_from + nt * rows_a_tile * dx_pitch + k * 16);
            mma<T>(part[0][nt], a[0], b[0], b[1]);
            mma<T>(part[1][nt], a[1], b[2], b[3]);
          }
        }
#pragma unroll
        for (int nt = 0; nt < n_tiles; ++nt) {
#pragma unroll
          for (int r = 0; r < 4; ++r) part[0][nt][r] += part[1][nt][r];
          send(s + 1, m_tile, nt, part[0][nt]);
        }
      }
    }
    if (alone) __syncthreads();

    // Gate lane / 8 of row lane % 8, the group's 8 units.
#pragma unroll
    for (int nt = 0; active && nt < n_tiles; ++nt) {
      const SlstmRow& at = row_table[nt * rows_a_tile + lane % 8];
      if (t >= at.length) continue;
      const T* from = dx_tile + (nt * rows_a_tile + lane % 8) * dx_pitch + warp * 32 + lane / 8 * 8;
      T* to = static_cast<T*>(params.dx) +
              (((at.batch * p.seq + at.start + t) * 4 + lane / 8) * p.heads + head) * p.dim + group * units_a_group;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
  }
  if (longest > 0) add_parts(longest);
  ptx::cp_async_wait<0>();

  if (params.dh0 != nullptr && active) {
#pragma unroll
    for (int nt = 0; nt < n_tiles; ++nt) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = first_row + nt * rows_a_tile + 2 * quad + j;
        if (row >= p.rows) continue;
        const int64_t to = (row * p.heads + head) * p.dim + unit;
        const SlstmUnitGradient& from = grad[nt][j];
        params.dh0[to] = from.dh, params.dc0[to] = from.dc, params.dn0[to] = from.dn;
        params.dm0[to] =
            from.excess + from.dc * initial(p.c0, p, row, head, unit) + from.dn * initial(p.n0, p, row, head, unit);
      }
    }
  }
  __syncwarp();
  if (!alone) ptx::cluster_barrier();  // no block leaves while others may store to it
}

// A launch that can serve a problem.
struct Choice {
  void (*kernel)(SlstmBackward, Geometry) = nullptr;
  Geometry g{};
  int n_tiles = 0, shared_bytes = 0;
  int64_t cost = 0;
};

template <int m_tiles, int k_tiles, int k_parts, int n_tiles, bool m_extra>
void consider(Choice& best, const SlstmProblem& p, const Geometry& g) {
  static std::atomic<int> known[16][17];
  auto* kernel = backward_kernel<bf16, m_tiles, k_tiles, k_parts, n_tiles, m_extra>;
  const int bytes = Layout<m_tiles, k_tiles, k_parts, n_tiles, m_extra>::total(g);
  const int active = active_clusters(kernel, g.cluster, 32 * g.warps, bytes, known);
  if (active == 0) return;
  const int64_t cost = launch_cost(p, n_tiles, active);
  if (best.kernel == nullptr || cost < best.cost) best = {kernel, g, n_tiles, bytes, cost};
}

Choice choose(const SlstmBackward& params) {
  const SlstmProblem& p = params.p;
  const bool fits = p.dtype == DType::bfloat16 && p.dim % units_a_group == 0 && p.dim <= 512 && p.seq < (1ll << 30) &&
                    params.dh_batch % 8 == 0 && params.dh_seq % 8 == 0 && params.dh_head % 8 == 0 &&
                    aligned_16(params.dh) && aligned_16(params.dx) && aligned_16(params.kept) && aligned_16(p.c0) &&
                    aligned_16(p.n0);
  Choice best;
  if (!fits) return best;
  Geometry g{};
  g.groups = static_cast<int>(p.dim / units_a_group);
  g.warps = p.dim <= 128 ? 8 : 4;
  g.cluster = (g.groups + g.warps - 1) / g.warps;
  if (p.dim <= 64) {
    consider<1, 8, 2, 1, false>(best, p, g);
    consider<1, 8, 2, 2, false>(best, p, g);
    consider<1, 8, 2, 4, false>(best, p, g);
  } else if (p.dim <= 128) {
    consider<1, 16, 1, 1, false>(best, p, g);
    consider<1, 16, 1, 2, false>(best, p, g);
  } else if (p.dim <= 256) {
    consider<4, 8, 1, 1, false>(best, p, g);
    consider<4, 8, 1, 2, false>(best, p, g);
  } else {
    g.extra = ((g.groups + 1) / 2 + 3) / 4 - 4;
    consider<4, 8, 1, 1, true>(best, p, g);
  }
  return best;
}

}  // namespace

bool serves(const SlstmBackward& params) { return choose(params).kernel != nullptr; }

cudaError_t backward(const SlstmBackward& params, cudaStream_t stream) {
  const Choice best = choose(params);
  if (best.kernel == nullptr) return cudaErrorInvalidConfiguration;
  return launch(best.kernel, params, best.g, params.p.heads * row_tiles(params.p, best.n_tiles), best.shared_bytes,
                stream);
}

}  // namespace flash_xlstm::cuda::slstm_hopper
