#include "cpu/kernels.h"
#include "ops/cuda_context.h"
#include "ops/ops.h"
#ifdef FLASH_XLSTM_WITH_CUDA
#include "cuda/linear/launch.h"
#endif

namespace flash_xlstm {
namespace {

constexpr int64_t max_rows = 16, vector_bytes = 16;

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % vector_bytes == 0; }

#ifdef FLASH_XLSTM_WITH_CUDA
void check_cuda_limits(const Tensor& x, const Tensor& weight) {
  if (x.scalar_type() != ScalarType::BFloat16) {
    type_error("x has dtype ", dtype_text(x.scalar_type()), "; on CUDA it must be bfloat16");
  }
  if (weight.size(1) % 8 != 0) {
    value_error("weight has shape ", shape_text(weight), "; on CUDA its second dimension must be a multiple of 8");
  }
  if (!aligned(weight)) value_error("weight begins at no multiple of 16 bytes; call weight.clone()");
}
#endif

}  // namespace

Tensor linear_rows(Tensor x, Tensor weight, OptTensor bias) {
  if (x.dim() < 1) value_error("x has shape ", shape_text(x), "; it must be (..., in)");
  check_op_dtype("x", x.scalar_type());
  const int64_t in = x.size(x.dim() - 1);
  if (in < 1) value_error("x has shape ", shape_text(x), "; its last dimension must be at least 1");
  const int64_t rows = x.numel() / in;
  if (rows > max_rows) value_error("x has ", rows, " rows; it must have at most ", max_rows);
  check_shape("weight", weight, {-1, in}, "(out, in)");
  check_dtype("weight", weight, x.scalar_type(), ", as x");
  check_device("weight", weight, x, "x");
  const int64_t out = weight.size(0);
  if (bias) {
    check_shape("bias", *bias, {out}, "(out,)");
    check_dtype("bias", *bias, x.scalar_type(), ", as x");
    check_device("bias", *bias, x, "x");
    bias = torch::stable::contiguous(*bias);
  }
  weight = torch::stable::contiguous(weight);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = out;
  Tensor y = new_empty(x, sizes, x.scalar_type());
  if (rows == 0 || out == 0) return y;
  x = with_uniform_rows(x);
  if (x.is_cuda() && (!aligned(x) || row_stride(x) * 2 % vector_bytes != 0)) x = torch::stable::clone(x);
  const LinearRows p{
      to_dtype(x.scalar_type()),         rows,        in, out, x.data_ptr(), row_stride(x), weight.data_ptr(),
      bias ? bias->data_ptr() : nullptr, y.data_ptr()};
  if (x.is_cpu()) {
    cpu::linear_rows(&p, 1);
    return y;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  check_cuda_limits(x, weight);
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_device_supported(device);
  check_cuda(cuda::linear_rows(p, current_stream(device)), "linear_rows");
#else
  no_cuda_build("linear_rows");
#endif
  return y;
}

}  // namespace flash_xlstm
