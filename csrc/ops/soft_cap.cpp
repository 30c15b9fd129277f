#include <cmath>

#include "cpu/kernels.h"
#include "ops/cuda_context.h"
#include "ops/ops.h"
#ifdef FLASH_XLSTM_WITH_CUDA
#include "cuda/pointwise/launch.h"
#endif

namespace flash_xlstm {
namespace {

void check_cap(double cap) {
  const float value = static_cast<float>(cap);
  if (!std::isfinite(value) || value <= 0.0f) {
    value_error("cap is ", cap, "; it must be None, or finite and greater than 0 in float32");
  }
}

// dy == nullptr: the forward, else the gradient.
void run(const Tensor& x, const Tensor* dy, const Tensor& out, double cap) {
  SoftCap params{to_dtype(x.scalar_type()), x.numel(), static_cast<float>(cap), x.data_ptr(),
                 dy ? dy->data_ptr() : nullptr, out.data_ptr()};
  if (params.count == 0) return;
  if (x.is_cpu()) {
    cpu::soft_cap(params);
    return;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_device_supported(device);
  check_cuda(cuda::soft_cap(params, current_stream(device)), "soft_cap");
#else
  no_cuda_build("soft_cap");
#endif
}

}  // namespace

Tensor soft_cap(Tensor x, double cap) {
  check_op_dtype("x", x.scalar_type());
  check_cap(cap);
  x = torch::stable::contiguous(x);
  Tensor y = new_empty(x, sizes_of(x), x.scalar_type());
  run(x, nullptr, y, cap);
  return y;
}

Tensor soft_cap_backward(Tensor dy, Tensor x, double cap) {
  check_op_dtype("x", x.scalar_type());
  check_dtype("dy", dy, x.scalar_type(), ", as x");
  check_shape("dy", dy, sizes_of(x), "the shape of x");
  check_device("dy", dy, x, "x");
  check_cap(cap);
  x = torch::stable::contiguous(x);
  dy = torch::stable::contiguous(dy);
  Tensor dx = new_empty(x, sizes_of(x), x.scalar_type());
  run(x, &dy, dx, cap);
  return dx;
}

}  // namespace flash_xlstm
