
// The mLSTM over a sequence and its gradients, with exponential or sigmoid input gates.
#include <cmath>
#include <utility>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "ops/mlstm.h"
#include "ops/mlstm_step.h"
#include "ops/reused_memory.h"
#include "params/mlstm.h"

namespace flash_xlstm {
namespace {

// What the ops of this family take besides q, k, v and the gates.
struct Options {
  OptTensor c, n, m, cu_seqlens;
  std::optional<double> scale;
  double eps;
  std::optional<double> gate_soft_cap;
  int64_t chunk_size;
  InputGate input_gate = InputGate::exponential;
  bool normalize = true;
  const char* first = "q";  // the argument that stands for q: k where there is none
  float first_m = 0.0f;
  OptTensor state_indices = std::nullopt;  // c, n and m are then a pool, which is updated in place
  OptTensor fresh = std::nullopt;

  // Whether the state has an n and an m.
  bool has_n() const { return normalize; }
  bool has_m() const { return input_gate == InputGate::exponential; }
  // What the backward needs of a token and head besides states: s and m, s, or nothing.
  int64_t scalars() const { return int64_t{has_n()} + int64_t{has_m()}; }
};

// A problem, and the tensors that it points to.
struct CheckedProblem {
  MlstmProblem p;
  std::vector<Tensor> held;
};

const float* hold_float32(CheckedProblem& checked, const Tensor& t) {
  Tensor dense = as_contiguous(t);
  checked.held.push_back(dense);
  return static_cast<const float*>(dense.data_ptr());
}

void check_gate(const char* name, const Tensor& gate, const Tensor& q, const char* first, ScalarType dtype,
                ScalarType gate_dtype) {
  check_shape(name, gate, {q.size(0), q.size(1), q.size(2)}, "(batch, seq, heads)");
  check_device(name, gate, q, first);
  const ScalarType has = gate.scalar_type();
  if (has != ScalarType::Float && has != dtype) {
    type_error(name, " has dtype ", dtype_text(has), "; it must be float32 or the dtype of ", first, ", ",
               dtype_text(dtype));
  }
  if (has != gate_dtype) {
    type_error(name, " has dtype ", dtype_text(has), "; it must be that of i, ", dtype_text(gate_dtype));
  }
}

void check_state(const char* name, const Tensor& t, const Tensor& q, Sizes sizes, const char* want,
                 const char* first = "q") {
  check_shape(name, t, sizes, want);
  check_device(name, t, q, first);
  check_dtype(name, t, ScalarType::Float);
}

void check_pool(MlstmProblem& p, const Tensor& q, const Options& options) {
  const char* const rows = options.cu_seqlens ? "num_seqs" : "batch";
  p.pool = check_slots({p.num_seqs, p.heads, p.dqk, p.dv, rows}, q, *options.c, *options.n, *options.m,
                       options.state_indices);
  if (!options.fresh) return;
  const Tensor& fresh = *options.fresh;
  check_shape("fresh", fresh, {p.num_seqs}, options.cu_seqlens ? "(num_seqs,)" : "(batch,)");
  check_dtype("fresh", fresh, ScalarType::Bool);
  check_device("fresh", fresh, q);
  if (p.num_seqs > 1 && fresh.stride(0) != 1) value_error("fresh must be contiguous");
  p.fresh = static_cast<const bool*>(fresh.data_ptr());
}

void check_initial_state(CheckedProblem& checked, const Tensor& q, const Options& options) {
  MlstmProblem& p = checked.p;
  if (options.state_indices) return check_pool(p, q, options);
  const auto& [c, n, m] = std::tie(options.c, options.n, options.m);
  if (n && !options.has_n()) value_error("initial_state n is a tensor; with normalize=False it must be None");
  if ((options.has_n() && c.has_value() != n.has_value()) || (options.has_m() && c.has_value() != m.has_value())) {
    value_error("initial_state must be None or all of ", options.has_m() ? "(c, n, m)" : "(c, n)");
  }
  if (c) {
    check_state("initial_state c", *c, q, {p.num_seqs, p.heads, p.dqk, p.dv}, "(batch, heads, dqk, dv)");
    p.c0 = hold_float32(checked, *c);
  }
  if (n) {
    check_state("initial_state n", *n, q, {p.num_seqs, p.heads, p.dqk}, "(batch, heads, dqk)");
    p.n0 = hold_float32(checked, *n);
  }
  if (m) {
    check_state("initial_state m", *m, q, {p.num_seqs, p.heads}, "(batch, heads)");
    p.m0 = hold_float32(checked, *m);
  }
}

CheckedProblem check_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                             const Options& options) {
  const OptTensor& cu_seqlens = options.cu_seqlens;
  CheckedProblem checked{};
  MlstmProblem& p = checked.p;
  const char* const first = options.first;
  check_shape(first, q, {-1, -1, -1, -1}, "(batch, seq, heads, dqk)");
  const ScalarType dtype = q.scalar_type(), gate_dtype = i.scalar_type();  // read once: each read searches a list
  check_op_dtype(first, dtype);
  p.batch = q.size(0), p.seq = q.size(1), p.heads = q.size(2), p.dqk = q.size(3);
  if (p.seq < 1) value_error(first, " has seq ", p.seq, "; it must be at least 1");
  if (p.dqk < 1) value_error(first, " has dqk ", p.dqk, "; it must be at least 1");
  check_shape("k", k, {p.batch, p.seq, p.heads, p.dqk}, "(batch, seq, heads, dqk)");
  check_shape("v", v, {p.batch, p.seq, p.heads, -1}, "(batch, seq, heads, dv)");
  p.dv = v.size(3);
  if (p.dv < 1) value_error("v has dv ", p.dv, "; it must be at least 1");
  check_dtype("k", k, dtype, ", as q");
  check_dtype("v", v, dtype, first[0] == 'q' ? ", as q" : ", as k");
  check_device("k", k, q);
  check_device("v", v, q, first);
  check_last_dim_contiguous(first, q);
  check_last_dim_contiguous("k", k);
  check_last_dim_contiguous("v", v);
  check_gate("i", i, q, first, dtype, gate_dtype);
  check_gate("f", f, q, first, dtype, gate_dtype);

  p.num_seqs = p.batch;
  if (cu_seqlens) {
    p.num_seqs = check_cu_seqlens(*cu_seqlens, q, first);
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  }
  check_initial_state(checked, q, options);
  const int64_t chunk_size = options.chunk_size;
  if (chunk_size < 0 || chunk_size > max_chunk_size) {
    value_error("chunk_size is ", chunk_size, "; it must be None or from 1 to ", max_chunk_size);
  }
  p.gate_soft_cap = check_gate_soft_cap(options.gate_soft_cap);
  p.input_gate = options.input_gate;
  p.normalize = options.normalize;
  p.first_m = options.first_m;
  p.dtype = to_dtype(dtype);
  p.gate_dtype = to_dtype(gate_dtype);
  p.scale = check_scale(options.scale, p.dqk);
  p.eps = check_eps("eps", options.eps);
  p.chunk_size = chunk_size;
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  p.i = strided(i), p.f = strided(f);
  return checked;
}

// Copies the input `t`, for kernels that cannot read it as it lies, and makes `to` describe the copy.
[[maybe_unused]] void copy_input(CheckedProblem& checked, Strided& to, const Tensor& t) {
  Tensor copy = as_contiguous(t);
  if (copy.data_ptr() == t.data_ptr()) copy = copy_of(t);  // t is contiguous, but not aligned
  to = strided(copy);
  checked.held.push_back(std::move(copy));
}

[[maybe_unused]] void copy_inputs(CheckedProblem& checked, MlstmProblem& p, const cuda::MlstmCopies& copies,
                                  const Tensor& q, const Tensor& k, const Tensor& v) {
  if (copies.q) copy_input(checked, p.q, q);
  if (copies.k) copy_input(checked, p.k, k);
  if (copies.v) copy_input(checked, p.v, v);
}

float* float_data(const Tensor& t, bool wanted = true) { return wanted ? static_cast<float*>(t.data_ptr()) : nullptr; }
float* float_data(const OptTensor& t) { return t ? float_data(*t) : nullptr; }

// Whether the kernels can write a gradient to `to`, which is not contiguous.
bool writes_apart([[maybe_unused]] const Tensor& q, [[maybe_unused]] const MlstmBackward& params,
                  [[maybe_unused]] const Tensor& to) {
#ifdef FLASH_XLSTM_WITH_CUDA
  if (!q.is_cuda() || to.stride(1) * element_bytes(params.p.dtype) % 16 != 0) return false;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return cuda::mlstm_writes_apart(params);
#else
  return false;
#endif
}

// The floats of the states that a forward keeps for the backward; -1: the kernels for the problem keep none.
int64_t kept_state_floats(const Tensor& q, const MlstmProblem& p) {
  if (q.is_cpu()) {
    const auto [floats, tokens] = cpu::mlstm_kept_states(p.dqk, p.dv);
    return p.batch * p.heads * ((p.seq - 1) / tokens) * floats + 16;  // never empty: compilers would ask for which seq
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  if (!q.is_cuda()) return -1;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t floats = cuda::mlstm_kept_floats(p.dtype, p.dqk, p.dv);
  const int64_t chunks = (p.seq + mlstm_kept_tokens - 1) / mlstm_kept_tokens;
  return floats == 0 ? -1 : (p.cu_seqlens != nullptr ? chunks + p.num_seqs : chunks * p.batch) * p.heads * floats;
#else
  return -1;
#endif
}

struct ForwardOutputs {
  OptTensor h, kept, c_last, n_last, m_last, log_decay;  // only those that exist and are wanted
  OptTensor piece;                                       // c_last, n_last, m_last and log_decay in one
};

enum class Wanted { h, h_and_kept, h_kept_and_state, state_and_decay, piece };

// c, n, m and log decay one after the other; a multiple of 16 bytes, so that a row of several is aligned too.
int64_t piece_floats(const MlstmProblem& p) { return (p.num_seqs * p.heads * (p.dqk * p.dv + p.dqk + 2) + 3) / 4 * 4; }

// Allocates only what is wanted: every tensor costs the host a microsecond. `kept` is what the backward needs: s and m
// as one tensor (2, batch, seq, heads), or s alone as (batch, seq, heads). With states it has one dimension, they come
// first, then s and m, as far as there are any.
ForwardOutputs forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                       const Tensor& f, const Options& options, Wanted wanted, bool keep_states = false) {
  CheckedProblem checked = check_problem(q, k, v, i, f, options);
  const MlstmProblem& p = checked.p;
  const auto make = [&](bool wanted, Sizes sizes) {
    return wanted ? OptTensor(new_empty(q, sizes, ScalarType::Float)) : std::nullopt;
  };
  const bool has_n = options.has_n(), has_m = options.has_m();
  const bool piece = wanted == Wanted::piece, h = wanted != Wanted::state_and_decay && !piece;
  const bool keep = h && wanted != Wanted::h, state = wanted == Wanted::h_kept_and_state || (!h && !piece);
  const int64_t states = keep && keep_states ? kept_state_floats(q, p) : -1, normalizers = p.batch * p.seq * p.heads;
  OptTensor kept_with_states;
  if (states >= 0) {
    kept_with_states = reused_empty(q, {states + options.scalars() * normalizers}, ScalarType::Float);
  }
  ForwardOutputs y{.h = h ? OptTensor(new_empty(q, {p.batch, p.seq, p.heads, p.dv}, q.scalar_type())) : std::nullopt,
                   .kept = states >= 0 ? kept_with_states
                           : has_m     ? make(keep, {2, p.batch, p.seq, p.heads})
                                       : make(keep && has_n, {p.batch, p.seq, p.heads}),
                   .c_last = make(state, {p.num_seqs, p.heads, p.dqk, p.dv}),
                   .n_last = make(state && has_n, {p.num_seqs, p.heads, p.dqk}),
                   .m_last = make(state && has_m, {p.num_seqs, p.heads}),
                   .log_decay = make(!h && !piece, {p.num_seqs, p.heads}),
                   .piece = make(piece, {piece_floats(p)})};
  MlstmForward params{};
  params.p = p;
  if (h) params.h = y.h->data_ptr();
  if (y.kept) {
    float* kept = float_data(*y.kept);
    if (states > 0) params.kept_states = kept, params.kept_floats = states, kept += states;
    if (has_n) params.s = kept;
    if (has_m) params.m = kept + normalizers;
  }
  params.c_last = float_data(y.c_last);
  params.n_last = float_data(y.n_last);
  params.m_last = float_data(y.m_last);
  params.log_decay = float_data(y.log_decay);
  if (piece) {
    const int64_t rows = p.num_seqs * p.heads;
    params.c_last = float_data(y.piece);
    params.n_last = params.c_last + rows * p.dqk * p.dv;
    params.m_last = params.n_last + rows * p.dqk;
    params.log_decay = params.m_last + rows;
  }
  if (p.batch > 0 && p.heads > 0) {
    run<cpu::mlstm_forward, cuda::mlstm_forward, cuda::mlstm_forward_workspace_bytes>(
        op, q, params, [&] { copy_inputs(checked, params.p, cuda::mlstm_copies(params), q, k, v); });
  }
  return y;
}

// The gradients that a backward makes. rest: all, with what a call of initial_state_alone has begun.
enum class Of { all, state_alone, initial_state_alone, rest };

#ifdef FLASH_XLSTM_WITH_CUDA
bool begins_backward(const Tensor& q, const MlstmBackward& params) {
  if (!q.is_cuda()) return false;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return cuda::mlstm_begins_backward(params);
}

// A part of a backward. The first makes `workspace`, the second takes it.
template <typename F>
void run_part(const char* op, const Tensor& q, const MlstmBackward& params, Tensor& workspace, F&& prepare) {
  on_cuda(op, q, [&](cudaStream_t stream) {
    prepare();
    const int64_t bytes = cuda::mlstm_backward_workspace_bytes(params);
    if (!params.is_begun) {
      workspace = new_empty(q, {bytes}, ScalarType::Byte);
    } else if (workspace.numel() != bytes) {
      value_error("begun has ", workspace.numel(), " bytes; it must be what mlstm_initial_backward returned, ", bytes);
    }
    return cuda::mlstm_backward(params, workspace.data_ptr(), stream);
  });
}
#endif

// The gradients of q, k, v, i, f, c, n and m. Those of states that there are not are empty. `kept` is what the forward
// returned. With `into`, dq, dk and dv go there: the kernels write them, or they are copied.
// Of::state_alone: from the end state and its decay alone. There is no q then, but k in its place, no dh, h and kept.
// Of::initial_state_alone: dk and dv are empty; in the places of di and df are open_e and is_open, (num_seqs, heads)
// float32, or without an initial state (0, heads). `begun` becomes the kernels' workspace, for Of::rest, whose dq is
// empty. Where the kernels do not go in two parts, `begun` is empty, this call's dq means nothing, and Of::rest makes
// all.
Tensors<8> backward(const char* op, OptTensor dh, const OptTensor& dc_last, const OptTensor& dn_last,
                    const OptTensor& dm_last, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                    const Tensor& f, const Options& options, const OptTensor& h, const OptTensor& kept,
                    const MlstmInto* into = nullptr, Of of = Of::all, const OptTensor& dlog_decay = std::nullopt,
                    Tensor* begun = nullptr) {
  if (of == Of::rest && begun->numel() == 0) of = Of::all;
  const bool state_only = of == Of::state_alone, all_but_initial = of != Of::initial_state_alone;
  CheckedProblem checked = check_problem(q, k, v, i, f, options);
  const MlstmProblem& p = checked.p;
  MlstmBackward params{};
  params.p = p;
  if (q.is_cuda() && p.dtype == DType::float32 && !state_only) {  // only this path makes dh . h from h
    if (!h) value_error("h is None; for float32 on CUDA it must be what the forward returned");
    check_shape("h", *h, {p.batch, p.seq, p.heads, p.dv}, "(batch, seq, heads, dv)");
    check_dtype("h", *h, q.scalar_type(), ", as q");
    params.h = hold_float32(checked, *h);
  }
  if (!state_only) {
    const int64_t states = kept->dim() == 1 ? kept_state_floats(q, p) : -1, normalizers = p.batch * p.seq * p.heads;
    if (states >= 0) {
      check_shape("kept", *kept, {states + options.scalars() * normalizers}, "(states and what follows them,)");
    } else if (options.has_m()) {
      check_shape("kept", *kept, {2, p.batch, p.seq, p.heads}, "(2, batch, seq, heads)");
    } else {
      check_shape("kept", *kept, {options.has_n() ? p.batch : 0, p.seq, p.heads},
                  options.has_n() ? "(batch, seq, heads)" : "(0, seq, heads)");
    }
    check_dtype("kept", *kept, ScalarType::Float);
    check_device("kept", *kept, q);
    const float* data = hold_float32(checked, *kept);
    if (states > 0) params.kept_states = data, params.kept_floats = states, data += states;
    if (options.has_n()) params.s = data;
    if (options.has_m()) params.m = data + normalizers;
  }
  if (dh) {
    check_shape("dh", *dh, {p.batch, p.seq, p.heads, p.dv}, "(batch, seq, heads, dv)");
    check_dtype("dh", *dh, q.scalar_type(), ", as q");
    check_device("dh", *dh, q);
    if (p.dv > 1 && dh->stride(3) != 1) dh = as_contiguous(*dh);
    params.dh = strided(*dh);
  }
  if (dc_last) {
    check_state("dc_last", *dc_last, q, {p.num_seqs, p.heads, p.dqk, p.dv}, "(batch, heads, dqk, dv)", options.first);
    params.dc_last = hold_float32(checked, *dc_last);
  }
  if (dn_last && options.has_n()) {
    check_state("dn_last", *dn_last, q, {p.num_seqs, p.heads, p.dqk}, "(batch, heads, dqk)", options.first);
    params.dn_last = hold_float32(checked, *dn_last);
  }
  if (dm_last) {
    check_state("dm_last", *dm_last, q, {p.num_seqs, p.heads}, "(batch, heads)", options.first);
    params.dm_last = hold_float32(checked, *dm_last);
  }
  if (dlog_decay) {
    check_state("dlog_decay", *dlog_decay, q, {p.num_seqs, p.heads}, "(batch, heads)", options.first);
    params.dlog_decay = hold_float32(checked, *dlog_decay);
  }

  const auto gradient = [&](const Tensor& to, const Tensor& of, bool wanted = true) {
    if (!wanted) return new_empty(q, {0}, q.scalar_type());
    if (into != nullptr && writes_apart(q, params, to)) return to;
    return reused_empty(q, {p.batch, p.seq, p.heads, of.size(3)}, q.scalar_type());
  };
  Tensor dq = gradient(into == nullptr ? q : into->dq, q, !state_only && of != Of::rest);
  Tensor dk = gradient(into == nullptr ? q : into->dk, k, all_but_initial);
  Tensor dv = gradient(into == nullptr ? q : into->dv, v, all_but_initial);
  const auto of_gates = [&](const OptTensor& to) {
    if (to && i.scalar_type() == q.scalar_type() && writes_apart(q, params, *to)) return *to;
    return all_but_initial ? new_empty(q, {p.batch, p.seq, p.heads}, i.scalar_type())
                           : new_empty(q, {options.c ? p.num_seqs : 0, p.heads}, ScalarType::Float);
  };
  Tensor di = of_gates(into == nullptr ? std::nullopt : into->di);
  Tensor df = of_gates(into == nullptr ? std::nullopt : into->df);
  const bool has_c = options.c.has_value(), has_n = has_c && options.has_n(), has_m = has_c && options.has_m();
  Tensor dc = new_empty(q, {has_c ? p.num_seqs : 0, p.heads, p.dqk, p.dv}, ScalarType::Float);
  Tensor dn = new_empty(q, {has_n ? p.num_seqs : 0, p.heads, p.dqk}, ScalarType::Float);
  Tensor dm = new_empty(q, {has_m ? p.num_seqs : 0, p.heads}, ScalarType::Float);
  if (all_but_initial) {
    params.dk = dk.data_ptr(), params.dv = dv.data_ptr();
    params.dk_token = dk.stride(1), params.dv_token = dv.stride(1);
    params.di = di.data_ptr(), params.df = df.data_ptr(), params.gate_token = di.stride(1);
  } else {
    params.open_e = float_data(di), params.is_open = float_data(df);
  }
  params.is_begun = of == Of::rest;
  if (!state_only && !params.is_begun) params.dq = dq.data_ptr(), params.dq_token = dq.stride(1);
  params.dc0 = float_data(dc, has_c);
  params.dn0 = float_data(dn, has_n);
  params.dm0 = float_data(dm, has_m);
  const auto prepare = [&] {
    const cuda::MlstmCopies copies = cuda::mlstm_copies(params);
    copy_inputs(checked, params.p, copies, q, k, v);
    if (copies.dh) copy_input(checked, params.dh, *dh);
  };
  bool in_parts = false;
#ifdef FLASH_XLSTM_WITH_CUDA
  in_parts = (params.is_begun || !all_but_initial) && p.batch > 0 && p.heads > 0 && begins_backward(q, params);
  if (in_parts) run_part(op, q, params, *begun, prepare);
#endif
  if (params.is_begun && !in_parts) {
    value_error("begun has ", begun->numel(), " bytes; it must be empty, as mlstm_initial_backward returned it");
  }
  if (p.batch > 0 && p.heads > 0 && !in_parts && (all_but_initial || has_c)) {
    run<cpu::mlstm_backward, cuda::mlstm_backward, cuda::mlstm_backward_workspace_bytes>(op, q, params, prepare);
  }
  if (into != nullptr) {
    const auto copy = [&](Tensor to, const Tensor& from) {
      if (to.data_ptr() != from.data_ptr()) torch::stable::copy_(to, torch::stable::view(from, sizes_of(to)));
    };
    copy(into->dq, dq), copy(into->dk, dk), copy(into->dv, dv);
    if (into->di) copy(*into->di, di), copy(*into->df, df);
  }
  return {dq, dk, dv, di, df, dc, dn, dm};
}

// `t`, or an empty tensor where the state is not wanted. The first of `sizes` becomes 0.
Tensor or_empty(const OptTensor& t, const Tensor& q, std::vector<int64_t> sizes) {
  sizes[0] = 0;
  return t ? *t : new_empty(q, sizes, ScalarType::Float);
}

Tensors<5> mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                 OptTensor cu_seqlens, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
                 int64_t chunk_size, bool return_final_state, bool keep_states) {
  const Options options{.c = c,
                        .n = n,
                        .m = m,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size};
  const ForwardOutputs y = forward("mlstm", q, k, v, i, f, options,
                                   return_final_state ? Wanted::h_kept_and_state : Wanted::h_and_kept, keep_states);
  const int64_t heads = q.size(2), dqk = q.size(3), dv = v.size(3);
  return {*y.h, *y.kept, or_empty(y.c_last, q, {0, heads, dqk, dv}), or_empty(y.n_last, q, {0, heads, dqk}),
          or_empty(y.m_last, q, {0, heads})};
}

}  // namespace

int64_t mlstm_kept_floats_on([[maybe_unused]] const std::string& dtype, [[maybe_unused]] int64_t dqk,
                             [[maybe_unused]] int64_t dv, [[maybe_unused]] int32_t device) {
#ifdef FLASH_XLSTM_WITH_CUDA
  torch::stable::accelerator::DeviceGuard guard(device);
  for (const DType each : {DType::bfloat16, DType::float16}) {
    if (dtype == (each == DType::bfloat16 ? "bfloat16" : "float16")) return cuda::mlstm_kept_floats(each, dqk, dv);
  }
#endif
  return 0;
}

Tensors<2> mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                         OptTensor cu_seqlens, std::optional<double> scale, double eps,
                         std::optional<double> gate_soft_cap, int64_t chunk_size, bool keep_states) {
  const Options options{.c = c,
                        .n = n,
                        .m = m,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size};
  ForwardOutputs y = forward("mlstm_forward", q, k, v, i, f, options, Wanted::h_and_kept, keep_states);
  return {std::move(*y.h), std::move(*y.kept)};
}

namespace {

Tensor mlstm_h(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
               OptTensor cu_seqlens, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
               int64_t chunk_size) {
  const Options options{.c = c,
                        .n = n,
                        .m = m,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size};
  return *forward("mlstm_h", q, k, v, i, f, options, Wanted::h).h;
}

Tensor mlstm_prefill(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor c, Tensor n, Tensor m,
                     Tensor state_indices, OptTensor cu_seqlens, OptTensor fresh, std::optional<double> scale,
                     double eps, std::optional<double> gate_soft_cap) {
  const Options options{.c = c,
                        .n = n,
                        .m = m,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = 0,
                        .state_indices = state_indices,
                        .fresh = fresh};
  return *forward("mlstm_prefill", q, k, v, i, f, options, Wanted::h).h;
}

Tensors<8> mlstm_backward(OptTensor dh, OptTensor dc_last, OptTensor dn_last, OptTensor dm_last, Tensor q, Tensor k,
                          Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m, OptTensor cu_seqlens,
                          OptTensor h, Tensor kept, std::optional<double> scale, double eps,
                          std::optional<double> gate_soft_cap, int64_t chunk_size) {
  const Options options{.c = c,
                        .n = n,
                        .m = m,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size};
  return backward("mlstm_backward", dh, dc_last, dn_last, dm_last, q, k, v, i, f, options, h, kept);
}

// The options of the state alone: it begins without weight, and scale and eps mean nothing to it.
Options state_options(const OptTensor& cu_seqlens, std::optional<double> gate_soft_cap, int64_t chunk_size) {
  Options options{std::nullopt, std::nullopt, std::nullopt, cu_seqlens, 1.0, 1.0, gate_soft_cap, chunk_size};
  options.first = "k", options.first_m = no_weight_m;
  return options;
}

Tensors<4> mlstm_state(Tensor k, Tensor v, Tensor i, Tensor f, OptTensor cu_seqlens,
                       std::optional<double> gate_soft_cap, int64_t chunk_size) {
  const ForwardOutputs y = forward("mlstm_state", k, k, v, i, f, state_options(cu_seqlens, gate_soft_cap, chunk_size),
                                   Wanted::state_and_decay);
  return {*y.c_last, *y.n_last, *y.m_last, *y.log_decay};
}

Tensor mlstm_piece(Tensor k, Tensor v, Tensor i, Tensor f, std::optional<double> gate_soft_cap, int64_t chunk_size,
                   bool from_zero) {
  Options options = state_options(std::nullopt, gate_soft_cap, chunk_size);
  if (from_zero) options.first_m = 0.0f;
  return *forward("mlstm_piece", k, k, v, i, f, options, Wanted::piece).piece;
}

Tensors<4> mlstm_state_backward(OptTensor dc_last, OptTensor dn_last, OptTensor dm_last, OptTensor dlog_decay, Tensor k,
                                Tensor v, Tensor i, Tensor f, OptTensor cu_seqlens, std::optional<double> gate_soft_cap,
                                int64_t chunk_size) {
  auto [dq, dk, dv, di, df, dc, dn, dm] = backward("mlstm_state_backward", std::nullopt, dc_last, dn_last, dm_last, k,
                                                   k, v, i, f, state_options(cu_seqlens, gate_soft_cap, chunk_size),
                                                   std::nullopt, std::nullopt, nullptr, Of::state_alone, dlog_decay);
  return {dk, dv, di, df};
}

Tensors<6> mlstm_initial_backward(Tensor dh, OptTensor dc_last, OptTensor dn_last, Tensor q, Tensor k, Tensor v,
                                  Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m, OptTensor cu_seqlens,
                                  OptTensor h, Tensor kept, std::optional<double> scale, double eps,
                                  std::optional<double> gate_soft_cap, int64_t chunk_size) {
  Tensor begun = new_empty(q, {0}, ScalarType::Byte);
  auto [dq, dk, dv, open_e, is_open, dc, dn, dm] =
      backward("mlstm_initial_backward", dh, dc_last, dn_last, std::nullopt, q, k, v, i, f,
               {c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size}, h, kept, nullptr, Of::initial_state_alone,
               std::nullopt, &begun);
  return {dc, dn, open_e, is_open, dq, begun};
}

Tensors<8> mlstm_remaining_backward(Tensor dh, OptTensor dc_last, OptTensor dn_last, OptTensor dm_last, Tensor q,
                                    Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                                    OptTensor cu_seqlens, OptTensor h, Tensor kept, std::optional<double> scale,
                                    double eps, std::optional<double> gate_soft_cap, int64_t chunk_size, Tensor begun) {
  return backward("mlstm_remaining_backward", dh, dc_last, dn_last, dm_last, q, k, v, i, f,
                  {c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size}, h, kept, nullptr, Of::rest,
                  std::nullopt, &begun);
}

Tensors<4> mlstm_sig(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor cu_seqlens,
                     std::optional<double> scale, double eps, std::optional<double> gate_soft_cap, int64_t chunk_size,
                     bool return_final_state, bool normalize, bool keep_states) {
  const Options options{.c = c,
                        .n = n,
                        .m = std::nullopt,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size,
                        .input_gate = InputGate::sigmoid,
                        .normalize = normalize};
  const ForwardOutputs y = forward("mlstm_sig", q, k, v, i, f, options,
                                   return_final_state ? Wanted::h_kept_and_state : Wanted::h_and_kept, keep_states);
  const int64_t seq = q.size(1), heads = q.size(2), dqk = q.size(3), dv = v.size(3);
  return {*y.h, or_empty(y.kept, q, {0, seq, heads}), or_empty(y.c_last, q, {0, heads, dqk, dv}),
          or_empty(y.n_last, q, {0, heads, dqk})};
}

Tensors<7> mlstm_sig_backward(OptTensor dh, OptTensor dc_last, OptTensor dn_last, Tensor q, Tensor k, Tensor v,
                              Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor cu_seqlens, OptTensor h,
                              Tensor kept, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
                              int64_t chunk_size, bool normalize) {
  const Options options{.c = c,
                        .n = n,
                        .m = std::nullopt,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size,
                        .input_gate = InputGate::sigmoid,
                        .normalize = normalize};
  auto [dq, dk, dv, di, df, dc, dn, dm] =
      backward("mlstm_sig_backward", dh, dc_last, dn_last, std::nullopt, q, k, v, i, f, options, h, kept);
  return {dq, dk, dv, di, df, dc, dn};
}

}  // namespace

Tensors<8> mlstm_backward_into(const MlstmInto& into, const Tensor& dh, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& i, const Tensor& f, const OptTensor& cu_seqlens,
                               const Tensor& h, const Tensor& kept, std::optional<double> scale, double eps,
                               std::optional<double> gate_soft_cap, int64_t chunk_size) {
  const Options options{.c = std::nullopt,
                        .n = std::nullopt,
                        .m = std::nullopt,
                        .cu_seqlens = cu_seqlens,
                        .scale = scale,
                        .eps = eps,
                        .gate_soft_cap = gate_soft_cap,
                        .chunk_size = chunk_size};
  return backward("mlstm_gated_backward", dh, std::nullopt, std::nullopt, std::nullopt, q, k, v, i, f, options, h, kept,
                  &into);
}

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  // `c, n, m` are the initial state, all or none. `scale=None` means dqk ** -0.5, `gate_soft_cap=None` means no cap.
  // With `chunk_size=0` the kernel chooses. Returned states are empty where they are not wanted. Without `normalize`
  // there is no n: as a result it is empty, as an input it must be None. A backward reads h only for float32 on CUDA.
  // `kept` is s and m, (2, batch, seq, heads); of mlstm_sig s, (batch, seq, heads), empty without `normalize`. With
  // keep_states, where the kernels can, it also has the states at the starts of chunks, which the backward else makes
  // again: (floats of these + those of s and m,).
  lib.def(
      "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, float? gate_soft_cap, int chunk_size, "
      "bool return_final_state=False, bool keep_states=False) "
      "-> (Tensor h, Tensor kept, Tensor c_last, Tensor n_last, Tensor m_last)");
  // Eager calls without a final state take the next two operators: every returned tensor costs the host one or two
  // microseconds. mlstm_forward returns h and what the backward needs, for an autograd.Function. It has no derivative
  // of its own, since torch's search for one would cost as much. mlstm_h returns h alone.
  lib.def(
      "mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
      "Tensor? cu_seqlens, float? scale, float eps, float? gate_soft_cap, int chunk_size, bool keep_states=False) "
      "-> (Tensor h, Tensor kept)");
  lib.def(
      "mlstm_h(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size) -> Tensor");
  // Inference alone: states are read from the slots of a pool, and written there.
  lib.def(
      "mlstm_prefill(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, "
      "Tensor state_indices, Tensor? cu_seqlens, Tensor? fresh, float? scale, float eps, float? gate_soft_cap) "
      "-> Tensor");
  lib.def(
      "mlstm_backward(Tensor? dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
      "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, "
      "Tensor? h, Tensor kept, float? scale, float eps, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn, Tensor dm)");
  // The end state of a sequence that begins without weight, and the sum of the log forget gates.
  lib.def(
      "mlstm_state(Tensor k, Tensor v, Tensor i, Tensor f, Tensor? cu_seqlens, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor c, Tensor n, Tensor m, Tensor log_decay)");
  // The same in one tensor, for an exchange between ranks: c, n, m, log_decay one after the other, and up to three
  // floats that mean nothing. from_zero: it begins with c, n and m of 0.
  lib.def(
      "mlstm_piece(Tensor k, Tensor v, Tensor i, Tensor f, float? gate_soft_cap, int chunk_size, bool from_zero) "
      "-> Tensor");
  lib.def(
      "mlstm_state_backward(Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, Tensor? dlog_decay, "
      "Tensor k, Tensor v, Tensor i, Tensor f, Tensor? cu_seqlens, float? gate_soft_cap, int chunk_size) "
      "-> (Tensor dk, Tensor dv, Tensor di, Tensor df)");
  // Of the gradients those of the initial c and n alone; for each sequence and head, what eps gives to the initial m
  // (the sum of e before the first token whose m took the input gate's branch), and 1 where there is no such token. Where
  // the kernels go in two parts, dq too, and `begun`, what the second needs; else this is empty, and dq means nothing.
  // Without an initial state the first four are empty.
  lib.def(
      "mlstm_initial_backward(Tensor dh, Tensor? dc_last, Tensor? dn_last, Tensor q, Tensor k, Tensor v, Tensor i, "
      "Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, Tensor? h, Tensor kept, float? scale, float eps, "
      "float? gate_soft_cap, int chunk_size) -> (Tensor dc, Tensor dn, Tensor open_e, Tensor is_open, Tensor dq, "
      "Tensor begun)");
  // mlstm_backward behind that, with the same arguments but for the gradients of the final state. dq is empty where
  // `begun` is not.
  lib.def(
      "mlstm_remaining_backward(Tensor dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, Tensor q, Tensor k, "
      "Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? cu_seqlens, Tensor? h, Tensor kept, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size, Tensor begun) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn, Tensor dm)");
  lib.def(
      "mlstm_sig(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? cu_seqlens, "
      "float? scale, float eps, float? gate_soft_cap, int chunk_size, bool return_final_state, bool normalize, "
      "bool keep_states=False) -> (Tensor h, Tensor kept, Tensor c_last, Tensor n_last)");
  lib.def(
      "mlstm_sig_backward(Tensor? dh, Tensor? dc_last, Tensor? dn_last, "
      "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? cu_seqlens, "
      "Tensor? h, Tensor kept, float? scale, float eps, float? gate_soft_cap, int chunk_size, bool normalize) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("mlstm", TORCH_BOX(&mlstm));
  lib.impl("mlstm_forward", TORCH_BOX(&mlstm_forward));
  lib.impl("mlstm_h", TORCH_BOX(&mlstm_h));
  lib.impl("mlstm_prefill", TORCH_BOX(&mlstm_prefill));
  lib.impl("mlstm_backward", TORCH_BOX(&mlstm_backward));
  lib.impl("mlstm_state", TORCH_BOX(&mlstm_state));
  lib.impl("mlstm_piece", TORCH_BOX(&mlstm_piece));
  lib.impl("mlstm_state_backward", TORCH_BOX(&mlstm_state_backward));
  lib.impl("mlstm_initial_backward", TORCH_BOX(&mlstm_initial_backward));
  lib.impl("mlstm_remaining_backward", TORCH_BOX(&mlstm_remaining_backward));
  lib.impl("mlstm_sig", TORCH_BOX(&mlstm_sig));
  lib.impl("mlstm_sig_backward", TORCH_BOX(&mlstm_sig_backward));
}

static const DescribedOp described_mlstm("mlstm", CUDA_ONLY(cuda::mlstm_words));
static const DescribedOp described_mlstm_prefill("mlstm_prefill", CUDA_ONLY(cuda::mlstm_words));
static const DescribedOp described_mlstm_state("mlstm_state", CUDA_ONLY(cuda::mlstm_words));
static const DescribedOp described_mlstm_sig("mlstm_sig", CUDA_ONLY(cuda::mlstm_words));

}  // namespace flash_xlstm
