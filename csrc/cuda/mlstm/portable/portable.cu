// The portable mLSTM, step by step. Forward: gate scan, states at chunk boundaries, h. Backward: gate scan and states
// again (keeping the states of every layer would cost more memory than q, k, v, h together), then u, delta and e, dq,
// the states' gradients in place of the states, dk, dv, and last the gates.
#include "cuda/mlstm/portable/portable.h"

#include "cuda/mlstm/portable/kernels.h"

namespace flash_xlstm::cuda::portable {
namespace {

constexpr int64_t alignment = 256;

// Hands out consecutive aligned pieces; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void take(T*& out, int64_t count) {
    out = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), alignment) * alignment;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

int64_t carve(const MlstmProblem& p, bool backward, void* workspace, Work& w) {
  Carver carver(workspace);
  Layout& l = w.layout;
  Scratch& s = w.scratch;
  w.p = p;
  const bool packed = p.cu_seqlens != nullptr;
  l = Layout{p.batch, p.seq, p.heads, p.dqk, p.dv, p.num_seqs, 0, ceil_div(p.seq, chunk_tokens), nullptr, nullptr,
             nullptr};
  l.max_chunks = packed ? l.chunks_per_seq + p.num_seqs : l.chunks_per_seq * p.batch;
  w.dv_pitch = ceil_div(p.dv, 8) * 8;

  const int64_t items = l.max_chunks * p.heads, tokens = items * chunk_tokens;
  const int64_t slots = (l.max_chunks + p.num_seqs) * p.heads;
  carver.take(s.b, tokens);
  carver.take(s.i, tokens);
  carver.take(s.m, tokens);
  carver.take(s.reset, tokens);
  carver.take(s.chunk_b, items);
  carver.take(s.chunk_max, items);
  carver.take(s.m_slot, slots);
  const int64_t state_elements = slots * p.dqk * w.dv_pitch;
  if (p.dtype == DType::bfloat16) {
    bf16* c;
    carver.take(c, state_elements);
    s.c = c;
  } else {
    float* c;
    carver.take(c, state_elements);
    s.c = c;
  }
  carver.take(s.n, slots * p.dqk);
  if (packed) {
    carver.take(s.first_chunk, p.num_seqs + 1);
    carver.take(s.first_token, p.num_seqs + 1);
    carver.take(s.seq_of_chunk, l.max_chunks);
    l.first_chunk = s.first_chunk;
    l.first_token = s.first_token;
    l.seq_of_chunk = s.seq_of_chunk;
  }
  if (backward) {
    carver.take(s.inv_d, tokens);
    carver.take(s.delta, tokens);
    carver.take(s.e, tokens);
    carver.take(s.q_dq, tokens * column_tiles(p.dqk));
    carver.take(s.k_dk, tokens * column_tiles(p.dqk));
    carver.take(s.inner, slots * state_tiles(p));
    carver.take(s.stabilizer, items);
  }
  return carver.used();
}

template <Output output>
cudaError_t outputs(const OutputArgs& args, cudaStream_t stream) {
  return dispatch_dtype(args.w.p.dtype,
                        [&](auto zero) { return chunk_outputs<output, decltype(zero)>(args, stream); });
}

#define RETURN_IF_FAILED(call)                              \
  do {                                                      \
    if (cudaError_t status = (call); status != cudaSuccess) \
      return status;                                        \
  } while (0)

}  // namespace

int column_tiles(int64_t columns) { return static_cast<int>(ceil_div(columns, 64)); }

int64_t forward_workspace_bytes(const MlstmForward& params) {
  Work w{};
  return carve(params.p, false, nullptr, w);
}

cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  Work w{};
  carve(params.p, false, workspace, w);
  if (params.p.cu_seqlens != nullptr) RETURN_IF_FAILED(build_chunk_table(w, stream));
  RETURN_IF_FAILED(scan_gates(w, params.m, params.m_last, stream));
  RETURN_IF_FAILED(forward_states(w, params.c_last, params.n_last, false, stream));
  return outputs<Output::h>({w, {}, params.h, params.s, nullptr}, stream);
}

int64_t backward_workspace_bytes(const MlstmBackward& params) {
  Work w{};
  return carve(params.p, true, nullptr, w);
}

cudaError_t backward(const MlstmBackward& params, void* workspace, cudaStream_t stream) {
  Work w{};
  carve(params.p, true, workspace, w);
  if (params.p.cu_seqlens != nullptr) RETURN_IF_FAILED(build_chunk_table(w, stream));
  RETURN_IF_FAILED(scan_gates(w, nullptr, nullptr, stream));
  RETURN_IF_FAILED(forward_states(w, nullptr, nullptr, true, stream));
  RETURN_IF_FAILED(token_gradients(w, params, stream));
  RETURN_IF_FAILED(outputs<Output::dq>({w, params.dh, params.dq, nullptr, w.scratch.q_dq}, stream));
  RETURN_IF_FAILED(backward_states(w, params, stream));
  RETURN_IF_FAILED(outputs<Output::dk>({w, params.dh, params.dk, nullptr, w.scratch.k_dk}, stream));
  RETURN_IF_FAILED(outputs<Output::dv>({w, params.dh, params.dv, nullptr, nullptr}, stream));
  const int tiles = column_tiles(params.p.dqk);
  return gate_gradients(w, params, tiles, tiles, state_tiles(params.p), stream);
}

}  // namespace flash_xlstm::cuda::portable
