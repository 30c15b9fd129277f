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

// The stride between slots of these sizes. Each slot must be contiguous, and lie apart from the others.
template <typename... Size>
int64_t check_slot_stride(const char* name, const Tensor& t, Size... of_slot) {
  // Unsigned: where there are no elements, the product may wrap.
  if (t.is_contiguous()) return static_cast<int64_t>((uint64_t{1} * ... * static_cast<uint64_t>(of_slot)));
  const Sizes sizes = t.sizes(), strides = t.strides();
  int64_t inner = 1;
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    if (sizes[d] > 1 && strides[d] != inner) {
      value_error(name, " must be contiguous within a slot: it is updated in place");
    }
    inner *= sizes[d];
  }
  if (sizes[0] == 1) return inner;
  if (strides[0] < inner) {
    value_error(name, " has stride ", strides[0], " between slots; it must be at least ", inner,
                ": a slot is updated in place");
  }
  return strides[0];
}

}  // namespace

MlstmSlots check_slots(const SlotSizes& sizes, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                       const OptTensor& indices) {
  const auto& [rows, heads, dqk, dv, rows_name] = sizes;
  MlstmSlots slots{};
  slots.num_slots = rows;
  if (indices) {
    check_shape("state_indices", *indices, {rows}, rows_name[0] == 'b' ? "(batch,)" : "(num_seqs,)");
    check_dtype("state_indices", *indices, ScalarType::Int);
    check_device("state_indices", *indices, like);
    if (rows > 1 && indices->stride(0) != 1) value_error("state_indices must be contiguous");
    slots.num_slots = c.dim() > 0 ? c.size(0) : 0;
    if (indices->is_cpu()) check_indices(*indices, slots.num_slots);
    slots.indices = static_cast<const int32_t*>(indices->data_ptr());
  }
  check_shape("state c", c, {slots.num_slots, heads, dqk, dv}, "(batch or slots, heads, dqk, dv)");
  check_shape("state n", n, {slots.num_slots, heads, dqk}, "(batch or slots, heads, dqk)");
  check_shape("state m", m, {slots.num_slots, heads}, "(batch or slots, heads)");
  if (c.scalar_type() != ScalarType::Float && c.scalar_type() != ScalarType::BFloat16) {
    type_error("state c has dtype ", dtype_text(c.scalar_type()), "; it must be float32 or bfloat16");
  }
  check_dtype("state n", n, ScalarType::Float);
  check_dtype("state m", m, ScalarType::Float);
  check_device("state c", c, like);
  check_device("state n", n, like);
  check_device("state m", m, like);
  slots.c_stride = check_slot_stride("state c", c, heads, dqk, dv);
  slots.n_stride = check_slot_stride("state n", n, heads, dqk);
  slots.m_stride = check_slot_stride("state m", m, heads);
  slots.c_dtype = to_dtype(c.scalar_type());
  slots.c = c.data_ptr();
  slots.n = static_cast<float*>(n.data_ptr());
  slots.m = static_cast<float*>(m.data_ptr());
  return slots;
}

void set_step_state(MlstmStep& p, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                    const OptTensor& state_indices) {
  p.state = check_slots({p.batch, p.heads, p.dqk, p.dv, "batch"}, like, c, n, m, state_indices);
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

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def(
      "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, "
      "Tensor? state_indices, float? scale, float eps, float? gate_soft_cap, bool settled_state=False) -> Tensor");
}

IMPLEMENT_OPS(lib) { lib.impl("mlstm_step", TORCH_BOX(&mlstm_step)); }

static const DescribedOp described_mlstm_step("mlstm_step");

}  // namespace flash_xlstm
