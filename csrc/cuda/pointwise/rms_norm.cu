// RMSNorm and its gradient. With a residual, the norm is that of x + residual. Each row is read from memory once
// (rows.cuh).
#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::block_threads, resident_blocks<L>(L::row_threads == 512 ? 512 : 1024))
    rms_norm_kernel(const __grid_constant__ RmsNorm p) {
  if (!p.holds_next) let_next_kernel_start();
  wait_for_earlier_kernels();
  if (p.holds_next) let_next_kernel_start();
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
      float value[width], other[width];
      unpack(value, x[k]);
      unpack(other, residual[k]);
#pragma unroll
      for (int e = 0; e < width; ++e) value[e] += other[e];
      x[k] = round_pack<T>(value);
      keep_packed(x[k]);
      store_pack(p.sum, start + at, x[k]);
    }
  }
  RowWeight<L> weights(p.weight, 0, count, p.weight_dtype == DType::float32);
  float sums[1] = {};
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
    float value[width];
    unpack(value, x[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) sums[0] += value[e] * value[e];
  }
  row_sums<L>(sums, buffer[group]);
  const float inverse = rsqrtf(sums[0] / static_cast<float>(count) + p.eps);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    float weight[width], value[width];
    weights.read(weight, k);
    keep_packed(x[k]);
    unpack(value, x[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) value[e] = value[e] * inverse * weight[e];
    store_pack(p.y, start + at, round_pack<T>(value));
  }
}

// with_dsum: p.dsum is given. with_y: p.y is wanted.
template <typename L, bool with_dsum, bool with_y>
__global__ void __launch_bounds__(walk_threads, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackward p, float* partial, int stages) {
  let_next_kernel_start();
  using T = typename L::T;
  using S = Slots<L, with_dsum ? 3 : 2>;
  constexpr int width = L::width;
  __shared__ float buffer[2][L::walk_groups][2 * L::row_warps];
  extern __shared__ uint4 slots[];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int count = static_cast<int>(p.dim), ahead = stages - 1;
  // All groups go on until the first group's rows end: racecheck does not follow groups that leave at different times.
  int64_t row = static_cast<int64_t>(blockIdx.x) * L::walk_groups + group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * L::walk_groups, step_elements = step * p.dim;
  int64_t next_start = row * p.dim + thread * width;
  const bool weight_is_float = p.weight_dtype == DType::float32;
  prefetch_row_weight<L>(p.weight, thread * width, count, weight_is_float);
#pragma unroll 1
  for (int stage = 0; stage < stages && row + stage * step < p.rows; ++stage) {
    prefetch_row<L>(p.x, next_start + stage * step_elements, count);
    prefetch_row<L>(p.dy, next_start + stage * step_elements, count);
    if (with_dsum) prefetch_row<L>(p.dsum, next_start + stage * step_elements, count);
  }
  wait_for_earlier_kernels();
  float weight[L::packs][width], dweight[L::packs][width] = {};
  fetch_row_weight<L>(weight, p.weight, 0, count, weight_is_float);
  const S ring(slots, stages);
  uint32_t slot = ring.first;
  const auto copy_next = [&](int64_t next) {
    if (next < p.rows) {
      copy_row<L>(slot, p.x, next_start, count);
      copy_row<L>(slot + S::tensor_bytes, p.dy, next_start, count);
      if (with_dsum) copy_row<L>(slot + 2 * S::tensor_bytes, p.dsum, next_start, count);
    }
    ptx::cp_async_commit();  // also without a copy: wait_for_copies counts the groups
    next_start += step_elements, slot = ring.after(slot);
  };
#pragma unroll 1
  for (int stage = 0; stage < ahead; ++stage) copy_next(row + stage * step);
  widen_row_weight<L>(weight, weight_is_float);
  const float share = 1.0f / static_cast<float>(count);  // weight of an element in a mean
#pragma unroll 1
  for (int turn = 0; row - group < p.rows; row += step, turn ^= 1) {
    copy_next(row + ahead * step);
    wait_for_copies(ahead);  // for this row's, which are at `slot`: the next copy goes there
    const bool has_row = row < p.rows;
    const int64_t start = next_start - stages * step_elements;
    float x[L::kept_packs][width], dy[L::kept_packs][width];
    const auto read = [&](int k) {
      unpack(x[k % L::kept_packs], read_pack<L>(slot, p.x, start, k, count));
      unpack(dy[k % L::kept_packs], read_pack<L>(slot + S::tensor_bytes, p.dy, start, k, count));
    };
    float sums[2] = {};  // x . x and x . (weight dy)
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row) break;
      read(k);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const float value = x[k % L::kept_packs][e];
        sums[0] += value * value;
        sums[1] += value * weight[k][e] * dy[k % L::kept_packs][e];
      }
    }
    row_sums<L>(sums, buffer[turn][group]);
    if (has_row) {
      const float inverse = rsqrtf(sums[0] * share + p.eps), mean = sums[1] * inverse * share;
#pragma unroll
      for (int k = 0; k < L::packs; ++k) {
        float past[width], dx[width], y[width];
        if (!L::kept) read(k);
        if (with_dsum) unpack(past, read_pack<L>(slot + 2 * S::tensor_bytes, p.dsum, start, k, count));
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const float normed = x[k % L::kept_packs][e] * inverse, incoming = dy[k % L::kept_packs][e];
          dweight[k][e] += incoming * normed;
          dx[e] = inverse * (weight[k][e] * incoming - normed * mean);
          if (with_dsum) dx[e] += past[e];
          if (with_y) y[e] = normed * weight[k][e];
        }
        if ((thread + k * L::row_threads) * width < count) {
          store_pack(p.dx, start + k * L::row_threads * width, round_pack<T>(dx));
          if (with_y) store_pack(p.y, start + k * L::row_threads * width, round_pack<T>(y));
        }
      }
    }
  }
  if (partial != nullptr)
    write_partial<L>(dweight, reinterpret_cast<float*>(slots), partial + blockIdx.x * p.dim, count);
}

bool vectors(const RmsNorm& p) {
  return aligned_16(p.x) && aligned_16(p.residual) && aligned_16(p.weight) && aligned_16(p.y) && aligned_16(p.sum);
}
bool vectors(const RmsNormBackward& p) {
  return aligned_16(p.x) && aligned_16(p.dy) && aligned_16(p.dsum) && aligned_16(p.weight) && aligned_16(p.dx) &&
         aligned_16(p.y);
}

int64_t backward_blocks(const RmsNormBackward& p, int64_t groups) {
  return walking_blocks(p.rows, groups, processor_count());
}

}  // namespace

cudaError_t rms_norm(const RmsNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows, L::groups));
    return launch_early(rms_norm_kernel<L>, dim3(blocks), dim3(L::block_threads), 0, 1, stream, p);
  });
}

int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& p) {
  if (p.dweight == nullptr) return 0;
  return backward_blocks(p, walking_rows(p.dtype, p.dim, vectors(p))) * p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t rms_norm_backward(const RmsNormBackward& p, void* workspace, cudaStream_t stream) {
  return dispatch_walking_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = backward_blocks(p, L::walk_groups);
    if (blocks == 0) return cudaErrorUnknown;
    const int tensors = p.dsum != nullptr ? 3 : 2, stages = walking_stages<L>(tensors);
    const int bytes = walking_bytes<L>(tensors, stages);
    float* partial = p.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    const auto kernel = p.dsum == nullptr ? p.y == nullptr ? rms_norm_backward_kernel<L, false, false>
                                                           : rms_norm_backward_kernel<L, false, true>
                        : p.y == nullptr  ? rms_norm_backward_kernel<L, true, false>
                                          : rms_norm_backward_kernel<L, true, true>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    status = launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(walk_threads), bytes, 1, stream, p, partial,
                          stages);
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, blocks, p.dim, p.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
