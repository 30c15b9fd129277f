// The sLSTM on any GPU. A block takes one head of up to 4 rows through all tokens. It reads R from the L2 cache at
// every token; the rows share the reads. Arithmetic is float32.
//
// Forward: a warp makes the 4 gates of one unit for 4 rows, with its lanes along R's inputs. The 16 sums end up in
// different lanes, and 4 lanes run the cell. h is double-buffered, so a token needs one __syncthreads.
// Backward: threads run the cells of (row, unit). Then warps make dh = R^T dx, an input unit at a time, from a
// transposed copy of R, (heads, in, 4, out). A token needs two __syncthreads.
//
// State and h (forward, 20 floats a unit of dim) or gradients and dx (backward, 32) lie in shared memory where they
// fit, else in the workspace. So dim has no limit.
#include "cuda/common/device.h"
#include "cuda/slstm/cell.cuh"
#include "cuda/slstm/portable.h"
#include "params/slstm.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int block_rows = 4, threads = 512, warps = threads / 32;
constexpr int forward_floats = 5 * block_rows, backward_floats = 8 * block_rows;  // a unit of dim

// sums[o][r] += the lane's part of weights[o] . values[r].
template <typename W, int outputs>
__device__ __forceinline__ void lane_dots(float (&sums)[outputs * block_rows], const W* weights, int64_t output_stride,
                                          const float* values, int64_t length, bool vectors) {
  const int lane = threadIdx.x % 32;
  if (vectors) {
#pragma unroll 1
    for (int64_t k = 4 * lane; k < length; k += 128) {
      float4 v[block_rows];
#pragma unroll
      for (int r = 0; r < block_rows; ++r) v[r] = *reinterpret_cast<const float4*>(values + r * length + k);
#pragma unroll
      for (int o = 0; o < outputs; ++o) {
        const auto w = *reinterpret_cast<const Group<W, 4>*>(weights + o * output_stride + k);
#pragma unroll
        for (int r = 0; r < block_rows; ++r) {
          sums[o * block_rows + r] += to_float(w.value[0]) * v[r].x + to_float(w.value[1]) * v[r].y +
                                      to_float(w.value[2]) * v[r].z + to_float(w.value[3]) * v[r].w;
        }
      }
    }
    return;
  }
  for (int64_t k = lane; k < length; k += 32) {
#pragma unroll
    for (int o = 0; o < outputs; ++o) {
      const float w = to_float(weights[o * output_stride + k]);
#pragma unroll
      for (int r = 0; r < block_rows; ++r) sums[o * block_rows + r] += w * values[r * length + k];
    }
  }
}

// Sums each of `count` values over the warp. Sum j ends up in the 32 / count lanes from j * 32 / count on.
template <int count, int distance = 16, int size>
__device__ __forceinline__ float warp_sums(float (&value)[size]) {
  if constexpr (count > 1) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int j = 0; j < count / 2; ++j) {
      const float mine = upper ? value[j + count / 2] : value[j], other = upper ? value[j] : value[j + count / 2];
      value[j] = mine + __shfl_xor_sync(all_lanes, other, distance);
    }
    return warp_sums<count / 2, distance / 2>(value);
  } else {
    float sum = value[0];
#pragma unroll
    for (int d = distance; d > 0; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
    return sum;
  }
}

// The 4 gates of a unit for 4 rows. `add` of lane l is added to the sum of gate l / 8 and row l / 2 % 4; pairs of lanes
// have the same. Lane l gets the gates of row l % 4.
template <typename W>
__device__ __forceinline__ void unit_gates(float (&gates)[4], const W* weights, int64_t gate_stride, const float* h,
                                           int64_t dim, bool vectors, float add) {
  float sums[4 * block_rows] = {};
  lane_dots<W, 4>(sums, weights, gate_stride, h, dim, vectors);
  const float sum = warp_sums<4 * block_rows>(sums) + add;
  const int row = threadIdx.x % block_rows;
#pragma unroll
  for (int g = 0; g < 4; ++g) gates[g] = __shfl_sync(all_lanes, sum, g * 8 + row * 2);
}

template <typename W>
__global__ void __launch_bounds__(threads)
    forward_kernel(const __grid_constant__ SlstmForward params, float* workspace, bool vectors) {
  extern __shared__ float4 shared[];
  const SlstmProblem& p = params.p;
  const int head = static_cast<int>(blockIdx.x % p.heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = blockIdx.x / p.heads * static_cast<int64_t>(block_rows), dim = p.dim;
  const int64_t plane = block_rows * dim;
  float* h = workspace == nullptr ? reinterpret_cast<float*>(shared) : workspace + blockIdx.x * forward_floats * dim;
  float *c = h + 2 * plane, *n = c + plane, *m = n + plane;

  int64_t longest = 0;
  for (int r = 0; r < block_rows; ++r) longest = max(longest, slstm_row(p, first_row + r).length);
  for (int64_t x = threadIdx.x; x < plane; x += threads) {
    const int64_t row = first_row + x / dim, unit = x % dim;
    h[x] = initial(p.h0, p, row, head, unit);
    c[x] = initial(p.c0, p, row, head, unit);
    n[x] = initial(p.n0, p, row, head, unit);
    m[x] = initial(p.m0, p, row, head, unit);
  }
  __syncthreads();

  const W* weights = static_cast<const W*>(p.weights) + head * dim * dim;
  const int gate = lane / 8, gate_row = lane / 2 % block_rows;  // whose x this lane loads
  const SlstmRow loaded = slstm_row(p, first_row + gate_row), mine = slstm_row(p, first_row + lane % block_rows);
  for (int64_t t = 0; t < longest; ++t) {
    const float* h_before = h + (t % 2) * plane;
    float* h_after = h + ((t + 1) % 2) * plane;
    for (int64_t unit = warp; unit < dim; unit += warps) {
      float add = load_as_float(p.bias, (gate * p.heads + head) * dim + unit, p.bias_dtype);
      if (t < loaded.length) {
        add += load_as_float(params.x,
                             loaded.batch * params.x_batch + (loaded.start + t) * params.x_seq + gate * params.x_gate +
                                 head * params.x_head + unit,
                             p.dtype);
      }
      float gates[4];
      unit_gates(gates, weights + unit * dim, p.heads * dim * dim, h_before, dim, vectors, add);
      if (lane < block_rows) {
        const int64_t at = lane * dim + unit;
        SlstmUnit state{.h = h_before[at], .c = c[at], .n = n[at], .m = m[at]};
        if (t < mine.length) {
          const SlstmUnitKept kept = slstm_unit<ExactMath>(gates[0], gates[1], gates[2], gates[3], state);
          const int64_t token = (mine.batch * p.seq + mine.start + t) * p.heads + head;
          store_from_float(params.h, token * dim + unit, p.dtype, state.h);
          if (params.kept != nullptr) {
#pragma unroll
            for (int k = 0; k < slstm_kept; ++k) params.kept[(token * slstm_kept + k) * dim + unit] = kept.value[k];
          }
          c[at] = state.c, n[at] = state.n, m[at] = state.m;
        }
        h_after[at] = state.h;
      }
      __syncwarp();
    }
    __syncthreads();
  }
  if (params.h_last == nullptr) return;
  for (int64_t x = threadIdx.x; x < plane; x += threads) {
    const int64_t row = first_row + x / dim;
    if (row >= p.rows) break;
    const int64_t to = (row * p.heads + head) * dim + x % dim;
    params.h_last[to] = h[(longest % 2) * plane + x];
    params.c_last[to] = c[x], params.n_last[to] = n[x], params.m_last[to] = m[x];
  }
}

// (4, heads, out, in) to (heads, in, 4, out).
template <typename W>
__global__ void transpose_kernel(const W* from, W* to, int64_t heads, int64_t dim) {
  __shared__ float tile[32][33];
  const int64_t tiles = ceil_div(dim, 32), matrix = blockIdx.x / (tiles * tiles);
  const int64_t gate = matrix / heads, head = matrix % heads;
  const int64_t out = blockIdx.x / tiles % tiles * 32, in = blockIdx.x % tiles * 32;
  from += (gate * heads + head) * dim * dim;
  to += head * 4 * dim * dim + gate * dim;
  for (int r = threadIdx.y; r < 32; r += blockDim.y) {
    if (out + r < dim && in + threadIdx.x < dim)
      tile[r][threadIdx.x] = to_float(from[(out + r) * dim + in + threadIdx.x]);
  }
  __syncthreads();
  for (int r = threadIdx.y; r < 32; r += blockDim.y) {
    if (in + r < dim && out + threadIdx.x < dim) {
      to[(in + r) * 4 * dim + out + threadIdx.x] = from_float<W>(tile[threadIdx.x][r]);
    }
  }
}

// c or n before token t of a row.
__device__ __forceinline__ float before(const SlstmBackward& params, const SlstmRow& at, int64_t row, int head,
                                        int64_t t, int64_t unit, SlstmKept which, const float* state) {
  const SlstmProblem& p = params.p;
  if (t == 0) return initial(state, p, row, head, unit);
  const int64_t token = (at.batch * p.seq + at.start + t - 1) * p.heads + head;
  return params.kept[(token * slstm_kept + which) * p.dim + unit];
}

template <typename W>
__global__ void __launch_bounds__(threads)
    backward_kernel(const __grid_constant__ SlstmBackward params, const W* transposed, float* workspace, bool vectors) {
  extern __shared__ float4 shared[];
  const SlstmProblem& p = params.p;
  const int head = static_cast<int>(blockIdx.x % p.heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = blockIdx.x / p.heads * static_cast<int64_t>(block_rows), dim = p.dim;
  const int64_t plane = block_rows * dim;
  float* dx = workspace == nullptr ? reinterpret_cast<float*>(shared) : workspace + blockIdx.x * backward_floats * dim;
  float *dh = dx + 4 * plane, *dc = dh + plane, *dn = dc + plane, *excess = dn + plane;

  int64_t longest = 0;
  for (int r = 0; r < block_rows; ++r) longest = max(longest, slstm_row(p, first_row + r).length);
  for (int64_t x = threadIdx.x; x < plane; x += threads) {
    const int64_t row = first_row + x / dim, unit = x % dim;
    const SlstmRow at = slstm_row(p, row);
    const float c = before(params, at, row, head, at.length, unit, kept_c, p.c0);
    const float n = before(params, at, row, head, at.length, unit, kept_n, p.n0);
    dh[x] = initial(params.dh_last, p, row, head, unit);
    dc[x] = initial(params.dc_last, p, row, head, unit);
    dn[x] = initial(params.dn_last, p, row, head, unit);
    excess[x] = initial(params.dm_last, p, row, head, unit) - (dc[x] * c + dn[x] * n);
  }
  __syncthreads();

  const W* weights = transposed + head * 4 * dim * dim;
  for (int64_t t = longest - 1; t >= 0; --t) {
    for (int64_t x = threadIdx.x; x < plane; x += threads) {
      const int64_t r = x / dim, row = first_row + r, unit = x % dim;
      const SlstmRow at = slstm_row(p, row);
      float gates[4] = {};
      if (t < at.length) {
        const int64_t token = at.batch * p.seq + at.start + t;
        float kept[slstm_kept];
#pragma unroll
        for (int k = 0; k < slstm_kept; ++k) {
          kept[k] = params.kept[((token * p.heads + head) * slstm_kept + k) * dim + unit];
        }
        SlstmUnitGradient g{.dh = dh[x], .dc = dc[x], .dn = dn[x], .excess = excess[x]};
        if (params.dh != nullptr) {
          g.dh += load_as_float(
              params.dh, at.batch * params.dh_batch + (at.start + t) * params.dh_seq + head * params.dh_head + unit,
              p.dtype);
        }
        slstm_unit_backward<ExactMath>(kept, before(params, at, row, head, t, unit, kept_c, p.c0),
                                       before(params, at, row, head, t, unit, kept_n, p.n0), g, gates);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          store_from_float(params.dx, ((token * 4 + gate) * p.heads + head) * dim + unit, p.dtype, gates[gate]);
        }
        dh[x] = g.dh, dc[x] = g.dc, dn[x] = g.dn, excess[x] = g.excess;
      }
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) dx[(r * 4 + gate) * dim + unit] = gates[gate];
    }
    __syncthreads();
    for (int64_t in = warp; in < dim; in += warps) {
      float sums[block_rows] = {};
      lane_dots<W, 1>(sums, weights + in * 4 * dim, 0, dx, 4 * dim, vectors);
      const float sum = warp_sums<block_rows>(sums);
      if (lane % 8 == 0) dh[lane / 8 * dim + in] += clip_gradient(sum, params.clip);
    }
    __syncthreads();
  }
  if (params.dh0 == nullptr) return;
  for (int64_t x = threadIdx.x; x < plane; x += threads) {
    const int64_t row = first_row + x / dim, unit = x % dim;
    if (row >= p.rows) break;
    const int64_t to = (row * p.heads + head) * dim + unit;
    params.dh0[to] = dh[x], params.dc0[to] = dc[x], params.dn0[to] = dn[x];
    params.dm0[to] = excess[x] + dc[x] * initial(p.c0, p, row, head, unit) + dn[x] * initial(p.n0, p, row, head, unit);
  }
}

// One token. A block takes 16 units, one a warp, of one head and 4 rows. It writes the new h to `h_next`, because other
// blocks still read the old h.
template <typename W>
__global__ void __launch_bounds__(threads) step_kernel(const __grid_constant__ SlstmStep params, float* h_next) {
  const int lane = threadIdx.x % 32;
  const int64_t dim = params.dim, heads = params.heads, unit_tiles = ceil_div(dim, warps);
  const int64_t unit = blockIdx.x % unit_tiles * warps + threadIdx.x / 32;
  const int64_t head = blockIdx.x / unit_tiles % heads;
  const int64_t first_row = blockIdx.x / unit_tiles / heads * block_rows;
  if (unit >= dim) return;
  const int gate = lane / 8;
  const int64_t gate_row = first_row + lane / 2 % block_rows, row = first_row + lane % block_rows;
  float add = load_as_float(params.bias, (gate * heads + head) * dim + unit, params.bias_dtype);
  if (gate_row < params.batch) {
    add += load_as_float(params.x, gate_row * params.x_batch + gate * params.x_gate + head * params.x_head + unit,
                         params.dtype);
  }
  const W* weights = static_cast<const W*>(params.weights) + (head * dim + unit) * dim;
  float sums[4 * block_rows] = {};
#pragma unroll 2
  for (int64_t k = lane; k < dim; k += 32) {
    float h[block_rows];
#pragma unroll
    for (int r = 0; r < block_rows; ++r) {
      h[r] = first_row + r < params.batch ? params.h_state[((first_row + r) * heads + head) * dim + k] : 0.0f;
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float w = to_float(weights[g * heads * dim * dim + k]);
#pragma unroll
      for (int r = 0; r < block_rows; ++r) sums[g * block_rows + r] += w * h[r];
    }
  }
  const float sum = warp_sums<4 * block_rows>(sums) + add;
  float gates[4];
#pragma unroll
  for (int g = 0; g < 4; ++g) gates[g] = __shfl_sync(all_lanes, sum, g * 8 + lane % block_rows * 2);
  if (lane >= block_rows || row >= params.batch) return;
  const int64_t at = (row * heads + head) * dim + unit;
  SlstmUnit state{.h = params.h_state[at], .c = params.c_state[at], .n = params.n_state[at], .m = params.m_state[at]};
  slstm_unit<ExactMath>(gates[0], gates[1], gates[2], gates[3], state);
  h_next[at] = state.h;
  params.c_state[at] = state.c, params.n_state[at] = state.n, params.m_state[at] = state.m;
  store_from_float(params.h, at, params.dtype, state.h);
}

bool can_load_vectors(const void* weights, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0;
}

int64_t blocks_of(const SlstmProblem& p) { return p.heads * ceil_div(p.rows, block_rows); }

// `bytes` where they fit a block's shared memory, else 0.
int64_t shared_bytes(int64_t bytes) { return bytes <= shared_memory_limit() ? bytes : 0; }

int64_t weight_bytes(const SlstmProblem& p) {
  const int64_t bytes = 4 * p.heads * p.dim * p.dim * element_bytes(p.weight_dtype);
  return ceil_div(bytes, 256) * 256;
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace

namespace slstm_portable {

int64_t forward_workspace_bytes(const SlstmForward& params) {
  const int64_t bytes = forward_floats * params.p.dim * static_cast<int64_t>(sizeof(float));
  return shared_bytes(bytes) ? 0 : blocks_of(params.p) * bytes;
}

cudaError_t forward(const SlstmForward& params, void* workspace, cudaStream_t stream) {
  const SlstmProblem& p = params.p;
  return dispatch_dtype(p.weight_dtype, [&](auto zero) {
    using W = decltype(zero);
    const int64_t bytes = shared_bytes(forward_floats * p.dim * static_cast<int64_t>(sizeof(float)));
    if (cudaError_t status = allow_shared(forward_kernel<W>, bytes); status != cudaSuccess) return status;
    forward_kernel<W><<<static_cast<unsigned>(blocks_of(p)), threads, bytes, stream>>>(
        params, bytes ? nullptr : static_cast<float*>(workspace), can_load_vectors(p.weights, p.dim));
    return cudaGetLastError();
  });
}

int64_t backward_workspace_bytes(const SlstmBackward& params) {
  const int64_t bytes = backward_floats * params.p.dim * static_cast<int64_t>(sizeof(float));
  return weight_bytes(params.p) + (shared_bytes(bytes) ? 0 : blocks_of(params.p) * bytes);
}

cudaError_t backward(const SlstmBackward& params, void* workspace, cudaStream_t stream) {
  const SlstmProblem& p = params.p;
  return dispatch_dtype(p.weight_dtype, [&](auto zero) {
    using W = decltype(zero);
    W* transposed = static_cast<W*>(workspace);
    const int64_t tiles = ceil_div(p.dim, 32);
    transpose_kernel<W><<<static_cast<unsigned>(tiles * tiles * 4 * p.heads), dim3(32, 8), 0, stream>>>(
        static_cast<const W*>(p.weights), transposed, p.heads, p.dim);
    const int64_t bytes = shared_bytes(backward_floats * p.dim * static_cast<int64_t>(sizeof(float)));
    if (cudaError_t status = allow_shared(backward_kernel<W>, bytes); status != cudaSuccess) return status;
    float* scratch = bytes ? nullptr : reinterpret_cast<float*>(static_cast<char*>(workspace) + weight_bytes(p));
    backward_kernel<W><<<static_cast<unsigned>(blocks_of(p)), threads, bytes, stream>>>(
        params, transposed, scratch, can_load_vectors(transposed, p.dim));
    return cudaGetLastError();
  });
}

}  // namespace slstm_portable

int64_t slstm_step_workspace_bytes(const SlstmStep& params) {
  return params.batch * params.heads * params.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t slstm_step(const SlstmStep& params, void* workspace, cudaStream_t stream) {
  return dispatch_dtype(params.weight_dtype, [&](auto zero) {
    using W = decltype(zero);
    const int64_t unit_tiles = ceil_div(params.dim, warps), row_tiles = ceil_div(params.batch, block_rows);
    float* h_next = static_cast<float*>(workspace);
    step_kernel<W>
        <<<static_cast<unsigned>(unit_tiles * params.heads * row_tiles), threads, 0, stream>>>(params, h_next);
    if (cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
    return cudaMemcpyAsync(params.h_state, h_next, slstm_step_workspace_bytes(params), cudaMemcpyDeviceToDevice,
                           stream);
  });
}

}  // namespace flash_xlstm::cuda
