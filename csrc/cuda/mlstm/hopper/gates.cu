// Everything that is one number per token. A block owns one head of one sequence and walks it in steps of 4,096 tokens,
// eight consecutive ones a thread, so that a chunk is 16 lanes; scans over threads run in float64. Few long sequences:
// a cluster of up to eight blocks shares the walk, each a range of steps; a first pass finds what each range does to
// what is carried through it, and the others read it from the block's shared memory.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>

#include "cuda/dependent_launch.cuh"
#include "cuda/mlstm/hopper/work.h"

namespace flash_xlstm::cuda::hopper {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int tokens_per_thread = 8;
constexpr int threads_per_block = 512;
constexpr int tokens_per_step = threads_per_block * tokens_per_thread;
constexpr int lanes_per_chunk = chunk_tokens / tokens_per_thread;
constexpr int num_warps = threads_per_block / 32;
static_assert(lanes_per_chunk == 16, "a chunk is half a warp");

__device__ __forceinline__ double negative_infinity() { return -static_cast<double>(INFINITY); }

// The block's sequence. Packed: its place among the chunks, from the offsets clamped to [0, seq] and kept from
// decreasing, so that wrong ones cannot lead outside the tensors; blocks of head 0 write the table for later kernels.
struct Sequence {
  int64_t seq, row, first_token, length, first_chunk;
  int head;
};

__device__ Sequence find_sequence(const Work& w) {
  const Layout& l = w.layout;
  Sequence out;
  const int64_t index = blockIdx.x / cooperative_groups::this_cluster().num_blocks();
  out.seq = index / l.heads;
  out.head = static_cast<int>(index % l.heads);
  if (w.p.cu_seqlens == nullptr) {
    out.row = out.seq, out.first_token = 0, out.length = l.seq, out.first_chunk = out.seq * l.chunks_per_seq;
    return out;
  }
  __shared__ int64_t found[3];
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const auto offset = [&](int64_t s) { return min(max(static_cast<int64_t>(w.p.cu_seqlens[s]), int64_t{0}), l.seq); };
    int64_t start = offset(0), chunks = 0, stop = start;
    for (int64_t base = 0; base <= out.seq; base += 32) {
      const int64_t s = base + lane;
      int64_t end = s <= out.seq ? offset(s + 1) : 0;
      for (int d = 1; d < 32; d *= 2) {
        const int64_t other = __shfl_up_sync(all_lanes, end, d);
        if (lane >= d) end = max(end, other);
      }
      end = max(end, stop);
      int64_t begin = __shfl_up_sync(all_lanes, end, 1);
      if (lane == 0) begin = stop;
      int64_t count = s < out.seq ? (end - begin + chunk_tokens - 1) / chunk_tokens : 0;
      for (int d = 16; d > 0; d /= 2) count += __shfl_xor_sync(all_lanes, count, d);
      chunks += count;
      const int last = static_cast<int>(min(out.seq - base, int64_t{31}));
      start = __shfl_sync(all_lanes, begin, last);
      stop = __shfl_sync(all_lanes, end, last);
    }
    if (lane == 0) found[0] = start, found[1] = stop, found[2] = chunks;
  }
  __syncthreads();
  out.row = 0, out.first_token = found[0], out.length = found[1] - found[0], out.first_chunk = found[2];
  return out;
}

__device__ void write_table(const Work& w, const Sequence& s) {
  const int64_t count = (s.length + chunk_tokens - 1) / chunk_tokens;
  for (int64_t c = threadIdx.x; c < count; c += threads_per_block) {
    w.seq_of_chunk[s.first_chunk + c] = static_cast<int32_t>(s.seq);
  }
  if (threadIdx.x == 0) {
    w.first_chunk[s.seq] = s.first_chunk;
    w.first_token[s.seq] = s.first_token;
    if (s.seq == w.layout.num_seqs - 1) {
      w.first_chunk[s.seq + 1] = s.first_chunk + count;
      w.first_token[s.seq + 1] = s.first_token + s.length;
    }
  }
}

// This block's steps of 4,096 tokens among its cluster's.
struct Range {
  int64_t begin, end;
  int rank, ranks;
  bool is_last;  // the sequence's end is in it, or past it
  __device__ explicit Range(int64_t length) {
    const auto cluster = cooperative_groups::this_cluster();
    rank = static_cast<int>(cluster.block_rank()), ranks = static_cast<int>(cluster.num_blocks());
    const int64_t steps = (length + tokens_per_step - 1) / tokens_per_step, each = (steps + ranks - 1) / ranks;
    begin = min(rank * each, steps), end = min(begin + each, steps);
    is_last = rank == ranks - 1;
  }
};

// A natural log as one to base 2, a whole number and the rest.
__device__ __forceinline__ float2 split_log(double x) {
  constexpr double log2_e = 1.4426950408889634;
  x *= log2_e;
  const double whole = isinf(x) ? x : rint(x);
  return make_float2(static_cast<float>(whole), isinf(x) ? 0.0f : static_cast<float>(x - whole));
}

// What a run of tokens does to m: m -> max(m + sum, top).
struct Transform {
  double sum, top;
  __device__ Transform then(const Transform& next) const { return {sum + next.sum, fmax(top + next.sum, next.top)}; }
};

__device__ __forceinline__ Transform shuffle_up(const Transform& x, int d) {
  return {__shfl_up_sync(all_lanes, x.sum, d), __shfl_up_sync(all_lanes, x.top, d)};
}

__global__ void __launch_bounds__(threads_per_block)
    scan_gates_kernel(const __grid_constant__ Work w, float* m_out, float* m_last) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  __shared__ Transform warp_total[num_warps], range_total;
  const Sequence s = find_sequence(w);
  const Range range(s.length);
  if (blockIdx.x == 0) {
    for (int x = threadIdx.x; x < w.num_flags; x += threads_per_block) w.segment_flags[x] = 0;
  }
  if (w.p.cu_seqlens != nullptr && s.head == 0 && range.rank == 0) write_table(w, s);
  const Layout& l = w.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Strided &gi = w.p.i, &gf = w.p.f;
  const int64_t i_base = s.row * gi.batch + s.first_token * gi.seq + s.head * gi.head;
  const int64_t f_base = s.row * gf.batch + s.first_token * gf.seq + s.head * gf.head;
  const bool sigmoid = w.p.input_gate == InputGate::sigmoid;
  double m_in = sigmoid || w.p.m0 == nullptr ? 0.0 : w.p.m0[s.seq * l.heads + s.head];

  Transform total{0.0, negative_infinity()};
  for (int pass = range.ranks > 1 ? 0 : 1; pass < 2; ++pass) {
    const bool writes = pass == 1;
    if (writes && range.ranks > 1) {
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) range_total = total;
      cluster.sync();
      for (int r = 0; r < range.rank; ++r) {
        const Transform earlier = *cluster.map_shared_rank(&range_total, r);
        m_in = fmax(m_in + earlier.sum, earlier.top);
      }
    }
    for (int64_t step = range.begin; step < range.end; ++step) {
      const int64_t first = step * tokens_per_step + static_cast<int64_t>(threadIdx.x) * tokens_per_thread;
      float i[tokens_per_thread], lf[tokens_per_thread];
#pragma unroll
      for (int x = 0; x < tokens_per_thread; ++x) {
        const int64_t t = first + x;
        const bool inside = t < s.length;
        i[x] = inside ? load_as_float(gi.data, i_base + t * gi.seq, w.p.gate_dtype) : -INFINITY;
        lf[x] = inside ? load_as_float(gf.data, f_base + t * gf.seq, w.p.gate_dtype) : INFINITY;
        i[x] = cap_gate(i[x], w.p.gate_soft_cap);
        lf[x] = cap_gate(lf[x], w.p.gate_soft_cap);
        if (sigmoid) i[x] = log_sigmoid(i[x]);
      }
      Transform mine{0.0, negative_infinity()};
#pragma unroll
      for (int x = 0; x < tokens_per_thread; ++x) {
        lf[x] = log_sigmoid(lf[x]);
        mine = mine.then({lf[x], i[x]});
      }
      Transform through = mine;
      for (int d = 1; d < 32; d *= 2) {
        const Transform before = shuffle_up(through, d);
        if (lane >= d) through = before.then(through);
      }
      if (lane == 31) warp_total[warp] = through;
      Transform before = shuffle_up(through, 1);
      if (lane == 0) before = {0.0, negative_infinity()};
      __syncthreads();
      Transform start{0.0, negative_infinity()}, all = start;
      for (int x = 0; x < num_warps; ++x) {
        if (x == warp) start = all;
        all = all.then(warp_total[x]);
      }
      const double b_chunk = __shfl_sync(all_lanes, before.sum, lane & lanes_per_chunk);
      double b = before.sum - b_chunk;
      before = start.then(before);
      double m = sigmoid ? 0.0 : fmax(m_in + before.sum, before.top);
      total = total.then(all);
      if (!writes) {
        __syncthreads();
        continue;
      }
      m_in = fmax(m_in + all.sum, all.top);

      const int64_t chunk = s.first_chunk + first / chunk_tokens;
      const bool kept = first / chunk_tokens < (s.length + chunk_tokens - 1) / chunk_tokens;
      const int64_t item = chunk * l.heads + s.head;
      const int64_t at = item * chunk_tokens + first % chunk_tokens;
      if (kept && lane % lanes_per_chunk == 0) w.m_start[item] = split_log(m);
      float2 alpha[tokens_per_thread], beta[tokens_per_thread];
#pragma unroll
      for (int x = 0; x < tokens_per_thread; ++x) {
        const double carried = lf[x] + m;
        const bool reset = !sigmoid && i[x] >= carried;
        m = sigmoid ? 0.0 : fmax(carried, static_cast<double>(i[x]));
        b += lf[x];
        const float2 log_decay = split_log(b - m);
        if (kept && x == tokens_per_thread - 1 && lane % lanes_per_chunk == lanes_per_chunk - 1) {
          w.alpha_last[item] = log_decay;  // nothing past the chunk's end changes it
        }
        alpha[x] = first + x < s.length ? log_decay : make_float2(-INFINITY, 0.0f);
        beta[x] = split_log(b - i[x]);
        if (kept && w.reset != nullptr) w.reset[at + x] = reset;
        if (first + x < s.length && m_out != nullptr) {
          m_out[(s.row * l.seq + s.first_token + first + x) * l.heads + s.head] = static_cast<float>(m);
        }
      }
      if (kept) {
#pragma unroll
        for (int x = 0; x < tokens_per_thread; x += 2) {
          const auto four = [&](const float2* two) { return make_float4(two[0].x, two[0].y, two[1].x, two[1].y); };
          *reinterpret_cast<float4*>(w.alpha + at + x) = four(alpha + x);
          *reinterpret_cast<float4*>(w.beta + at + x) = four(beta + x);
        }
      }
      __syncthreads();  // warp_total is read before the next step writes it
    }
  }
  if (range.ranks > 1) cooperative_groups::this_cluster().sync();  // nobody leaves while others read its total
  if (range.is_last && threadIdx.x == 0 && m_last != nullptr)
    m_last[s.seq * l.heads + s.head] = static_cast<float>(m_in);
}

// The stabilizer's path: walking back from a = dm - (<c, dc> + <n, dn>) at the sequence's end, a += e_t, and a token
// whose m took the input gate's branch (a reset) takes a and clears it; the others get it besides their dlf. Before the
// first reset that is met (open), dlf_t + a_t is dm plus the sum of e + q . dq - k . dk over the tokens from t on:
// <c, dc> + <n, dn>, which may be much larger, is gone from it. That sum is what is carried while open, and a itself
// where a reset takes it is the difference to dlf of the token behind.
struct Carried {
  double value;
  bool open;
};

// What a run of tokens does to it.
struct Walk {
  double closed, open;  // sums of e since the last reset, and of e + q . dq - k . dk
  int reset;
  __device__ Walk then(const Walk& earlier) const {
    return earlier.reset ? earlier : Walk{closed + earlier.closed, open + earlier.open, reset};
  }
  __device__ Carried from(const Carried& x) const {
    return reset ? Carried{closed, false} : Carried{x.value + (x.open ? open : closed), x.open};
  }
};

__device__ __forceinline__ Walk shuffle_down(const Walk& x, int d) {
  return {__shfl_down_sync(all_lanes, x.closed, d), __shfl_down_sync(all_lanes, x.open, d),
          __shfl_down_sync(all_lanes, x.reset, d)};
}

// dlf_t sums X S over the pairs j < t <= u, by where they lie: both outside the chunk on either side (through), j
// before it (suffix sum of q . dq across), u behind it (prefix sum of k . dk across), both inside. Nothing large
// cancels but inside.
__global__ void __launch_bounds__(threads_per_block)
    gate_gradients_kernel(const __grid_constant__ Work w, const float* dm_last, void* di, void* df, float* dm0,
                          int state_tiles) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  __shared__ Walk warp_total[num_warps], range_total;
  const Sequence s = find_sequence(w);
  const Range range(s.length);
  const Layout& l = w.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % lanes_per_chunk;
  const int64_t stride = l.max_chunks * l.heads * chunk_tokens;
  const int64_t chunks = (s.length + chunk_tokens - 1) / chunk_tokens;
  // No stabilizer: as if past a reset, with nothing to carry.
  const bool sigmoid = w.p.input_gate == InputGate::sigmoid;
  Carried carried{sigmoid || dm_last == nullptr ? 0.0 : dm_last[s.seq * l.heads + s.head], !sigmoid};

  const Walk nothing{0.0, 0.0, 0};
  Walk total = nothing;
  for (int pass = range.ranks > 1 ? 0 : 1; pass < 2; ++pass) {
    const bool writes = pass == 1;
    if (writes && range.ranks > 1) {
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) range_total = total;
      cluster.sync();
      for (int r = range.ranks - 1; r > range.rank; --r)
        carried = cluster.map_shared_rank(&range_total, r)->from(carried);
    }
    for (int64_t index = range.end - 1; index >= range.begin; --index) {
      const int64_t first = index * tokens_per_step + static_cast<int64_t>(threadIdx.x) * tokens_per_thread;
      const int64_t chunk = first / chunk_tokens;
      const bool kept = chunk < chunks;
      const int64_t item = (s.first_chunk + chunk) * l.heads + s.head;
      const int64_t at = item * chunk_tokens + first % chunk_tokens;
      float qdq[tokens_per_thread] = {}, kdk[tokens_per_thread] = {}, in_q[tokens_per_thread] = {},
            in_k[tokens_per_thread] = {}, e[tokens_per_thread] = {};
      unsigned resets = 0;
      double through = 0.0;
      if (kept) {
        const auto add = [&](float (&to)[tokens_per_thread], const float* from) {
#pragma unroll
          for (int x = 0; x < tokens_per_thread; x += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + at + x);
            to[x] += four.x, to[x + 1] += four.y, to[x + 2] += four.z, to[x + 3] += four.w;
          }
        };
        for (int c = 0; c < w.dq_tiles; ++c) add(qdq, w.q_dq + c * stride);
        for (int c = 0; c < w.dk_tiles; ++c) add(kdk, w.k_dk + c * stride);
        add(in_q, w.q_dq + w.dq_tiles * stride);
        add(in_k, w.k_dk + w.dk_tiles * stride);
        add(in_k, w.k_dk + (w.dk_tiles + 1) * stride);
        add(e, w.e);
#pragma unroll
        for (int x = 0; x < tokens_per_thread; ++x) resets |= static_cast<unsigned>(w.reset[at + x]) << x;
        for (int t = part; writes && t < state_tiles; t += lanes_per_chunk)
          through += w.through[item * state_tiles + t];
      }
      double later = 0.0, earlier = 0.0;  // this thread's sums
#pragma unroll
      for (int x = 0; x < tokens_per_thread; ++x) {
        later += static_cast<double>(qdq[x]) + (in_q[x] - in_k[x]);
        earlier += kdk[x];
      }
      const double own_earlier = earlier, own_later = later;
      double cross_q = 0.0;
#pragma unroll
      for (int x = 0; x < tokens_per_thread; ++x) cross_q += qdq[x];
      for (int d = 1; d < lanes_per_chunk; d *= 2) {
        const double after = __shfl_down_sync(all_lanes, later, d, lanes_per_chunk);
        const double before = __shfl_up_sync(all_lanes, earlier, d, lanes_per_chunk);
        if (part + d < lanes_per_chunk) later += after;
        if (part >= d) earlier += before;
        cross_q += __shfl_xor_sync(all_lanes, cross_q, d);
        through += __shfl_xor_sync(all_lanes, through, d);
      }
      later -= own_later, earlier -= own_earlier;

      // What is carried into this thread's last token.
      Walk mine = nothing;
#pragma unroll
      for (int x = tokens_per_thread - 1; x >= 0; --x) {
        mine = mine.then({e[x], e[x] + (static_cast<double>(qdq[x]) - kdk[x] + (in_q[x] - in_k[x])), 0});
        if (resets >> x & 1) mine = {0.0, 0.0, 1};
      }
      Walk from = mine;
      for (int d = 1; d < 32; d *= 2) {
        const Walk after = shuffle_down(from, d);
        if (lane + d < 32) from = after.then(from);
      }
      if (lane == 0) warp_total[warp] = from;
      Walk after = shuffle_down(from, 1);
      if (lane == 31) after = nothing;
      __syncthreads();
      Walk start = nothing, all = nothing;
      for (int x = num_warps - 1; x >= 0; --x) {
        if (x == warp) start = all;
        all = all.then(warp_total[x]);
      }
      after = start.then(after);
      total = total.then(all);
      if (!writes) {
        __syncthreads();
        continue;
      }
      Carried a = after.from(carried);
      carried = all.from(carried);
      if (index == 0 && threadIdx.x == 0 && dm0 != nullptr) {
        dm0[s.seq * l.heads + s.head] = static_cast<float>(
            carried.value + (carried.open ? 0.0 : through + cross_q));  // <c, dc> + <n, dn> at the start
      }

      double before = own_earlier + earlier;  // k . dk across, of tokens up to x
#pragma unroll
      for (int x = tokens_per_thread - 1; x >= 0; --x) {
        const double dlf_behind = through + later + before;
        before -= kdk[x];
        later += static_cast<double>(qdq[x]) + (in_q[x] - in_k[x]);
        const double dlf = through + later + before;
        const bool reset = resets >> x & 1;
        const double taken = reset ? (a.open ? a.value - dlf_behind : a.value) + e[x] : 0.0;
        a.value += a.open ? e[x] + (dlf - dlf_behind) : e[x];
        const int64_t t = first + x;
        if (t < s.length) {
          const int64_t token = s.first_token + t, out = (s.row * l.seq + token) * l.heads + s.head;
          const double with_a = reset ? dlf : a.open ? a.value : dlf + a.value;
          // Through the logarithm and the cap; a slope of 0 ends what is behind it.
          const auto to_gate = [&](const Strided& gate, float gradient, bool through_log_sigmoid) {
            const float raw =
                load_as_float(gate.data, s.row * gate.batch + token * gate.seq + s.head * gate.head, w.p.gate_dtype);
            const float capped = cap_gate(raw, w.p.gate_soft_cap);
            const float slope = (through_log_sigmoid ? flash_xlstm::cuda::sigmoid(-capped) : 1.0f) *
                                cap_gate_slope(raw, w.p.gate_soft_cap);
            return slope == 0.0f ? 0.0f : gradient * slope;
          };
          const float into_i = static_cast<float>(static_cast<double>(kdk[x]) + in_k[x] + taken);
          store_from_float(di, out, w.p.gate_dtype,
                           sigmoid || w.p.gate_soft_cap != 0.0f ? to_gate(w.p.i, into_i, sigmoid) : into_i);
          store_from_float(df, out, w.p.gate_dtype, to_gate(w.p.f, static_cast<float>(with_a), true));
        }
        if (reset) a = {0.0, false};
      }
      __syncthreads();
    }
  }
  if (range.ranks > 1) cooperative_groups::this_cluster().sync();
  if (s.length == 0 && range.rank == 0 && threadIdx.x == 0 && dm0 != nullptr)
    dm0[s.seq * l.heads + s.head] = static_cast<float>(carried.value);
}

// One block a head of a sequence, or a cluster of them where that leaves most of the GPU idle.
template <typename... Args>
cudaError_t launch(const Work& w, void (*kernel)(Args...), cudaStream_t stream, Args... args) {
  const int64_t sequences = w.layout.num_seqs * w.layout.heads, steps = ceil_div(w.layout.seq, tokens_per_step);
  unsigned cluster = 1;
  while (cluster < 8 && cluster * 2 <= steps && sequences * cluster < 64) cluster *= 2;
  return launch_early(kernel, dim3(static_cast<unsigned>(sequences) * cluster), dim3(threads_per_block), 0,
                      static_cast<int>(cluster), stream, args...);
}

}  // namespace

cudaError_t scan_gates(const Work& w, float* m_out, float* m_last, cudaStream_t stream) {
  return launch(w, scan_gates_kernel, stream, w, m_out, m_last);
}

cudaError_t gate_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  return launch(w, gate_gradients_kernel, stream, w, params.dm_last, params.di, params.df, params.dm0,
                state_tiles(w.p));
}

}  // namespace flash_xlstm::cuda::hopper
