// The gradient of an mLSTM with the gated head-wise norm behind it, as a layer has them.
#include "ops/launch.h"
#include "ops/mlstm.h"
#include "ops/norms.h"

namespace flash_xlstm {
namespace {

// The gradients of q, k, v and the output gate lie side by side in dz, as a projection joined of the four wants them.
Tensors<4> mlstm_gated_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor i, Tensor f, Tensor weight,
                                OptTensor cu_seqlens, Tensor h, Tensor kept, std::optional<double> scale, double eps,
                                std::optional<double> gate_soft_cap, int64_t chunk_size, double norm_eps,
                                bool weight_gradient) {
  check_shape("q", q, {-1, -1, -1, -1}, "(batch, seq, heads, dqk)");
  check_shape("v", v, {q.size(0), q.size(1), q.size(2), -1}, "(batch, seq, heads, dv)");
  check_shape("h", h, sizes_of(v), "the shape of v");
  check_dtype("h", h, q.scalar_type(), ", as q");
  check_device("h", h, q);
  check_dtype("v", v, q.scalar_type(), ", as q");
  const int64_t keys = checked_product("q", {q.size(2), q.size(3)});
  const int64_t values = checked_product("v", {v.size(2), v.size(3)});
  check_shape("gate", gate, {q.size(0), q.size(1), values}, "(batch, seq, heads * dv)");
  Tensor dz = new_empty(q, {q.size(0), q.size(1), 2 * keys + 2 * values}, q.scalar_type());
  const auto part = [&](int64_t start, int64_t size) {
    Tensor whole = dz;
    return torch::stable::narrow(whole, 2, start, size);
  };
  const MlstmInto into{.dq = part(0, keys), .dk = part(keys, keys), .dv = part(2 * keys, values)};
  const Tensor dgate = part(2 * keys + values, values);
  // Where the gate is a part of a tensor like dz, its gradient is written in place.
  const bool alike = gate.stride(0) == dgate.stride(0) && gate.stride(1) == dgate.stride(1) && gate.stride(2) == 1;
  auto [dh, plain_dgate, dweight] = gated_head_norm_backward(dy, h, gate, weight, norm_eps, weight_gradient,
                                                             alike ? OptTensor(dgate) : std::nullopt);
  if (!alike) {
    Tensor to = dgate;
    torch::stable::copy_(to, plain_dgate);
  }
  auto [dq, dk, dv, di, df, dc, dn, dm] =
      mlstm_backward_into(into, dh, q, k, v, i, f, cu_seqlens, h, kept, scale, eps, gate_soft_cap, chunk_size);
  return {dz, di, df, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_xlstm, lib) {
  lib.def(
      "mlstm_gated_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor i, Tensor f, Tensor weight, "
      "Tensor? cu_seqlens, Tensor h, Tensor kept, float? scale, float eps, float? gate_soft_cap, int chunk_size, "
      "float norm_eps, bool weight_gradient) -> (Tensor dz, Tensor di, Tensor df, Tensor dweight)");
}

IMPLEMENT_OPS(lib) { lib.impl("mlstm_gated_backward", TORCH_BOX(&mlstm_gated_backward)); }

}  // namespace flash_xlstm
