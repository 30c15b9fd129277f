// Every operator of the namespace flash_xlstm: schemas and their implementations. Importing the module registers
// them; fake kernels and autograd are registered in python/flash_xlstm/ops.
#include "ops/ops.h"

// `c, n, m` are the initial state (all or none), `scale=None` is dqk ** -0.5, `chunk_size=0` lets the kernel choose.
// Returned states are empty where they were not asked for.
STABLE_TORCH_LIBRARY(flash_xlstm, lib) {
  lib.def(
      "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, int chunk_size, bool return_final_state) "
      "-> (Tensor h, Tensor s, Tensor m_seq, Tensor c_last, Tensor n_last, Tensor m_last)");
  lib.def(
      "mlstm_backward(Tensor? dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
      "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, "
      "Tensor h, Tensor s, Tensor m_seq, float? scale, float eps, int chunk_size) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn, Tensor dm)");
  lib.def(
      "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, "
      "Tensor? state_indices, float? scale, float eps, float? gate_soft_cap=None) -> Tensor");
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
  lib.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  lib.def("swiglu(Tensor x, Tensor y) -> Tensor");
  lib.def("swiglu_backward(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_xlstm, CPU, lib) {
  lib.impl("mlstm", TORCH_BOX(&flash_xlstm::mlstm));
  lib.impl("mlstm_backward", TORCH_BOX(&flash_xlstm::mlstm_backward));
  lib.impl("mlstm_step", TORCH_BOX(&flash_xlstm::mlstm_step));
  lib.impl("soft_cap", TORCH_BOX(&flash_xlstm::soft_cap));
  lib.impl("soft_cap_backward", TORCH_BOX(&flash_xlstm::soft_cap_backward));
  lib.impl("rms_norm", TORCH_BOX(&flash_xlstm::rms_norm));
  lib.impl("add_rms_norm", TORCH_BOX(&flash_xlstm::add_rms_norm));
  lib.impl("rms_norm_backward", TORCH_BOX(&flash_xlstm::rms_norm_backward));
  lib.impl("gated_head_norm", TORCH_BOX(&flash_xlstm::gated_head_norm));
  lib.impl("gated_head_norm_backward", TORCH_BOX(&flash_xlstm::gated_head_norm_backward));
  lib.impl("linear_rows", TORCH_BOX(&flash_xlstm::linear_rows));
  lib.impl("swiglu", TORCH_BOX(&flash_xlstm::swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&flash_xlstm::swiglu_backward));
}

// Registered in a CPU-only build too: there the ops say that CUDA kernels were not built.
STABLE_TORCH_LIBRARY_IMPL(flash_xlstm, CUDA, lib) {
  lib.impl("mlstm", TORCH_BOX(&flash_xlstm::mlstm));
  lib.impl("mlstm_backward", TORCH_BOX(&flash_xlstm::mlstm_backward));
  lib.impl("mlstm_step", TORCH_BOX(&flash_xlstm::mlstm_step));
  lib.impl("soft_cap", TORCH_BOX(&flash_xlstm::soft_cap));
  lib.impl("soft_cap_backward", TORCH_BOX(&flash_xlstm::soft_cap_backward));
  lib.impl("rms_norm", TORCH_BOX(&flash_xlstm::rms_norm));
  lib.impl("add_rms_norm", TORCH_BOX(&flash_xlstm::add_rms_norm));
  lib.impl("rms_norm_backward", TORCH_BOX(&flash_xlstm::rms_norm_backward));
  lib.impl("gated_head_norm", TORCH_BOX(&flash_xlstm::gated_head_norm));
  lib.impl("gated_head_norm_backward", TORCH_BOX(&flash_xlstm::gated_head_norm_backward));
  lib.impl("linear_rows", TORCH_BOX(&flash_xlstm::linear_rows));
  lib.impl("swiglu", TORCH_BOX(&flash_xlstm::swiglu));
  lib.impl("swiglu_backward", TORCH_BOX(&flash_xlstm::swiglu_backward));
}
