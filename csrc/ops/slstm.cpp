#include <cmath>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "ops/reused_memory.h"
#include "params/slstm.h"

namespace flash_xlstm {
namespace {

float* float_data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// A problem, with the tensors that it points to.
struct CheckedProblem {
  SlstmProblem p;
  std::vector<Tensor> held;

  const void* hold(const Tensor& t) {
    held.push_back(as_contiguous(t));
    return held.back().data_ptr();
  }
  const float* hold_state(const char* name, const Tensor& t, const Tensor& first, const char* first_name) {
    check_shape(name, t, {p.rows, p.heads, p.dim}, "(batch, heads, dim)");
    check_device(name, t, first, first_name);
    check_dtype(name, t, ScalarType::Float);
    return static_cast<const float*>(hold(t));
  }
};

void check_weights(const Tensor& R, const Tensor& b, int64_t heads, int64_t dim, const Tensor& first,
                   const char* first_name) {
  check_shape("R", R, {4, heads, dim, dim}, "(4, heads, dim, dim)");
  check_shape("b", b, {4, heads, dim}, "(4, heads, dim)");
  for (auto [name, t] : {std::pair{"R", &R}, {"b", &b}}) {
    check_device(name, *t, first, first_name);
    if (t->scalar_type() != ScalarType::Float && t->scalar_type() != first.scalar_type()) {
      type_error(name, " has dtype ", dtype_text(t->scalar_type()), "; it must be float32 or the dtype of ", first_name,
                 ", ", dtype_text(first.scalar_type()));
    }
  }
}

// `first` is x (forward) or h (backward); p's sizes are set.
void check_common(CheckedProblem& checked, const Tensor& first, const char* first_name, const Tensor& R,
                  const Tensor& b, const OptTensor& h0, const OptTensor& c0, const OptTensor& n0, const OptTensor& m0,
                  const OptTensor& cu_seqlens, double clip) {
  SlstmProblem& p = checked.p;
  if (p.seq < 1) value_error(first_name, " has seq ", p.seq, "; it must be at least 1");
  if (p.dim < 1) value_error(first_name, " has dim ", p.dim, "; it must be at least 1");
  check_last_dim_contiguous(first_name, first);
  check_weights(R, b, p.heads, p.dim, first, first_name);
  p.rows = p.batch;
  if (cu_seqlens) {
    p.rows = check_cu_seqlens(*cu_seqlens, first, first_name);
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  }
  if (h0.has_value() != c0.has_value() || h0.has_value() != n0.has_value() || h0.has_value() != m0.has_value()) {
    value_error("initial_state must be None or all of (h, c, n, m)");
  }
  if (h0) {
    p.h0 = checked.hold_state("initial_state h", *h0, first, first_name);
    p.c0 = checked.hold_state("initial_state c", *c0, first, first_name);
    p.n0 = checked.hold_state("initial_state n", *n0, first, first_name);
    p.m0 = checked.hold_state("initial_state m", *m0, first, first_name);
  }
  if (!(static_cast<float>(clip) > 0.0f)) {
    value_error("recurrent_grad_clip is ", clip, "; it must be None, or greater than 0 in float32");
  }
  p.dtype = to_dtype(first.scalar_type());
  p.weight_dtype = to_dtype(R.scalar_type());
  p.bias_dtype = to_dtype(b.scalar_type());
  // The CPU packs R from either order of `out` and `in`: a copy would cost a single short row a good part of its time.
  const bool as_it_is = R.is_cpu() && (R.stride(2) == 1 || R.stride(3) == 1);
  p.weights = as_it_is ? checked.held.emplace_back(R).data_ptr() : checked.hold(R);
  const Tensor& held = checked.held.back();
  p.weights_gate = held.stride(0), p.weights_head = held.stride(1);
  p.weights_out = held.stride(2), p.weights_in = held.stride(3);
  p.bias = checked.hold(b);
}

std::vector<int64_t> kept_shape(const SlstmProblem& p, bool cpu, bool keep) {
  const int64_t batch = keep ? p.batch : 0;
  if (cpu) return {batch, 1, p.heads, slstm_kept_arrays(p.seq), p.dim};
  return {batch, p.seq, p.heads, slstm_kept, p.dim};
}

// `last`: nullptr, or where h, c, n and m after the last token go.
Tensors<2> forward(const Tensor& x, const Tensor& R, const Tensor& b, const OptTensor& h0, const OptTensor& c0,
                   const OptTensor& n0, const OptTensor& m0, const OptTensor& cu_seqlens, double recurrent_grad_clip,
                   bool keep, Tensor* last) {
  CheckedProblem checked{};
  SlstmProblem& p = checked.p;
  check_shape("x", x, {-1, -1, 4, -1, -1}, "(batch, seq, 4, heads, dim)");
  check_op_dtype("x", x.scalar_type());
  p.batch = x.size(0), p.seq = x.size(1), p.heads = x.size(3), p.dim = x.size(4);
  check_common(checked, x, "x", R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip);

  Tensor h = new_empty(x, {p.batch, p.seq, p.heads, p.dim}, x.scalar_type());
  Tensor kept = reused_empty(x, kept_shape(p, x.is_cpu(), keep), ScalarType::Float);

  SlstmForward params{};
  params.p = p;
  params.x = x.data_ptr();
  params.x_batch = x.stride(0), params.x_seq = x.stride(1), params.x_gate = x.stride(2), params.x_head = x.stride(3);
  params.h = h.data_ptr();
  if (keep) params.kept = float_data(kept);
  if (last != nullptr) {
    for (int part = 0; part < 4; ++part) last[part] = new_empty(x, {p.rows, p.heads, p.dim}, ScalarType::Float);
    params.h_last = float_data(last[0]), params.c_last = float_data(last[1]);
    params.n_last = float_data(last[2]), params.m_last = float_data(last[3]);
  }
  if (p.batch > 0 && p.heads > 0) {
    run<cpu::slstm_forward, cuda::slstm_forward, cuda::slstm_forward_workspace_bytes>("slstm", x, params);
  }
  return {h, kept};
}

Tensors<6> slstm(Tensor x, Tensor R, Tensor b, OptTensor h0, OptTensor c0, OptTensor n0, OptTensor m0,
                 OptTensor cu_seqlens, double recurrent_grad_clip, bool keep, bool return_final_state) {
  Tensor last[4];
  auto [h, kept] =
      forward(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep, return_final_state ? last : nullptr);
  for (Tensor& t : last) {
    if (!return_final_state) t = new_empty(x, {0, x.size(3), x.size(4)}, ScalarType::Float);
  }
  return {h, kept, last[0], last[1], last[2], last[3]};
}

Tensors<2> slstm_forward(Tensor x, Tensor R, Tensor b, OptTensor h0, OptTensor c0, OptTensor n0, OptTensor m0,
                         OptTensor cu_seqlens, double recurrent_grad_clip, bool keep) {
  return forward(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep, nullptr);
}

// `initial`: nullptr, or where the gradients of h0, c0, n0 and m0 go.
Tensors<3> backward(OptTensor dh, const OptTensor& dh_last, const OptTensor& dc_last, const OptTensor& dn_last,
                    const OptTensor& dm_last, const Tensor& R, const Tensor& b, const OptTensor& h0,
                    const OptTensor& c0, const OptTensor& n0, const OptTensor& m0, const OptTensor& cu_seqlens,
                    const Tensor& h, const Tensor& kept, double recurrent_grad_clip, Tensor* initial) {
  CheckedProblem checked{};
  SlstmProblem& p = checked.p;
  check_shape("h", h, {-1, -1, -1, -1}, "(batch, seq, heads, dim)");
  check_op_dtype("h", h.scalar_type());
  p.batch = h.size(0), p.seq = h.size(1), p.heads = h.size(2), p.dim = h.size(3);
  check_common(checked, h, "h", R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip);
  check_shape("kept", kept, kept_shape(p, h.is_cpu(), true), "the shape that the forward gave it");
  check_dtype("kept", kept, ScalarType::Float);
  check_device("kept", kept, h, "h");

  SlstmBackward params{};
  if (dh) {
    check_shape("dh", *dh, {p.batch, p.seq, p.heads, p.dim}, "(batch, seq, heads, dim)");
    check_dtype("dh", *dh, h.scalar_type(), ", as h");
    check_device("dh", *dh, h, "h");
    if (p.dim > 1 && dh->stride(3) != 1) dh = as_contiguous(*dh);
    params.dh = dh->data_ptr();
    params.dh_batch = dh->stride(0), params.dh_seq = dh->stride(1), params.dh_head = dh->stride(2);
  }
  if (dh_last) params.dh_last = checked.hold_state("dh_last", *dh_last, h, "h");
  if (dc_last) params.dc_last = checked.hold_state("dc_last", *dc_last, h, "h");
  if (dn_last) params.dn_last = checked.hold_state("dn_last", *dn_last, h, "h");
  if (dm_last) params.dm_last = checked.hold_state("dm_last", *dm_last, h, "h");
  params.h = checked.hold(h);
  params.kept = static_cast<const float*>(checked.hold(kept));
  params.clip = static_cast<float>(recurrent_grad_clip);

  Tensor dx = reused_empty(h, {p.batch, p.seq, 4, p.heads, p.dim}, h.scalar_type());
  Tensor dR = new_empty(h, {4, p.heads, p.dim, p.dim}, R.scalar_type());
  Tensor db = new_empty(h, {4, p.heads, p.dim}, b.scalar_type());
  params.p = p;
  params.dx = dx.data_ptr();
  params.dweights = dR.data_ptr();
  params.dbias = db.data_ptr();
  if (h0) {
    for (int part = 0; part < 4; ++part) initial[part] = new_empty(h, {p.rows, p.heads, p.dim}, ScalarType::Float);
    params.dh0 = float_data(initial[0]), params.dc0 = float_data(initial[1]);
    params.dn0 = float_data(initial[2]), params.dm0 = float_data(initial[3]);
  }
  if (p.heads > 0 && p.batch == 0) {
    torch::stable::zero_(dR);
    torch::stable::zero_(db);
  }
  if (p.batch > 0 && p.heads > 0) {
    run<cpu::slstm_backward, cuda::slstm_backward, cuda::slstm_backward_workspace_bytes>("slstm_backward", h, params);
  }
  return {dx, dR, db};
}

Tensors<7> slstm_backward(OptTensor dh, OptTensor dh_last, OptTensor dc_last, OptTensor dn_last, OptTensor dm_last,
                          Tensor R, Tensor b, OptTensor h0, OptTensor c0, OptTensor n0, OptTensor m0,
                          OptTensor cu_seqlens, Tensor h, Tensor kept, double recurrent_grad_clip) {
  Tensor initial[4];
  auto [dx, dR, db] = backward(dh, dh_last, dc_last, dn_last, dm_last, R, b, h0, c0, n0, m0, cu_seqlens, h, kept,
                               recurrent_grad_clip, initial);
  for (Tensor& t : initial) {
    if (!h0) t = new_empty(h, {0, h.size(2), h.size(3)}, ScalarType::Float);
  }
  return {dx, dR, db, initial[0], initial[1], initial[2], initial[3]};
}

Tensors<3> slstm_fresh_backward(Tensor dh, Tensor R, Tensor b, OptTensor cu_seqlens, Tensor h, Tensor kept,
                                double recurrent_grad_clip) {
  const OptTensor none;
  return backward(dh, none, none, none, none, R, b, none, none, none, none, cu_seqlens, h, kept, recurrent_grad_clip,
                  nullptr);
}

Tensor slstm_step(Tensor x, Tensor R, Tensor b, Tensor h, Tensor c, Tensor n, Tensor m) {
  SlstmStep params{};
  check_shape("x", x, {-1, 4, -1, -1}, "(batch, 4, heads, dim)");
  check_op_dtype("x", x.scalar_type());
  params.batch = x.size(0), params.heads = x.size(2), params.dim = x.size(3);
  if (params.dim < 1) value_error("x has dim ", params.dim, "; it must be at least 1");
  check_last_dim_contiguous("x", x);
  check_weights(R, b, params.heads, params.dim, x, "x");
  for (auto [name, t] : {std::pair{"state h", &h}, {"state c", &c}, {"state n", &n}, {"state m", &m}}) {
    check_shape(name, *t, {params.batch, params.heads, params.dim}, "(batch, heads, dim)");
    check_dtype(name, *t, ScalarType::Float);
    check_device(name, *t, x, "x");
    check_contiguous(name, *t);
  }
  R = as_contiguous(R);
  b = as_contiguous(b);
  Tensor out = new_empty(x, {params.batch, params.heads, params.dim}, x.scalar_type());
  params.dtype = to_dtype(x.scalar_type());
  params.weight_dtype = to_dtype(R.scalar_type());
  params.bias_dtype = to_dtype(b.scalar_type());
  params.weights = R.data_ptr();
  params.bias = b.data_ptr();
  params.x = x.data_ptr();
  params.x_batch = x.stride(0), params.x_gate = x.stride(1), params.x_head = x.stride(2);
  params.h_state = float_data(h), params.c_state = float_data(c);
  params.n_state = float_data(n), params.m_state = float_data(m);
  params.h = out.data_ptr();
  if (params.batch > 0 && params.heads > 0) {
    run<cpu::slstm_step, cuda::slstm_step, cuda::slstm_step_workspace_bytes>("slstm_step", x, params);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  // `keep`: whether to keep what the backward needs; else `kept` is empty. `recurrent_grad_clip` may be infinite.
  lib.def(
      "slstm(Tensor x, Tensor R, Tensor b, Tensor? h0, Tensor? c0, Tensor? n0, Tensor? m0, Tensor? cu_seqlens, "
      "float recurrent_grad_clip, bool keep, bool return_final_state) "
      "-> (Tensor h, Tensor kept, Tensor h_last, Tensor c_last, Tensor n_last, Tensor m_last)");
  // Eager calls without a final state take this one, as they take mlstm_forward; their backward the next but one, where
  // there is no initial state either.
  lib.def(
      "slstm_forward(Tensor x, Tensor R, Tensor b, Tensor? h0, Tensor? c0, Tensor? n0, Tensor? m0, "
      "Tensor? cu_seqlens, float recurrent_grad_clip, bool keep) -> (Tensor h, Tensor kept)");
  lib.def(
      "slstm_backward(Tensor? dh, Tensor? dh_last, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
      "Tensor R, Tensor b, Tensor? h0, Tensor? c0, Tensor? n0, Tensor? m0, Tensor? cu_seqlens, "
      "Tensor h, Tensor kept, float recurrent_grad_clip) "
      "-> (Tensor dx, Tensor dR, Tensor db, Tensor dh0, Tensor dc0, Tensor dn0, Tensor dm0)");
  lib.def(
      "slstm_fresh_backward(Tensor dh, Tensor R, Tensor b, Tensor? cu_seqlens, Tensor h, Tensor kept, "
      "float recurrent_grad_clip) -> (Tensor dx, Tensor dR, Tensor db)");
  lib.def("slstm_step(Tensor x, Tensor R, Tensor b, Tensor(a!) h, Tensor(b!) c, Tensor(c!) n, Tensor(d!) m) -> Tensor");
}

IMPLEMENT_OPS(lib) {
  lib.impl("slstm", TORCH_BOX(&slstm));
  lib.impl("slstm_forward", TORCH_BOX(&slstm_forward));
  lib.impl("slstm_backward", TORCH_BOX(&slstm_backward));
  lib.impl("slstm_fresh_backward", TORCH_BOX(&slstm_fresh_backward));
  lib.impl("slstm_step", TORCH_BOX(&slstm_step));
}

static const DescribedOp described_slstm("slstm", CUDA_ONLY(cuda::slstm_words));
static const DescribedOp described_slstm_step("slstm_step");

}  // namespace flash_xlstm
