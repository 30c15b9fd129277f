#include "cpu/kernels.h"
#include "ops/cuda_context.h"
#include "ops/ops.h"
#ifdef FLASH_XLSTM_WITH_CUDA
#include "cuda/pointwise/launch.h"
#endif

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

void run(const Swiglu& p, const Tensor& x) {
  if (p.rows == 0) return;
  if (x.is_cpu()) {
    cpu::swiglu(p);
    return;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_device_supported(device);
  check_cuda(cuda::swiglu(p, current_stream(device)), "swiglu");
#else
  no_cuda_build("swiglu");
#endif
}

}  // namespace

Tensor swiglu(Tensor x, Tensor y) {
  check_inputs(x, y);
  x = rows_of(x);
  y = rows_of(y);
  Swiglu p = problem(x, y);
  Tensor out = new_empty(x, sizes_of(x), x.scalar_type());
  p.out = out.data_ptr();
  run(p, x);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dout, Tensor x, Tensor y) {
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
  run(p, x);
  return {dx, dy};
}

}  // namespace flash_xlstm
