// out = silu(x) y and its gradients. A thread takes 16 bytes of a row where everything is aligned, else one element. A
// block's threads lie along the columns.
#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"
#include "cuda/pointwise/swiglu.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int threads = 256;

template <typename T, int width, bool gradient, bool with_out>
__global__ void __launch_bounds__(threads) swiglu_kernel(const __grid_constant__ Swiglu p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) * width;
  if (column >= p.columns) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t at = row * p.columns + column;
    Pack<T, width> x = load_once<T, width>(p.x, row * p.x_stride + column);
    Pack<T, width> y = load_once<T, width>(p.y, row * p.y_stride + column);
    Pack<T, width> dout{}, out{};
    if (gradient) dout = load_once<T, width>(p.dout, at);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float value = to_float(x.value[e]), other = to_float(y.value[e]);
      if (gradient) {
        const SwigluGradients g = swiglu_gradients<T>(value, other, to_float(dout.value[e]));
        x.value[e] = from_float<T>(g.x);
        y.value[e] = from_float<T>(g.y);
        if (with_out) out.value[e] = from_float<T>(g.out);
      } else {
        out.value[e] = from_float<T>(swiglu_of<T>(value, other));
      }
    }
    if (with_out) store_pack(p.out, at, out);
    if (gradient) {
      store_pack(p.dx, row * p.gradient_stride + column, x);
      store_pack(p.dy, row * p.gradient_stride + column, y);
    }
  }
}

template <typename T, int width>
cudaError_t launch(const Swiglu& p, cudaStream_t stream) {
  constexpr int64_t max_rows = 65535;  // CUDA's limit of gridDim.y
  const int64_t per_block = int64_t{threads} * width;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, per_block)),
                  static_cast<unsigned>(std::min(p.rows, max_rows)));
  const auto kernel = p.dout == nullptr  ? swiglu_kernel<T, width, false, true>
                      : p.out == nullptr ? swiglu_kernel<T, width, true, false>
                                         : swiglu_kernel<T, width, true, true>;
  return launch_early(kernel, grid, dim3(threads), 0, 1, stream, p);
}

}  // namespace

cudaError_t swiglu(const Swiglu& params, cudaStream_t stream) {
  Swiglu p = params;
  if (p.x_stride == p.columns && p.y_stride == p.columns && (p.dout == nullptr || p.gradient_stride == p.columns)) {
    p.columns = p.x_stride = p.y_stride = p.gradient_stride = p.rows * p.columns;  // contiguous: one long row
    p.rows = 1;
  }
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int width = 16 / sizeof(T);
    const bool vectors = aligned_16(p.x) && aligned_16(p.y) && aligned_16(p.out) && aligned_16(p.dout) &&
                         aligned_16(p.dx) && aligned_16(p.dy) && p.columns % width == 0 && p.x_stride % width == 0 &&
                         p.y_stride % width == 0 && p.gradient_stride % width == 0;
    return vectors ? launch<T, width>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace flash_xlstm::cuda
