// y = cap tanh(x / cap) and its gradient dx = dy (1 - (y / cap)^2), 16 bytes a thread and step where aligned.
#include <algorithm>

#include "cuda/numeric.cuh"
#include "cuda/pointwise/launch.h"

namespace flash_xlstm::cuda {
namespace {

template <typename T, bool gradient>
__device__ __forceinline__ T apply(T x, T dy, float cap) {
  const float t = tanhf(to_float(x) / cap);
  return from_float<T>(gradient ? to_float(dy) * (1.0f - t * t) : cap * t);
}

template <typename T, bool gradient>
__global__ void soft_cap_kernel(const T* x, const T* dy, T* out, int64_t count, int64_t vectors, float cap) {
  constexpr int width = 16 / sizeof(T);
  struct alignas(16) Group {
    T value[width];
  };
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t g = thread; g < vectors; g += threads) {
    const Group xs = reinterpret_cast<const Group*>(x)[g];
    const Group dys = gradient ? reinterpret_cast<const Group*>(dy)[g] : Group{};
    Group result;
#pragma unroll
    for (int e = 0; e < width; ++e) result.value[e] = apply<T, gradient>(xs.value[e], dys.value[e], cap);
    reinterpret_cast<Group*>(out)[g] = result;
  }
  for (int64_t e = vectors * width + thread; e < count; e += threads) {
    out[e] = apply<T, gradient>(x[e], gradient ? dy[e] : x[e], cap);
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

cudaError_t soft_cap(const SoftCap& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int width = 16 / sizeof(T), threads = 256;
    constexpr int64_t max_blocks = 1 << 20;
    const int64_t vectors = aligned(p.x) && aligned(p.dy) && aligned(p.out) ? p.count / width : 0;
    const int64_t items = vectors > 0 ? vectors : p.count;
    const unsigned blocks = static_cast<unsigned>(std::min((items + threads - 1) / threads, max_blocks));
    const T* x = static_cast<const T*>(p.x);
    const T* dy = static_cast<const T*>(p.dy);
    T* out = static_cast<T*>(p.out);
    if (dy == nullptr) soft_cap_kernel<T, false><<<blocks, threads, 0, stream>>>(x, dy, out, p.count, vectors, p.cap);
    else soft_cap_kernel<T, true><<<blocks, threads, 0, stream>>>(x, dy, out, p.count, vectors, p.cap);
    return cudaGetLastError();
  });
}

}  // namespace flash_xlstm::cuda
