// The mLSTM of one joined projection, with the gated head-wise norm behind it, as a layer has them.
#include "ops/launch.h"
#include "ops/mlstm.h"
#include "ops/norms.h"

namespace flash_xlstm {
namespace {

// z (batch, seq, 2 qk_dim + 2 v_dim) holds q, k, v and the output gate side by side.
struct Parts {
  int64_t keys, values;  // qk_dim and v_dim, of all heads together
  Tensor q, k, v, gate;
};

// The columns [start, start + size) of z.
Tensor part(Tensor z, int64_t start, int64_t size) { return torch::stable::narrow(z, 2, start, size); }

Parts parts_of(const Tensor& z, int64_t heads, int64_t qk_dim) {
  check_shape("z", z, {-1, -1, -1}, "(batch, seq, 2 * qk_dim + 2 * v_dim)");
  check_op_dtype("z", z.scalar_type());
  check_last_dim_contiguous("z", z);
  const int64_t batch = z.size(0), seq = z.size(1), width = z.size(2);
  if (heads < 1) value_error("heads is ", heads, "; it must be at least 1");
  if (qk_dim < heads || qk_dim % heads != 0) {
    value_error("qk_dim is ", qk_dim, "; it must be a positive multiple of heads, ", heads);
  }
  const int64_t values = width / 2 - qk_dim;
  if (width % 2 != 0 || values < heads || values % heads != 0) {
    value_error("z has shape ", shape_text(z), "; its last dimension must be 2 * qk_dim + 2 * v_dim, with a qk_dim of ",
                qk_dim, " and v_dim a positive multiple of heads, ", heads);
  }
  const auto split = [&](int64_t start, int64_t size) {
    return torch::stable::view(part(z, start, size), {batch, seq, heads, size / heads});
  };
  return {.keys = qk_dim,
          .values = values,
          .q = split(0, qk_dim),
          .k = split(qk_dim, qk_dim),
          .v = split(2 * qk_dim, values),
          .gate = part(z, 2 * qk_dim + values, values)};
}

Tensors<3> mlstm_gated(Tensor z, Tensor i, Tensor f, Tensor weight, OptTensor cu_seqlens, int64_t heads, int64_t qk_dim,
                       std::optional<double> scale, double eps, std::optional<double> gate_soft_cap, int64_t chunk_size,
                       double norm_eps, bool keep_states) {
  const Parts parts = parts_of(z, heads, qk_dim);
  auto [h, kept] = mlstm_forward(parts.q, parts.k, parts.v, i, f, std::nullopt, std::nullopt, std::nullopt, cu_seqlens,
                                 scale, eps, gate_soft_cap, chunk_size, keep_states);
  Tensor y = gated_head_norm(h, parts.gate, weight, norm_eps);
  return {y, h, kept};
}

// The gradients of q, k, v and the output gate are written side by side into dz, as the projection's gradient reads
// them. With gates_beside those of i and f come next in each row, as one product with the gates' weights behind the
// projection's reads them; di and df are then empty.
Tensors<4> mlstm_gated_backward(Tensor dy, Tensor z, Tensor i, Tensor f, Tensor weight, OptTensor cu_seqlens, Tensor h,
                                Tensor kept, int64_t heads, int64_t qk_dim, std::optional<double> scale, double eps,
                                std::optional<double> gate_soft_cap, int64_t chunk_size, double norm_eps,
                                bool weight_gradient, bool gates_beside) {
  z = as_contiguous(z);  // dz has its layout
  const Parts parts = parts_of(z, heads, qk_dim);
  check_shape("h", h, sizes_of(parts.v), "(batch, seq, heads, dv)");
  check_dtype("h", h, z.scalar_type(), ", as z");
  check_device("h", h, z, "z");
  const int64_t keys = parts.keys, values = parts.values, width = z.size(2);
  Tensor dz = new_empty(z, {z.size(0), z.size(1), width + (gates_beside ? 2 * heads : 0)}, z.scalar_type());
  MlstmInto into{.dq = part(dz, 0, keys), .dk = part(dz, keys, keys), .dv = part(dz, 2 * keys, values)};
  if (gates_beside) into.di = part(dz, width, heads), into.df = part(dz, width + heads, heads);
  auto [dh, dgate, dweight] = gated_head_norm_backward(dy, h, parts.gate, weight, norm_eps, weight_gradient,
                                                       part(dz, 2 * keys + values, values));
  auto [dq, dk, dv, di, df, dc, dn, dm] = mlstm_backward_into(into, dh, parts.q, parts.k, parts.v, i, f, cu_seqlens, h,
                                                              kept, scale, eps, gate_soft_cap, chunk_size);
  if (gates_beside) di = new_empty(i, {0}, i.scalar_type()), df = new_empty(i, {0}, i.scalar_type());
  return {dz, di, df, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  // The options are those of the mLSTM and of the norm.
  lib.def(
      "mlstm_gated(Tensor z, Tensor i, Tensor f, Tensor weight, Tensor? cu_seqlens, int heads, int qk_dim, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size, float norm_eps, bool keep_states=False) "
      "-> (Tensor y, Tensor h, Tensor kept)");
  lib.def(
      "mlstm_gated_backward(Tensor dy, Tensor z, Tensor i, Tensor f, Tensor weight, Tensor? cu_seqlens, Tensor h, "
      "Tensor kept, int heads, int qk_dim, float? scale, float eps, float? gate_soft_cap, int chunk_size, "
      "float norm_eps, bool weight_gradient, bool gates_beside) -> (Tensor dz, Tensor di, Tensor df, Tensor dweight)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("mlstm_gated", TORCH_BOX(&mlstm_gated));
  lib.impl("mlstm_gated_backward", TORCH_BOX(&mlstm_gated_backward));
}

}  // namespace flash_xlstm
