// SwiGLU of two tensors, or of the two halves of one.
#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "params/pointwise.h"

namespace flash_xlstm {
namespace {

void check_inputs(const Tensor& x, const Tensor& y) {
  check_op_dtype("x", x.scalar_type());
  check_shape("y", y, sizes_of(x), "the shape of x");
  check_dtype("y", y, x.scalar_type(), ", as x");
  check_device("y", y, x, "x");
}

Tensor rows_of(const Tensor& t) { return t.dim() == 0 ? as_contiguous(t) : with_uniform_rows(t); }

Swiglu problem(const Tensor& x, const Tensor& y) {
  Swiglu p{};
  p.dtype = to_dtype(x.scalar_type());
  p.columns = x.dim() == 0 ? 1 : x.size(x.dim() - 1);
  p.rows = p.columns == 0 ? 0 : x.numel() / p.columns;
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.x_stride = x.dim() == 0 ? 1 : row_stride(x);
  p.y_stride = y.dim() == 0 ? 1 : row_stride(y);
  return p;
}

Tensor swiglu(Tensor x, Tensor y) {
  check_inputs(x, y);
  x = rows_of(x);
  y = rows_of(y);
  Swiglu p = problem(x, y);
  Tensor out = new_empty(x, sizes_of(x), x.scalar_type());
  p.out = out.data_ptr();
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", x, p);
  return out;
}

Tensors<2> swiglu_backward(Tensor dout, Tensor x, Tensor y) {
  check_inputs(x, y);
  check_shape("dout", dout, sizes_of(x), "the shape of x");
  check_dtype("dout", dout, x.scalar_type(), ", as x");
  check_device("dout", dout, x, "x");
  x = rows_of(x);
  y = rows_of(y);
  dout = as_contiguous(dout);
  Swiglu p = problem(x, y);
  Tensor dx = new_empty(x, sizes_of(x), x.scalar_type()), dy = new_empty(x, sizes_of(x), x.scalar_type());
  p.dout = dout.data_ptr();
  p.dx = dx.data_ptr();
  p.dy = dy.data_ptr();
  p.gradient_stride = p.columns;
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", x, p);
  return {dx, dy};
}

// The sizes of x and of y, which lie side by side in z.
std::vector<int64_t> halves_of(const Tensor& z) {
  check_op_dtype("x", z.scalar_type());
  std::vector<int64_t> sizes = sizes_of(z);
  if (sizes.empty() || sizes.back() % 2 != 0) {
    value_error("y is None and x has shape ", shape_text(z),
                "; without y the last dimension of x must be even: it holds the two side by side");
  }
  sizes.back() /= 2;
  return sizes;
}

char* second_half(const Tensor& z) {
  return static_cast<char*>(z.data_ptr()) + z.size(z.dim() - 1) / 2 * element_bytes(to_dtype(z.scalar_type()));
}

Swiglu joined_problem(const Tensor& z) {
  Swiglu p{};
  p.dtype = to_dtype(z.scalar_type());
  p.columns = z.size(z.dim() - 1) / 2;
  p.rows = p.columns == 0 ? 0 : z.numel() / (2 * p.columns);
  p.x = z.data_ptr();
  p.y = second_half(z);
  p.x_stride = p.y_stride = row_stride(z);
  return p;
}

Tensor swiglu_joined(Tensor z) {
  const std::vector<int64_t> sizes = halves_of(z);
  z = rows_of(z);
  Swiglu p = joined_problem(z);
  Tensor out = new_empty(z, sizes, z.scalar_type());
  p.out = out.data_ptr();
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", z, p);
  return out;
}

Tensors<2> swiglu_joined_backward(Tensor dout, Tensor z, bool remake) {
  std::vector<int64_t> sizes = halves_of(z);
  check_shape("dout", dout, sizes, "half of x");
  check_dtype("dout", dout, z.scalar_type(), ", as x");
  check_device("dout", dout, z, "x");
  z = rows_of(z);
  dout = as_contiguous(dout);
  Swiglu p = joined_problem(z);
  Tensor dz = new_empty(z, sizes_of(z), z.scalar_type());
  if (!remake) sizes.assign(sizes.size(), 0);
  Tensor out = new_empty(z, sizes, z.scalar_type());
  p.dout = dout.data_ptr();
  p.out = remake ? out.data_ptr() : nullptr;
  p.dx = dz.data_ptr();
  p.dy = second_half(dz);
  p.gradient_stride = 2 * p.columns;
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", z, p);
  return {dz, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("swiglu(Tensor x, Tensor y) -> Tensor");
  lib.def("swiglu_backward(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)");
  // The same where x and y lie side by side in z, as a joined projection leaves them. Their gradients lie side by side
  // in dz. With `remake` the backward also returns the output, for callers that did not keep it; else `out` is empty.
  lib.def("swiglu_joined(Tensor z) -> Tensor");
  lib.def("swiglu_joined_backward(Tensor dout, Tensor z, bool remake) -> (Tensor dz, Tensor out)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("swiglu", TORCH_BOX(&swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  lib.impl("swiglu_joined", TORCH_BOX(&swiglu_joined));
  lib.impl("swiglu_joined_backward", TORCH_BOX(&swiglu_joined_backward));
}

static const DescribedOp described_swiglu("swiglu");

}  // namespace flash_xlstm
