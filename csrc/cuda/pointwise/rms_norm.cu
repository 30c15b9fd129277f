// RMSNorm, with the residual's sum in front where there is one, and its gradient: each row read once (rows.cuh).
#include "cuda/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::block_threads, resident_blocks<L>(L::row_threads == 512 ? 512 : 1024))
    rms_norm_kernel(const __grid_constant__ RmsNorm p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
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
      for (int e = 0; e < width; ++e) x[k].value[e] = from_float<T>(value[e] + other[e]);
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
    for (int e = 0; e < width; ++e) x[k].value[e] = from_float<T>(value[e] * inverse * weight[e]);
    store_pack(p.y, start + at, x[k]);
  }
}

template <typename L>
__global__ void __launch_bounds__(walk_threads, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackward p, float* partial, int stages) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  using T = typename L::T;
  constexpr int width = L::width;
  __shared__ float buffer[2][L::walk_groups][2 * L::row_warps];
  extern __shared__ uint4 slots[];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int count = static_cast<int>(p.dim), tensors = p.dsum != nullptr ? 3 : 2, ahead = stages - 1;
  const float share = 1.0f / static_cast<float>(count);  // of an element in a mean
  const int64_t step = static_cast<int64_t>(gridDim.x) * L::walk_groups;
  const auto slots_of = [&](int stage) { return slots + stage * tensors * L::row_slots + threadIdx.x; };
  const auto copy = [&](int64_t row, int stage) {
    if (row < p.rows) {
      uint4* to = slots_of(stage);
      copy_row<L>(to, p.x, row * p.dim, count);
      copy_row<L>(to + L::row_slots, p.dy, row * p.dim, count);
      if (p.dsum != nullptr) copy_row<L>(to + 2 * L::row_slots, p.dsum, row * p.dim, count);
    }
    ptx::cp_async_commit();  // also of nothing: wait_for_copies counts
  };
  // All groups go on for as long as the first has rows: racecheck does not follow groups that leave at different times.
  int64_t row = static_cast<int64_t>(blockIdx.x) * L::walk_groups + group;
  for (int stage = 0; stage < ahead; ++stage) copy(row + stage * step, stage);
  float weight[L::packs][width], dweight[L::packs][width] = {};
  load_row_weight<L>(weight, p.weight, 0, count, p.weight_dtype == DType::float32);
  // The number of stages is a power of two.
  for (int stage = 0, turn = 0; row - group < p.rows; row += step, stage = (stage + 1) & ahead, turn ^= 1) {
    copy(row + ahead * step, (stage + ahead) & ahead);
    wait_for_copies(ahead);
    const int64_t start = row * p.dim;
    const uint4* from = slots_of(stage);
    const bool has_row = row < p.rows;
    float sums[2] = {};  // x . x, x . (weight dy)
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row) break;
      float x[width], dy[width];
      unpack(x, read_pack<L>(from, p.x, start, k, count));
      unpack(dy, read_pack<L>(from + L::row_slots, p.dy, start, k, count));
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sums[0] += x[e] * x[e];
        sums[1] += x[e] * weight[k][e] * dy[e];
      }
    }
    row_sums<L>(sums, buffer[turn][group]);
    if (!has_row) continue;
    const float inverse = rsqrtf(sums[0] * share + p.eps), mean = sums[1] * inverse * share;
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      float x[width], dy[width], past[width] = {};
      unpack(x, read_pack<L>(from, p.x, start, k, count));
      unpack(dy, read_pack<L>(from + L::row_slots, p.dy, start, k, count));
      if (p.dsum != nullptr) unpack(past, read_pack<L>(from + 2 * L::row_slots, p.dsum, start, k, count));
      Pack<T, width> dx;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const float normed = x[e] * inverse;
        dweight[k][e] += dy[e] * normed;
        // past is 0 without dsum
        dx.value[e] = from_float<T>(inverse * (weight[k][e] * dy[e] - normed * mean) + past[e]);
      }
      if (at < count) store_pack(p.dx, start + at, dx);
    }
  }
  if (partial != nullptr)
    write_partial<L>(dweight, reinterpret_cast<float*>(slots), partial + blockIdx.x * p.dim, count);
}

bool vectors(const RmsNorm& p) {
  return aligned_16(p.x) && aligned_16(p.residual) && aligned_16(p.weight) && aligned_16(p.y) && aligned_16(p.sum);
}
bool vectors(const RmsNormBackward& p) {
  return aligned_16(p.x) && aligned_16(p.dy) && aligned_16(p.dsum) && aligned_16(p.weight) && aligned_16(p.dx);
}

int64_t backward_blocks(const RmsNormBackward& p, int64_t groups) {
  return std::min(walking_blocks(), (p.rows + groups - 1) / groups);
}

}  // namespace

cudaError_t rms_norm(const RmsNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>((p.rows + L::groups - 1) / L::groups);
    return launch_early(rms_norm_kernel<L>, dim3(blocks), dim3(L::block_threads), 0, 1, stream, p);
  });
}

int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& p) {
  if (p.dweight == nullptr) return 0;
  return backward_blocks(p, walking_rows(p.dtype, p.dim, vectors(p))) * p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t rms_norm_backward(const RmsNormBackward& p, void* workspace, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = backward_blocks(p, L::walk_groups);
    if (blocks == 0) return cudaErrorUnknown;
    const int tensors = p.dsum != nullptr ? 3 : 2, stages = walking_stages<L>(tensors);
    const int bytes = stages * tensors * L::row_slots * 16;
    float* partial = p.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    const auto kernel = rms_norm_backward_kernel<L>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    status = launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(walk_threads), bytes, 1, stream, p, partial,
                          stages);
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, blocks, p.dim, p.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
