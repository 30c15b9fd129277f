// y = cap tanh(x / cap) and its gradient dx = dy (1 - tanh(x / cap)^2), 16 bytes at a time where all tensors are
// aligned, else one element.
#include <limits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int threads = 256;

template <typename T, bool gradient>
__device__ __forceinline__ float apply(float x, float dy, float cap, float inverse_cap) {
  if constexpr (sizeof(T) == 4) {
    const float t = tanhf(x / cap);
    return gradient ? dy * (1.0f - t * t) : cap * t;
  } else {
    // tanhf would take longer than the loads and stores. With e = exp(-2 |u|) the slope of tanh is 4 e / (1 + e)^2.
    constexpr float two_log2_e = 2.88539008f;
    const float u = x * inverse_cap;
    if (!gradient) return cap * fast_tanh(u);
    float e, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-two_log2_e * fabsf(u)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + e));
    return dy * (4.0f * e * (reciprocal * reciprocal));
  }
}

// A thread takes one pack of each tensor. Two are slower on an H200.
template <typename T, bool gradient>
__global__ void __launch_bounds__(threads)
    soft_cap_kernel(const T* x, const T* dy, T* out, int64_t count, int64_t vectors, float cap, float inverse_cap) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  constexpr int width = 16 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t at = thread; at < vectors; at += step) {
    const Pack<T, width> xs = load_once<T, width>(x, at * width);
    Pack<T, width> dys{};
    if (gradient) dys = load_once<T, width>(dy, at * width);
    float value[width], incoming[width] = {};
    unpack(value, xs);
    if (gradient) unpack(incoming, dys);
#pragma unroll
    for (int e = 0; e < width; ++e) value[e] = apply<T, gradient>(value[e], incoming[e], cap, inverse_cap);
    store_pack(out, at * width, round_pack<T>(value));
  }
  for (int64_t e = vectors * width + thread; e < count; e += step)
    out[e] = from_float<T>(apply<T, gradient>(to_float(x[e]), gradient ? to_float(dy[e]) : 0.0f, cap, inverse_cap));
}

}  // namespace

cudaError_t soft_cap(const SoftCap& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t width = 16 / sizeof(T), max_blocks = 1 << 22;
    const int64_t vectors = aligned_16(p.x) && aligned_16(p.dy) && aligned_16(p.out) ? p.count / width : 0;
    const int64_t items = vectors > 0 ? vectors : p.count;
    const dim3 blocks(static_cast<unsigned>(std::min(ceil_div(items, threads), max_blocks)));
    const auto kernel = p.dy == nullptr ? soft_cap_kernel<T, false> : soft_cap_kernel<T, true>;
    // 1 / cap is infinite for the smallest caps. At the largest float instead, 0 times it is 0.
    const float inverse_cap = std::min(1.0f / p.cap, std::numeric_limits<float>::max());
    return launch_early(kernel, blocks, dim3(threads), 0, 1, stream, static_cast<const T*>(p.x),
                        static_cast<const T*>(p.dy), static_cast<T*>(p.out), p.count, vectors, p.cap, inverse_cap);
  });
}

}  // namespace flash_xlstm::cuda
