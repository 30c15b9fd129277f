// RMSNorm, with the residual's sum in front where there is one, and its gradient: each row read once and kept in
// registers (rows.cuh).
//
// Forward: a group of threads a row. Gradient: two blocks a multiprocessor walk over the rows and keep their share of
// the weight's gradient in registers; a second launch adds up the groups' shares in a fixed order.
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::block_threads) rms_norm_kernel(const __grid_constant__ RmsNorm p) {
  using T = typename L::T;
  constexpr int width = L::width;
  __shared__ float buffer[L::groups][L::row_warps];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::groups + group;
  if (row >= p.rows) return;
  const int count = static_cast<int>(p.dim);
  const int64_t start = row * p.dim;
  Pack<T, width> x[L::packs];
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at < count) x[k] = load_once<T, width>(p.x, start + at);
  }
  if (p.residual != nullptr) {
    Pack<T, width> residual[L::packs];
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at < count) residual[k] = load_once<T, width>(p.residual, start + at);
    }
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        x[k].value[e] = from_float<T>(to_float(x[k].value[e]) + to_float(residual[k].value[e]));
      }
      store_pack(p.sum, start + at, x[k]);
    }
  }
  float sums[1] = {};
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
#pragma unroll
    for (int e = 0; e < width; ++e) sums[0] += to_float(x[k].value[e]) * to_float(x[k].value[e]);
  }
  row_sums<L>(sums, buffer[group]);
  const float inverse = rsqrtf(sums[0] / static_cast<float>(count) + p.eps);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    float weight[width];
    load_weight<T>(weight, p.weight, at, p.weight_dtype == DType::float32);
#pragma unroll
    for (int e = 0; e < width; ++e) x[k].value[e] = from_float<T>(to_float(x[k].value[e]) * inverse * weight[e]);
    store_pack(p.y, start + at, x[k]);
  }
}

template <typename L>
__global__ void __launch_bounds__(L::block_threads)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackward p, float* partial) {
  using T = typename L::T;
  constexpr int width = L::width;
  __shared__ float buffer[2][L::groups][2 * L::row_warps];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int count = static_cast<int>(p.dim);
  float dweight[L::packs][width] = {};
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * L::groups + group; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * L::groups, turn ^= 1) {
    const int64_t start = row * p.dim;
    Pack<T, width> x[L::packs], dy[L::packs];
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      x[k] = load_once<T, width>(p.x, start + at);
      dy[k] = load_once<T, width>(p.dy, start + at);
    }
    float sums[2] = {};  // x . x, x . (weight dy)
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      float weight[width];
      load_weight<T>(weight, p.weight, at, p.weight_dtype == DType::float32);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const float value = to_float(x[k].value[e]);
        sums[0] += value * value;
        sums[1] += value * weight[e] * to_float(dy[k].value[e]);
      }
    }
    row_sums<L>(sums, buffer[turn][group]);
    const float inverse = rsqrtf(sums[0] / static_cast<float>(count) + p.eps);
    const float mean = sums[1] * inverse / static_cast<float>(count);
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      float weight[width];
      load_weight<T>(weight, p.weight, at, p.weight_dtype == DType::float32);
      Pack<T, width> past{};
      if (p.dsum != nullptr) past = load_once<T, width>(p.dsum, start + at);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const float normed = to_float(x[k].value[e]) * inverse, gradient = to_float(dy[k].value[e]);
        dweight[k][e] += gradient * normed;
        const float dx = inverse * (weight[e] * gradient - normed * mean);
        x[k].value[e] = from_float<T>(p.dsum != nullptr ? dx + to_float(past.value[e]) : dx);
      }
      store_pack(p.dx, start + at, x[k]);
    }
  }
  if (partial != nullptr)
    write_partial<L>(dweight, partial + (blockIdx.x * static_cast<int64_t>(L::groups) + group) * p.dim, count);
}

bool vectors(const RmsNorm& p) {
  return aligned_16(p.x) && aligned_16(p.residual) && aligned_16(p.weight) && aligned_16(p.y) && aligned_16(p.sum);
}
bool vectors(const RmsNormBackward& p) {
  return aligned_16(p.x) && aligned_16(p.dy) && aligned_16(p.dsum) && aligned_16(p.weight) && aligned_16(p.dx);
}

}  // namespace

cudaError_t rms_norm(const RmsNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>((p.rows + L::groups - 1) / L::groups);
    rms_norm_kernel<L><<<blocks, L::block_threads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& p) {
  const int64_t rows = walking_blocks() * rows_of_block(p.dtype, p.dim, vectors(p));
  return p.dweight == nullptr ? 0 : rows * p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t rms_norm_backward(const RmsNormBackward& p, void* workspace, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = std::min(walking_blocks(), (p.rows + L::groups - 1) / L::groups);
    if (blocks == 0) return cudaErrorUnknown;
    float* partial = p.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    rms_norm_backward_kernel<L><<<static_cast<unsigned>(blocks), L::block_threads, 0, stream>>>(p, partial);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, blocks * L::groups, p.dim, p.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
