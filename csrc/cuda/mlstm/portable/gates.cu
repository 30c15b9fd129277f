// Everything of the mLSTM that is one number per token: log forget gates, stabilizer, the backward's u, delta, e and
// the gates' gradients. Long sums are float64. A warp takes one chunk of one head, two tokens a lane. Two kernels are
// different: one warp takes a whole sequence of one head (boundary_stabilizer, carry_stabilizer).
#include <cfloat>
#include <cmath>

#include "cuda/mlstm/chunked/open_sum.cuh"
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/portable/kernels.h"

namespace flash_xlstm::cuda::portable {
namespace {

constexpr int warps_per_block = 4;
static_assert(chunk_tokens == 64, "two tokens a lane");

__device__ __forceinline__ double negative_infinity() { return -static_cast<double>(INFINITY); }

// The (chunk, head) of this warp; false past the end.
__device__ bool warp_item(const Layout& layout, Chunk& chunk, int& head, int64_t& item) {
  item = static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / 32;
  if (item >= layout.max_chunks * layout.heads) return false;
  head = static_cast<int>(item % layout.heads);
  return layout.locate(item / layout.heads, chunk);
}

__device__ __forceinline__ double prefix_sum(double x, int lane) {
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_up_sync(all_lanes, x, d);
    if (lane >= d) x += other;
  }
  return x;
}

__device__ __forceinline__ double suffix_sum(double x, int lane) {
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_down_sync(all_lanes, x, d);
    if (lane + d < 32) x += other;
  }
  return x;
}

__device__ __forceinline__ double prefix_max(double x, int lane) {
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_up_sync(all_lanes, x, d);
    if (lane >= d) x = fmax(x, other);
  }
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(all_lanes, x, d);
  return x;
}

// One thread, since sequences are few. Offsets are clamped to [0, seq] and kept from decreasing, so that wrong ones
// cannot lead outside the tensors.
__global__ void chunk_table_kernel(const __grid_constant__ Work w) {
  const Layout& l = w.layout;
  if (threadIdx.x == 0) {
    int64_t token = 0, chunk = 0;
    for (int64_t s = 0; s < l.num_seqs; ++s) {
      const int64_t start = min(max(static_cast<int64_t>(w.p.cu_seqlens[s]), token), l.seq);
      const int64_t stop = min(max(static_cast<int64_t>(w.p.cu_seqlens[s + 1]), start), l.seq);
      w.scratch.first_token[s] = start;
      w.scratch.first_chunk[s] = chunk;
      chunk += ceil_div(stop - start, chunk_tokens);
      token = stop;
    }
    w.scratch.first_token[l.num_seqs] = token;
    w.scratch.first_chunk[l.num_seqs] = chunk;
  }
  __syncthreads();
  for (int64_t s = threadIdx.x; s < l.num_seqs; s += blockDim.x) {
    for (int64_t c = w.scratch.first_chunk[s]; c < w.scratch.first_chunk[s + 1]; ++c) {
      w.scratch.seq_of_chunk[c] = static_cast<int32_t>(s);
    }
  }
}

// The pre-activation of a gate at the chunk's token t, as given.
__device__ __forceinline__ float raw_gate(const Work& w, const Strided& gate, const Chunk& chunk, int head, int t) {
  return load_as_float(gate.data, chunk.row * gate.batch + (chunk.first + t) * gate.seq + head * gate.head,
                       w.p.gate_dtype);
}

// A gate's pre-activation, capped, or log(sigmoid) of that. float64 where the tensors are float32, because sums of
// neighbouring tokens may all but cancel.
__device__ __forceinline__ double log_gate(const Work& w, float raw, bool through_log_sigmoid) {
  const float cap = w.p.gate_soft_cap;
  if (w.p.dtype == DType::float32) {
    const double x = cap_gate(static_cast<double>(raw), static_cast<double>(cap));
    return through_log_sigmoid ? log_sigmoid(x) : x;
  }
  const float x = cap_gate(raw, cap);
  return through_log_sigmoid ? log_sigmoid(x) : x;
}

// Writes b to `row`, from where token_stabilizer_kernel reads it, and `column`; then the chunk's sum of log forget
// gates and its largest log weight at the end.
__global__ void chunk_gates_kernel(const __grid_constant__ Work w) {
  Chunk chunk;
  int head;
  int64_t item;
  if (!warp_item(w.layout, chunk, head, item)) return;
  const int lane = threadIdx.x % 32;
  double lf[2], i[2];
  for (int x = 0; x < 2; ++x) {
    const int t = lane * 2 + x;
    const bool inside = t < chunk.length;
    i[x] = inside ? log_gate(w, raw_gate(w, w.p.i, chunk, head, t), !w.stabilized()) : negative_infinity();
    lf[x] = inside ? log_gate(w, raw_gate(w, w.p.f, chunk, head, t), true) : 0.0;
  }
  const double through = prefix_sum(lf[0] + lf[1], lane);
  // Not through - lf[1]: a NaN in the second token's gate must not reach the first token.
  double before = __shfl_up_sync(all_lanes, through, 1);
  if (lane == 0) before = 0.0;
  const double b[2] = {before + lf[0], through};
  const double b_end = __shfl_sync(all_lanes, through, 31);
  double largest = negative_infinity();
  for (int x = 0; x < 2; ++x) {
    const int64_t at = item * chunk_tokens + lane * 2 + x;
    w.scratch.row[at] = split_log(b[x]);
    w.scratch.column[at] = split_log(i[x] - b[x]);
    largest = fmax(largest, b_end - b[x] + i[x]);
  }
  for (int d = 16; d > 0; d /= 2) largest = fmax(largest, __shfl_xor_sync(all_lanes, largest, d));
  if (lane == 0) {
    w.scratch.chunk_b[item] = b_end;
    w.scratch.chunk_max[item] = largest;
  }
}

// m at every chunk boundary, m' = max(b_chunk + m, max_chunk), and the sum of all b_chunk. One warp a sequence and head
// scans 32 chunks at a time.
__global__ void boundary_stabilizer_kernel(const __grid_constant__ Work w, float* m_last, float* log_decay) {
  const Layout& l = w.layout;
  const int64_t seq = blockIdx.x / l.heads;
  const int head = static_cast<int>(blockIdx.x % l.heads);
  const int lane = threadIdx.x;
  int64_t begin, end;
  l.chunk_range(seq, begin, end);
  double m = initial_m(w.p, seq, head), decay = 0.0;
  if (lane == 0) w.scratch.m_boundary[(begin + seq) * l.heads + head] = static_cast<float>(m);
  for (int64_t base = begin; base < end; base += 32) {
    const int64_t chunk = base + lane;
    const bool inside = chunk < end;
    double sum = inside ? w.scratch.chunk_b[chunk * l.heads + head] : 0.0;
    double top = inside ? w.scratch.chunk_max[chunk * l.heads + head] : negative_infinity();
    for (int d = 1; d < 32; d *= 2) {  // compose (sum, top): m -> max(sum + m, top)
      const double before_sum = __shfl_up_sync(all_lanes, sum, d), before_top = __shfl_up_sync(all_lanes, top, d);
      if (lane >= d) {
        top = fmax(sum + before_top, top);
        sum += before_sum;
      }
    }
    const double m_end = w.stabilized() ? fmax(sum + m, top) : 0.0;
    if (inside) w.scratch.m_boundary[(chunk + 1 + seq) * l.heads + head] = static_cast<float>(m_end);
    m = __shfl_sync(all_lanes, m_end, 31);
    decay += __shfl_sync(all_lanes, sum, 31);
  }
  float* const m_to = lane == 0 ? final_m(w.p, m_last, seq, head) : nullptr;
  if (m_to != nullptr) *m_to = static_cast<float>(m);
  if (lane == 0 && log_decay != nullptr) log_decay[seq * l.heads + head] = static_cast<float>(decay);
}

__global__ void token_stabilizer_kernel(const __grid_constant__ Work w, float* m_out) {
  Chunk chunk;
  int head;
  int64_t item;
  if (!warp_item(w.layout, chunk, head, item)) return;
  const int lane = threadIdx.x % 32;
  const double m_start = w.scratch.m_boundary[chunk.boundary * w.layout.heads + head];
  double b[2], over[2];  // over: i - b, a token's term of the maximum
  for (int x = 0; x < 2; ++x) {
    const int64_t at = item * chunk_tokens + lane * 2 + x;
    const float2 parts = w.scratch.row[at], other = w.scratch.column[at];
    b[x] = static_cast<double>(parts.x) + parts.y;
    over[x] = static_cast<double>(other.x) + other.y;
  }
  const double through = prefix_max(fmax(over[0], over[1]), lane);
  double before = __shfl_up_sync(all_lanes, through, 1);
  before = lane == 0 ? m_start : fmax(before, m_start);
  for (int x = 0; x < 2; ++x) {
    const int t = lane * 2 + x;
    const int64_t at = item * chunk_tokens + t;
    w.scratch.reset[at] = w.stabilized() && over[x] >= before;
    before = fmax(before, over[x]);
    const float m = w.stabilized() ? static_cast<float>(b[x] + before) : 0.0f;
    w.scratch.m[at] = m;
    w.scratch.row[at] = split_log(b[x] - m);
    if (m_out != nullptr && t < chunk.length) {
      m_out[(chunk.row * w.layout.seq + chunk.first + t) * w.layout.heads + head] = m;
    }
  }
}

// s == nullptr: 0.
__global__ void token_gradients_kernel(const __grid_constant__ Work w, Strided dh, const float* h, const float* s) {
  const Layout& l = w.layout;
  const int64_t item = blockIdx.x;
  const int head = static_cast<int>(item % l.heads);
  Chunk chunk;
  if (!l.locate(item / l.heads, chunk)) return;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int t = threadIdx.x / 32; t < chunk_tokens; t += warps) {
    const int64_t at = item * chunk_tokens + t;
    if (t >= chunk.length) {
      if (lane == 0) store_no_gradients(w, at);
      continue;
    }
    const int64_t token = (chunk.row * l.seq + chunk.first + t) * l.heads + head;
    float u = 0.0f;
    if (dh.data != nullptr) {
      const float* dh_row = static_cast<const float*>(dh.data) + chunk.row * dh.batch + (chunk.first + t) * dh.seq +
                            head * dh.head;
      const float* h_row = h + token * l.dv;
      for (int64_t x = lane; x < l.dv; x += 32) u += dh_row[x] * h_row[x];
      for (int d = 16; d > 0; d /= 2) u += __shfl_xor_sync(all_lanes, u, d);
    }
    const float st = s == nullptr ? 0.0f : s[token];
    if (lane == 0) store_token_gradients(w, at, Normalizer(st, w.scratch.m[at], w.p.eps), u);
  }
}

// The sum of the first `parts` shares of a token's q . dq or k . dk. All but the last share cross the chunk's boundary.
__device__ __forceinline__ double crossing(const float* shares, int64_t at, int64_t stride, int parts) {
  double sum = 0.0;
  for (int t = 0; t < parts; ++t) sum += shares[t * stride + at];
  return sum;
}

// The gradient that flows through the stabilizer m, walked from the sequence's end to its start:
//   a = dm - (<c, dc> + <n, dn>) at the end; a += e_t at every token.
//   A reset is a token whose m took the input gate's branch. It adds a to its input gate's gradient and clears a.
//   Every other token adds a to its forget gate's gradient, dlf_t + a_t.
// Until the walk meets the first reset, it is open. There dlf_t + a_t = dm + the sum of e + q . dq - k . dk over the
// tokens from t on. <c, dc> + <n, dn> may be much larger than this sum, and does not occur in it. So this sum is
// carried while open. The a that a reset takes is this sum minus dlf of the next token.
// This kernel writes what is carried into every chunk's end.
__global__ void carry_stabilizer_kernel(const __grid_constant__ Work w, const float* dm_last, float* dm0,
                                        int column_tiles, int state_tiles) {
  const Layout& l = w.layout;
  const int64_t seq = blockIdx.x / l.heads;
  const int head = static_cast<int>(blockIdx.x % l.heads);
  const int lane = threadIdx.x;
  const int64_t stride = l.max_chunks * l.heads * chunk_tokens;
  int64_t begin, end;
  l.chunk_range(seq, begin, end);
  const auto inner_at = [&](int64_t chunk, const float* shares) {
    const int64_t item = chunk * l.heads + head;
    double sum = 0.0;
    for (int t = lane; t < state_tiles; t += 32) sum += w.scratch.through[item * state_tiles + t];
    for (int t = lane; t < chunk_tokens; t += 32) {
      sum += crossing(shares, item * chunk_tokens + t, stride, column_tiles);
    }
    return warp_sum(sum);
  };
  double a = dm_last == nullptr ? 0.0 : dm_last[seq * l.heads + head];
  bool open = true;
  for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
    const int64_t item = chunk * l.heads + head;
    if (lane == 0) w.scratch.stabilizer[item] = static_cast<float>(a), w.scratch.open[item] = open;
    const int64_t at = item * chunk_tokens + lane * 2;
    // The e of the tokens before the chunk's first reset go on to the chunk before.
    const unsigned resets0 = __ballot_sync(all_lanes, w.scratch.reset[at] != 0);
    const unsigned resets1 = __ballot_sync(all_lanes, w.scratch.reset[at + 1] != 0);
    const int first0 = resets0 ? 2 * (__ffs(resets0) - 1) : chunk_tokens;
    const int first1 = resets1 ? 2 * (__ffs(resets1) - 1) + 1 : chunk_tokens;
    const int first = min(first0, first1);
    open &= first == chunk_tokens;
    double kept = 0.0;
    for (int x = 0; x < 2; ++x) {
      if (lane * 2 + x < first) kept += w.scratch.e[at + x];
      if (open) {
        kept += crossing(w.scratch.q_dq, at + x, stride, column_tiles + 1) -
                crossing(w.scratch.k_dk, at + x, stride, column_tiles + 1);
      }
    }
    kept = warp_sum(kept);
    a = first < chunk_tokens ? kept : a + kept;
  }
  if (dm0 != nullptr) {
    if (begin < end && !open) a += inner_at(begin, w.scratch.q_dq);
    if (lane == 0) dm0[seq * l.heads + head] = static_cast<float>(a);
  }
}

// dlf_t is the sum of X S over the pairs j < t <= u. The pairs are summed by where j and u lie:
//   j before the chunk, u after it   through
//   j before it, u inside            suffix sum of q . dq across
//   j inside, u after it             prefix sum of k . dk across
//   both inside                      prefix and suffix sums of what chunk_sums.cu makes
// Large terms cancel only in the last, which is exact to float32. Without a stabilizer a stays 0: no reset, e and carry
// of 0.
__global__ void gate_gradients_kernel(const __grid_constant__ Work w, const float* dlog_decay, void* di, void* df,
                                      int column_tiles, int state_tiles) {
  Chunk chunk;
  int head;
  int64_t item;
  const Layout& l = w.layout;
  if (!warp_item(l, chunk, head, item)) return;
  const int lane = threadIdx.x % 32;
  const int64_t stride = l.max_chunks * l.heads * chunk_tokens;

  double through = 0.0;
  for (int t = lane; t < state_tiles; t += 32) through += w.scratch.through[item * state_tiles + t];
  through = warp_sum(through);

  double qdq[2], kdk[2], inside_k[2], inside[2], e[2];
  bool reset[2];
  for (int x = 0; x < 2; ++x) {
    const int64_t at = item * chunk_tokens + lane * 2 + x, last = column_tiles * stride + at;
    qdq[x] = crossing(w.scratch.q_dq, at, stride, column_tiles);
    kdk[x] = crossing(w.scratch.k_dk, at, stride, column_tiles);
    inside_k[x] = w.scratch.k_dk[last];
    inside[x] = w.scratch.q_dq[last] - inside_k[x];
    e[x] = w.stabilized() ? w.scratch.e[at] : 0.0f;
    reset[x] = w.scratch.reset[at] != 0;
  }
  const double later = suffix_sum(qdq[0] + inside[0] + qdq[1] + inside[1], lane);
  const double earlier = prefix_sum(kdk[0] + kdk[1], lane) - (kdk[0] + kdk[1]);
  const double dlf_sum[2] = {through + later + earlier, through + later - (qdq[0] + inside[0]) + earlier + kdk[0]};

  const double into_decay = dlog_decay == nullptr ? 0.0 : dlog_decay[chunk.seq * l.heads + head];

  // While open: dlf + a, summed from token t on, and dlf of the next token.
  const bool open = w.stabilized() && w.scratch.open[item] != 0;
  const double y[2] = {e[0] + qdq[0] + inside[0] - kdk[0], e[1] + qdq[1] + inside[1] - kdk[1]};
  const double y_after = suffix_sum(y[0] + y[1], lane);
  const double dlf_behind[2] = {dlf_sum[1], dlf_sum[1] - (qdq[1] + inside[1]) + kdk[1]};

  // a at each token, its own e included: a segmented suffix sum, with the carry after the last token.
  const double e_after = suffix_sum(e[0] + e[1], lane);  // e of tokens >= 2 lane
  const unsigned resets0 = __ballot_sync(all_lanes, reset[0]), resets1 = __ballot_sync(all_lanes, reset[1]);
  const double carried = w.stabilized() ? w.scratch.stabilizer[item] : 0.0f;
  for (int x = 0; x < 2; ++x) {
    const int t = lane * 2 + x;
    const double e_from_t = x == 0 ? e_after : e_after - e[0];
    // The next reset after t cuts the sum: it takes all from itself on.
    const unsigned later_lanes = lane == 31 ? 0u : all_lanes << (lane + 1);
    const unsigned later0 = resets0 & later_lanes;
    const unsigned later1 = resets1 & (x == 0 ? later_lanes | (1u << lane) : later_lanes);
    const int next0 = later0 ? 2 * (__ffs(later0) - 1) : chunk_tokens;
    const int next1 = later1 ? 2 * (__ffs(later1) - 1) + 1 : chunk_tokens;
    const int next = min(next0, next1);
    const double other_e_after = __shfl_sync(all_lanes, e_after, (next / 2) % 32);
    const double other_e0 = __shfl_sync(all_lanes, e[0], (next / 2) % 32);
    const double e_from_next =
        next == chunk_tokens ? -carried : next % 2 == 0 ? other_e_after : other_e_after - other_e0;
    const bool is_open = open && next == chunk_tokens;
    const double y_from_t = carried + (x == 0 ? y_after : y_after - y[0]);
    const double a = is_open ? y_from_t - y[x] + e[x] - dlf_behind[x] : e_from_t - e_from_next;
    if (t >= chunk.length) continue;
    const int64_t out = (chunk.row * l.seq + chunk.first + t) * l.heads + head;
    const double dlf = (reset[x] ? dlf_sum[x] : is_open ? y_from_t : dlf_sum[x] + a) + into_decay;
    const double dli = kdk[x] + inside_k[x] + (reset[x] ? a : 0.0);
    const float i = raw_gate(w, w.p.i, chunk, head, t), f = raw_gate(w, w.p.f, chunk, head, t), cap = w.p.gate_soft_cap;
    float i_slope = cap_gate_slope(i, cap);
    if (!w.stabilized()) i_slope *= sigmoid(-cap_gate(i, cap));
    const float f_slope = cap_gate_slope(f, cap) * sigmoid(-cap_gate(f, cap));
    store_from_float(di, out, w.p.gate_dtype, i_slope == 0.0f ? 0.0f : static_cast<float>(dli) * i_slope);
    store_from_float(df, out, w.p.gate_dtype, f_slope == 0.0f ? 0.0f : static_cast<float>(dlf) * f_slope);
  }
}

int warp_blocks(const Work& w) {
  return static_cast<int>(ceil_div(w.layout.max_chunks * w.layout.heads, warps_per_block));
}

}  // namespace

cudaError_t build_chunk_table(const Work& w, cudaStream_t stream) {
  chunk_table_kernel<<<1, 256, 0, stream>>>(w);
  return cudaGetLastError();
}

cudaError_t scan_gates(const Work& w, float* m_out, float* m_last, float* log_decay, cudaStream_t stream) {
  const int sequences = static_cast<int>(w.layout.num_seqs * w.layout.heads);
  chunk_gates_kernel<<<warp_blocks(w), warps_per_block * 32, 0, stream>>>(w);
  boundary_stabilizer_kernel<<<sequences, 32, 0, stream>>>(w, m_last, log_decay);
  token_stabilizer_kernel<<<warp_blocks(w), warps_per_block * 32, 0, stream>>>(w, m_out);
  return cudaGetLastError();
}

cudaError_t token_gradients_from_h(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  const int blocks = static_cast<int>(w.layout.max_chunks * w.layout.heads);
  const Strided dh = w.p.normalize ? params.dh : Strided{};  // without a normalizer nothing depends on u
  token_gradients_kernel<<<blocks, 256, 0, stream>>>(w, dh, static_cast<const float*>(params.h), params.s);
  return cudaGetLastError();
}

cudaError_t gate_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  const int columns = column_tiles(w.p.dqk), states = state_tiles(w.p);
  const int sequences = static_cast<int>(w.layout.num_seqs * w.layout.heads);
  if (w.stabilized()) {
    carry_stabilizer_kernel<<<sequences, 32, 0, stream>>>(w, params.dm_last, params.dm0, columns, states);
  }
  gate_gradients_kernel<<<warp_blocks(w), warps_per_block * 32, 0, stream>>>(w, params.dlog_decay, params.di, params.df,
                                                                             columns, states);
  return cudaGetLastError();
}

cudaError_t sum_open_tokens(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  return sum_open(w.layout, w.scratch.reset, w.scratch.e, params.open_e, params.is_open, stream);
}

}  // namespace flash_xlstm::cuda::portable
