// The sLSTM's backward on Hopper: all tokens, from the last to the first, in one launch. It makes dx and the initial
// state's gradients. dR and db are one product over all tokens afterwards (weights.cu). tile.cuh says which warp owns
// what.
//
// R^T is the stationary operand. A block's k are the gates of its own units, 32 a group; its m are all inputs. So dx
// stays within the block. Blocks exchange float32 parts of dh_{t-1} = R^T dx_t: each part goes to the block that owns
// the units, which adds the parts in the order of the blocks. A warp has every m_warps-th m tile (16 inputs) and
// `k_tiles` k tiles: up to 36 fragments in registers, further m tiles in shared memory in fragment order.
//
// A step of a warp:
//   what was kept, and dh_t       from the warp's own ring, which cp.async fills some steps ahead
//   parts of R^T dx_{t+1}         waits for them, adds and clips them
//   the cell backwards            in registers, where the state's gradient stays
//   dx_t to the block             rounded, transposed by stmatrix, a row of the batch contiguous; then __syncthreads
//   R^T dx_t                      parts to their owners: in a cluster by st.async, which completes on the receiver's
//                                 mbarrier; in one block by plain stores and __syncthreads
//   dx_t to memory                off the critical path
//
// At dim 768 a block has 295 KB of R^T. Half of it takes 144 registers a thread of 8 warps, the other half shared
// memory. At dim 512 the registers of 8 warps hold all of it, and shared memory has room for the parts of 32 rows.
//
// float16's range is too small for dx as an operand. So each warp multiplies its group's dx of a row of the batch by a
// power of two that brings the largest to 2^14 and more. Two k tiles are one group; what they add to a product is
// divided by that power in float32. bfloat16 has float32's range and needs no scaling.
//
// Parts and dx are double-buffered. A block sends parts for step s + 2 after it has all parts for step s + 1. Every
// warp that sent those had passed its block's barrier after the parts for step s were read. mbarriers are rearmed as in
// the forward.
#include "cuda/slstm/hopper/hopper.h"
#include "cuda/slstm/hopper/tile.cuh"

namespace flash_xlstm::cuda::slstm_hopper {
namespace {

constexpr int plane_bytes = rows_a_tile * units_a_group * 4;  // of one kept value: 8 rows x 8 units
constexpr int dh_offset = slstm_kept * plane_bytes, ring_bytes = dh_offset + rows_a_tile * units_a_group * 2;
constexpr int max_warps = 8;

// Where the parts of an m tile go: the offset in the owner's parts, and the peer address of the owner's shared memory.
struct Route {
  uint32_t offset, base;
};
constexpr int routes_offset = header_bytes, inverses_offset = routes_offset + 512, dx_offset = inverses_offset + 2048;
static_assert(max_dim / 16 * sizeof(Route) <= inverses_offset - routes_offset);
static_assert(2 * max_warps * 4 * rows_a_tile * sizeof(float) <= dx_offset - inverses_offset);

// A warp's share of R^T: m_tiles in registers and m_extra in shared memory, x k_tiles. `k_parts` warps share an m tile.
template <int m_tiles, int k_tiles, int k_parts, int n_tiles, int m_extra>
struct Layout {
  static constexpr int stages = m_extra > 0 ? 2 : n_tiles == 1 ? 4 : 3;
  static constexpr int rows = n_tiles * rows_a_tile;

  __host__ __device__ static int dx_pitch(const Geometry& g) { return 32 * g.block_groups + 8; }  // elements
  __host__ __device__ static int dx_bytes(const Geometry& g) { return rows * dx_pitch(g) * 2; }
  __host__ __device__ static int sources(const Geometry& g) { return g.cluster * k_parts; }
  // Of one buffer: [source][pair of groups][n tile] fragments.
  __host__ __device__ static int parts_bytes(const Geometry& g) {
    return sources(g) * (g.block_groups / 2) * n_tiles * fragment_bytes;
  }
  __host__ __device__ static int parts_offset(const Geometry& g) { return dx_offset + 2 * dx_bytes(g); }
  __host__ __device__ static int ring_offset(const Geometry& g) { return parts_offset(g) + 2 * parts_bytes(g); }
  __host__ __device__ static int weights_offset(const Geometry& g) {
    return ring_offset(g) + g.block_groups * stages * n_tiles * ring_bytes;
  }
  __host__ __device__ static int total(const Geometry& g) {
    return weights_offset(g) + g.warps * m_extra * k_tiles * fragment_bytes;
  }
};

// The fragment of inputs 16 m_tile and on, and of the block's gate rows 16 k_tile and on. Row r of the block is unit r
// % 8 of gate r / 8 % 4 of group r / 32.
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

// Multiplies a group's dx of rows 2 (lane % 4) and the next by powers of two that bring each row's largest to 2^14 and
// more. Returns the inverses, the same in all lanes of a row.
__device__ __forceinline__ float2 scale(float (&dx)[2][4]) {
  constexpr uint32_t smallest = 15, target = 127 + 14;  // exponents as float32 has them
  uint32_t largest = 0;                                 // of both rows, 16 bits each
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float size = fmaxf(fmaxf(fabsf(dx[j][0]), fabsf(dx[j][1])), fmaxf(fabsf(dx[j][2]), fabsf(dx[j][3])));
    largest |= (__float_as_uint(size) >> 23) << (16 * j);
  }
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    largest = __vmaxu2(largest, __shfl_xor_sync(all_lanes, largest, distance));
  }
  float undo[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t exponent = max(largest >> (16 * j) & 0xffffu, smallest);
    const float factor = __uint_as_float((target + 127 - exponent) << 23);
    undo[j] = __uint_as_float((exponent + 127 - target) << 23);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) dx[j][gate] *= factor;
  }
  return make_float2(undo[0], undo[1]);
}

template <typename T, int m_tiles, int k_tiles, int k_parts, int n_tiles, int cell_tiles, int m_extra>
__global__ void __launch_bounds__(max_warps * 32, 1)
    backward_kernel(const __grid_constant__ SlstmBackward params, const __grid_constant__ Geometry g) {
  using Shared = Layout<m_tiles, k_tiles, k_parts, n_tiles, m_extra>;
  constexpr int stages = Shared::stages, rows = Shared::rows;
  constexpr bool scaled = std::is_same_v<T, half>;
  // m_at_once: m tiles multiplied at a time, whose accumulators fit into registers. chains: along k, to hide latency.
  constexpr int all_tiles = m_tiles + m_extra, at_once = !scaled ? 8 : m_extra > 0 ? 1 : 4 / cell_tiles;
  constexpr int m_at_once = all_tiles * n_tiles > at_once ? std::max(1, at_once / n_tiles) : all_tiles;
  constexpr int chains = scaled || m_at_once * n_tiles >= 4 ? 1 : m_at_once * n_tiles >= 2 ? 2 : 4;
  static_assert(all_tiles % m_at_once == 0 && n_tiles % cell_tiles == 0);
  extern __shared__ uint4 shared[];
  char* base = reinterpret_cast<char*>(shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(base);
  SlstmRow* row_table = reinterpret_cast<SlstmRow*>(base + rows_offset);
  Route* routes = reinterpret_cast<Route*>(base + routes_offset);
  float* inverses = reinterpret_cast<float*>(base + inverses_offset);  // [buffer][group of the block][row]
  T* dx_buffers = reinterpret_cast<T*>(base + dx_offset);
  const int dx_pitch = Shared::dx_pitch(g), sources = Shared::sources(g), parts_bytes = Shared::parts_bytes(g);
  const int pairs = g.block_groups / 2;

  const SlstmProblem& p = params.p;
  const bool alone = g.cluster == 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rank = alone ? 0 : ptx::cluster_rank();
  const int64_t tile = blockIdx.x / g.cluster, head = tile % p.heads, first_row = tile / p.heads * rows;
  const int local_group = warp % g.block_groups, first_group = rank * g.block_groups, group = first_group + local_group;
  const int first_tile = warp / g.block_groups * cell_tiles;
  const bool active = first_tile < n_tiles && group < g.groups;  // in the cell; every warp takes part in the product
  const int64_t unit = group * units_a_group + lane / 4;
  const int m_warps = g.warps / k_parts, m_first = warp % m_warps, k_part = warp / m_warps;
  const int m_count = ceil_div(g.groups, 2);
  const int own_pairs = ceil_div(min(g.block_groups, g.groups - first_group), 2);
  const uint32_t step_bytes = sources * own_pairs * n_tiles * fragment_bytes;

  // --- start: rows, barriers, R^T
  if (threadIdx.x < rows) row_table[threadIdx.x] = slstm_row(p, first_row + threadIdx.x);
  for (int x = threadIdx.x; x < 2 * rows * dx_pitch; x += blockDim.x) dx_buffers[x] = from_float<T>(0.0f);
  for (int x = threadIdx.x; scaled && x < 2 * g.block_groups * rows; x += blockDim.x) inverses[x] = 0.0f;
  for (int m = threadIdx.x; m < m_count; m += blockDim.x) {
    routes[m].offset = m % pairs * n_tiles * fragment_bytes;
    routes[m].base = alone ? 0u : ptx::peer_address(base, m / pairs);
  }
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      ptx::mbarrier_init(&full[b], 1);
      ptx::mbarrier_arrive_expect(&full[b], step_bytes);
    }
    ptx::fence_barrier_init();
  }
  uint32_t weights[m_tiles][k_tiles][4];
  char* extra_weights = base + Shared::weights_offset(g) + warp * m_extra * k_tiles * fragment_bytes + lane * 16;
  const auto load_all = [&](auto zero) {
    using W = decltype(zero);
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int k = 0; k < k_tiles; ++k) {
        load_weights<T, W>(weights[m][k], p, head, first_group, m * m_warps + m_first, k_part * k_tiles + k);
      }
    }
    for (int x = 0; m_extra > 0 && x < m_extra * k_tiles; ++x) {
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

  // --- this thread's part. The cell: unit lane / 4, rows 2 quad and the next. Loads and stores: row lane / 2 % 8 of
  // what was kept, row lane % 8 of dh and dx. Pointers start at the last token and step back.
  SlstmUnitGradient grad[cell_tiles][2];
  float c_now[cell_tiles][2], n_now[cell_tiles][2];
  const float* kept_from[cell_tiles];
  const T* dh_from[cell_tiles];
  T* dx_to[cell_tiles];
  const auto row_length = [&](int nt, int row) {
    return static_cast<int>(row_table[(first_tile + nt) * rows_a_tile + row].length);
  };
  const int width = static_cast<int>(p.heads * p.dim);  // of a token's h; what was kept has 6 widths, dx 4
  const auto before = [&](auto* from, int widths) { return from - static_cast<int64_t>(width) * widths; };
  if (active) {
#pragma unroll
    for (int nt = 0; nt < cell_tiles; ++nt) {
      const int first = (first_tile + nt) * rows_a_tile;
      const auto kept_at = [&](const SlstmRow& at, int64_t t) {
        return params.kept + (at.batch * p.seq + at.start + t) * width * slstm_kept + head * slstm_kept * p.dim;
      };
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int local = first + 2 * quad + j;
        const int64_t row = first_row + local;
        const SlstmRow at = row_table[local];
        const float c =
            at.length > 0 ? kept_at(at, at.length - 1)[kept_c * p.dim + unit] : initial(p.c0, p, row, head, unit);
        const float n =
            at.length > 0 ? kept_at(at, at.length - 1)[kept_n * p.dim + unit] : initial(p.n0, p, row, head, unit);
        SlstmUnitGradient& to = grad[nt][j];
        to.dh = initial(params.dh_last, p, row, head, unit);
        to.dc = initial(params.dc_last, p, row, head, unit);
        to.dn = initial(params.dn_last, p, row, head, unit);
        to.excess = initial(params.dm_last, p, row, head, unit) - (to.dc * c + to.dn * n);
        c_now[nt][j] = c, n_now[nt][j] = n;
      }
      const SlstmRow of_kept = row_table[first + lane / 2 % 8], of_dx = row_table[first + lane % 8];
      const int64_t last = longest - 1;
      kept_from[nt] =
          kept_at(of_kept, last) + lane / 16 * p.dim + static_cast<int64_t>(group) * units_a_group + lane % 2 * 4;
      dh_from[nt] = static_cast<const T*>(params.dh) + of_dx.batch * params.dh_batch +
                    (of_dx.start + last) * params.dh_seq + head * params.dh_head + group * units_a_group;
      dx_to[nt] = static_cast<T*>(params.dx) + (of_dx.batch * p.seq + of_dx.start + last) * 4 * width +
                  (lane / 8 * p.heads + head) * p.dim + group * units_a_group;
    }
  }

  // Step s takes token t = longest - 1 - s. It fills stage s % stages with dh and what was kept of t, except that c and
  // n are those of t - 1, or of the initial state. c and n of t itself are in registers from the step before.
  char* ring = base + Shared::ring_offset(g) + warp * stages * cell_tiles * ring_bytes;
  const auto prefetch = [&](int s) {
    const int t = longest - 1 - s;
#pragma unroll
    for (int nt = 0; active && nt < cell_tiles; ++nt) {
      char* to = ring + (s % stages * cell_tiles + nt) * ring_bytes;
      static_assert(kept_c == 4 && kept_n == 5 && slstm_kept == 6);
#pragma unroll
      for (int x = 0; x < 3; ++x) {  // planes 2 x + lane / 16
        const int at = x < 2 ? t : t - 1;
        const float* from = before(kept_from[nt], x < 2 ? 0 : slstm_kept) + 2 * x * p.dim;
        bool there = at >= 0 && at < row_length(nt, lane / 2 % 8);
        if (x == 2 && at == -1) {
          const int64_t row = first_row + (first_tile + nt) * rows_a_tile + lane / 2 % 8;
          there = p.c0 != nullptr && row < p.rows;
          from = (lane < 16 ? p.c0 : p.n0) + (row * p.heads + head) * p.dim + group * units_a_group + lane % 2 * 4;
        }
        ptx::cp_async_16(to + x * 512 + lane * 16, there ? from : params.kept, there ? 16 : 0);
      }
      if (lane < rows_a_tile) {
        const bool there = params.dh != nullptr && t >= 0 && t < row_length(nt, lane % 8);
        ptx::cp_async_16(to + dh_offset + lane * 16, there ? static_cast<const void*>(dh_from[nt]) : params.kept,
                         there ? 16 : 0);
      }
      kept_from[nt] = before(kept_from[nt], slstm_kept), dh_from[nt] -= params.dh_seq;
    }
    ptx::cp_async_commit();
  };

  // Adds the parts of R^T dx that warps and blocks sent for step s.
  const auto add_parts = [&](int s) {
    if (!alone) {
      ptx::mbarrier_wait_cluster(&full[s % 2], ((s - 1) / 2) % 2);
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(&full[s % 2], step_bytes);
    }
    if (!active) return;
    const char* parts = base + Shared::parts_offset(g) + s % 2 * parts_bytes + lane * 16 + local_group % 2 * 8 +
                        (local_group / 2 * n_tiles + first_tile) * fragment_bytes;
#pragma unroll
    for (int nt = 0; nt < cell_tiles; ++nt) {
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
      for (int source = 0; source < sources; ++source) {
        const float2 part = *reinterpret_cast<const float2*>(parts + (source * pairs * n_tiles + nt) * fragment_bytes);
        sum.x += part.x, sum.y += part.y;
      }
      // The parts come from token longest - s: nothing where the row has no such token.
      if (longest - s < row_length(nt, 2 * quad)) grad[nt][0].dh += clip_gradient(sum.x, params.clip);
      if (longest - s < row_length(nt, 2 * quad + 1)) grad[nt][1].dh += clip_gradient(sum.y, params.clip);
    }
  };

  // Sends `acc`, a part of the inputs of m tile `m_tile`, for step s.
  const int parts_to =
      Shared::parts_offset(g) + (rank * k_parts + k_part) * pairs * n_tiles * fragment_bytes + lane * 16;
  const auto send = [&](int s, int m_tile, int nt, const float (&acc)[4]) {
    const Route route = routes[m_tile];
    const uint32_t offset = parts_to + s % 2 * parts_bytes + route.offset + nt * fragment_bytes;
    if (alone) {
      *reinterpret_cast<float4*>(base + offset) = make_float4(acc[0], acc[1], acc[2], acc[3]);
      return;
    }
    ptx::store_async(route.base + offset, route.base + s % 2 * sizeof(uint64_t), __float_as_uint(acc[0]),
                     __float_as_uint(acc[1]), __float_as_uint(acc[2]), __float_as_uint(acc[3]));
  };

  for (int s = 0; s < stages - 1; ++s) prefetch(s);
#pragma unroll 1
  for (int s = 0; s < longest; ++s) {
    const int t = longest - 1 - s;
    __syncwarp();  // other lanes have read the stage that is refilled
    prefetch(s + stages - 1);
    ptx::cp_async_wait<stages - 1>();
    __syncwarp();
    if (s > 0) add_parts(s);
    T* dx_tile = dx_buffers + s % 2 * rows * dx_pitch;
    float* inverse = inverses + s % 2 * g.block_groups * rows;
    if (active) {
#pragma unroll
      for (int nt = 0; nt < cell_tiles; ++nt) {
        const char* here = ring + (s % stages * cell_tiles + nt) * ring_bytes;
        float dx[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = (2 * quad + j) * units_a_group + lane / 4;
          float kept[slstm_kept];
#pragma unroll
          for (int x = 0; x < slstm_kept; ++x) kept[x] = reinterpret_cast<const float*>(here + x * plane_bytes)[at];
          const float c = kept[kept_c], n = kept[kept_n];
          kept[kept_c] = c_now[nt][j], kept[kept_n] = n_now[nt][j];
          // Past the end of a row the unit is treated as padding.
          if (t >= row_length(nt, 2 * quad + j))
            kept[kept_forget] = -1.0f;
          else
            c_now[nt][j] = c, n_now[nt][j] = n;
          grad[nt][j].dh += to_float(reinterpret_cast<const T*>(here + dh_offset)[at]);
          slstm_unit_backward<FastMath>(kept, c, n, grad[nt][j], dx[j]);
        }
        if constexpr (scaled) {
          const float2 undo = scale(dx);
          if (lane < 4) {
            const int row = (first_tile + nt) * rows_a_tile + 2 * quad;
            *reinterpret_cast<float2*>(inverse + local_group * rows + row) = undo;
          }
        }
        T* to = dx_tile + ((first_tile + nt) * rows_a_tile + lane % 8) * dx_pitch + local_group * 32 + lane / 8 * 8;
        ptx::stmatrix_x4_transposed(to, pack<T>(dx[0][0], dx[1][0]), pack<T>(dx[0][1], dx[1][1]),
                                    pack<T>(dx[0][2], dx[1][2]), pack<T>(dx[0][3], dx[1][3]));
      }
    }
    __syncthreads();

    // The products of two k tiles, which are one group's dx, for 8 rows of the batch.
    const auto multiply = [&](float (&even)[4], float (&odd)[4], const uint32_t (&a0)[4], const uint32_t (&a1)[4],
                              const uint32_t (&b)[4], float2 undo) {
      if constexpr (scaled) {
        float product[4] = {};
        mma<T>(product, a0, b[0], b[1]);
        mma<T>(product, a1, b[2], b[3]);
        even[0] += product[0] * undo.x, even[1] += product[1] * undo.y;
        even[2] += product[2] * undo.x, even[3] += product[3] * undo.y;
      } else {
        mma<T>(even, a0, b[0], b[1]);
        mma<T>(odd, a1, b[2], b[3]);
      }
    };
    const auto undo_of = [&](int k, int nt) {
      if constexpr (!scaled) return float2{};
      const int at = (k_part * k_tiles + k) / 2 * rows + nt * rows_a_tile + 2 * quad;
      return *reinterpret_cast<const float2*>(inverse + at);
    };
    const T* b_from = dx_tile + lane % 8 * dx_pitch + k_part * k_tiles * 16 + lane / 8 * 8;
#pragma unroll
    for (int m_from = 0; m_from < all_tiles; m_from += m_at_once) {
      float acc[chains][m_at_once][n_tiles][4] = {};
#pragma unroll
      for (int k = 0; k < k_tiles; k += 2) {
        uint32_t b[n_tiles][4];
        float2 undo[n_tiles];
#pragma unroll
        for (int nt = 0; nt < n_tiles; ++nt) {
          ptx::ldmatrix_x4<false>(b[nt], b_from + nt * rows_a_tile * dx_pitch + k * 16);
          undo[nt] = undo_of(k, nt);
        }
#pragma unroll
        for (int m = 0; m < m_at_once; ++m) {
          auto& even = acc[k % chains][m];
          auto& odd = acc[(k + 1) % chains][m];
          const int x = m_from + m - m_tiles;
          if (x < 0) {
            const auto& a = weights[m_from + m];
#pragma unroll
            for (int nt = 0; nt < n_tiles; ++nt) multiply(even[nt], odd[nt], a[k], a[k + 1], b[nt], undo[nt]);
          } else {
            uint32_t a[2][4];
            load_16_bytes(a[0], extra_weights + (x * k_tiles + k) * fragment_bytes);
            load_16_bytes(a[1], extra_weights + (x * k_tiles + k + 1) * fragment_bytes);
#pragma unroll
            for (int nt = 0; nt < n_tiles; ++nt) multiply(even[nt], odd[nt], a[0], a[1], b[nt], undo[nt]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < m_at_once; ++m) {
        const int m_tile = (m_from + m) * m_warps + m_first;
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
    }
    if (alone) __syncthreads();

    // Gate lane / 8 of row lane % 8, the group's 8 units.
#pragma unroll
    for (int nt = 0; active && nt < cell_tiles; ++nt) {
      if (t < row_length(nt, lane % 8)) {
        const T* from =
            dx_tile + ((first_tile + nt) * rows_a_tile + lane % 8) * dx_pitch + local_group * 32 + lane / 8 * 8;
        uint32_t word[4];
        load_16_bytes(word, from);
        if constexpr (scaled) {
          const float undo = inverse[local_group * rows + (first_tile + nt) * rows_a_tile + lane % 8];
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float2 pair = unpack<T>(word[x]);
            word[x] = pack<T>(pair.x * undo, pair.y * undo);
          }
        }
        *reinterpret_cast<uint4*>(dx_to[nt]) = make_uint4(word[0], word[1], word[2], word[3]);
      }
      dx_to[nt] = before(dx_to[nt], 4);
    }
  }
  if (longest > 0) add_parts(longest);
  ptx::cp_async_wait<0>();

  if (params.dh0 != nullptr && active) {
#pragma unroll
    for (int nt = 0; nt < cell_tiles; ++nt) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = first_row + (first_tile + nt) * rows_a_tile + 2 * quad + j;
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

// A launch that serves a problem; kernel == nullptr: none.
struct Choice {
  void (*kernel)(SlstmBackward, Geometry) = nullptr;
  Geometry g{};
  int n_tiles = 0, shared_bytes = 0;
  int64_t cost = 0;
};

template <typename T, int m_tiles, int k_tiles, int k_parts, int n_tiles, int cell_tiles, int m_extra>
void consider(Choice& best, const SlstmProblem& p, const Geometry& g) {
  static KnownClusters known;
  auto* kernel = backward_kernel<T, m_tiles, k_tiles, k_parts, n_tiles, cell_tiles, m_extra>;
  const int bytes = Layout<m_tiles, k_tiles, k_parts, n_tiles, m_extra>::total(g);
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
  const auto spread = [&](int block_groups, int warps) {
    g.block_groups = block_groups, g.warps = warps;
    g.cluster = ceil_div(g.groups, block_groups);
  };
  if (p.dim <= 64) {
    spread(8, 8);
    consider<T, 1, 8, 2, 1, 1, 0>(best, p, g);
    consider<T, 1, 8, 2, 2, 2, 0>(best, p, g);
    consider<T, 1, 8, 2, 4, 4, 0>(best, p, g);
  } else if (p.dim <= 128) {
    spread(8, 8);
    consider<T, 1, 16, 1, 1, 1, 0>(best, p, g);
    consider<T, 1, 16, 1, 2, 2, 0>(best, p, g);
  } else if (p.dim <= 256) {
    spread(4, 4);
    consider<T, 4, 8, 1, 1, 1, 0>(best, p, g);
    consider<T, 4, 8, 1, 2, 2, 0>(best, p, g);
  } else if (p.dim <= 512) {
    spread(4, 8);
    consider<T, 4, 8, 1, 1, 1, 0>(best, p, g);
    consider<T, 4, 8, 1, 2, 1, 0>(best, p, g);
    if constexpr (!std::is_same_v<T, half>) consider<T, 4, 8, 1, 4, 2, 0>(best, p, g);
  } else {
    spread(6, 8);
    consider<T, 3, 12, 1, 1, 1, 3>(best, p, g);
  }
  return best;
}

Choice choose(const SlstmBackward& params) {
  const SlstmProblem& p = params.p;
  const bool fits = p.dtype != DType::float32 && p.dim % units_a_group == 0 && p.dim <= max_dim &&
                    p.seq < (1ll << 30) && p.heads * p.dim < (1ll << 28) && params.dh_batch % 8 == 0 &&
                    params.dh_seq % 8 == 0 && params.dh_head % 8 == 0 && aligned_16(params.dh) &&
                    aligned_16(params.dx) && aligned_16(params.kept) && aligned_16(p.c0) && aligned_16(p.n0);
  if (!fits) return {};
  return p.dtype == DType::bfloat16 ? choose<bf16>(p) : choose<half>(p);
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
