// The soft cap and its gradient.
#include <cmath>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "params/pointwise.h"

namespace flash_xlstm {
namespace {

void check_cap(double cap) {
  const float value = static_cast<float>(cap);
  if (!std::isfinite(value) || value <= 0.0f) {
    value_error("cap is ", cap, "; it must be None, or finite and greater than 0 in float32");
  }
}

// Writes the capped x to `out`, or with dy the gradient of x.
void run_soft_cap(const Tensor& x, const Tensor* dy, const Tensor& out, double cap) {
  const SoftCap params{.dtype = to_dtype(x.scalar_type()),
                       .count = x.numel(),
                       .cap = static_cast<float>(cap),
                       .x = x.data_ptr(),
                       .dy = dy ? dy->data_ptr() : nullptr,
                       .out = out.data_ptr()};
  if (params.count > 0) run<cpu::soft_cap, cuda::soft_cap>("soft_cap", x, params);
}

Tensor soft_cap(Tensor x, double cap) {
  check_op_dtype("x", x.scalar_type());
  check_cap(cap);
  x = as_contiguous(x);
  Tensor y = new_empty(x, sizes_of(x), x.scalar_type());
  run_soft_cap(x, nullptr, y, cap);
  return y;
}

Tensor soft_cap_backward(Tensor dy, Tensor x, double cap) {
  check_op_dtype("x", x.scalar_type());
  check_dtype("dy", dy, x.scalar_type(), ", as x");
  check_shape("dy", dy, sizes_of(x), "the shape of x");
  check_device("dy", dy, x, "x");
  check_cap(cap);
  x = as_contiguous(x);
  dy = as_contiguous(dy);
  Tensor dx = new_empty(x, sizes_of(x), x.scalar_type());
  run_soft_cap(x, &dy, dx, cap);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("soft_cap(Tensor x, float cap) -> Tensor");
  lib.def("soft_cap_backward(Tensor dy, Tensor x, float cap) -> Tensor");
}

IMPLEMENT_OPS(lib) {
  lib.impl("soft_cap", TORCH_BOX(&soft_cap));
  lib.impl("soft_cap_backward", TORCH_BOX(&soft_cap_backward));
}

static const DescribedOp described_soft_cap("soft_cap");

}  // namespace flash_xlstm
