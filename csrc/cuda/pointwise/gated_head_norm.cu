// y = sigmoid(gate) * LayerNorm(h) * weight for each head, and its gradient: each row of a head read once and kept in
// registers (rows.cuh). Mean and variance in two passes over the registers, so that a large mean costs no precision.
//
// Forward: a group of threads a row. Gradient: a block stays with one head, walks over the tokens and keeps its share
// of the weight's gradient in registers; a second launch adds up the groups' shares in a fixed order.
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

// x = the row minus its mean, 0 beyond its end; returns 1 / sqrt(var + eps).
template <typename L>
__device__ __forceinline__ float load_centred(float (&x)[L::packs][L::width],
                                              const Pack<typename L::T, L::width>* packs, int thread, int count,
                                              float eps, float* mean_buffer, float* square_buffer) {
  float sum[1] = {}, square[1] = {};
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const bool inside = (thread + k * L::row_threads) * L::width < count;
#pragma unroll
    for (int e = 0; e < L::width; ++e) {
      x[k][e] = inside ? to_float(packs[k].value[e]) : 0.0f;
      sum[0] += x[k][e];
    }
  }
  row_sums<L>(sum, mean_buffer);
  const float mean = sum[0] / static_cast<float>(count);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * L::width >= count) continue;
#pragma unroll
    for (int e = 0; e < L::width; ++e) {
      x[k][e] -= mean;
      square[0] += x[k][e] * x[k][e];
    }
  }
  row_sums<L>(square, square_buffer);
  return rsqrtf(square[0] / static_cast<float>(count) + eps);
}

template <typename L>
__global__ void __launch_bounds__(L::block_threads) gated_head_norm_kernel(const __grid_constant__ GatedHeadNorm p) {
  using T = typename L::T;
  constexpr int width = L::width;
  __shared__ float buffer[2][L::groups][L::row_warps];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::groups + group;
  if (row >= p.tokens * p.heads) return;
  const int64_t token = row / p.heads, column = (row - token * p.heads) * p.dim;
  const int count = static_cast<int>(p.dim);
  Pack<T, width> packs[L::packs], gate[L::packs];
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    packs[k] = load_once<T, width>(p.h, row * p.dim + at);
    gate[k] = load_once<T, width>(p.gate, token * p.gate_stride + column + at);
  }
  float x[L::packs][width];
  const float inverse = load_centred<L>(x, packs, thread, count, p.eps, buffer[0][group], buffer[1][group]);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    float weight[width];
    load_weight<T>(weight, p.weight, column + at, p.weight_dtype == DType::float32);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      packs[k].value[e] = from_float<T>(sigmoid(to_float(gate[k].value[e])) * (x[k][e] * inverse * weight[e]));
    }
    store_pack(p.y, row * p.dim + at, packs[k]);
  }
}

template <typename L>
__global__ void __launch_bounds__(L::block_threads)
    gated_head_norm_backward_kernel(const __grid_constant__ GatedHeadNormBackward b, float* partial) {
  using T = typename L::T;
  constexpr int width = L::width;
  const GatedHeadNorm& p = b.p;
  __shared__ float buffer[2][3][L::groups][2 * L::row_warps];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int heads = static_cast<int>(p.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int64_t first = blockIdx.x / heads, step = gridDim.x / heads, column = head * p.dim;
  const int count = static_cast<int>(p.dim);
  float dweight[L::packs][width] = {};
  int turn = 0;
  for (int64_t token = first * L::groups + group; token < p.tokens; token += step * L::groups, turn ^= 1) {
    const int64_t start = (token * p.heads + head) * p.dim, gate_start = token * p.gate_stride + column;
    Pack<T, width> packs[L::packs], gate[L::packs], dy[L::packs];
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      packs[k] = load_once<T, width>(p.h, start + at);
      gate[k] = load_once<T, width>(p.gate, gate_start + at);
      dy[k] = load_once<T, width>(b.dy, start + at);
    }
    float x[L::packs][width];
    const float inverse =
        load_centred<L>(x, packs, thread, count, p.eps, buffer[turn][0][group], buffer[turn][1][group]);
    float sums[2] = {};  // of the normed row's gradient, and of its product with the normed row
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      float weight[width];
      load_weight<T>(weight, p.weight, column + at, p.weight_dtype == DType::float32);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        x[k][e] *= inverse;
        const float pre = to_float(gate[k].value[e]), open = sigmoid(pre), gradient = to_float(dy[k].value[e]);
        const float through = __fmul_rn(gradient, open);
        dweight[k][e] += through * x[k][e];
        gate[k].value[e] = from_float<T>(gradient * x[k][e] * weight[e] * open * sigmoid(-pre));
        sums[0] += __fmul_rn(through, weight[e]);
        sums[1] += __fmul_rn(through, weight[e]) * x[k][e];
      }
      store_pack(b.dgate, start + at, gate[k]);
    }
    row_sums<L>(sums, buffer[turn][2][group]);
    const float mean = sums[0] / static_cast<float>(count), along = sums[1] / static_cast<float>(count);
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const int at = (thread + k * L::row_threads) * width;
      if (at >= count) continue;
      float weight[width];
      load_weight<T>(weight, p.weight, column + at, p.weight_dtype == DType::float32);
      // The gate was overwritten by its gradient: read again, from the second-level cache.
      const auto again = load_pack<T, width>(p.gate, gate_start + at);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        // Rounded as in the sum: with one column nothing is left.
        const float through =
            __fmul_rn(__fmul_rn(to_float(dy[k].value[e]), sigmoid(to_float(again.value[e]))), weight[e]);
        packs[k].value[e] = from_float<T>(inverse * (through - mean - x[k][e] * along));
      }
      store_pack(b.dh, start + at, packs[k]);
    }
  }
  if (partial != nullptr)
    write_partial<L>(dweight, partial + (first * L::groups + group) * p.heads * p.dim + column, count);
}

bool vectors(const GatedHeadNorm& p) {
  // Rows of every stride and head begin at a multiple of 16 bytes where the first two do.
  return aligned_16(p.h) && aligned_16(p.gate) && aligned_16(p.weight) && aligned_16(p.y) &&
         p.gate_stride * (p.dtype == DType::float32 ? 4 : 2) % 16 == 0;
}

bool vectors(const GatedHeadNormBackward& b) {
  return vectors(b.p) && aligned_16(b.dy) && aligned_16(b.dh) && aligned_16(b.dgate);
}

// A multiple of the heads.
int64_t backward_blocks(const GatedHeadNorm& p, int64_t groups) {
  const int64_t each = std::max<int64_t>(1, walking_blocks() / p.heads);
  return p.heads * std::min(each, (p.tokens + groups - 1) / groups);
}

}  // namespace

cudaError_t gated_head_norm(const GatedHeadNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>((p.tokens * p.heads + L::groups - 1) / L::groups);
    gated_head_norm_kernel<L><<<blocks, L::block_threads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& b) {
  const int64_t groups = rows_of_block(b.p.dtype, b.p.dim, vectors(b));
  const int64_t blocks = backward_blocks(b.p, groups);
  return b.dweight == nullptr ? 0 : blocks * groups * b.p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& b, void* workspace, cudaStream_t stream) {
  const GatedHeadNorm& p = b.p;
  return dispatch_layout(p.dtype, p.dim, vectors(b), [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = backward_blocks(p, L::groups);
    float* partial = b.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    gated_head_norm_backward_kernel<L><<<static_cast<unsigned>(blocks), L::block_threads, 0, stream>>>(b, partial);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, blocks / p.heads * L::groups, p.heads * p.dim, b.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
