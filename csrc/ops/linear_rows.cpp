#include <utility>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "params/linear.h"
#include "params/pointwise.h"

namespace flash_xlstm {
namespace {

[[maybe_unused]] bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % linear_alignment == 0;
}

// (rows, in) of x.
std::pair<int64_t, int64_t> check_x(const Tensor& x) {
  if (x.dim() < 1) value_error("x has shape ", shape_text(x), "; it must be (..., in)");
  check_op_dtype("x", x.scalar_type());
  const int64_t in = x.size(x.dim() - 1);
  if (in < 1) value_error("x has shape ", shape_text(x), "; its last dimension must be at least 1");
  const int64_t rows = x.numel() / in;
  if (rows > linear_max_rows) value_error("x has ", rows, " rows; it must have at most ", linear_max_rows);
  return {rows, in};
}

void check_weight(const char* name, const Tensor& weight, const char* bias_name, const OptTensor& bias, const Tensor& x,
                  int64_t in) {
  check_shape(name, weight, {-1, in}, "(out, in)");
  check_dtype(name, weight, x.scalar_type(), ", as x");
  check_device(name, weight, x, "x");
  if (!bias) return;
  check_shape(bias_name, *bias, {weight.size(0)}, "(out,)");
  check_dtype(bias_name, *bias, x.scalar_type(), ", as x");
  check_device(bias_name, *bias, x, "x");
}

Tensor output_of(const Tensor& x, const Tensor& weight) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = weight.size(0);
  return new_empty(x, sizes, x.scalar_type());
}

#ifdef FLASH_XLSTM_WITH_CUDA
void check_cuda_limits(const Tensor& x, const char* name, const Tensor& weight) {
  if (to_dtype(x.scalar_type()) != linear_cuda_dtype) {
    type_error("x has dtype ", dtype_text(x.scalar_type()), "; on CUDA it must be bfloat16");
  }
  if (weight.size(1) % linear_in_multiple != 0) {
    value_error(name, " has shape ", shape_text(weight), "; on CUDA its second dimension must be a multiple of ",
                linear_in_multiple);
  }
  if (!aligned(weight)) {
    value_error(name, " begins at no multiple of ", linear_alignment, " bytes; call ", name, ".clone()");
  }
}

// x with rows that are aligned to 16 bytes and do not overlap. The rows of an expanded x overlap and are copied.
Tensor aligned_rows(const Tensor& x) {
  Tensor t = with_uniform_rows(x);
  const int64_t in = t.size(t.dim() - 1);
  if (t.numel() > in && row_stride(t) < in) t = as_contiguous(t);
  return aligned(t) && row_stride(t) * element_bytes(linear_cuda_dtype) % linear_alignment == 0
             ? t
             : copy_of(t);
}

void run_cuda(const char* op, const Tensor& x, const FusedLinearRows& p) {
  on_cuda(op, x, [&](cudaStream_t stream) { return cuda::fused_linear_rows(p, stream); });
}
#endif

Tensor linear_rows(Tensor x, Tensor weight, OptTensor bias, [[maybe_unused]] bool constant_weights) {
  const auto [rows, in] = check_x(x);
  check_weight("weight", weight, "bias", bias, x, in);
  weight = as_contiguous(weight);
  if (bias) bias = as_contiguous(*bias);
  Tensor y = output_of(x, weight);
  const int64_t out = weight.size(0);
  if (rows == 0 || out == 0) return y;
  const void* const bias_data = bias ? bias->data_ptr() : nullptr;
  if (x.is_cpu()) {
    x = with_uniform_rows(x);
    const LinearRows p{.dtype = to_dtype(x.scalar_type()),
                       .rows = rows,
                       .in = in,
                       .out = out,
                       .x = x.data_ptr(),
                       .x_stride = row_stride(x),
                       .weight = weight.data_ptr(),
                       .bias = bias_data,
                       .y = y.data_ptr()};
    cpu::linear_rows(&p, 1);
    return y;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  check_cuda_limits(x, "weight", weight);
  x = aligned_rows(x);
  FusedLinearRows p{};
  p.dtype = to_dtype(x.scalar_type());
  p.rows = rows, p.in = in;
  p.x = x.data_ptr(), p.x_stride = row_stride(x);
  p.count = 1;
  p.part[0] = {.weight = weight.data_ptr(), .bias = bias_data, .y = y.data_ptr(), .out = out};
  p.constant_weights = constant_weights;
  run_cuda("linear_rows", x, p);
#else
  no_cuda_build("linear_rows");
#endif
  return y;
}

std::vector<Tensor> fused_linear_rows(Tensor x, std::vector<Tensor> weights, std::vector<OptTensor> biases,
                                      OptTensor residual, bool swiglu, bool constant_weights) {
  const auto [rows, in] = check_x(x);
  const int64_t count = static_cast<int64_t>(weights.size());
  if (count < 1 || count > FusedLinearRows::max_parts) {
    value_error("weights has ", count, " tensors; it must have 1 to ", int64_t{FusedLinearRows::max_parts});
  }
  if (static_cast<int64_t>(biases.size()) != count) {
    value_error("biases has ", static_cast<int64_t>(biases.size()), " tensors; it must have as many as weights, ",
                count);
  }
  const auto name = [](const char* list, int64_t part) { return join_text(list, "[", part, "]"); };
  for (int64_t part = 0; part < count; ++part) {
    check_weight(name("weights", part).c_str(), weights[part], name("biases", part).c_str(), biases[part], x, in);
  }
  if (swiglu && (count != 2 || weights[0].size(0) != weights[1].size(0))) {
    value_error("weights must be two tensors of one shape with swiglu");
  }
  if (residual) {
    if (count != 1) value_error("residual is for one weight");
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = weights[0].size(0);
    check_shape("residual", *residual, sizes, "(..., out)");
    check_dtype("residual", *residual, x.scalar_type(), ", as x");
    check_device("residual", *residual, x, "x");
  }
  if (x.is_cpu()) {  // one product after the other
    std::vector<Tensor> outputs;
    for (int64_t part = 0; part < count; ++part) {
      outputs.push_back(linear_rows(x, weights[part], biases[part], constant_weights));
    }
    if (swiglu) {
      Tensor out = new_empty(x, sizes_of(outputs[0]), x.scalar_type());
      const int64_t columns = weights[0].size(0);
      const Swiglu p{.dtype = to_dtype(x.scalar_type()),
                     .rows = columns == 0 ? 0 : rows,
                     .columns = columns,
                     .x = outputs[0].data_ptr(),
                     .x_stride = columns,
                     .y = outputs[1].data_ptr(),
                     .y_stride = columns,
                     .out = out.data_ptr()};
      cpu::swiglu(p);
      outputs = {out};
    }
    if (residual) outputs[0] = torch::stable::subtract(*residual, outputs[0], -1.0);
    return outputs;
  }
  std::vector<Tensor> outputs;
  for (int64_t part = 0; part < (swiglu ? 1 : count); ++part) outputs.push_back(output_of(x, weights[part]));
#ifdef FLASH_XLSTM_WITH_CUDA
  FusedLinearRows p{};
  p.dtype = to_dtype(x.scalar_type());
  p.rows = rows, p.in = in;
  p.count = static_cast<int>(count);
  int64_t columns = 0;
  for (int64_t part = 0; part < count; ++part) {
    check_cuda_limits(x, name("weights", part).c_str(), weights[part]);
    weights[part] = as_contiguous(weights[part]);
    if (biases[part]) biases[part] = as_contiguous(*biases[part]);
    p.part[part] = {.weight = weights[part].data_ptr(),
                    .bias = biases[part] ? biases[part]->data_ptr() : nullptr,
                    .y = outputs[swiglu ? 0 : part].data_ptr(),
                    .out = weights[part].size(0)};
    columns += weights[part].size(0);
  }
  if (rows == 0 || columns == 0) return outputs;
  x = aligned_rows(x);
  p.x = x.data_ptr(), p.x_stride = row_stride(x);
  if (residual) {
    residual = with_uniform_rows(*residual);
    p.residual = residual->data_ptr();
    p.residual_stride = row_stride(*residual);
  }
  p.swiglu = swiglu;
  p.constant_weights = constant_weights;
  run_cuda("fused_linear_rows", x, p);
#else
  no_cuda_build("fused_linear_rows");
#endif
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("linear_rows(Tensor x, Tensor weight, Tensor? bias, bool constant_weights=False) -> Tensor");
  lib.def(
      "fused_linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual, bool swiglu, "
      "bool constant_weights=False) -> Tensor[]");
}

IMPLEMENT_OPS(lib) {
  lib.impl("linear_rows", TORCH_BOX(&linear_rows));
  lib.impl("fused_linear_rows", TORCH_BOX(&fused_linear_rows));
}

static const DescribedOp described_linear_rows("linear_rows", CUDA_ONLY(cuda::linear_words));
static const DescribedOp described_fused_linear_rows("fused_linear_rows", CUDA_ONLY(cuda::linear_words));

}  // namespace flash_xlstm
