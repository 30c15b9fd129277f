#include <cmath>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "ops/mlstm_step.h"
#include "params/mlstm.h"

namespace flash_xlstm {
namespace {

void check_step_gate(const char* name, const Tensor& gate, const Tensor& q, ScalarType want) {
  check_shape(name, gate, {q.size(0), q.size(1)}, "(batch, heads)");
  check_device(name, gate, q);
  if (gate.scalar_type() != ScalarType::Float && gate.scalar_type() != q.scalar_type()) {
    type_error(name, " has dtype ", dtype_text(gate.scalar_type()), "; it must be float32 or the dtype of q, ",
               dtype_text(q.scalar_type()));
  }
  if (gate.scalar_type() != want) {
    type_error(name, " has dtype ", dtype_text(gate.scalar_type()), "; it must be that of i, ", dtype_text(want));
  }
}

void check_indices(const Tensor& indices, int64_t num_slots) {
  const auto* slots = static_cast<const int32_t*>(indices.data_ptr());
  std::vector<bool> used(num_slots, false);
  for (int64_t b = 0; b < indices.size(0); ++b) {
    if (slots[b] == -1) continue;
    if (slots[b] < -1 || slots[b] >= num_slots) {
      value_error("state_indices[", b, "] is ", slots[b], "; it must be -1 or from 0 to ", num_slots - 1);
    }
    if (used[slots[b]]) value_error("state_indices[", b, "] = ", slots[b], " appears twice; slots must be distinct");
    used[slots[b]] = true;
  }
}

}  // namespace

void set_step_state(MlstmStep& p, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                    const OptTensor& state_indices) {
  p.num_slots = p.batch;
  if (state_indices) {
    check_shape("state_indices", *state_indices, {p.batch}, "(batch,)");
    check_dtype("state_indices", *state_indices, ScalarType::Int);
    check_device("state_indices", *state_indices, like);
    if (p.batch > 1 && state_indices->stride(0) != 1) value_error("state_indices must be contiguous");
    p.num_slots = c.dim() > 0 ? c.size(0) : 0;
    if (state_indices->is_cpu()) check_indices(*state_indices, p.num_slots);
    p.state_indices = static_cast<const int32_t*>(state_indices->data_ptr());
  }
  check_shape("state c", c, {p.num_slots, p.heads, p.dqk, p.dv}, "(batch or slots, heads, dqk, dv)");
  check_shape("state n", n, {p.num_slots, p.heads, p.dqk}, "(batch or slots, heads, dqk)");
  check_shape("state m", m, {p.num_slots, p.heads}, "(batch or slots, heads)");
  if (c.scalar_type() != ScalarType::Float && c.scalar_type() != ScalarType::BFloat16) {
    type_error("state c has dtype ", dtype_text(c.scalar_type()), "; it must be float32 or bfloat16");
  }
  check_dtype("state n", n, ScalarType::Float);
  check_dtype("state m", m, ScalarType::Float);
  for (auto [name, t] : {std::pair{"state c", &c}, {"state n", &n}, {"state m", &m}}) {
    check_device(name, *t, like);
    check_contiguous(name, *t);
  }
  p.state_dtype = to_dtype(c.scalar_type());
  p.c = c.data_ptr();
  p.n = static_cast<float*>(n.data_ptr());
  p.m = static_cast<float*>(m.data_ptr());
}

void set_step_options(MlstmStep& p, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap) {
  p.gate_soft_cap = check_gate_soft_cap(gate_soft_cap);
  p.scale = check_scale(scale, p.dqk);
  p.eps = check_eps("eps", eps);
}

namespace {

Tensor mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor c, Tensor n, Tensor m,
                  OptTensor state_indices, std::optional<double> scale, double eps,
                  std::optional<double> gate_soft_cap, bool settled_state) {
  MlstmStep p{};
  // In a chain of such steps each may read its state when all kernels but the one before it have ended.
  p.settled_state = p.holds_next = settled_state;
  check_shape("q", q, {-1, -1, -1}, "(batch, heads, dqk)");
  check_op_dtype("q", q.scalar_type());
  p.batch = q.size(0), p.heads = q.size(1), p.dqk = q.size(2);
  if (p.dqk < 1) value_error("q has dqk ", p.dqk, "; it must be at least 1");
  check_shape("k", k, {p.batch, p.heads, p.dqk}, "(batch, heads, dqk)");
  check_shape("v", v, {p.batch, p.heads, -1}, "(batch, heads, dv)");
  p.dv = v.size(2);
  if (p.dv < 1) value_error("v has dv ", p.dv, "; it must be at least 1");
  for (auto [name, t] : {std::pair{"k", &k}, {"v", &v}}) {
    check_dtype(name, *t, q.scalar_type(), ", as q");
    check_device(name, *t, q);
  }
  check_last_dim_contiguous("q", q);
  check_last_dim_contiguous("k", k);
  check_last_dim_contiguous("v", v);
  check_step_gate("i", i, q, i.scalar_type());
  check_step_gate("f", f, q, i.scalar_type());

  set_step_state(p, q, c, n, m, state_indices);
  set_step_options(p, scale, eps, gate_soft_cap);
  if (q.is_cuda() && p.dqk > cuda::max_step_dqk) {
    value_error("q has dqk ", p.dqk, "; on CUDA it must be at most ", cuda::max_step_dqk);
  }

  Tensor h = new_empty(q, {p.batch, p.heads, p.dv}, q.scalar_type());
  p.dtype = to_dtype(q.scalar_type());
  p.gate_dtype = to_dtype(i.scalar_type());
  const auto strided = [](const Tensor& t) {
    return Strided{.data = t.data_ptr(), .batch = t.stride(0), .head = t.stride(1)};
  };
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  p.i = strided(i), p.f = strided(f);
  p.h = h.data_ptr();
  if (p.batch > 0 && p.heads > 0) {
    run<cpu::mlstm_step, cuda::mlstm_step, cuda::mlstm_step_workspace_bytes>("mlstm_step", q, p);
  }
  return h;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_xlstm, lib) {
  lib.def(
      "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, "
      "Tensor? state_indices, float? scale, float eps, float? gate_soft_cap, bool settled_state=False) -> Tensor");
}

IMPLEMENT_OPS(lib) { lib.impl("mlstm_step", TORCH_BOX(&mlstm_step)); }

static const DescribedOp described_mlstm_step("mlstm_step");

}  // namespace flash_xlstm
