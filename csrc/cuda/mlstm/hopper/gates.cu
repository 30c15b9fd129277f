// Everything that is one number per token: the scan of the gates and the gates' gradients.
//
// The gates lie in memory with the heads innermost. So a block works on tiles: some chunks of one sequence, for up to
// eight heads. The scan of a long sequence takes fewer heads a tile, which gives more blocks. A block reads and writes
// the gates in memory order and passes them through shared memory. There a warp owns one chunk of one head, a lane four
// consecutive tokens. Scans run in float64.
//
// Tiles of one sequence depend on each other.
//   Scan: a thread block cluster has a sequence, each of its blocks a run of consecutive tiles. A block reads through
//     distributed shared memory what the tiles of earlier blocks do to m.
//   Gradients: every tile has a block. It writes its share to memory, sets a flag, and waits for the flags of the
//     later tiles.
#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/mlstm/chunked/open_sum.cuh"
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/hopper/work.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::hopper {
namespace {

constexpr int tokens_per_lane = 4;
constexpr int most_heads = 8;  // of a tile: 32 bytes of float32 gates
constexpr int most_warps = 32;
constexpr int blocks_of_16_warps = 2;  // that fit an SM
static_assert(chunk_tokens == 32 * tokens_per_lane, "a chunk is a warp");

__device__ __forceinline__ double infinity() { return static_cast<double>(INFINITY); }

struct Sequence {
  int seq, length;
  int begin;  // token, within its row of the batch
  int chunk;  // the first, among those of all sequences
  // At least 1: a sequence without tokens has a tile too.
  __device__ int tiles(const Work& w) const { return max((length - 1) / (w.tiles.chunks * chunk_tokens) + 1, 1); }
};

// Some chunks of one sequence.
struct Tile {
  int seq, index;  // the sequence; this tile among its tiles
  bool is_last;
  int tokens;  // 0: the sequence has none
  int first;   // token, within its row of the batch
  int chunk;   // the first, among those of all sequences

  __device__ Tile(const Work& w, const Sequence& s, int index) : seq(s.seq), index(index) {
    const int chunks = index * w.tiles.chunks, before = chunks * chunk_tokens, most = w.tiles.chunks * chunk_tokens;
    is_last = s.length - before <= most;
    tokens = min(s.length - before, most);
    first = s.begin + before, chunk = s.chunk + chunks;
  }
  __device__ int64_t row(const Work& w) const { return w.p.cu_seqlens == nullptr ? seq : 0; }
};

// Cuts every sequence into parts of part_tokens tokens, at least one each, and finds part `id` of them all: its
// sequence, and its index within the sequence. Packed offsets are clamped to [0, seq] and kept from decreasing, so that
// wrong ones cannot lead outside the tensors. Returns false where there are not so many parts.
__device__ bool find_part(const Work& w, int64_t id, int64_t parts_per_seq, int part_tokens, Sequence& out,
                          int& index) {
  const Layout& l = w.layout;
  if (w.p.cu_seqlens == nullptr) {
    const unsigned per_seq = static_cast<unsigned>(parts_per_seq), seq = static_cast<unsigned>(id) / per_seq;
    out = {.seq = static_cast<int>(seq),
           .length = static_cast<int>(l.seq),
           .begin = 0,
           .chunk = static_cast<int>(seq * l.chunks_per_seq)};
    index = static_cast<int>(static_cast<unsigned>(id) - seq * per_seq);
    return true;
  }
  __shared__ Sequence found;
  __shared__ int found_index;
  __shared__ int warp_end[most_warps];
  __shared__ int2 warp_sum[most_warps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int wanted = static_cast<int>(id);
  const auto offset = [&](int64_t s) {
    return static_cast<int>(min(max(int64_t{w.p.cu_seqlens[s]}, int64_t{0}), l.seq));
  };
  if (threadIdx.x == 0) found.seq = -1;
  __syncthreads();
  int stop = offset(0), chunks = 0, parts = 0;  // of the sequences before `base`
  for (int64_t base = 0; base < l.num_seqs && parts <= wanted; base += blockDim.x) {
    const int64_t s = base + threadIdx.x;
    const bool exists = s < l.num_seqs;
    int end = exists ? offset(s + 1) : 0;
    for (int d = 1; d < 32; d *= 2) end = max(end, __shfl_up_sync(all_lanes, end, d));
    if (lane == 31) warp_end[warp] = end;
    __syncthreads();
    int begin = stop;
#pragma unroll 1
    for (int x = 0; x < warps; ++x) {
      if (x < warp) begin = max(begin, warp_end[x]);
      stop = max(stop, warp_end[x]);
    }
    end = max(end, begin);
    const int end_before = __shfl_up_sync(all_lanes, end, 1);
    if (lane > 0) begin = end_before;
    const int own_chunks = ceil_div(end - begin, chunk_tokens);
    const int own_parts = exists ? max((end - begin - 1) / part_tokens + 1, 1) : 0;
    int2 sum = make_int2(own_chunks, own_parts);
    for (int d = 1; d < 32; d *= 2) {
      const int2 before = make_int2(__shfl_up_sync(all_lanes, sum.x, d), __shfl_up_sync(all_lanes, sum.y, d));
      if (lane >= d) sum.x += before.x, sum.y += before.y;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    int first_chunk = chunks + sum.x - own_chunks, first_part = parts + sum.y - own_parts;
#pragma unroll 1
    for (int x = 0; x < warps; ++x) {
      if (x < warp) first_chunk += warp_sum[x].x, first_part += warp_sum[x].y;
      chunks += warp_sum[x].x, parts += warp_sum[x].y;
    }
    if (first_part <= wanted && wanted < first_part + own_parts) {
      found = {.seq = static_cast<int>(s), .length = end - begin, .begin = begin, .chunk = first_chunk};
      found_index = wanted - first_part;
    }
    __syncthreads();
  }
  out = found, index = found_index;
  return out.seq >= 0;
}

// The tables of packed sequences, for later kernels.
__device__ void write_table(const Work& w, const Tile& tile) {
  const int count = ceil_div(tile.tokens, chunk_tokens);
  if (threadIdx.x < count) w.seq_of_chunk[tile.chunk + threadIdx.x] = tile.seq;
  if (threadIdx.x != 0) return;
  if (tile.index == 0) w.first_chunk[tile.seq] = tile.chunk, w.first_token[tile.seq] = tile.first;
  if (tile.is_last && tile.seq == w.layout.num_seqs - 1) {
    w.first_chunk[tile.seq + 1] = tile.chunk + count;
    w.first_token[tile.seq + 1] = tile.first + tile.tokens;
  }
}

// This thread's elements of the tile: four tokens of one head, `step` apart. Neighbouring threads have neighbouring
// heads, then tokens. Shared memory holds two rows of the tile's tokens for each head.
struct Elements {
  int head, token, step;  // head within the tile's; first token within the tile
  int inside;             // how many of the four are the sequence's
  int row;                // of the first in shared memory
  __device__ Elements(const Work& w, const Tile& tile) {
    const int heads = w.tiles.heads;
    head = threadIdx.x % heads, token = threadIdx.x / heads, step = w.tiles.chunks * (chunk_tokens / tokens_per_lane);
    inside = 0;
    if (blockIdx.y * heads + head < w.layout.heads) {
      for (int x = 0; x < tokens_per_lane; ++x) inside += token + x * step < tile.tokens;
    }
    row = head * row_pitch(w) + token;
  }
  // Index of the first element in an output with so many elements from a token to the next.
  __device__ int64_t output(const Work& w, const Tile& tile, int64_t token_stride) const {
    const int64_t token_of_all = tile.row(w) * w.layout.seq + tile.first + token;
    return token_of_all * token_stride + blockIdx.y * w.tiles.heads + head;
  }
  // 16 bytes more than the tokens, so that the heads' elements lie in different banks.
  __device__ static int row_pitch(const Work& w) { return w.tiles.chunks * chunk_tokens + 4; }
};

// All four loads are issued before the first is used.
__device__ __forceinline__ void load_gates(float (&out)[tokens_per_lane], const Work& w, const Strided& gate,
                                           const Tile& tile, const Elements& own, float outside) {
  const int64_t first = tile.row(w) * gate.batch + (tile.first + own.token) * gate.seq +
                        (blockIdx.y * w.tiles.heads + own.head) * gate.head;
  const auto load = [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(gate.data) + first;
    T raw[tokens_per_lane];
#pragma unroll
    for (int x = 0; x < tokens_per_lane; ++x, from += own.step * gate.seq) raw[x] = x < own.inside ? *from : zero;
#pragma unroll
    for (int x = 0; x < tokens_per_lane; ++x) out[x] = x < own.inside ? to_float(raw[x]) : outside;
  };
  switch (w.p.gate_dtype) {
    case DType::float32: load(0.0f); break;
    case DType::bfloat16: load(from_float<bf16>(0.0f)); break;
    default: load(from_float<half>(0.0f));
  }
}

// The same bits as log_sigmoid, without branches: lanes do not diverge, and the latencies of tokens overlap. log1pf is
// written out for e in [0, 1]: 1 + e = 2^k (1 + r).
__device__ __forceinline__ float straight_log_sigmoid(float x) {
  const float e = expf(-fabsf(x));
  const int k = (__float_as_int(__fadd_rz(e, 1.0f)) - 0x3f400000) & static_cast<int>(0xff800000);  // times 2^23
  const float r = __int_as_float(__float_as_int(e) - k) + fmaf(__int_as_float(0x40800000 - k), 0.25f, -1.0f);
  constexpr float coefficients[] = {0.105468884f, -0.132297039f, 0.144914463f, -0.166415647f,
                                    0.199888676f, -0.250001967f, 0.333335102f, -0.5f};
  float p = -0.0453486145f;
#pragma unroll
  for (const float c : coefficients) p = fmaf(r, p, c);
  const float log1p_e = fmaf(static_cast<float>(k) * 0x1p-23f, 0.693147182f, fmaf(r, r * p, r));
  return (x >= 0.0f ? 0.0f : x) - log1p_e;  // NaN too
}

// Hides x from the compiler, which then converts it to float64 again instead of keeping the result: that would spill.
__device__ __forceinline__ void derive_anew(float& x) { asm volatile("" : "+f"(x)); }

// Converts a natural log to base 2, as a whole number and the rest.
__device__ __forceinline__ float2 split_log(double x) {
  constexpr double log2_e = 1.4426950408889634;
  x *= log2_e;
  const double whole = rint(x);
  const float high = static_cast<float>(whole);
  return make_float2(high, isinf(high) ? 0.0f : static_cast<float>(x - whole));
}

// What a run of tokens does to m: m -> max(m + sum, top).
struct Transform {
  double sum, top;
  __device__ Transform then(const Transform& next) const {
    return {.sum = sum + next.sum, .top = fmax(top + next.sum, next.top)};
  }
  __device__ double from(double m) const { return fmax(m + sum, top); }
};

// With b_t the cumulative log forget gate from the chunk's start on, beta_t = b_t - i_t and
// alpha_t = min(-m_start, min_{j <= t} beta_j),
//   m_t = max(m_start + b_t, max_{j <= t} b_t - b_j + i_j) = b_t - alpha_t.
// The sums and the minimum over j are made before m_start is known.
struct ChunkLogs {
  double b[tokens_per_lane], beta[tokens_per_lane];
  double least_before;  // the least beta before this lane's tokens
  Transform all;        // of the whole chunk, in the last lane
};

__device__ ChunkLogs scan_chunk(const float* i_row, const float* lf_row, int lane) {
  ChunkLogs out;
  const float4 i = reinterpret_cast<const float4*>(i_row)[lane], lf = reinterpret_cast<const float4*>(lf_row)[lane];
  out.b[0] = lf.x, out.b[1] = out.b[0] + lf.y, out.b[2] = out.b[1] + lf.z, out.b[3] = out.b[2] + lf.w;
  double sum = out.b[3];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double before = __shfl_up_sync(all_lanes, sum, d);
    if (lane >= d) sum += before;
  }
  const double before = __shfl_up_sync(all_lanes, sum, 1);
  if (lane > 0) {
#pragma unroll
    for (double& b : out.b) b += before;
  }
  out.beta[0] = out.b[0] - i.x, out.beta[1] = out.b[1] - i.y;
  out.beta[2] = out.b[2] - i.z, out.beta[3] = out.b[3] - i.w;
  const auto least = [](double a, double b) { return b < a ? b : a; };
  double through = least(least(out.beta[0], out.beta[1]), least(out.beta[2], out.beta[3]));
#pragma unroll
  for (int d = 1; d < 32; d *= 2) through = least(through, __shfl_up_sync(all_lanes, through, d));
  out.least_before = __shfl_up_sync(all_lanes, through, 1);
  if (lane == 0) out.least_before = infinity();
  out.all = {.sum = out.b[3], .top = out.b[3] - through};
  return out;
}

// The warp's chunk of a head.
struct Unit {
  int lane, warp, head, chunk;  // head, chunk: within the tile
  int tokens;                   // 0: none here
  int64_t item;
  __device__ Unit(const Work& w, const Tile& tile) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = warp % w.tiles.heads, chunk = warp / w.tiles.heads;
    const int64_t tile_head = blockIdx.y * w.tiles.heads + head;
    tokens = tile_head < w.layout.heads ? max(min(tile.tokens - chunk * chunk_tokens, chunk_tokens), 0) : 0;
    item = (tile.chunk + chunk) * w.layout.heads + tile_head;
  }
};

// The warp's chunk for the fused path. start: log alpha before the chunk; end: after the lane's last token.
__device__ __forceinline__ void write_records(GateRecord* records, int64_t item, int lane, float2 start, float2 end,
                                              const float2 (&alpha)[tokens_per_lane],
                                              const float2 (&beta)[tokens_per_lane],
                                              const float (&m)[tokens_per_lane]) {
  constexpr int lanes = GateRecord::tokens / tokens_per_lane;  // of a half
  const int half = lane / lanes, at = lane % lanes * tokens_per_lane;
  const auto of_lane = [&](float2 x, int from) {
    return make_float2(__shfl_sync(all_lanes, x.x, from), __shfl_sync(all_lanes, x.y, from));
  };
  const float2 middle = of_lane(end, lanes - 1), last = of_lane(end, 31);
  if (half == 1) start = middle;
  const float2 reached = half == 0 ? middle : last;
  GateRecord& to = records[item * 2 + half];
  float g[tokens_per_lane], w[tokens_per_lane];
#pragma unroll
  for (int x = 0; x < tokens_per_lane; ++x) {
    g[x] = fast_exp2(log_difference(alpha[x], start)), w[x] = fast_exp2(log_difference(reached, beta[x]));
  }
  const auto store = [&](float* into, float a, float b, float c, float d) {
    *reinterpret_cast<float4*>(into) = make_float4(a, b, c, d);
  };
  const auto store_logs = [&](float2* into, const float2(&log)[tokens_per_lane]) {
    store(&into[at].x, log[0].x, log[0].y, log[1].x, log[1].y);
    store(&into[at + 2].x, log[2].x, log[2].y, log[3].x, log[3].y);
  };
  store_logs(to.alpha, alpha), store_logs(to.beta, beta);
  store(to.g + at, g[0], g[1], g[2], g[3]), store(to.w + at, w[0], w[1], w[2], w[3]);
  store(to.exp_neg_m + at, expf(-m[0]), expf(-m[1]), expf(-m[2]), expf(-m[3]));
  const auto counts = [&](int x) { return (w[x] != 0.0f ? 0xffffu : 0u) | (w[x + 1] != 0.0f ? 0xffff0000u : 0u); };
  *reinterpret_cast<uint2*>(to.counts + at / 2) = make_uint2(counts(0), counts(2));
  if (at == 0) to.keep = fast_exp2(log_difference(reached, start));
}

extern __shared__ __align__(16) float rows[];
size_t shared_bytes(int heads, int chunks) { return 2 * sizeof(float) * heads * (chunks * chunk_tokens + 4); }

// The tile's log gates into shared memory: i in the first rows, lf in the others.
__device__ __forceinline__ void load_logs(const Work& w, const Tile& tile, const Elements& own) {
  float i[tokens_per_lane], f[tokens_per_lane];
  load_gates(i, w, w.p.i, tile, own, -INFINITY);
  load_gates(f, w, w.p.f, tile, own, INFINITY);
#pragma unroll
  for (int x = 0; x < tokens_per_lane; ++x) {
    i[x] = cap_gate(i[x], w.p.gate_soft_cap);
    if (w.p.input_gate == InputGate::sigmoid) i[x] = straight_log_sigmoid(i[x]);
    rows[own.row + x * own.step] = i[x];
    rows[w.tiles.heads * Elements::row_pitch(w) + own.row + x * own.step] =
        straight_log_sigmoid(cap_gate(f[x], w.p.gate_soft_cap));
  }
}

__device__ __forceinline__ ChunkLogs scan_unit(const Work& w, const Unit& unit) {
  const int pitch = Elements::row_pitch(w), at = unit.head * pitch + unit.chunk * chunk_tokens;
  return scan_chunk(rows + at, rows + w.tiles.heads * pitch + at, unit.lane);
}

// What the tile does to m. The first threads call it, one for each head.
__device__ __forceinline__ Transform tile_total(const Work& w, const Transform* unit_total) {
  Transform total = unit_total[threadIdx.x];
#pragma unroll 1
  for (int c = 1; c < w.tiles.chunks; ++c) total = total.then(unit_total[c * w.tiles.heads + threadIdx.x]);
  return total;
}

// What the earlier blocks of the cluster do to m, in order. A whole warp calls it; lane 0 has the result.
__device__ Transform earlier_blocks(const double2* own_total, int rank, int lane) {
  Transform all{.sum = 0.0, .top = -infinity()};
  if (lane < rank) {
    const double2 theirs = ptx::load_peer(own_total, lane);
    all = {.sum = theirs.x, .top = theirs.y};
  }
#pragma unroll
  for (int d = 1; d < largest_cluster; d *= 2) {
    all = all.then({.sum = __shfl_down_sync(all_lanes, all.sum, d), .top = __shfl_down_sync(all_lanes, all.top, d)});
  }
  return all;
}

// A cluster has one sequence, packed or not; each block has a run of its tiles. The later runs need what this run does
// to m. So a block with several tiles reads them twice: first for that, then to write.
__global__ void __launch_bounds__(most_warps * 32)
    scan_gates_kernel(const __grid_constant__ Work w, float* m_out, float* m_last, float* log_decay, int cluster) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  __shared__ Transform unit_total[most_warps];
  __shared__ double2 block_total[most_heads];
  __shared__ float2 log_start[most_warps];  // alpha before each warp's chunk; in registers it would spill
  __shared__ double m_in[most_heads], decay_in[most_heads];  // m, and the sum of lf, before this block's next tile
  __shared__ Sequence seq;  // read from here where it is needed: in registers it would spill
  const int64_t blocks = int64_t{gridDim.x} * gridDim.y, block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const auto clear = [&](int* flags, int64_t count) {
#pragma unroll 1
    for (int64_t x = block * blockDim.x + threadIdx.x; x < count; x += blocks * blockDim.x) flags[x] = 0;
  };
  clear(w.segment_flags, w.num_flags);
  clear(w.state_flags, w.num_state_flags);
  clear(w.tile_flags, w.num_tile_flags);
  const Layout& l = w.layout;
  int begin, end;   // of this block's tiles
  bool goes_twice;  // not the last run: no block needs what that does to m
  {
    Sequence found;
    int only;  // part
    find_part(w, blockIdx.x / cluster, 1, INT_MAX, found, only);
    const int tiles = found.tiles(w), each = (tiles - 1) / cluster + 1;
    begin = static_cast<int>(blockIdx.x % cluster) * each, end = min(begin + each, tiles);
    goes_twice = end < tiles && end - begin > 1;
    if (threadIdx.x == 0) seq = found;
  }
  __syncthreads();
  if (begin >= end) {  // no tiles, but the other blocks of the cluster wait at the barriers
    ptx::cluster_barrier();
    ptx::cluster_barrier();
    return;
  }
  const int heads = w.tiles.heads;
  // The first threads do what is done once for each head.
  const auto has_head = [&] { return threadIdx.x < heads && blockIdx.y * heads + threadIdx.x < l.heads; };
  if (has_head()) {
    const int64_t head = blockIdx.y * heads + threadIdx.x;
    const double m = w.p.input_gate == InputGate::sigmoid ? w.p.first_m : initial_m(w.p, seq.seq, head);
    m_in[threadIdx.x] = m, decay_in[threadIdx.x] = 0.0;
    if (seq.length == 0) {
      if (float* const to = final_m(w.p, m_last, seq.seq, head)) *to = static_cast<float>(m);
      if (log_decay != nullptr) log_decay[seq.seq * l.heads + head] = 0.0f;
    }
  }
  if (goes_twice) {
    Transform total{.sum = 0.0, .top = -infinity()};
#pragma unroll 1
    for (int index = begin; index < end; ++index) {
      const Tile tile(w, seq, index);
      load_logs(w, tile, Elements(w, tile));
      __syncthreads();
      const Unit unit(w, tile);
      const Transform all = scan_unit(w, unit).all;
      if (unit.lane == 31) unit_total[unit.warp] = all;
      __syncthreads();
      if (has_head()) total = total.then(tile_total(w, unit_total));
    }
    if (has_head()) block_total[threadIdx.x] = make_double2(total.sum, total.top);
  }

#pragma unroll 1
  for (int index = begin; index < end; ++index) {
    {  // Tile is made again from seq behind the barrier: kept in registers it would spill
      const Tile tile(w, seq, index);
      if (w.p.cu_seqlens != nullptr && blockIdx.y == 0) write_table(w, tile);
      load_logs(w, tile, Elements(w, tile));
    }
    __syncthreads();
    const Tile tile(w, seq, index);
    const Unit unit(w, tile);
    const int64_t head = blockIdx.y * heads + unit.head;
    const ChunkLogs logs = scan_unit(w, unit);
    if (unit.lane == 31) unit_total[unit.warp] = logs.all;
    __syncthreads();
    if (cluster > 1 && index == begin) {
      if (has_head() && !goes_twice) {
        const Transform total = tile_total(w, unit_total);
        block_total[threadIdx.x] = make_double2(total.sum, total.top);
      }
      ptx::cluster_barrier();
      if (unit.chunk == 0 && head < l.heads) {
        const int rank = static_cast<int>(blockIdx.x % cluster);
        const Transform before = earlier_blocks(block_total + unit.head, rank, unit.lane);
        if (unit.lane == 0) m_in[unit.head] = before.from(m_in[unit.head]), decay_in[unit.head] = before.sum;
      }
      ptx::cluster_arrive();
      __syncthreads();
    }

    if (unit.tokens > 0) {
      const bool sigmoid = w.p.input_gate == InputGate::sigmoid;  // m stays 0
      double m = m_in[unit.head];
#pragma unroll 1
      for (int x = unit.head; x < unit.warp; x += heads) m = unit_total[x].from(m);
      double alpha = sigmoid ? 0.0 : fmin(-m, logs.least_before);
      float2 log_alpha = split_log(alpha);
      if (unit.lane == 0) log_start[unit.warp] = log_alpha;
      const int first = unit.lane * tokens_per_lane;
      const int64_t at = unit.item * chunk_tokens + first;
      float2 alphas[tokens_per_lane], betas[tokens_per_lane];
      float ms[tokens_per_lane];
      unsigned resets = 0;
#pragma unroll
      for (int x = 0; x < tokens_per_lane; ++x) {
        betas[x] = split_log(logs.beta[x]);
        if (sigmoid) {
          alpha = logs.b[x], log_alpha = split_log(alpha);
        } else if (logs.beta[x] <= alpha) {
          alpha = logs.beta[x], log_alpha = betas[x];
          resets |= 1u << (8 * x);
        }
        ms[x] = static_cast<float>(logs.b[x] - alpha);
        alphas[x] = first + x < unit.tokens ? log_alpha : make_float2(-INFINITY, 0.0f);
      }
      const auto store = [&](float2* to, const float2(&from)[tokens_per_lane]) {
        reinterpret_cast<float4*>(to + at)[0] = make_float4(from[0].x, from[0].y, from[1].x, from[1].y);
        reinterpret_cast<float4*>(to + at)[1] = make_float4(from[2].x, from[2].y, from[3].x, from[3].y);
      };
      if (w.records != nullptr) {
        __syncwarp();
        write_records(w.records, unit.item, unit.lane, log_start[unit.warp], log_alpha, alphas, betas, ms);
      } else {
        store(w.alpha, alphas);
        store(w.beta, betas);
        if (unit.lane == 0) {
          const float2 start = log_start[unit.warp];
          w.m_start[unit.item] = make_float2(-start.x, -start.y);
        }
        if (unit.lane == 31) w.alpha_last[unit.item] = log_alpha;  // padding past the end changes neither this nor m
        if (w.reset != nullptr) *reinterpret_cast<unsigned*>(w.reset + at) = resets;
      }
      if (unit.lane == 31) {
        const bool ends = tile.is_last && unit.chunk * chunk_tokens + unit.tokens == tile.tokens;
        float* const to = ends ? final_m(w.p, m_last, tile.seq, head) : nullptr;
        if (to != nullptr) *to = ms[tokens_per_lane - 1];
      }
      if (m_out != nullptr) {
        float* to = rows + unit.head * Elements::row_pitch(w) + unit.chunk * chunk_tokens + first;
        *reinterpret_cast<float4*>(to) = make_float4(ms[0], ms[1], ms[2], ms[3]);  // in the place of i
      }
    }
    if (m_out != nullptr) {
      __syncthreads();
      const Elements own(w, tile);
      float* to = m_out + own.output(w, tile, w.layout.heads);
#pragma unroll
      for (int x = 0; x < tokens_per_lane; ++x, to += own.step * l.heads) {
        if (x < own.inside) *to = rows[own.row + x * own.step];
      }
    }
    if (index + 1 < end) {
      __syncthreads();
      if (has_head()) {
        double m = m_in[threadIdx.x], decay = decay_in[threadIdx.x];
#pragma unroll 1
        for (int c = 0; c < w.tiles.chunks; ++c) {
          const Transform& total = unit_total[c * heads + threadIdx.x];
          m = total.from(m), decay += total.sum;
        }
        m_in[threadIdx.x] = m, decay_in[threadIdx.x] = decay;
      }
    }
  }
  if (log_decay != nullptr && has_head() && end == seq.tiles(w) && seq.length > 0) {
    const double decay = decay_in[threadIdx.x] + tile_total(w, unit_total).sum;
    log_decay[seq.seq * l.heads + blockIdx.y * heads + threadIdx.x] = static_cast<float>(decay);
  }
  if (cluster > 1) ptx::cluster_wait();  // no block leaves while others may read its total
}

// The gradient that flows through the stabilizer m, walked from the sequence's end to its start:
//   a = dm - (<c, dc> + <n, dn>) at the end; a += e_t at every token.
//   A reset is a token whose m took the input gate's branch. It adds a to its input gate's gradient and clears a.
//   Every other token adds a to its forget gate's gradient, dlf_t + a_t.
// Until the walk meets the first reset, it is open. There dlf_t + a_t = dm + the sum of e + q . dq - k . dk over the
// tokens from t on. <c, dc> + <n, dn> may be much larger than this sum, and does not occur in it. So this sum is
// carried while open. The a that a reset takes is this sum minus dlf of the next token.
struct Carried {
  double value;
  bool open;
};

// What a run of tokens does to Carried.
struct Walk {
  double closed, open;  // sums of e since the last reset, and of e + q . dq - k . dk
  int reset;
  __device__ Walk then(const Walk& earlier) const {
    return earlier.reset ? earlier
                         : Walk{.closed = closed + earlier.closed, .open = open + earlier.open, .reset = reset};
  }
  __device__ Carried from(const Carried& x) const {
    return reset ? Carried{.value = closed, .open = false}
                 : Carried{.value = x.value + (x.open ? open : closed), .open = x.open};
  }
};

// What the later tiles of the sequence do to Carried. Blocks take tiles from the last to the first, in the order in
// which the blocks start. So a block waits only for blocks that run already, and cannot deadlock.
__device__ Walk later_tiles(const Work& w, const Tile& tile, int count, int64_t id, int64_t head, int lane) {
  Walk behind{};
  for (int first = tile.index + 1; first < count && !behind.reset; first += 32) {
    Walk mine{};
    if (first + lane < count) {
      const int64_t at = (id - tile.index + first + lane) * w.layout.heads + head;
      int flag;
      while ((flag = ptx::load_acquire(w.tile_flags + at)) == 0) __nanosleep(50);
      const double2 sums = w.tile_totals[at];
      mine = {.closed = sums.x, .open = sums.y, .reset = flag - 1};
    }
    __syncwarp();
    const auto from_lane = [&](int source) {
      return Walk{.closed = __shfl_sync(all_lanes, mine.closed, source),
                  .open = __shfl_sync(all_lanes, mine.open, source),
                  .reset = __shfl_sync(all_lanes, mine.reset, source)};
    };
    for (int d = 1; d < 32; d *= 2) mine = from_lane(lane + d).then(mine);  // right in the lanes that lane 0 reads
    behind = from_lane(0).then(behind);
  }
  return behind;
}

// dlf_t is the sum of X S over the pairs j < t <= u. The pairs are summed by where j and u lie:
//   j before the chunk, u after it   through
//   j before it, u inside            suffix sum of q . dq across
//   j inside, u after it             prefix sum of k . dk across
//   both inside                      prefix and suffix sums of `within`
// Large terms cancel only in the last.
__global__ void __launch_bounds__(most_warps * 32)
    gate_gradients_kernel(const __grid_constant__ Work w, const float* dm_last, const float* dlog_decay, void* di,
                          void* df, int64_t gate_token, float* dm0, int state_tiles) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  __shared__ Walk unit_walk[most_warps];
  __shared__ Carried carried_in[most_heads];
  __shared__ float into_decay[most_heads];  // into every lf: read late, in a register it would spill
  __shared__ int turn;
  int place = static_cast<int>(blockIdx.x);
  if (w.tiles.per_seq > 1) {
    if (threadIdx.x == 0) turn = atomicAdd(w.tile_flags + w.tiles.count * w.layout.heads + blockIdx.y, 1);
    __syncthreads();
    place = turn;
  }
  const unsigned id = static_cast<unsigned>(w.tiles.count - 1 - place);
  Sequence seq;
  int index;
  if (!find_part(w, id, w.tiles.per_seq, w.tiles.chunks * chunk_tokens, seq, index)) return;
  const int tiles = seq.tiles(w);
  const Tile tile(w, seq, index);
  const Layout& l = w.layout;
  const Unit unit(w, tile);
  const int lane = unit.lane, heads = w.tiles.heads, pitch = Elements::row_pitch(w);
  const int64_t head = blockIdx.y * heads + unit.head;
  const int64_t stride = l.max_chunks * l.heads * chunk_tokens;
  const int64_t at = unit.item * chunk_tokens + lane * tokens_per_lane;
  const bool sigmoid = w.p.input_gate == InputGate::sigmoid;
  // qdq, kdk: across the chunk's ends. in_k: k . dk within it; within: q . dq - k . dk within it.
  float qdq[tokens_per_lane] = {}, kdk[tokens_per_lane] = {}, in_k[tokens_per_lane] = {}, within[tokens_per_lane] = {},
        e[tokens_per_lane] = {};
  unsigned resets = 0;  // a byte a token
  double through = 0.0;
  if (unit.tokens > 0) {
    const auto add = [&](float (&to)[tokens_per_lane], const float* from) {
      const float4 four = *reinterpret_cast<const float4*>(from + at);
      to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
    };
    add(qdq, w.q_dq);
    add(kdk, w.k_dk);
    add(e, w.e);
    add(within, w.q_dq + w.dq_tiles * stride);
    add(in_k, w.k_dk + w.dk_tiles * stride);
    add(in_k, w.k_dk + (w.dk_tiles + 1) * stride);
    resets = *reinterpret_cast<const unsigned*>(w.reset + at);
    if (lane < state_tiles) through = w.through[unit.item * state_tiles + lane];
#pragma unroll 1
    for (int c = 1; c < w.dq_tiles; ++c) add(qdq, w.q_dq + c * stride);
#pragma unroll 1
    for (int c = 1; c < w.dk_tiles; ++c) add(kdk, w.k_dk + c * stride);
#pragma unroll 1
    for (int t = lane + 32; t < state_tiles; t += 32) through += w.through[unit.item * state_tiles + t];
#pragma unroll
    for (int x = 0; x < tokens_per_lane; ++x) within[x] -= in_k[x];
  }

  // Sums over later and earlier tokens of the chunk, and of what is carried: over this lane's tokens, then the warp's.
  double later = 0.0, earlier = 0.0, closed = 0.0;
#pragma unroll
  for (int x = tokens_per_lane - 1; x >= 0; --x) {
    later += static_cast<double>(qdq[x]) + within[x];
    earlier += kdk[x];
    closed = resets >> (8 * x) & 1 ? 0.0 : closed + e[x];
  }
  const double own_earlier = earlier;
  const unsigned lanes_with_reset = __ballot_sync(all_lanes, resets != 0), from_here = lanes_with_reset >> lane;
  const int next_reset = from_here != 0 ? __ffs(static_cast<int>(from_here)) - 1 : 32;  // lanes ahead
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double more_later = __shfl_down_sync(all_lanes, later, d);
    const double more_earlier = __shfl_up_sync(all_lanes, earlier, d);
    const double more_closed = __shfl_down_sync(all_lanes, closed, d);
    if (lane + d < 32) later += more_later;
    if (lane >= d) earlier += more_earlier;
    if (lane + d < 32 && d <= next_reset) closed += more_closed;
    through += __shfl_xor_sync(all_lanes, through, d);
  }
  const double all_earlier = __shfl_sync(all_lanes, earlier, 31);
  if (lane == 0) {
    const bool reset = lanes_with_reset != 0;
    unit_walk[unit.warp] = {
        .closed = closed, .open = reset ? 0.0 : closed + later - all_earlier, .reset = static_cast<int>(reset)};
  }
  // From here on: sums over the tokens after this lane's, and before them.
  earlier -= own_earlier;
  later = __shfl_down_sync(all_lanes, later, 1);
  closed = __shfl_down_sync(all_lanes, closed, 1);
  if (lane == 31) later = closed = 0.0;
  __syncthreads();

  if (unit.chunk == 0 && head < l.heads) {
    if (tile.index > 0) {
      Walk all = unit_walk[unit.head];
#pragma unroll 1
      for (int c = 1; c < w.tiles.chunks; ++c) all = unit_walk[c * heads + unit.head].then(all);
      if (lane == 0) {
        const int64_t to = int64_t{id} * l.heads + head;
        w.tile_totals[to] = make_double2(all.closed, all.open);
        ptx::store_release(w.tile_flags + to, 1 + all.reset);
      }
    }
    // Without a stabilizer: as after a reset, with nothing carried.
    const double from_m = sigmoid || dm_last == nullptr ? 0.0 : dm_last[tile.seq * l.heads + head];
    const Carried at_end{.value = from_m, .open = !sigmoid};
    const Carried carried = later_tiles(w, tile, tiles, id, head, lane).from(at_end);
    if (lane == 0) {
      carried_in[unit.head] = carried;
      into_decay[unit.head] = dlog_decay == nullptr ? 0.0f : dlog_decay[tile.seq * l.heads + head];
      if (tile.tokens == 0 && dm0 != nullptr) dm0[tile.seq * l.heads + head] = static_cast<float>(carried.value);
    }
  }
  __syncthreads();

  if (unit.tokens > 0) {
    Carried carried = carried_in[unit.head];
#pragma unroll 1
    for (int c = w.tiles.chunks - 1; c > unit.chunk; --c) carried = unit_walk[c * heads + unit.head].from(carried);
    if (tile.index == 0 && unit.chunk == 0 && dm0 != nullptr) {
      double cross_q = 0.0;
      for (float x : qdq) cross_q += x;
      for (int d = 1; d < 32; d *= 2) cross_q += __shfl_xor_sync(all_lanes, cross_q, d);
      const Carried at_start = unit_walk[unit.warp].from(carried);
      if (lane == 0) {
        dm0[tile.seq * l.heads + head] = static_cast<float>(
            at_start.value + (at_start.open ? 0.0 : through + cross_q));  // <c, dc> + <n, dn> at the start
      }
    }
    // While open: dlf + a has the carried sum minus all k . dk in the place of through. a has e plus their difference.
    double a = closed, base = through, besides = 0.0;
    if (from_here >> 1 == 0) {
      if (carried.open)
        base = carried.value - all_earlier, besides = base - through;
      else
        a += carried.value;
    }
#pragma unroll
    for (int x = 0; x < tokens_per_lane; ++x) {
      derive_anew(qdq[x]), derive_anew(kdk[x]), derive_anew(within[x]), derive_anew(e[x]);
    }
    double before = own_earlier + earlier;  // k . dk across, of tokens up to x
    float into_i[tokens_per_lane], into_f[tokens_per_lane];
#pragma unroll
    for (int x = tokens_per_lane - 1; x >= 0; --x) {
      before -= kdk[x];
      later += static_cast<double>(qdq[x]) + within[x];
      a += e[x];
      const bool reset = resets >> (8 * x) & 1;
      const double taken = reset ? a + besides : 0.0;
      if (reset) a = 0.0, base = through, besides = 0.0;
      into_f[x] = static_cast<float>(base + later + before + a) + into_decay[unit.head];
      into_i[x] = static_cast<float>(static_cast<double>(kdk[x]) + in_k[x] + taken);
    }
    float* to = rows + unit.head * pitch + unit.chunk * chunk_tokens + lane * tokens_per_lane;
    *reinterpret_cast<float4*>(to) = make_float4(into_i[0], into_i[1], into_i[2], into_i[3]);
    *reinterpret_cast<float4*>(to + heads * pitch) = make_float4(into_f[0], into_f[1], into_f[2], into_f[3]);
  }

  // Through the logarithm and the cap. A slope of 0 gives 0 whatever the gradient is.
  const Elements own(w, tile);
  const float cap = w.p.gate_soft_cap;
  const bool i_has_slope = sigmoid || cap != 0.0f;
  float i[tokens_per_lane], f[tokens_per_lane];
  load_gates(f, w, w.p.f, tile, own, INFINITY);
  if (i_has_slope) load_gates(i, w, w.p.i, tile, own, -INFINITY);
  __syncthreads();
  const auto to_gate = [&](float gate, float gradient, bool through_log_sigmoid) {
    const float slope =
        (through_log_sigmoid ? flash_xlstm::cuda::sigmoid(-cap_gate(gate, cap)) : 1.0f) * cap_gate_slope(gate, cap);
    return slope == 0.0f ? 0.0f : gradient * slope;
  };
#pragma unroll
  for (int x = 0; x < tokens_per_lane; ++x) {
    const float into_i = rows[own.row + x * own.step], into_f = rows[heads * pitch + own.row + x * own.step];
    i[x] = i_has_slope ? to_gate(i[x], into_i, sigmoid) : into_i;
    f[x] = to_gate(f[x], into_f, true);
  }
  int64_t to = own.output(w, tile, gate_token);
  const auto store = [&](auto zero) {
    using T = decltype(zero);
#pragma unroll
    for (int x = 0; x < tokens_per_lane; ++x, to += own.step * gate_token) {
      if (x >= own.inside) break;
      static_cast<T*>(di)[to] = from_float<T>(i[x]);
      static_cast<T*>(df)[to] = from_float<T>(f[x]);
    }
  };
  switch (w.p.gate_dtype) {
    case DType::float32: store(float{}); break;
    case DType::bfloat16: store(bf16{}); break;
    default: store(half{});
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Work& w, void (*kernel)(Parameters...), int64_t blocks, int cluster, cudaStream_t stream,
                   Arguments... arguments) {
  const Tiles& tiles = w.tiles;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(w.layout.heads, tiles.heads)));
  const unsigned threads = static_cast<unsigned>(tiles.heads * tiles.chunks) * 32;
  return launch_early(kernel, grid, dim3(threads), shared_bytes(tiles.heads, tiles.chunks), cluster, stream,
                      arguments...);
}

// The scan's tiles, smaller than the gradients': two heads at most, else one, and 16 warps, else 32. The first choice
// is taken with which a cluster of portable size has a block for every tile of a sequence. So few long sequences occupy
// as many SMs as many short ones. Blocks of 16 warps, because more clusters of them run at once: on an H200 15 clusters
// of 8 blocks of 32 warps do, and 8 sequences of 8 heads make 16.
Tiles choose_scan_tiles(const Work& w) {
  Tiles tiles = w.tiles;
  const int64_t length_chunks = ceil_div(w.p.seq, chunk_tokens);
  if (w.p.cu_seqlens != nullptr || tiles.per_seq == 1) return tiles;
  for (int heads = std::min(tiles.heads, 2);; heads = 1) {
    for (const int warps : {most_warps / 2, most_warps}) {
      tiles.heads = heads;
      tiles.chunks = static_cast<int>(std::clamp(int64_t{warps / heads}, int64_t{1}, length_chunks));
      tiles.per_seq = ceil_div(length_chunks, tiles.chunks);
      if (tiles.per_seq <= portable_cluster) break;
    }
    if (tiles.per_seq <= portable_cluster || heads == 1) break;
  }
  tiles.count = tiles.per_seq * w.p.num_seqs;
  return tiles;
}

// Blocks of a sequence's cluster. Packed, one sequence may have nearly all tokens, and most other blocks then have no
// tile. So all clusters together have at most as many blocks as run at once.
int choose_cluster(const Work& w) {
  static PerDevice known;
  int64_t most = cluster_limit(known, reinterpret_cast<const void*>(scan_gates_kernel), most_warps * 32,
                               shared_bytes(most_heads, most_warps / most_heads));
  if (w.p.cu_seqlens != nullptr) {
    const int64_t alone = w.p.num_seqs * ceil_div(w.p.heads, int64_t{w.tiles.heads});
    const int64_t at_once = blocks_of_16_warps * processor_count();
    most = std::clamp(at_once / std::max(alone, int64_t{1}), int64_t{1}, most);
  }
  const int64_t each = ceil_div(w.tiles.per_seq, most);
  return static_cast<int>(ceil_div(w.tiles.per_seq, each));
}

}  // namespace

// Up to 32 warps a block where a tile then has the whole sequence: nothing is carried. Else 16 warps, two blocks an SM,
// where a cluster has a block for every tile. Else 32.
Tiles choose_tiles(const MlstmProblem& p) {
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t groups = ceil_div(p.heads, most_heads), heads = ceil_div(p.heads, groups);
  const int64_t length = packed ? ceil_div(p.seq, std::max(p.num_seqs, int64_t{1})) : p.seq;
  const int64_t length_chunks = std::max(ceil_div(length, chunk_tokens), int64_t{1});
  const bool whole = !packed && length_chunks * heads <= most_warps;
  const int64_t few = most_warps / 2 / heads, many = most_warps / heads;
  const int64_t chunks =
      whole ? length_chunks
            : std::clamp(length_chunks <= few * largest_cluster ? few : many, int64_t{1}, length_chunks);
  const int64_t per_seq = std::max(ceil_div(p.seq, chunks * chunk_tokens), int64_t{1});
  return {.heads = static_cast<int>(heads),
          .chunks = static_cast<int>(chunks),
          .per_seq = per_seq,
          .count = packed ? p.seq / (chunks * chunk_tokens) + p.num_seqs : per_seq * p.num_seqs};
}

cudaError_t scan_gates(const Work& work, float* m_out, float* m_last, float* log_decay, cudaStream_t stream) {
  Work w = work;
  w.tiles = choose_scan_tiles(work);
  const int cluster = choose_cluster(w);
  return launch(w, scan_gates_kernel, w.p.num_seqs * cluster, cluster, stream, w, m_out, m_last, log_decay, cluster);
}

cudaError_t gate_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  return launch(w, gate_gradients_kernel, w.tiles.count, 1, stream, w, params.dm_last, params.dlog_decay, params.di,
                params.df, params.gate_token, params.dm0, state_tiles(w.p));
}

cudaError_t sum_open_tokens(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  return sum_open(w.layout, w.reset, w.e, params.open_e, params.is_open, stream);
}

}  // namespace flash_xlstm::cuda::hopper
