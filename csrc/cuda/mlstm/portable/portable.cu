// The portable mLSTM, kernel by kernel.
//   Forward: gate scan; then, for each range of chunks, the states and h.
//   Backward: gate scan and states again; u, delta and e; dq; the states' gradients in place of the states; dk; dv; the
//     gates' gradients.
// The states are made again because keeping them would take more memory than q, k, v and h together.
#include "cuda/mlstm/portable/portable.h"

#include <algorithm>
#include <cstddef>

#include "cuda/common/carver.h"
#include "cuda/common/status.h"
#include "cuda/mlstm/portable/kernels.h"

namespace flash_xlstm::cuda::portable {
namespace {

// The forward's range of chunks: their states take at most half of h's size, or this much if that is more. So small
// problems are one range.
constexpr int64_t least_state_bytes = 2 << 20;

int64_t state_element_bytes(DType dtype) { return dtype == DType::bfloat16 ? 2 : 4; }

int64_t carve(const MlstmProblem& p, bool backward, void* workspace, Work& w) {
  Carver carver(workspace);
  Layout& l = w.layout;
  Scratch& s = w.scratch;
  w.p = p;
  if (!p.normalize) w.p.eps = 0.0f;  // d = max(|s|, exp(-m)) + eps is then 1, with s and m of 0
  const bool packed = p.cu_seqlens != nullptr;
  l = Layout{};
  l.batch = p.batch, l.seq = p.seq, l.heads = p.heads, l.dqk = p.dqk, l.dv = p.dv, l.num_seqs = p.num_seqs;
  l.chunks_per_seq = ceil_div(p.seq, chunk_tokens);
  l.max_chunks = packed ? l.chunks_per_seq + p.num_seqs : l.chunks_per_seq * p.batch;
  w.dv_pitch = ceil_div(p.dv, 8) * 8;
  const int64_t slot_bytes = p.heads * p.dqk * w.dv_pitch * state_element_bytes(p.dtype);
  const int64_t h_bytes = p.batch * p.seq * p.heads * p.dv * element_bytes(p.dtype);
  l.range_end = backward ? l.max_chunks
                         : std::clamp(std::max(h_bytes / 2, least_state_bytes) / slot_bytes, int64_t{1}, l.max_chunks);
  l.every_boundary = backward;

  const int64_t items = l.max_chunks * p.heads, tokens = items * chunk_tokens;
  const int64_t boundaries = (l.max_chunks + p.num_seqs) * p.heads;
  const int64_t slots = backward ? boundaries : l.range_end * p.heads;
  carver.take(s.row, tokens);
  carver.take(s.column, tokens);
  carver.take(s.m, tokens);
  carver.take(s.reset, tokens);
  carver.take(s.chunk_b, items);
  carver.take(s.chunk_max, items);
  carver.take(s.m_boundary, boundaries);
  std::byte* c;
  carver.take(c, slots * p.dqk * w.dv_pitch * state_element_bytes(p.dtype));
  s.c = c;
  carver.take(s.n, slots * p.dqk);
  if (packed) {
    carver.take(s.first_chunk, p.num_seqs + 1);
    carver.take(s.first_token, p.num_seqs + 1);
    carver.take(s.seq_of_chunk, l.max_chunks);
    l.first_chunk = s.first_chunk;
    l.first_token = s.first_token;
    l.seq_of_chunk = s.seq_of_chunk;
  }
  if (l.range_end < l.max_chunks) {
    for (int x = 0; x < 2; ++x) {
      carver.take(s.c_carry[x], p.heads * p.dqk * p.dv);
      carver.take(s.n_carry[x], p.heads * p.dqk);
    }
  }
  if (backward) {
    carver.take(s.inv_d, tokens);
    carver.take(s.delta, tokens);
    carver.take(s.e, tokens);
    carver.take(s.q_dq, tokens * (column_tiles(p.dqk) + 1));
    carver.take(s.k_dk, tokens * (column_tiles(p.dqk) + 1));
    carver.take(s.through, items * state_tiles(p));
    carver.take(s.stabilizer, items);
    carver.take(s.open, items);
  }
  return carver.used();
}

// Without dh: inv_d, delta, e and the shares of q . dq, which lie side by side, and dq are 0.
cudaError_t no_token_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  const Scratch& s = w.scratch;
  const auto bytes = reinterpret_cast<std::byte*>(s.k_dk) - reinterpret_cast<std::byte*>(s.inv_d);
  RETURN_IF_FAILED(cudaMemsetAsync(s.inv_d, 0, static_cast<size_t>(bytes), stream));
  if (params.dq == nullptr) return cudaSuccess;
  const int64_t dq_bytes = w.p.batch * w.p.seq * w.p.heads * w.p.dqk * element_bytes(w.p.dtype);
  return cudaMemsetAsync(params.dq, 0, static_cast<size_t>(dq_bytes), stream);
}

template <Output output>
cudaError_t outputs(const OutputArgs& args, cudaStream_t stream) {
  return dispatch_dtype(args.w.p.dtype,
                        [&](auto zero) { return chunk_outputs<output, decltype(zero)>(args, stream); });
}

}  // namespace

int64_t forward_workspace_bytes(const MlstmForward& params) {
  Work w{};
  return carve(params.p, false, nullptr, w);
}

cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  Work w{};
  carve(params.p, false, workspace, w);
  if (params.p.cu_seqlens != nullptr) RETURN_IF_FAILED(build_chunk_table(w, stream));
  RETURN_IF_FAILED(scan_gates(w, params.m, params.m_last, params.log_decay, stream));
  const int64_t count = w.layout.range_end;
  for (int64_t range = 0; range * count < w.layout.max_chunks; ++range) {
    w.layout.range_begin = range * count;
    w.layout.range_end = std::min(w.layout.range_begin + count, w.layout.max_chunks);
    RETURN_IF_FAILED(forward_states(w, params.c_last, params.n_last, range, stream));
    if (params.h == nullptr) continue;
    RETURN_IF_FAILED(outputs<Output::h>({.w = w, .out = params.h, .s_out = params.s}, stream));
  }
  return cudaSuccess;
}

int64_t backward_workspace_bytes(const MlstmBackward& params) {
  Work w{};
  return carve(params.p, true, nullptr, w);
}

cudaError_t backward(const MlstmBackward& params, void* workspace, cudaStream_t stream) {
  Work w{};
  carve(params.p, true, workspace, w);
  if (params.p.cu_seqlens != nullptr) RETURN_IF_FAILED(build_chunk_table(w, stream));
  RETURN_IF_FAILED(scan_gates(w, nullptr, nullptr, nullptr, stream));
  RETURN_IF_FAILED(forward_states(w, nullptr, nullptr, 0, stream));
  if (params.dh.data == nullptr) {
    RETURN_IF_FAILED(no_token_gradients(w, params, stream));
  } else {
    RETURN_IF_FAILED(token_gradients(w, params, stream));
    if (params.dk != nullptr) {
      RETURN_IF_FAILED(
          outputs<Output::dq>({.w = w, .dh = params.dh, .out = params.dq, .partial = w.scratch.q_dq}, stream));
    }
  }
  RETURN_IF_FAILED(backward_states(w, params, stream));
  if (params.dk == nullptr) return sum_open_tokens(w, params, stream);
  RETURN_IF_FAILED(outputs<Output::dk>({.w = w, .dh = params.dh, .out = params.dk, .partial = w.scratch.k_dk}, stream));
  RETURN_IF_FAILED(outputs<Output::dv>({.w = w, .dh = params.dh, .out = params.dv}, stream));
  RETURN_IF_FAILED(chunk_gate_sums(w, params.dh, stream));
  return gate_gradients(w, params, stream);
}

}  // namespace flash_xlstm::cuda::portable
