#include "params/conv.h"
#include "ops/kernel_for.h"
#include "ops/launch.h"

namespace flash_xlstm {
namespace {

struct CheckedProblem {
  ConvProblem p;
  std::vector<Tensor> held;

  const void* hold(const Tensor& t) {
    held.push_back(as_contiguous(t));
    return held.back().data_ptr();
  }
};

void check_parameter(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, x, "x");
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != x.scalar_type()) {
    type_error(name, " has dtype ", dtype_text(t.scalar_type()), "; it must be float32 or the dtype of x, ",
               dtype_text(x.scalar_type()));
  }
}

void check_weights(const Tensor& weight, const OptTensor& bias, const Tensor& x, int64_t channels) {
  check_shape("weight", weight, {channels, -1}, "(channels, kernel)");
  const int64_t kernel = weight.size(1);
  if (kernel < 1 || kernel > max_conv_kernel) {
    value_error("weight has kernel ", kernel, "; it must be from 1 to ", max_conv_kernel);
  }
  check_parameter("weight", weight, x);
  if (bias) {
    check_shape("bias", *bias, {channels}, "(channels,)");
    check_parameter("bias", *bias, x);
  }
}

void check_state(const char* name, const Tensor& state, const Tensor& x, int64_t rows, int64_t kernel,
                 int64_t channels) {
  check_shape(name, state, {rows, kernel - 1, channels}, "(batch, kernel - 1, channels)");
  check_device(name, state, x, "x");
  check_dtype(name, state, x.scalar_type(), ", as x");
}

CheckedProblem check_problem(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& state,
                             const OptTensor& cu_seqlens, bool silu) {
  CheckedProblem checked{};
  ConvProblem& p = checked.p;
  check_shape("x", x, {-1, -1, -1}, "(batch, seq, channels)");
  check_op_dtype("x", x.scalar_type());
  p.batch = x.size(0), p.seq = x.size(1), p.channels = x.size(2);
  if (p.seq < 1) value_error("x has seq ", p.seq, "; it must be at least 1");
  check_last_dim_contiguous("x", x);
  check_weights(weight, bias, x, p.channels);
  p.kernel = weight.size(1);
  p.rows = p.batch;
  if (cu_seqlens) {
    p.rows = check_cu_seqlens(*cu_seqlens, x, "x");
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  }
  if (state) {
    check_state("initial_state", *state, x, p.rows, p.kernel, p.channels);
    if (p.kernel > 1) p.state = checked.hold(*state);
  }
  p.dtype = to_dtype(x.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  p.weight = checked.hold(weight);
  p.bias_dtype = p.weight_dtype;
  if (bias) {
    p.bias_dtype = to_dtype(bias->scalar_type());
    p.bias = checked.hold(*bias);
  }
  p.silu = silu;
  p.x = x.data_ptr();
  p.x_batch = x.stride(0), p.x_seq = x.stride(1);
  return checked;
}

Tensors<2> causal_conv1d(Tensor x, Tensor weight, OptTensor bias, OptTensor state, OptTensor cu_seqlens, bool silu,
                         bool return_final_state) {
  CheckedProblem checked = check_problem(x, weight, bias, state, cu_seqlens, silu);
  const ConvProblem& p = checked.p;
  Tensor y = new_empty(x, {p.batch, p.seq, p.channels}, x.scalar_type());
  Tensor last = new_empty(x, {return_final_state ? p.rows : 0, p.kernel - 1, p.channels}, x.scalar_type());
  ConvForward params{};
  params.p = p;
  params.y = y.data_ptr();
  if (return_final_state && p.kernel > 1) params.last = last.data_ptr();
  if (p.batch > 0 && p.channels > 0) {
    run<cpu::conv_forward, cuda::conv_forward, cuda::conv_forward_workspace_bytes>("causal_conv1d", x, params);
  }
  return {y, last};
}

Tensors<4> causal_conv1d_backward(OptTensor dy, OptTensor dlast, Tensor x, Tensor weight, OptTensor bias,
                                  OptTensor state, OptTensor cu_seqlens, bool silu) {
  CheckedProblem checked = check_problem(x, weight, bias, state, cu_seqlens, silu);
  const ConvProblem& p = checked.p;
  ConvBackward params{};
  params.p = p;
  if (dy) {
    check_shape("dy", *dy, {p.batch, p.seq, p.channels}, "(batch, seq, channels)");
    check_dtype("dy", *dy, x.scalar_type(), ", as x");
    check_device("dy", *dy, x, "x");
    if (p.channels > 1 && dy->stride(2) != 1) dy = as_contiguous(*dy);
    params.dy = dy->data_ptr();
    params.dy_batch = dy->stride(0), params.dy_seq = dy->stride(1);
  }
  if (dlast) {
    check_state("dlast", *dlast, x, p.rows, p.kernel, p.channels);
    if (p.kernel > 1) params.dlast = checked.hold(*dlast);
  }
  Tensor dx = new_empty(x, {p.batch, p.seq, p.channels}, x.scalar_type());
  Tensor dweight = new_empty(x, {p.channels, p.kernel}, weight.scalar_type());
  Tensor dbias = new_empty(x, {bias ? p.channels : 0}, bias ? bias->scalar_type() : ScalarType::Float);
  Tensor dstate = new_empty(x, {state ? p.rows : 0, p.kernel - 1, p.channels}, x.scalar_type());
  params.p = p;
  params.dx = dx.data_ptr();
  params.dweight = dweight.data_ptr();
  if (bias) params.dbias = dbias.data_ptr();
  if (state && p.kernel > 1) params.dstate = dstate.data_ptr();
  if (p.batch == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else if (p.channels > 0) {
    run<cpu::conv_backward, cuda::conv_backward, cuda::conv_backward_workspace_bytes>("causal_conv1d_backward", x,
                                                                                      params);
  }
  return {dx, dweight, dbias, dstate};
}

Tensor causal_conv1d_step(Tensor x, Tensor weight, OptTensor bias, Tensor state, bool silu) {
  ConvStep params{};
  check_shape("x", x, {-1, -1}, "(batch, channels)");
  check_op_dtype("x", x.scalar_type());
  params.batch = x.size(0), params.channels = x.size(1);
  check_last_dim_contiguous("x", x);
  check_weights(weight, bias, x, params.channels);
  params.kernel = weight.size(1);
  check_state("state", state, x, params.batch, params.kernel, params.channels);
  check_contiguous("state", state);
  weight = as_contiguous(weight);
  if (bias) bias = as_contiguous(*bias);
  Tensor y = new_empty(x, {params.batch, params.channels}, x.scalar_type());
  params.dtype = to_dtype(x.scalar_type());
  params.weight_dtype = to_dtype(weight.scalar_type());
  params.bias_dtype = bias ? to_dtype(bias->scalar_type()) : params.weight_dtype;
  params.silu = silu;
  params.x = x.data_ptr();
  params.x_batch = x.stride(0);
  params.weight = weight.data_ptr();
  if (bias) params.bias = bias->data_ptr();
  params.state = state.data_ptr();
  params.y = y.data_ptr();
  if (params.batch > 0 && params.channels > 0) {
    run<cpu::conv_step, cuda::conv_step>("causal_conv1d_step", x, params);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool silu, "
      "bool return_final_state) -> (Tensor y, Tensor last)");
  lib.def(
      "causal_conv1d_backward(Tensor? dy, Tensor? dlast, Tensor x, Tensor weight, Tensor? bias, Tensor? state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)");
  lib.def("causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor");
}

IMPLEMENT_OPS(lib) {
  lib.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  lib.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  lib.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step));
}

static const DescribedOp described_causal_conv1d("causal_conv1d");
static const DescribedOp described_causal_conv1d_step("causal_conv1d_step");

}  // namespace flash_xlstm
