// Every operator of the namespace flash_xlstm: schemas and their implementations. Importing the module registers
// them; fake kernels and autograd are registered in python/flash_xlstm/ops.
#include "ops/ops.h"

// `c, n, m` are the initial state (all or none), `scale=None` is dqk ** -0.5, `gate_soft_cap=None` no cap,
// `chunk_size=0` lets the kernel choose. States that an operator returns are empty where they were not asked for; so
// are s and n without `normalize`, which then are no inputs either. A backward reads h of float32 on CUDA only.
STABLE_TORCH_LIBRARY(flash_xlstm, lib) {
  lib.def(
      "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor h, Tensor kept)");
  // The same without a derivative: for autograd.Function, within which torch's look for one costs microseconds.
  lib.def(
      "mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor h, Tensor kept)");
  // Without what a backward would need: every tensor that is returned takes the host a microsecond or two.
  lib.def(
      "mlstm_h(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size) -> Tensor");
  lib.def(
      "mlstm_with_state(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor h, Tensor kept, Tensor c_last, Tensor n_last, Tensor m_last)");
  lib.def(
      "mlstm_backward(Tensor? dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
      "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, "
      "Tensor? h, Tensor kept, float? scale, float eps, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn, Tensor dm)");
  lib.def(
      "mlstm_sig(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? cu_seqlens, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size, bool return_final_state, bool normalize) "
      "-> (Tensor h, Tensor s, Tensor c_last, Tensor n_last)");
  lib.def(
      "mlstm_sig_backward(Tensor? dh, Tensor? dc_last, Tensor? dn_last, "
      "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? cu_seqlens, "
      "Tensor? h, Tensor s, float? scale, float eps, float? gate_soft_cap, int chunk_size, bool normalize) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn)");
  lib.def(
      "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, "
      "Tensor? state_indices, float? scale, float eps, float? gate_soft_cap, bool settled_state=False) -> Tensor");
  // `qkvo`, `gates` and `up` are the weights of layers that read the same input: stacked in one (q, k, v, output gate;
  // input gate, forget gate; gate, up), or each for itself in that order.
  lib.def(
      "mlstm_block_step(Tensor x, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor? state_indices, Tensor norm_mlstm, "
      "Tensor[] qkvo, Tensor[] gates, Tensor[] gate_biases, Tensor head_norm, Tensor out_proj, Tensor norm_ffn, "
      "Tensor[] up, Tensor down, float norm_mlstm_eps, float eps, float head_norm_eps, float norm_ffn_eps, "
      "float? gate_soft_cap, bool constant_weights=False) -> Tensor");
  // `keep`: keep what the backward needs; without, `kept` is empty. `recurrent_grad_clip` may be infinite.
  lib.def(
      "slstm(Tensor x, Tensor R, Tensor b, Tensor? h0, Tensor? c0, Tensor? n0, Tensor? m0, Tensor? cu_seqlens, "
      "float recurrent_grad_clip, bool keep, bool return_final_state) "
      "-> (Tensor h, Tensor kept, Tensor h_last, Tensor c_last, Tensor n_last, Tensor m_last)");
  lib.def(
      "slstm_backward(Tensor? dh, Tensor? dh_last, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
      "Tensor R, Tensor b, Tensor? h0, Tensor? c0, Tensor? n0, Tensor? m0, Tensor? cu_seqlens, "
      "Tensor h, Tensor kept, float recurrent_grad_clip) "
      "-> (Tensor dx, Tensor dR, Tensor db, Tensor dh0, Tensor dc0, Tensor dn0, Tensor dm0)");
  lib.def(
      "slstm_step(Tensor x, Tensor R, Tensor b, Tensor(a!) h, Tensor(b!) c, Tensor(c!) n, Tensor(d!) m) -> Tensor");
  lib.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool silu, "
      "bool return_final_state) -> (Tensor y, Tensor last)");
  lib.def(
      "causal_conv1d_backward(Tensor? dy, Tensor? dlast, Tensor x, Tensor weight, Tensor? bias, Tensor? state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)");
  lib.def("causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor");
  lib.def("soft_cap(Tensor x, float cap) -> Tensor");
  lib.def("soft_cap_backward(Tensor dy, Tensor x, float cap) -> Tensor");
  lib.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  lib.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  lib.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, float eps, bool weight_gradient) "
      "-> (Tensor dx, Tensor dweight)");
  lib.def("gated_head_norm(Tensor h, Tensor gate, Tensor weight, float eps) -> Tensor");
  lib.def(
      "gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, float eps, bool weight_gradient) "
      "-> (Tensor dh, Tensor dgate, Tensor dweight)");
  lib.def("linear_rows(Tensor x, Tensor weight, Tensor? bias, bool constant_weights=False) -> Tensor");
  lib.def(
      "fused_linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual, bool swiglu, "
      "bool constant_weights=False) -> Tensor[]");
  lib.def("swiglu(Tensor x, Tensor y) -> Tensor");
  lib.def("swiglu_backward(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)");
}

namespace {

// The same entry points for both: each dispatches by its tensors' device.
template <typename Library>
void implement(Library& lib) {
  lib.impl("mlstm", TORCH_BOX(&flash_xlstm::mlstm));
  lib.impl("mlstm_forward", TORCH_BOX(&flash_xlstm::mlstm));
  lib.impl("mlstm_h", TORCH_BOX(&flash_xlstm::mlstm_h));
  lib.impl("mlstm_with_state", TORCH_BOX(&flash_xlstm::mlstm_with_state));
  lib.impl("mlstm_backward", TORCH_BOX(&flash_xlstm::mlstm_backward));
  lib.impl("mlstm_sig", TORCH_BOX(&flash_xlstm::mlstm_sig));
  lib.impl("mlstm_sig_backward", TORCH_BOX(&flash_xlstm::mlstm_sig_backward));
  lib.impl("mlstm_step", TORCH_BOX(&flash_xlstm::mlstm_step));
  lib.impl("mlstm_block_step", TORCH_BOX(&flash_xlstm::mlstm_block_step));
  lib.impl("slstm", TORCH_BOX(&flash_xlstm::slstm));
  lib.impl("slstm_backward", TORCH_BOX(&flash_xlstm::slstm_backward));
  lib.impl("slstm_step", TORCH_BOX(&flash_xlstm::slstm_step));
  lib.impl("causal_conv1d", TORCH_BOX(&flash_xlstm::causal_conv1d));
  lib.impl("causal_conv1d_backward", TORCH_BOX(&flash_xlstm::causal_conv1d_backward));
  lib.impl("causal_conv1d_step", TORCH_BOX(&flash_xlstm::causal_conv1d_step));
  lib.impl("soft_cap", TORCH_BOX(&flash_xlstm::soft_cap));
  lib.impl("soft_cap_backward", TORCH_BOX(&flash_xlstm::soft_cap_backward));
  lib.impl("rms_norm", TORCH_BOX(&flash_xlstm::rms_norm));
  lib.impl("add_rms_norm", TORCH_BOX(&flash_xlstm::add_rms_norm));
  lib.impl("rms_norm_backward", TORCH_BOX(&flash_xlstm::rms_norm_backward));
  lib.impl("gated_head_norm", TORCH_BOX(&flash_xlstm::gated_head_norm));
  lib.impl("gated_head_norm_backward", TORCH_BOX(&flash_xlstm::gated_head_norm_backward));
  lib.impl("linear_rows", TORCH_BOX(&flash_xlstm::linear_rows));
  lib.impl("fused_linear_rows", TORCH_BOX(&flash_xlstm::fused_linear_rows));
  lib.impl("swiglu", TORCH_BOX(&flash_xlstm::swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&flash_xlstm::swiglu_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flash_xlstm, CPU, lib) { implement(lib); }

// Registered in a CPU-only build too: there the ops say that CUDA kernels were not built.
STABLE_TORCH_LIBRARY_IMPL(flash_xlstm, CUDA, lib) { implement(lib); }
