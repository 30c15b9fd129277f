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

Tensor rows_of(const Tensor& t) { return t.dim() == 0 ? torch::stable::contiguous(t) : with_uniform_rows(t); }

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
  dout = torch::stable::contiguous(dout);
  Swiglu p = problem(x, y);
  Tensor dx = new_empty(x, sizes_of(x), x.scalar_type()), dy = new_empty(x, sizes_of(x), x.scalar_type());
  p.dout = dout.data_ptr();
  p.dx = dx.data_ptr();
  p.dy = dy.data_ptr();
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", x, p);
  return {dx, dy};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_xlstm, lib) {
  lib.def("swiglu(Tensor x, Tensor y) -> Tensor");
  lib.def("swiglu_backward(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("swiglu", TORCH_BOX(&swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

static const DescribedOp described_swiglu("swiglu");

}  // namespace flash_xlstm
