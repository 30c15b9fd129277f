// out = x factor, in 16-byte stores where x and out are aligned. The last elements, and all elements of unaligned
// tensors, go one by one.
#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"
#include "params/loss.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int threads = 256;

template <typename In, typename Out>
__global__ void __launch_bounds__(threads)
    scaling_kernel(const In* x, const float* factor, Out* out, int64_t count, int64_t vectors) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  constexpr int width = 16 / sizeof(Out), part = 16 / sizeof(In) < width ? 16 / sizeof(In) : width;
  const float by = __ldg(factor);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t at = thread; at < vectors; at += step) {
    float value[width];
#pragma unroll
    for (int first = 0; first < width; first += part) {
      float some[part];
      unpack(some, load_once<In, part>(x, at * width + first));
#pragma unroll
      for (int e = 0; e < part; ++e) value[first + e] = some[e] * by;
    }
    store_pack(out, at * width, round_pack<Out>(value));
  }
  for (int64_t e = vectors * width + thread; e < count; e += step) out[e] = from_float<Out>(to_float(x[e]) * by);
}

}  // namespace

cudaError_t scaling(const Scaling& p, cudaStream_t stream) {
  return dispatch_dtype(p.out_dtype, [&](auto zero) {
    using Out = decltype(zero);
    constexpr int64_t width = 16 / sizeof(Out), max_blocks = 1 << 22;
    const int64_t vectors = aligned_16(p.x) && aligned_16(p.out) ? p.count / width : 0;
    const int64_t items = vectors > 0 ? vectors : p.count;
    const dim3 blocks(static_cast<unsigned>(std::min(ceil_div(items, threads), max_blocks)));
    const auto launch = [&](auto from) {
      using In = decltype(from);
      return launch_early(scaling_kernel<In, Out>, blocks, dim3(threads), 0, 1, stream, static_cast<const In*>(p.x),
                          p.factor, static_cast<Out*>(p.out), p.count, vectors);
    };
    return p.x_dtype == p.out_dtype ? launch(Out{}) : launch(0.0f);
  });
}

}  // namespace flash_xlstm::cuda
