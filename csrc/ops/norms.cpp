// RMSNorm, RMSNorm of a sum with a residual, and the gated head-wise LayerNorm.
#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "ops/norms.h"
#include "params/pointwise.h"

namespace flash_xlstm {
namespace {

// Checks the weight of a norm of `x`: (size,), in float32 or the dtype of x.
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
  if (t.is_cuda() && dim > max_norm_dim) {
    value_error(name, " has shape ", shape_text(t), "; on CUDA its last dimension must be at most ", max_norm_dim);
  }
}

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
  if (p.rows > 0) run<cpu::rms_norm, cuda::rms_norm>("rms_norm", x, p);
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
  h = as_contiguous(h);
  gate = with_uniform_rows(gate);
  weight = as_contiguous(weight);
  p.h = h.data_ptr();
  p.gate = gate.data_ptr();
  p.gate_stride = row_stride(gate);
  p.weight = weight.data_ptr();
}

Tensor like(const Tensor& t) { return new_empty(t, sizes_of(t), t.scalar_type()); }

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  RmsNorm p = check_rms_norm(x, weight, eps);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  Tensor y = like(x);
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.y = y.data_ptr();
  run_rms_norm(p, x);
  return y;
}

Tensors<2> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  RmsNorm p = check_rms_norm(x, weight, eps);
  check_shape("residual", residual, sizes_of(x), "the shape of x");
  check_dtype("residual", residual, x.scalar_type(), ", as x");
  check_device("residual", residual, x, "x");
  x = as_contiguous(x);
  residual = as_contiguous(residual);
  weight = as_contiguous(weight);
  Tensor y = like(x), sum = like(x);
  p.x = x.data_ptr();
  p.residual = residual.data_ptr();
  p.weight = weight.data_ptr();
  p.y = y.data_ptr();
  p.sum = sum.data_ptr();
  run_rms_norm(p, x);
  return {y, sum};
}

Tensors<3> rms_norm_backward(Tensor dy, OptTensor dsum, Tensor x, Tensor weight, double eps, bool weight_gradient,
                             bool remake) {
  const RmsNorm forward = check_rms_norm(x, weight, eps);
  RmsNormBackward p{};
  p.dtype = forward.dtype, p.weight_dtype = forward.weight_dtype;
  p.rows = forward.rows, p.dim = forward.dim, p.eps = forward.eps;
  const auto check = [&](const char* name, Tensor& t) {
    check_shape(name, t, sizes_of(x), "the shape of x");
    check_dtype(name, t, x.scalar_type(), ", as x");
    check_device(name, t, x, "x");
    t = as_contiguous(t);
  };
  check("dy", dy);
  if (dsum) {
    check("dsum", *dsum);
    p.dsum = dsum->data_ptr();
  }
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  Tensor dx = like(x);
  Tensor dweight = new_empty(weight, {weight_gradient ? p.dim : 0}, weight.scalar_type());
  p.dy = dy.data_ptr();
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.dx = dx.data_ptr();
  p.dweight = weight_gradient ? dweight.data_ptr() : nullptr;
  Tensor y = remake ? like(x) : new_empty(x, {0}, x.scalar_type());
  p.y = remake ? y.data_ptr() : nullptr;
  if (p.rows == 0) {
    if (weight_gradient) torch::stable::zero_(dweight);
    return {dx, dweight, y};
  }
  run<cpu::rms_norm_backward, cuda::rms_norm_backward, cuda::rms_norm_backward_workspace_bytes>("rms_norm_backward", x,
                                                                                                p);
  return {dx, dweight, y};
}

}  // namespace

Tensor gated_head_norm(Tensor h, Tensor gate, Tensor weight, double eps) {
  GatedHeadNorm p = check_gated_head_norm(h, gate, weight, eps);
  Tensor y = new_empty(h, sizes_of(gate), h.scalar_type());
  if (p.tokens == 0) return y;
  set_inputs(p, h, gate, weight);
  p.y = y.data_ptr();
  run<cpu::gated_head_norm, cuda::gated_head_norm>("gated_head_norm", h, p);
  return y;
}

Tensors<3> gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps, bool weight_gradient,
                                    const OptTensor& dgate_to) {
  GatedHeadNormBackward b{};
  b.p = check_gated_head_norm(h, gate, weight, eps);
  check_shape("dy", dy, sizes_of(gate), "the shape of gate");
  check_dtype("dy", dy, h.scalar_type(), ", as h");
  check_device("dy", dy, h, "h");
  Tensor dh = new_empty(h, sizes_of(h), h.scalar_type());
  Tensor dgate = dgate_to ? *dgate_to : new_empty(h, sizes_of(gate), h.scalar_type());
  Tensor dweight = new_empty(weight, {weight_gradient ? weight.numel() : 0}, weight.scalar_type());
  if (b.p.tokens == 0) {
    if (weight_gradient) torch::stable::zero_(dweight);
    return {dh, dgate, dweight};
  }
  set_inputs(b.p, h, gate, weight);
  dy = as_contiguous(dy);
  b.dy = dy.data_ptr();
  b.dh = dh.data_ptr();
  b.dgate = dgate.data_ptr();
  b.dgate_stride = dgate_to ? dgate.stride(dgate.dim() - 2) : b.p.heads * b.p.dim;
  b.dweight = weight_gradient ? dweight.data_ptr() : nullptr;
  run<cpu::gated_head_norm_backward, cuda::gated_head_norm_backward, cuda::gated_head_norm_backward_workspace_bytes>(
      "gated_head_norm_backward", h, b);
  return {dh, dgate, dweight};
}

namespace {

Tensors<3> plain_gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps,
                                          bool weight_gradient) {
  return gated_head_norm_backward(dy, h, gate, weight, eps, weight_gradient, std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  lib.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  lib.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, float eps, bool weight_gradient, bool remake) "
      "-> (Tensor dx, Tensor dweight, Tensor y)");
  lib.def("gated_head_norm(Tensor h, Tensor gate, Tensor weight, float eps) -> Tensor");
  lib.def(
      "gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, float eps, bool weight_gradient) "
      "-> (Tensor dh, Tensor dgate, Tensor dweight)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("rms_norm", TORCH_BOX(&rms_norm));
  lib.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  lib.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  lib.impl("gated_head_norm", TORCH_BOX(&gated_head_norm));
  lib.impl("gated_head_norm_backward", TORCH_BOX(&plain_gated_head_norm_backward));
}

static const DescribedOp described_rms_norm("rms_norm");
static const DescribedOp described_gated_head_norm("gated_head_norm");

}  // namespace flash_xlstm
