// y = sigmoid(gate) * LayerNorm(h) * weight for each head, and its gradient: each row of a head read once (rows.cuh).
// The variance is of what the mean leaves, so that a large mean costs no precision. A block of the gradient stays with
// one head.
#include "cuda/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int tensors = 3;  // that the gradient reads: h, gate, dy

template <typename L>
__global__ void __launch_bounds__(L::block_threads, resident_blocks<L>(768))
    gated_head_norm_kernel(const __grid_constant__ GatedHeadNorm p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
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
  RowWeight<L> weights(p.weight, column, count, p.weight_dtype == DType::float32);
  float sum[1] = {}, square[1] = {};
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
    float h[width];
    unpack(h, packs[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) sum[0] += h[e];
  }
  row_sums<L>(sum, buffer[0][group]);
  const float mean = sum[0] / static_cast<float>(count);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
    float h[width];
    keep_packed(packs[k]);
    unpack(h, packs[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) square[0] += (h[e] - mean) * (h[e] - mean);
  }
  row_sums<L>(square, buffer[1][group]);
  const float inverse = rsqrtf(square[0] / static_cast<float>(count) + p.eps);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    float weight[width], h[width], pre[width];
    weights.read(weight, k);
    keep_packed(packs[k]);
    unpack(h, packs[k]);
    keep_packed(gate[k]);
    unpack(pre, gate[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float normed = (h[e] - mean) * inverse;
      h[e] = sigmoids(pre[e]).open * (normed * weight[e]);
    }
    store_pack(p.y, row * p.dim + at, round_pack<T>(h));
  }
}

template <typename L>
__global__ void __launch_bounds__(walk_threads, 1)
    gated_head_norm_backward_kernel(const __grid_constant__ GatedHeadNormBackward b, float* partial, int stages) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  using T = typename L::T;
  using S = Slots<L, tensors>;
  constexpr int width = L::width;
  const GatedHeadNorm& p = b.p;
  __shared__ float mean_buffer[L::walk_groups][L::row_warps], buffer[L::walk_groups][3 * L::row_warps];
  extern __shared__ uint4 slots[];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int heads = static_cast<int>(p.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int64_t first = blockIdx.x / heads, step = gridDim.x / heads * L::walk_groups, column = head * p.dim;
  const int count = static_cast<int>(p.dim), ahead = stages - 1;
  const bool weight_is_float = p.weight_dtype == DType::float32;
  float weight[L::packs][width], dweight[L::packs][width] = {};
  fetch_row_weight<L>(weight, p.weight, column, count, weight_is_float);
  // All groups go on for as long as the first has rows: racecheck does not follow groups that leave at different times.
  int64_t token = first * L::walk_groups + group;
  const int64_t row_elements = p.heads * p.dim, step_elements = step * row_elements;  // of a token, of a step
  int64_t next_start = token * row_elements + column + thread * width;
  int64_t next_gate_start = token * p.gate_stride + column + thread * width;
  const S ring(slots, stages);
  uint32_t slot = ring.first;
  const auto copy_next = [&](int64_t next) {
    if (next < p.tokens) {
      copy_row<L>(slot, p.h, next_start, count);
      copy_row<L>(slot + S::tensor_bytes, p.gate, next_gate_start, count);
      copy_row<L>(slot + 2 * S::tensor_bytes, b.dy, next_start, count);
    }
    ptx::cp_async_commit();  // also of nothing: wait_for_copies counts
    next_start += step_elements, next_gate_start += step * p.gate_stride, slot = ring.after(slot);
  };
#pragma unroll 1
  for (int stage = 0; stage < ahead; ++stage) copy_next(token + stage * step);
  widen_row_weight<L>(weight, weight_is_float);
  const float share = 1.0f / static_cast<float>(count);  // of an element in a mean
#pragma unroll 1
  for (; token - group < p.tokens; token += step) {
    copy_next(token + ahead * step);
    wait_for_copies(ahead);  // the oldest are where the next will go
    const bool has_row = token < p.tokens;
    const int64_t start = next_start - stages * step_elements;
    const int64_t gate_start = next_gate_start - stages * step * p.gate_stride;
    const auto within = [&](int k) { return (thread + k * L::row_threads) * width < count; };
    float h[L::kept_packs][width], opened[L::kept_packs][width], shut[L::kept_packs][width];
    const auto read_h = [&](int k) { unpack(h[k % L::kept_packs], read_pack<L>(slot, p.h, start, k, count)); };
    const auto open_gate = [&](int k) {
      float gate[width], dy[width];
      unpack(gate, read_pack<L>(slot + S::tensor_bytes, p.gate, gate_start, k, count));
      unpack(dy, read_pack<L>(slot + 2 * S::tensor_bytes, b.dy, start, k, count));
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const Sigmoids s = sigmoids(gate[e]);
        // Rounded alike for the sums and the gradients: with one column nothing is left.
        opened[k % L::kept_packs][e] = __fmul_rn(dy[e], s.open);
        shut[k % L::kept_packs][e] = s.shut;
      }
    };
    float sum[1] = {};
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row) break;
      read_h(k);
#pragma unroll
      for (int e = 0; e < width; ++e) sum[0] += h[k % L::kept_packs][e];
    }
    row_sums<L>(sum, mean_buffer[group]);
    const float mean = sum[0] / static_cast<float>(count);
    // Of the squares of the row without its mean, of the normed row's gradient, and of that times the row without mean.
    float sums[3] = {};
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row || !within(k)) continue;
      if (!L::kept) read_h(k);
      open_gate(k);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const float centred = h[k % L::kept_packs][e] - mean;
        const float through = __fmul_rn(opened[k % L::kept_packs][e], weight[k][e]);
        sums[0] += centred * centred;
        sums[1] += through;
        sums[2] += through * centred;
      }
    }
    row_sums<L>(sums, buffer[group]);
    if (has_row) {
      const float inverse = rsqrtf(sums[0] * share + p.eps);
      const float through_mean = sums[1] * share, along = sums[2] * inverse * share;
#pragma unroll
      for (int k = 0; k < L::packs; ++k) {
        if (!within(k)) continue;
        if (!L::kept) read_h(k), open_gate(k);
        float dh[width], dgate[width];
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const float normed = (h[k % L::kept_packs][e] - mean) * inverse;
          const float incoming = opened[k % L::kept_packs][e], through = __fmul_rn(incoming, weight[k][e]);
          dweight[k][e] += incoming * normed;
          dgate[e] = through * normed * shut[k % L::kept_packs][e];
          dh[e] = inverse * (through - through_mean - normed * along);
        }
        store_pack(b.dgate, start + k * L::row_threads * width, round_pack<T>(dgate));
        store_pack(b.dh, start + k * L::row_threads * width, round_pack<T>(dh));
      }
    }
  }
  if (partial != nullptr)
    write_partial<L>(dweight, reinterpret_cast<float*>(slots), partial + first * p.heads * p.dim + column, count);
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
  return p.heads * walking_blocks(p.tokens, groups, std::max<int64_t>(1, processor_count() / p.heads));
}

}  // namespace

cudaError_t gated_head_norm(const GatedHeadNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>((p.tokens * p.heads + L::groups - 1) / L::groups);
    return launch_early(gated_head_norm_kernel<L>, dim3(blocks), dim3(L::block_threads), 0, 1, stream, p);
  });
}

int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& b) {
  if (b.dweight == nullptr) return 0;
  const int64_t blocks = backward_blocks(b.p, walking_rows(b.p.dtype, b.p.dim, vectors(b)));
  return blocks * b.p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& b, void* workspace, cudaStream_t stream) {
  const GatedHeadNorm& p = b.p;
  return dispatch_walking_layout(p.dtype, p.dim, vectors(b), [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = backward_blocks(p, L::walk_groups);
    const int stages = walking_stages<L>(tensors), bytes = stages * tensors * L::row_slots * 16;
    float* partial = b.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    const auto kernel = gated_head_norm_backward_kernel<L>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    status = launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(walk_threads), bytes, 1, stream, b, partial,
                          stages);
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, blocks / p.heads, p.heads * p.dim, b.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
