// RMSNorm, alone and with the residual's sum in front, and the gated head-wise LayerNorm.
#include "cpu/kernels.h"
#include "ops/cuda_context.h"
#include "ops/ops.h"
#ifdef FLASH_XLSTM_WITH_CUDA
#include "cuda/pointwise/launch.h"
#endif

namespace flash_xlstm {
namespace {

// The weight of a norm of `x`: (size,), in float32 or the dtype of x.
void check_weight(const Tensor& weight, int64_t size, const Tensor& x, const char* x_name) {
  check_shape("weight", weight, {size}, "(size of the normalized features,)");
  check_device("weight", weight, x, x_name);
  if (weight.scalar_type() != ScalarType::Float && weight.scalar_type() != x.scalar_type()) {
    type_error("weight has dtype ", dtype_text(weight.scalar_type()), "; it must be float32 or the dtype of ", x_name,
               ", ", dtype_text(x.scalar_type()));
  }
}

void check_norm_dim(const char* name, const Tensor& t, int64_t dim) {
  if (dim < 1) value_error(name, " has shape ", shape_text(t), "; its last dimension must be at least 1");
#ifdef FLASH_XLSTM_WITH_CUDA
  if (t.is_cuda() && dim > cuda::max_norm_dim) {
    value_error(name, " has shape ", shape_text(t), "; on CUDA its last dimension must be at most ",
                cuda::max_norm_dim);
  }
#endif
}

// Runs one of two on the device of `t`; `cuda` takes the stream.
template <typename Cpu, typename Cuda>
void dispatch(const char* op, const Tensor& t, Cpu&& cpu, Cuda&& cuda) {
  if (t.is_cpu()) {
    cpu();
    return;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  const int32_t device = t.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_device_supported(device);
  check_cuda(cuda(current_stream(device)), op);
#else
  static_cast<void>(cuda);
  no_cuda_build(op);
#endif
}

#ifdef FLASH_XLSTM_WITH_CUDA
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

RmsNorm check_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (x.dim() < 1) value_error("x has shape ", shape_text(x), "; it must have at least one dimension");
  check_op_dtype("x", x.scalar_type());
  const int64_t dim = x.size(x.dim() - 1);
  check_norm_dim("x", x, dim);
  check_weight(weight, dim, x, "x");
  RmsNorm p{};
  p.dtype = to_dtype(x.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  p.rows = x.numel() / dim;
  p.dim = dim;
  p.eps = check_eps("eps", eps);
  return p;
}

void run_rms_norm(const RmsNorm& p, const Tensor& x) {
  if (p.rows == 0) return;
  dispatch(
      "rms_norm", x, [&] { cpu::rms_norm(p); },
      [&]([[maybe_unused]] Stream stream) {
#ifdef FLASH_XLSTM_WITH_CUDA
        return cuda::rms_norm(p, stream);
#endif
      });
}

GatedHeadNorm check_gated_head_norm(const Tensor& h, const Tensor& gate, const Tensor& weight, double eps) {
  if (h.dim() < 2) value_error("h has shape ", shape_text(h), "; it must be (..., heads, dim)");
  check_op_dtype("h", h.scalar_type());
  const int64_t heads = h.size(h.dim() - 2), dim = h.size(h.dim() - 1);
  check_norm_dim("h", h, dim);
  const int64_t features = checked_product("h", {heads, dim});
  std::vector<int64_t> flat = sizes_of(h);
  flat.pop_back();
  flat.back() = features;
  check_shape("gate", gate, flat, "(..., heads * dim)");
  check_dtype("gate", gate, h.scalar_type(), ", as h");
  check_device("gate", gate, h, "h");
  check_weight(weight, features, h, "h");
  GatedHeadNorm p{};
  p.dtype = to_dtype(h.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  p.heads = heads;
  p.dim = dim;
  p.tokens = features == 0 ? 0 : h.numel() / features;
  p.eps = check_eps("eps", eps);
  return p;
}

void set_inputs(GatedHeadNorm& p, Tensor& h, Tensor& gate, Tensor& weight) {
  h = torch::stable::contiguous(h);
  gate = with_uniform_rows(gate);
  weight = torch::stable::contiguous(weight);
  p.h = h.data_ptr();
  p.gate = gate.data_ptr();
  p.gate_stride = row_stride(gate);
  p.weight = weight.data_ptr();
}

Tensor like(const Tensor& t) { return new_empty(t, sizes_of(t), t.scalar_type()); }

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  RmsNorm p = check_rms_norm(x, weight, eps);
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  Tensor y = like(x);
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.y = y.data_ptr();
  run_rms_norm(p, x);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  RmsNorm p = check_rms_norm(x, weight, eps);
  check_shape("residual", residual, sizes_of(x), "the shape of x");
  check_dtype("residual", residual, x.scalar_type(), ", as x");
  check_device("residual", residual, x, "x");
  x = torch::stable::contiguous(x);
  residual = torch::stable::contiguous(residual);
  weight = torch::stable::contiguous(weight);
  Tensor y = like(x), sum = like(x);
  p.x = x.data_ptr();
  p.residual = residual.data_ptr();
  p.weight = weight.data_ptr();
  p.y = y.data_ptr();
  p.sum = sum.data_ptr();
  run_rms_norm(p, x);
  return {y, sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptTensor dsum, Tensor x, Tensor weight, double eps,
                                             bool weight_gradient) {
  const RmsNorm forward = check_rms_norm(x, weight, eps);
  RmsNormBackward p{forward.dtype, forward.weight_dtype,
                    forward.rows,  forward.dim,
                    forward.eps,   nullptr,
                    nullptr,       nullptr,
                    nullptr,       nullptr,
                    nullptr};
  const auto check = [&](const char* name, Tensor& t) {
    check_shape(name, t, sizes_of(x), "the shape of x");
    check_dtype(name, t, x.scalar_type(), ", as x");
    check_device(name, t, x, "x");
    t = torch::stable::contiguous(t);
  };
  check("dy", dy);
  if (dsum) {
    check("dsum", *dsum);
    p.dsum = dsum->data_ptr();
  }
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  Tensor dx = like(x);
  Tensor dweight = new_empty(weight, {weight_gradient ? p.dim : 0}, weight.scalar_type());
  p.dy = dy.data_ptr();
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.dx = dx.data_ptr();
  p.dweight = weight_gradient ? dweight.data_ptr() : nullptr;
  if (p.rows == 0) {
    if (weight_gradient) torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  dispatch(
      "rms_norm_backward", x, [&] { cpu::rms_norm_backward(p); },
      [&]([[maybe_unused]] Stream stream) {
#ifdef FLASH_XLSTM_WITH_CUDA
        Tensor workspace = new_empty(x, {cuda::rms_norm_backward_workspace_bytes(p)}, ScalarType::Byte);
        return cuda::rms_norm_backward(p, workspace.data_ptr(), stream);
#endif
      });
  return {dx, dweight};
}

Tensor gated_head_norm(Tensor h, Tensor gate, Tensor weight, double eps) {
  GatedHeadNorm p = check_gated_head_norm(h, gate, weight, eps);
  Tensor y = new_empty(h, sizes_of(gate), h.scalar_type());
  if (p.tokens == 0) return y;
  set_inputs(p, h, gate, weight);
  p.y = y.data_ptr();
  dispatch(
      "gated_head_norm", h, [&] { cpu::gated_head_norm(p); },
      [&]([[maybe_unused]] Stream stream) {
#ifdef FLASH_XLSTM_WITH_CUDA
        return cuda::gated_head_norm(p, stream);
#endif
      });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps,
                                                            bool weight_gradient) {
  GatedHeadNormBackward b{};
  b.p = check_gated_head_norm(h, gate, weight, eps);
  check_shape("dy", dy, sizes_of(gate), "the shape of gate");
  check_dtype("dy", dy, h.scalar_type(), ", as h");
  check_device("dy", dy, h, "h");
  Tensor dh = new_empty(h, sizes_of(h), h.scalar_type()), dgate = new_empty(h, sizes_of(gate), h.scalar_type());
  Tensor dweight = new_empty(weight, {weight_gradient ? weight.numel() : 0}, weight.scalar_type());
  if (b.p.tokens == 0) {
    if (weight_gradient) torch::stable::zero_(dweight);
    return {dh, dgate, dweight};
  }
  set_inputs(b.p, h, gate, weight);
  dy = torch::stable::contiguous(dy);
  b.dy = dy.data_ptr();
  b.dh = dh.data_ptr();
  b.dgate = dgate.data_ptr();
  b.dweight = weight_gradient ? dweight.data_ptr() : nullptr;
  dispatch(
      "gated_head_norm_backward", h, [&] { cpu::gated_head_norm_backward(b); },
      [&]([[maybe_unused]] Stream stream) {
#ifdef FLASH_XLSTM_WITH_CUDA
        Tensor workspace = new_empty(h, {cuda::gated_head_norm_backward_workspace_bytes(b)}, ScalarType::Byte);
        return cuda::gated_head_norm_backward(b, workspace.data_ptr(), stream);
#endif
      });
  return {dh, dgate, dweight};
}

}  // namespace flash_xlstm
