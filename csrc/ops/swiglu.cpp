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
  p.gradient_stride = p.columns;
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", x, p);
  return {dx, dy};
}

Tensors<2> swiglu_joined_backward(Tensor dout, Tensor z, bool remake) {
  check_op_dtype("z", z.scalar_type());
  const int64_t dim = z.dim() - 1;
  if (dim < 0 || z.size(dim) % 2 != 0) {
    value_error("z has shape ", shape_text(z), "; its last dimension must be even: x and y side by side");
  }
  std::vector<int64_t> sizes = sizes_of(z);
  sizes.back() /= 2;
  check_shape("dout", dout, sizes, "half of z");
  check_dtype("dout", dout, z.scalar_type(), ", as z");
  check_device("dout", dout, z, "z");
  z = rows_of(z);
  dout = torch::stable::contiguous(dout);
  const int64_t columns = sizes.back();
  const auto second = [&](const Tensor& t) {
    return static_cast<char*>(t.data_ptr()) + columns * element_bytes(to_dtype(z.scalar_type()));
  };
  Tensor dz = new_empty(z, sizes_of(z), z.scalar_type());
  if (!remake) sizes.assign(sizes.size(), 0);
  Tensor out = new_empty(z, sizes, z.scalar_type());
  Swiglu p{};
  p.dtype = to_dtype(z.scalar_type());
  p.columns = columns;
  p.rows = columns == 0 ? 0 : z.numel() / (2 * columns);
  p.x = z.data_ptr();
  p.y = second(z);
  p.x_stride = p.y_stride = row_stride(z);
  p.dout = dout.data_ptr();
  p.out = remake ? out.data_ptr() : nullptr;
  p.dx = dz.data_ptr();
  p.dy = second(dz);
  p.gradient_stride = 2 * columns;
  if (p.rows > 0) run<cpu::swiglu, cuda::swiglu>("swiglu", z, p);
  return {dz, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_xlstm, lib) {
  lib.def("swiglu(Tensor x, Tensor y) -> Tensor");
  lib.def("swiglu_backward(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)");
  // The same of x and y that lie side by side in z, as a joined projection leaves them; their gradients do, too. With
  // `remake` also swiglu(x, y), for who did not keep it; else empty.
  lib.def("swiglu_joined_backward(Tensor dout, Tensor z, bool remake) -> (Tensor dz, Tensor out)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("swiglu", TORCH_BOX(&swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  lib.impl("swiglu_joined_backward", TORCH_BOX(&swiglu_joined_backward));
}

static const DescribedOp described_swiglu("swiglu");

}  // namespace flash_xlstm
