// States at chunk boundaries, forward (c, n) and backward (dc, dn), by one kernel in two directions.
//
//   forward   c <- g c + sum_j w_j k_j v_j^T          w_j = exp(b_end - b_j + i_j - m_end)
//   backward  dc <- g dc + sum_t w_t q_t dh_t^T       w_t = scale exp(b_t + m_start - m_t) / d_t
//   with g = exp(b_end + m_start - m_end); n and dn likewise with 1 for v and delta_t d_t for dh.
//
// A block has one or two consumer warpgroups. Each owns a 64 dqk x tile_dv piece of one head's state, keeps it in
// float32 registers as wgmma's accumulator, and walks the chunks of one sequence. A producer warp streams k and v (q
// and dh) by TMA through a ring of 64-token stages. For each chunk a consumer
//   rounds its piece into shared memory, from where the TMA stores it to its slot;
//   multiplies the piece by g;
//   for each 16 tokens loads k^T fragments (transposed ldmatrix), weights them in float32, rounds them and issues one
//     m64 x tile_dv x 16 wgmma with v from the stage.
// Blocks of the first dv tile sum n from the float32 weighted fragments. Backward, the ring also brings the state at
// the chunk's start, for g (<c, dc> + <n, dn>), before its slot is overwritten.
//
// With few heads a sequence is cut into segments, one a block. A block needs the state at its segment's start. The walk
// has two passes.
//   First pass: all blocks share the steps before the last segment, an equal piece each. A piece is cut where a segment
//     begins into two runs at most. A block walks each run from a state of zero (the first run of all: from the initial
//     state) and writes the state at the run's end, and keep, the product of g over the run, to memory.
//   Second pass: a block combines the runs before its segment, one after the other: state = keep state + the run's.
//     Then it walks its segment and writes the slots.
// The first pass skips the tokens that the gates have forgotten by the run's end: in a long run mostly all but some
// thousand. This drops a NaN there too, which g = 0 would keep. The run that ends where segment s begins belongs to
// block s or an earlier one, so a block waits only for blocks that started before it.
//
// Where the end state alone is wanted, all steps are shared in the first pass, and the last segment's block combines all
// runs. So of a long sequence only what its end remembers is read.
//
// Forward, the initial and the final state may be the same slot of a pool. Segment 0 reads it before two of its passes,
// the last segment writes it. So the last segment first waits for a flag: segment 0 has read the slot.
//
// float16: the state is kept scaled by a power of two that bounds its weights, in registers and in memory. The weighted
// operands have the same scale. It follows from the weights alone, so all blocks of a head have the same.
//
// The producer warpgroup's other three warps make g and the weights of a step's tokens, each warp for every third step.
// So no consumer waits for the loads of the gates.
//
// The second half of a chunk is turned into fragments while the first half's products run. A step holds a chunk's two
// stages to its end; the rest of the ring prefetches (four stages at 64 x 64). Small states (dv up to 128) are bound by
// the latency of a step, not by bandwidth, so two blocks share an SM where they fit. Forward at 64 x 64 in bfloat16,
// the outputs' kernel runs beside this one (output_small.cuh): an output waits for the flag of its state.
//
// Shared memory at 2 x 64 x 256: 3 stages of 48 KiB, 64 KiB for the rounded state.
#include <algorithm>
#include <type_traits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/hopper/work.h"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::hopper {
namespace {

constexpr int stage_tokens = 64;
constexpr int stages_per_chunk = chunk_tokens / stage_tokens;

struct StateArgs {
  Work w;
  CUtensorMap x, y;  // k and v, or q and dh
  CUtensorMap c;
  // By sequence, or by slot of the pool: c0, or dc_last; nullptr: zeros. c_last, or dc0; nullptr: not wanted. Of the
  // pool in and out are the same memory.
  const void* c_in;
  const float* n_in;
  void* c_out;
  float* n_out;
  // Forward only; the backward has contiguous float32.
  DType c_dtype;
  int64_t c_stride, n_stride;  // from a sequence, or a slot, to the next
  void* h;                     // of sequences that are left out
  int dqk_tiles, dv_tiles;
  int* turns;  // blocks that have started, where there are segments
  int* flags;
  float* log;         // float16: the scale of what is kept
  const float* log0;  // backward: of what was kept before
  bool alone;         // no slot is written: the state at the walk's end is all that is wanted
};

// The weights of a chunk's tokens, for one step.
struct alignas(16) Weights {
  float product[chunk_tokens];  // of the product
  float n[chunk_tokens];        // of the n sum; backward only
  float keep, keep_log;         // g, log2 g
  unsigned most;                // float16: the bits of the largest
  bool has_zero;
};
constexpr int weighers = 3;  // warps that make Weights, each for every third step

// A step is skipped where the gates after it multiply its state by less than 2^this: a state up to 2^34 is then below
// the smallest normal number.
constexpr float forgotten = -160.0f;

constexpr int most_sorted = 256;  // packed sequences: one a thread

template <int groups, int tile_dv, typename T>
struct StateShared {
  static constexpr bool is_small = tile_dv <= 128;
  static constexpr int num_stages = groups == 1 && tile_dv == 64 ? 6 : groups == 2 && is_small ? 4 : 3;
  static constexpr int blocks_per_processor = groups == 1 && is_small ? 2 : 1;
  // setmaxnreg: the sum must not exceed what the launch gives the block, else the consumers would wait forever.
  static constexpr int launch_registers = 65536 / ((groups + 1) * 128 * blocks_per_processor) / 8 * 8;
  static constexpr int producer_registers = 48;
  static constexpr int consumer_registers = blocks_per_processor == 2 ? 208 : groups == 1 ? 232 : 224;
  static_assert(producer_registers + groups * consumer_registers <= (groups + 1) * std::min(launch_registers, 232));
  static constexpr int y_boxes = tile_dv / box;
  struct Stage {
    T x[groups][box * box];   // 64 tokens x 64 dqk, one box for each warpgroup
    T y[y_boxes][box * box];  // 64 tokens x tile_dv; or 64 dqk x tile_dv of the state at the chunk's start
  };
  alignas(1024) Stage stage[num_stages];
  T rounded[groups][y_boxes][box * box];  // 64 dqk x tile_dv
  Weights weights[weighers];              // of step s: weights[s % weighers]
  uint64_t full[num_stages], empty[num_stages];
  uint64_t weights_full[weighers], weights_empty[weighers];
  int run_begin[2];  // first step walked of this block's two runs: earlier ones are forgotten
  int turn;
  int lengths[most_sorted + 1];  // of packed sequences, in chunks; and the one that is found
};

// What a kernel is compiled for. The others are `any` with code left out, which is 5 to 12 percent of their time.
enum class Walk {
  whole,     // forward, a sequence is one segment, states by sequence in float32
  segments,  // the same with segments
  any,       // also pools, states in bfloat16, end states alone; the backward
};

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// h of a sequence that is left out: the columns [col0, col0 + tile_dv) of the chunks [begin, end).
template <int tile_dv, typename T>
__device__ __noinline__ void fill_h(const StateArgs& args, int64_t seq, int head, int col0, int64_t begin,
                                    int64_t end) {
  const Layout& l = args.w.layout;
  const T value = from_float<T>(h_left_out(args.w.p, seq));
  for (int64_t index = begin; index < end; ++index) {
    Chunk chunk;
    l.locate(index, chunk);
    for (int x = threadIdx.x; x < chunk.length * tile_dv; x += blockDim.x) {
      const int64_t token = chunk.row * l.seq + chunk.first + x / tile_dv, col = col0 + x % tile_dv;
      if (col < l.dv) static_cast<T*>(args.h)[(token * l.heads + head) * l.dv + col] = value;
    }
  }
}

// The packed sequence with `nth` longer ones. A block walks a sequence, and blocks start in order: longest first, the
// SMs end together. (16 documents of 1 to 16 chunks on 4 heads of 256 x 512 are 256 blocks; in any order the last to
// start may be a long one.) `lengths` is shared.
__device__ __forceinline__ int64_t nth_longest(const Layout& l, int64_t nth, int* lengths) {
  const int t = static_cast<int>(threadIdx.x), count = static_cast<int>(l.num_seqs);
  if (t < count) lengths[t] = static_cast<int>(l.first_chunk[t + 1] - l.first_chunk[t]);
  __syncthreads();
  if (t < count) {
    int before = 0;
    for (int s = 0; s < count; ++s) before += lengths[s] > lengths[t] || (lengths[s] == lengths[t] && s < t);
    if (before == nth) lengths[most_sorted] = t;
  }
  __syncthreads();
  return lengths[most_sorted];
}

template <int groups, int tile_dv, bool backward, Walk walk, typename T>
__global__ void __launch_bounds__((groups + 1) * 128, (StateShared<groups, tile_dv, T>::blocks_per_processor))
    states_kernel(const __grid_constant__ StateArgs args) {
  using Shared = StateShared<groups, tile_dv, T>;
  constexpr bool is_half = std::is_same_v<T, half>;
  constexpr int least_exponent = -100;  // float16: of the scale of a state without weights
  constexpr int num_stages = Shared::num_stages;
  constexpr bool may_tell = !backward && !is_half && groups == 1 && tile_dv == box;  // the outputs of small tiles
  extern __shared__ unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes + ptx::bytes_to_align<1024>(shared_bytes));

  // The outputs of small tiles rely on this order: when they start, the gates are written and all blocks of this kernel
  // run.
  wait_for_earlier_kernels();
  let_next_kernel_start();

  const Work& w = args.w;
  const Layout& l = w.layout;
  constexpr bool serves_pools = !backward && walk == Walk::any;
  const int segments = walk == Walk::whole ? 1 : w.segments;
  constexpr int first_pass = walk == Walk::whole ? 2 : 0;  // 0 and 1: the runs of the first pass
  const bool alone = walk == Walk::any && args.alone;
  // A segment waits for earlier ones. The hardware may start blocks in any order, so each takes its place when it
  // starts: all earlier places are then taken by running blocks.
  int64_t place = blockIdx.x;
  if (segments > 1) {
    if (threadIdx.x == 0) sh.turn = atomicAdd(args.turns, 1);
    __syncthreads();
    place = sh.turn;
  }
  const int64_t blocks = gridDim.x / segments;
  const int segment = static_cast<int>(place / blocks);
  int64_t block = place % blocks;
  const int64_t block_in_segment = block;
  const int tile_v = static_cast<int>(block % args.dv_tiles);
  block /= args.dv_tiles;
  const int tile_k = static_cast<int>(block % args.dqk_tiles);
  block /= args.dqk_tiles;
  const int head = static_cast<int>(block % l.heads);
  int64_t seq = block / l.heads;
  if (l.first_chunk != nullptr && segments == 1 && l.num_seqs > 1 && l.num_seqs <= most_sorted) {
    seq = nth_longest(l, seq, sh.lengths);
  }
  const int row0 = tile_k * groups * box, col0 = tile_v * tile_dv;
  int64_t begin, end;
  l.chunk_range(seq, begin, end);
  const int count = static_cast<int>(end - begin);
  const auto chunk_at = [&](int step) { return backward ? end - 1 - step : begin + step; };
  // Steps of this segment. Segments past the sequence's end return, but the first also writes an empty one's final
  // state. Of an end state alone no step is left for the second pass.
  const bool in_runs = alone && segments > 1 && count > 0;
  const int per_segment = in_runs ? count : ceil_div(count, segments);
  const int first_step = in_runs ? count : segment * per_segment, last_step = min(first_step + per_segment, count);
  if (segment > 0 && first_step >= count && !in_runs) return;
  if constexpr (serves_pools) {
    if (is_left_out(w.p, seq)) {
      if (tile_k == 0) fill_h<tile_dv, T>(args, seq, head, col0, begin + first_step, begin + last_step);
      return;
    }
  }
  const bool is_last = in_runs ? segment == segments - 1 : last_step == count;
  // Steps of a block's piece in the first pass.
  const int last_segment = in_runs ? segments - 1 : count > 0 ? (count - 1) / per_segment : 0;
  const int before_last = in_runs ? count : last_segment * per_segment;
  const int piece = (before_last + last_segment) / (last_segment + 1);
  // Steps of run `part` (0 or 1) of block `owner`'s piece; may be empty.
  const auto run_of = [&](int owner, int part, int& begin, int& end) {
    const int from = min(owner * piece, before_last), to = min(from + piece, before_last);
    const int cut = min((from / max(per_segment, 1) + 1) * per_segment, to);
    begin = part == 0 ? from : cut, end = part == 0 ? cut : to;
  };
  // is_zero: the state before a step is all zeros and is neither written nor read. reads_state: backward, whether the
  // step reads the forward state in its slot.
  const bool begins_at_zero = backward ? w.ends_empty : w.starts_empty;
  const auto is_zero = [&](int step) { return begins_at_zero && step == 0; };
  const auto reads_state = [&](int step) { return !is_zero(step) && !(w.starts_empty && step == count - 1); };

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(&sh.full[s], 1);
      ptx::mbarrier_init(&sh.empty[s], groups * 4);
    }
    for (int s = 0; s < weighers; ++s) {
      ptx::mbarrier_init(&sh.weights_full[s], 32);
      ptx::mbarrier_init(&sh.weights_empty[s], groups * 128);  // every thread arrives: racecheck tracks threads
    }
    ptx::fence_barrier_init();
  }
  if (const int warp = threadIdx.x / 32, lane = threadIdx.x % 32; warp < 2 && segments > 1) {
    int run_begin, run_end;
    run_of(segment, warp, run_begin, run_end);
    float left = 0.0f;  // log2 of the product of g over the steps seen so far, from the last one back
    for (int last = run_end - 1; last >= run_begin; last -= 32) {
      const int step = last - lane;
      float log = 0.0f;
      if (step >= run_begin) {
        const int64_t item = chunk_at(step) * l.heads + head;
        log = log_sum(w.alpha_last[item], w.m_start[item]);
      }
      for (int d = 1; d < 32; d *= 2) {
        const float later = __shfl_up_sync(all_lanes, log, d);
        if (lane >= d) log += later;
      }
      const unsigned enough = __ballot_sync(all_lanes, left + log < forgotten);
      if (enough != 0) {
        run_begin = max(run_begin, last - (__ffs(enough) - 1));
        break;
      }
      left += __shfl_sync(all_lanes, log, 31);
    }
    if (lane == 0) sh.run_begin[warp] = run_begin;
  }
  __syncthreads();
  // The steps of this block's run `part` that are walked.
  const auto walk_of = [&](int part, int& begin, int& end) {
    run_of(segment, part, begin, end);
    begin = segments > 1 ? sh.run_begin[part] : begin;
  };

  const int group = threadIdx.x / 128;
  if (group == groups) {
    ptx::fewer_registers<Shared::producer_registers>();
    const auto for_each_step = [&](auto&& f) {
      for (int pass = first_pass; pass < 3; ++pass) {
        int run_begin = first_step, run_end = last_step;
        if (pass < 2) walk_of(pass, run_begin, run_end);
        for (int step = run_begin; step < run_end; ++step) f(step, pass == 2);
      }
    };
    const int weigher = static_cast<int>(threadIdx.x % 128) / 32 - 1, lane = threadIdx.x % 32;
    if (weigher >= 0) {
      int turn = 0, parity = 1;
      // Sets the flag by which the outputs see a written state, so that no consumer has to wait for the store.
      const auto tell = [&](int64_t item) {
        if (lane == 0) ptx::store_release(w.state_flags + item, 1);
      };
      const bool tells = may_tell && w.state_flags != nullptr;
      if (tells && weigher == 0 && first_step < last_step && is_zero(first_step)) {
        tell(chunk_at(first_step) * l.heads + head);
      }
      int64_t written = -1;  // the item of this warp's last step
      for_each_step([&](int step, bool writes) {
        const bool mine = turn == weigher;
        if (++turn == weighers) turn = 0;
        if (!mine) return;
        const int64_t item = chunk_at(step) * l.heads + head, at = item * chunk_tokens + lane * 4;
        const float2 m_start = w.m_start[item], alpha_last = w.alpha_last[item];
        const float4* const logs = reinterpret_cast<const float4*>((backward ? w.alpha : w.beta) + at);
        const float4 low = logs[0], high = logs[1];
        const float2 log[4] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
        float product[4], of_n[4];
        if constexpr (backward) {
          const float4 inv_d = *reinterpret_cast<const float4*>(w.inv_d + at);
          const float4 delta = *reinterpret_cast<const float4*>(w.delta + at);
          const float inv_ds[4] = {inv_d.x, inv_d.y, inv_d.z, inv_d.w};
          const float deltas[4] = {delta.x, delta.y, delta.z, delta.w};
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float g = w.p.scale * fast_exp2(log_sum(log[x], m_start));
            product[x] = g * inv_ds[x], of_n[x] = g * deltas[x];
          }
        } else {
#pragma unroll
          for (int x = 0; x < 4; ++x) product[x] = fast_exp2(log_difference(alpha_last, log[x]));
        }
        Weights& to = sh.weights[weigher];
        ptx::mbarrier_wait(&sh.weights_empty[weigher], parity);
        parity ^= 1;
        reinterpret_cast<float4*>(to.product)[lane] = make_float4(product[0], product[1], product[2], product[3]);
        if constexpr (backward) {
          reinterpret_cast<float4*>(to.n)[lane] = make_float4(of_n[0], of_n[1], of_n[2], of_n[3]);
        }
        if constexpr (is_half) {
          unsigned most = 0;
#pragma unroll
          for (int x = 0; x < 4; ++x) most = max(most, __float_as_uint(fabsf(product[x])));
          most = __reduce_max_sync(all_lanes, most);
          if (lane == 0) to.most = most;
        }
        const bool has_zero =
            __any_sync(all_lanes, product[0] == 0.0f || product[1] == 0.0f || product[2] == 0.0f || product[3] == 0.0f);
        if (lane == 0) {
          to.has_zero = has_zero;
          to.keep_log = log_sum(alpha_last, m_start);
          to.keep = fast_exp2(to.keep_log);
        }
        ptx::mbarrier_arrive(&sh.weights_full[weigher]);
        if (tells) {
          if (written >= 0) tell(written);
          written = writes ? item : -1;
        }
      });
      if (tells && written >= 0) {
        ptx::mbarrier_wait(&sh.weights_empty[weigher], parity);
        tell(written);
      }
      return;
    }
    if (lane != 0) return;
    int stage = 0, parity = 1;
    const auto next_stage = [&](int bytes) -> typename Shared::Stage& {
      ptx::mbarrier_wait(&sh.empty[stage], parity);
      ptx::mbarrier_arrive_expect(&sh.full[stage], bytes);
      return sh.stage[stage];
    };
    const auto advance = [&] {
      if (++stage == num_stages) stage = 0, parity ^= 1;
    };
    for_each_step([&](int step, bool writes) {
      Chunk chunk;
      l.locate(chunk_at(step), chunk);
      const int row = static_cast<int>(chunk.row), item = static_cast<int>(chunk.chunk * l.heads + head);
      if (backward && writes && !alone && reads_state(step)) {
        for (int g = 0; g < groups; ++g) {
          auto& s = next_stage(Shared::y_boxes * box_bytes);
          for (int b = 0; b < Shared::y_boxes; ++b) {
            ptx::tma_load(s.y[b], &args.c, &sh.full[stage], 0, w.block_index(row0 / box + g, col0 / box + b) * box,
                          item);
          }
          advance();
        }
      }
      for (int part = 0; part < stages_per_chunk; ++part) {
        const int token = static_cast<int>(chunk.first) + part * stage_tokens;
        auto& s = next_stage((groups + Shared::y_boxes) * box_bytes);
        for (int g = 0; g < groups; ++g) {
          ptx::tma_load(s.x[g], &args.x, &sh.full[stage], row0 + g * box, head, token, row);
        }
        for (int b = 0; b < Shared::y_boxes; ++b) {
          ptx::tma_load(s.y[b], &args.y, &sh.full[stage], col0 + b * box, head, token, row);
        }
        advance();
      }
    });
    return;
  }

  ptx::more_registers<Shared::consumer_registers>();
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int group_row0 = row0 + group * box;
  const int quad = lane / 4, pos = lane % 4;
  const bool has_n = tile_v == 0;
  const int64_t state = seq * l.heads + head;
  // Where the head's c and n begin, in elements. Backward, for_each_pair counts c's rows from the first head on: another
  // way would spill.
  const auto c_at = [&] { return serves_pools ? slot_of(w.p, seq) * args.c_stride + head * l.dqk * l.dv : int64_t{0}; };
  const auto n_at = [&] { return serves_pools ? slot_of(w.p, seq) * args.n_stride + head * l.dqk : state * l.dqk; };

  float acc[tile_dv / 2];
  float n[2];  // rows quad, quad + 8 of the warp's 16; the four lanes of a quad hold the same
  const auto for_each_pair = [&](auto&& f) {
    const int first_col = col0 + pos * 2, cols = static_cast<int>(l.dv) - first_col;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = group_row0 + warp * 16 + quad + r * 8;
      if (row >= l.dqk) continue;
      const int64_t first = ((serves_pools ? 0 : state * l.dqk) + row) * l.dv + first_col;
#pragma unroll
      for (int c = 0; c < tile_dv / 8; ++c) {
        if (c * 8 < cols) f(&acc[c * 4 + r * 2], first + c * 8);
      }
    }
  };
  const auto for_each_n = [&](auto&& f) {
    if (!has_n) return;
    for (int r = 0; r < 2; ++r) {
      const int row = group_row0 + warp * 16 + quad + r * 8;
      if (row < l.dqk) f(n[r], row);
    }
  };
  int run_begin = first_step, run_end = last_step;

  // float16: acc is 2^-exponent times the state.
  int exponent;
  const auto start = [&] {
    exponent = run_begin == 0 && args.c_in != nullptr ? 0 : least_exponent;
    n[0] = n[1] = 0.0f;
#pragma unroll
    for (int x = 0; x < tile_dv / 2; ++x) acc[x] = 0.0f;
    if (run_begin > 0 || (serves_pools && is_fresh(w.p, seq))) return;
    if (serves_pools && args.c_dtype == DType::bfloat16) {  // dv is a multiple of 8
      const bf16* const from = static_cast<const bf16*>(args.c_in) + c_at();
      for_each_pair([&](float* a, int64_t at) {
        const float2 two = unpack<bf16>(*reinterpret_cast<const uint32_t*>(from + at));
        a[0] = two.x, a[1] = two.y;
      });
    } else if (args.c_in != nullptr) {
      const float* const from = static_cast<const float*>(args.c_in) + c_at();
      for_each_pair([&](float* a, int64_t at) {
        const float2 two = *reinterpret_cast<const float2*>(from + at);
        a[0] = two.x, a[1] = two.y;
      });
    }
    if (args.n_in != nullptr) for_each_n([&](float& x, int row) { x = args.n_in[n_at() + row]; });
  };

  // A warpgroup's share of the state at a run's end: acc, n, keep and exponent of each of its threads.
  constexpr int share_floats = (tile_dv / 2 + 4) * 128;
  const auto share_at = [&](int s) {
    return w.segment_ends + ((s * blocks + block_in_segment) * groups + group) * share_floats + thread;
  };
  const auto flag_at = [&](int s) { return args.flags + (s * blocks + block_in_segment) * groups + group; };
  // Set once segment 0 has read the pool's state: the last segment may then overwrite it.
  const bool shares_state = serves_pools && segments > 1 && w.p.pool.indices != nullptr;
  int* const read_flag = flag_at(2 * segments);
  const auto publish = [&](int part, float keep) {
    float* const share = share_at(segment * 2 + part);
#pragma unroll
    for (int x = 0; x < tile_dv / 2; ++x) share[x * 128] = acc[x];
    share[tile_dv / 2 * 128] = n[0], share[(tile_dv / 2 + 1) * 128] = n[1], share[(tile_dv / 2 + 2) * 128] = keep;
    share[(tile_dv / 2 + 3) * 128] = static_cast<float>(exponent);
    __threadfence();
    ptx::named_barrier(1 + group, 128);
    if (thread == 0) ptx::store_release(flag_at(segment * 2 + part), 1);
  };
  const auto state_before = [&] {
    for (int s = thread; s < 2 * (segment + 1); s += 128) {
      int begin, end;
      run_of(s / 2, s % 2, begin, end);
      if (begin == end || begin >= first_step) continue;
      while (ptx::load_acquire(flag_at(s)) == 0) __nanosleep(100);
    }
    __syncwarp();
    ptx::named_barrier(1 + group, 128);
    // Starts at the last run whose keep is 0: nothing of the runs before it is left.
    int first = 2 * segment + 1;
    for (; first > 0; --first) {
      int begin, end;
      run_of(first / 2, first % 2, begin, end);
      if (begin < end && begin < first_step && share_at(first)[(tile_dv / 2 + 2) * 128] == 0.0f) break;
    }
    for (int s = first; s < 2 * (segment + 1); ++s) {
      int begin, end;
      run_of(s / 2, s % 2, begin, end);
      if (begin == end) continue;
      if (begin >= first_step) break;
      const float* const share = share_at(s);
      const float keep = share[(tile_dv / 2 + 2) * 128];
      const bool is_whole = begin == 0 || keep == 0.0f;  // nothing is added to it
      float kept = keep, added = 1.0f;
      if constexpr (is_half) {
        const int theirs = static_cast<int>(share[(tile_dv / 2 + 3) * 128]);
        const int before = is_whole ? theirs : exponent;
        // Within the range of power_of_two.
        const int kept_log = max(keep == 0.0f ? least_exponent : static_cast<int>(ceilf(log2f(keep))), -126);
        exponent = is_whole ? theirs : max(before + kept_log, theirs);
        kept = keep * power_of_two(max(before - exponent, -126));
        added = power_of_two(max(theirs - exponent, -126));
      }
#pragma unroll
      for (int x = 0; x < tile_dv / 2; ++x) {
        acc[x] = is_whole ? share[x * 128] : acc[x] * kept + share[x * 128] * added;
        if (x % 16 == 15) ptx::keep_order();  // all loads ahead would take as many registers as acc
      }
      for (int r = 0; r < 2; ++r) {
        const float theirs = share[(tile_dv / 2 + r) * 128];
        n[r] = is_whole ? theirs : n[r] * keep + theirs;
      }
    }
  };

  int stage = 0, parity = 0;
  const auto free_stage = [&](int stage) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&sh.empty[stage]);
  };
  const auto advance = [&] {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  };
  const auto release = [&] {
    free_stage(stage);
    advance();
  };
  int turn = 0, weights_parity = 0;  // of the weights
  for (int pass = first_pass; pass < 3; ++pass) {
    const bool writes = pass == 2, keeps = writes && !alone;
    if (writes && in_runs && !is_last) break;
    run_begin = first_step, run_end = last_step;
    bool forgets = false;
    if (!writes) {
      run_of(segment, pass, run_begin, run_end);
      if (run_begin == run_end) continue;
      const int whole = run_begin;
      walk_of(pass, run_begin, run_end);
      forgets = run_begin > whole;
    }
    if (writes && segment > 0) {
      state_before();
    } else {
      start();
      if (shares_state && writes && !is_last) {
        __threadfence();
        ptx::named_barrier(1 + group, 128);
        if (thread == 0) ptx::store_release(read_flag, 1);
      }
    }
    float keep_all = forgets ? 0.0f : 1.0f;
    for (int step = run_begin; step < run_end; ++step) {
      const int64_t item = chunk_at(step) * l.heads + head;
      const Weights& weights = sh.weights[turn];
      ptx::mbarrier_wait(&sh.weights_full[turn], weights_parity);
      const float keep = weights.keep, keep_log = weights.keep_log;
      const float* const weight = weights.product;
      keep_all *= keep;

      if (backward && keeps) {
        float inner = 0.0f;
        for (int g = 0; g < (reads_state(step) ? groups : 0); ++g) {
          ptx::mbarrier_wait(&sh.full[stage], parity);
          if (g == group) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int row = warp * 16 + quad + r * 8;
#pragma unroll
              for (int c = 0; c < tile_dv / 8; ++c) {
                const T* at = sh.stage[stage].y[c / 8] + row * box + (((c % 8) ^ (row % 8)) * 8) + pos * 2;
                const float2 two = unpack<T>(*reinterpret_cast<const uint32_t*>(at));
                inner += acc[c * 4 + r * 2] * two.x + acc[c * 4 + r * 2 + 1] * two.y;
              }
            }
          }
          release();
        }
        if constexpr (is_half) {
          const float log = args.log0[item] + static_cast<float>(exponent);
          inner *= fast_exp2(log * 0.5f);  // in two factors, each within float32's range
          inner *= fast_exp2(log * 0.5f);
        }
        for_each_n([&](float& x, int row) {
          if (pos == 0) inner += x * w.n[item * l.dqk + row];
        });
        for (int d = 16; d > 0; d /= 2) inner += __shfl_xor_sync(all_lanes, inner, d);
        // A warp writes one share.
        if (lane == 0) {
          w.through[item * (args.dqk_tiles * args.dv_tiles * groups * 4) +
                    ((tile_k * args.dv_tiles + tile_v) * groups + group) * 4 + warp] = keep * inner;
        }
      }

      const auto write_n = [&](int exponent) {
        for_each_n([&](float& x, int row) {
          if (pos != 0) return;
          (backward ? w.dn : w.n)[item * l.dqk + row] = x;
          if (!backward && w.n_parts != nullptr) {  // as a sum of three 16-bit numbers
            float left = is_half ? x * power_of_two(-exponent) : x;
            for (int part = 0; part < 3; ++part) {
              const T high = from_float<T>(left);
              reinterpret_cast<T*>(w.n_parts)[(item * 3 + part) * w.dqk_pitch + row] = high;
              left -= to_float(high);
            }
          }
        });
      };
      if (keeps) {  // the rounded state to its slot
        if (thread == 0) ptx::bulk_store_wait_read<0>();
        ptx::named_barrier(1 + group, 128);  // the last chunk's store has read `rounded`
#pragma unroll
        for (int c = 0; c < tile_dv / 16; ++c) {
          const int row = warp * 16 + lane % 16, chunk16 = (c % 4) * 2 + lane / 16;
          ptx::stmatrix_x4(sh.rounded[group][c / 4] + row * box + ((chunk16 ^ (row % 8)) * 8),
                           pack<T>(acc[c * 8], acc[c * 8 + 1]), pack<T>(acc[c * 8 + 2], acc[c * 8 + 3]),
                           pack<T>(acc[c * 8 + 4], acc[c * 8 + 5]), pack<T>(acc[c * 8 + 6], acc[c * 8 + 7]));
        }
        ptx::fence_async_shared();
        ptx::named_barrier(1 + group, 128);
        if (thread == 0 && !is_zero(step)) {
          for (int b = 0; b < Shared::y_boxes; ++b) {
            if (group_row0 < l.dqk && col0 + b * box < l.dv) {
              uint16_t* const to = w.block(backward ? w.dc : w.c, item, group_row0 / box, col0 / box + b);
              ptx::bulk_store(to, sh.rounded[group][b], box_bytes);
            }
          }
          ptx::bulk_store_commit();
        }
        if (is_half && tile_k == 0 && tile_v == 0 && threadIdx.x == 0) args.log[item] = static_cast<float>(exponent);
      }

      // A token of weight 0 must add nothing, whatever its k and v hold. x is selected below; y is zeroed here.
      const bool zeros = weights.has_zero;
      const int exponent_before = exponent;
      float keep_acc = keep, weight_scale = 1.0f;
      if constexpr (is_half) {
        const int of_weights = static_cast<int>(weights.most >> 23) - 126;
        const int kept = exponent + static_cast<int>(fmaxf(ceilf(keep_log), 4.0f * least_exponent));
        const int next = min(max(max(kept, of_weights), least_exponent), 120);
        keep_acc = fast_exp2(keep_log + static_cast<float>(exponent - next)), weight_scale = power_of_two(-next);
        exponent = next;
      }
#pragma unroll
      for (int x = 0; x < tile_dv / 2; ++x) acc[x] *= keep_acc;
      float n_part[2] = {0.0f, 0.0f};
      int first_stage = 0;
#pragma unroll
      for (int part = 0; part < stages_per_chunk; ++part) {
        ptx::mbarrier_wait(&sh.full[stage], parity);
        auto& s = sh.stage[stage];
        const float* const part_weight = weight + part * stage_tokens;
        if (zeros) {
          for (int t = group * 4 + warp; t < stage_tokens; t += groups * 4) {
            if (part_weight[t] != 0.0f) continue;
            for (int x = lane; x < Shared::y_boxes * 32; x += 32) {
              reinterpret_cast<uint32_t*>(s.y[x / 32] + t * box)[x % 32] = 0u;
            }
          }
          ptx::fence_async_shared();
          ptx::named_barrier(1 + groups, groups * 128);  // the groups have the same weights, so all come here
        }
        uint32_t fragment[stage_tokens / 16][4];
#pragma unroll
        for (int kk = 0; kk < stage_tokens / 16; ++kk) {
          const int token = kk * 16 + (lane / 16) * 8 + lane % 8, chunk16 = warp * 2 + (lane / 8) % 2;
          uint32_t raw[4];
          ptx::ldmatrix_x4<true>(raw, s.x[group] + token * box + ((chunk16 ^ (token % 8)) * 8));
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int t = kk * 16 + (r / 2) * 8 + pos * 2;
            const float2 wt = *reinterpret_cast<const float2*>(part_weight + t);
            float2 two = unpack<T>(raw[r]);
            if constexpr (backward) {
              const float2 wn = *reinterpret_cast<const float2*>(weights.n + part * stage_tokens + t);
              n_part[r % 2] += (wn.x == 0.0f ? 0.0f : two.x * wn.x) + (wn.y == 0.0f ? 0.0f : two.y * wn.y);
            }
            two.x = wt.x == 0.0f ? 0.0f : two.x * wt.x;
            two.y = wt.y == 0.0f ? 0.0f : two.y * wt.y;
            if constexpr (!backward) n_part[r % 2] += two.x + two.y;
            fragment[kk][r] = is_half ? pack<T>(two.x * weight_scale, two.y * weight_scale) : pack<T>(two.x, two.y);
          }
        }
        if (part == 0) ptx::hold(acc);
        ptx::wgmma_fence();
        const uint64_t y = ptx::wgmma_descriptor(ptx::shared_address(s.y[0]), box_bytes);
#pragma unroll
        for (int kk = 0; kk < stage_tokens / 16; ++kk) {
          ptx::Wgmma<T, tile_dv>::template a_registers<true>(acc, fragment[kk], ptx::advanced(y, kk * 2048), true);
        }
        ptx::wgmma_commit();
        if (part == 0) {  // the second half's fragments are made while these products run
          first_stage = stage;
        } else {
          ptx::wgmma_wait<1>();
          free_stage(first_stage);
          if (keeps) write_n(exponent_before);
          ptx::wgmma_wait<0>();
          ptx::hold(acc);
          free_stage(stage);
        }
        advance();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        n_part[r] += __shfl_xor_sync(all_lanes, n_part[r], 1);
        n_part[r] += __shfl_xor_sync(all_lanes, n_part[r], 2);
        n[r] = n[r] * keep + n_part[r];
      }
      if (may_tell && writes && thread == 0) ptx::bulk_store_wait<0>();  // the weigher sets the flag after it
      ptx::mbarrier_arrive(&sh.weights_empty[turn]);
      if (++turn == weighers) turn = 0, weights_parity ^= 1;
    }
    if (!writes) publish(pass, keep_all);
  }

  if (shares_state && is_last && segment > 0) {
    if (thread == 0) {
      while (ptx::load_acquire(read_flag) == 0) __nanosleep(100);
    }
    ptx::named_barrier(1 + group, 128);
  }
  const float up = is_half ? power_of_two(exponent) : 1.0f;
  if (serves_pools && is_last && args.c_dtype == DType::bfloat16) {
    bf16* const to = static_cast<bf16*>(args.c_out) + c_at();
    for_each_pair(
        [&](float* a, int64_t at) { *reinterpret_cast<uint32_t*>(to + at) = pack<bf16>(a[0] * up, a[1] * up); });
  } else if (is_last && args.c_out != nullptr) {
    float* const to = static_cast<float*>(args.c_out) + c_at();
    for_each_pair(
        [&](float* a, int64_t at) { *reinterpret_cast<float2*>(to + at) = make_float2(a[0] * up, a[1] * up); });
  }
  if (is_last && args.n_out != nullptr) {
    for_each_n([&](float& x, int row) {
      if (pos == 0) args.n_out[n_at() + row] = x;
    });
  }
  if (thread == 0) ptx::bulk_store_wait<0>();
}

int consumer_groups(int64_t dqk) { return dqk <= 64 ? 1 : 2; }

template <bool backward>
cudaError_t launch(StateArgs& args, cudaStream_t stream) {
  const Work& w = args.w;
  const int groups = consumer_groups(w.p.dqk), tile_dv = column_tile(w.p.dv);
  args.dqk_tiles = static_cast<int>(ceil_div(w.p.dqk, groups * box));
  args.dv_tiles = static_cast<int>(ceil_div(w.p.dv, tile_dv));
  const auto go = [&](auto kernel, Prepared& prepared, int bytes) -> cudaError_t {
    bytes += 1024;  // to align
    int resident = 0;
    const cudaError_t status = prepared.resident_blocks(kernel, (groups + 1) * 128, bytes, resident);
    if (status != cudaSuccess) return status;
    const int64_t blocks = w.layout.num_seqs * w.layout.heads * args.dqk_tiles * args.dv_tiles * w.segments;
    return launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3((groups + 1) * 128), bytes, 1, stream, args);
  };
  const auto of_tile = [&](auto t, auto form) -> cudaError_t {
    using T = decltype(t);
    constexpr Walk walk = decltype(form)::value;
#define CASE(g, d)                                                                             \
  if (groups == g && tile_dv == d) {                                                           \
    static Prepared prepared;                                                                  \
    return go(states_kernel<g, d, backward, walk, T>, prepared, sizeof(StateShared<g, d, T>)); \
  }
    CASE(1, 64)
    CASE(1, 128)
    CASE(1, 256)
    CASE(2, 64)
    CASE(2, 128)
    CASE(2, 256)
#undef CASE
    return cudaErrorInvalidValue;
  };
  return dispatch_16_bit(w.p.dtype, [&](auto t) {
    if constexpr (!backward) {
      if (w.p.pool.indices == nullptr && !args.alone) {
        if (w.segments == 1) return of_tile(t, std::integral_constant<Walk, Walk::whole>{});
        return of_tile(t, std::integral_constant<Walk, Walk::segments>{});
      }
    }
    return of_tile(t, std::integral_constant<Walk, Walk::any>{});
  });
}

}  // namespace

int state_tiles(const MlstmProblem& p) {
  const int groups = consumer_groups(p.dqk);
  return static_cast<int>(ceil_div(p.dqk, groups * box) * ceil_div(p.dv, column_tile(p.dv))) * groups * 4;
}

Segments choose_segments(const MlstmProblem& p, int processors) {
  constexpr int64_t least_chunks = 8, most = 32;  // chunks of a segment, segments of a sequence
  const int groups = consumer_groups(p.dqk);
  const int64_t blocks = p.num_seqs * p.heads * (state_tiles(p) / (groups * 4));
  const int64_t chunks = ceil_div(p.seq, chunk_tokens);
  // Blocks of the smallest states share SMs. But more segments mean more steps in the first pass too. In a long
  // sequence most of those are skipped as forgotten.
  const bool is_smallest = groups == 1 && column_tile(p.dv) == box;
  const int64_t room = !is_smallest ? processors : chunks < 256 ? processors * 5 / 4 : processors * 2;
  const int64_t count = std::min({room / std::max(blocks, int64_t{1}), chunks / least_chunks, most});
  if (count < 2) return {.count = 1, .floats = 0, .flags = 0};
  const int64_t shares = 2 * count * blocks * groups, flags = shares + blocks * groups + 1;
  return {.count = static_cast<int>(count), .floats = shares * (column_tile(p.dv) / 2 + 4) * 128, .flags = flags};
}

cudaError_t forward_states(const Work& w, const Maps& maps, float* c_last, float* n_last, void* h,
                           cudaStream_t stream) {
  int* const turns = w.segment_flags;
  const MlstmSlots& pool = w.p.pool;
  const bool pooled = pool.indices != nullptr;
  StateArgs args{.w = w,
                 .x = maps.k,
                 .y = maps.v,
                 .c = maps.c,
                 .c_in = pooled ? pool.c : w.p.c0,
                 .n_in = pooled ? pool.n : w.p.n0,
                 .c_out = pooled ? pool.c : c_last,
                 .n_out = pooled ? pool.n : n_last,
                 .c_dtype = pool.c_dtype,
                 .c_stride = pooled ? pool.c_stride : w.p.heads * w.p.dqk * w.p.dv,
                 .n_stride = pooled ? pool.n_stride : w.p.heads * w.p.dqk,
                 .h = h,
                 .turns = turns,
                 .flags = turns + 1,
                 .log = w.state_log,
                 .alone = w.c == nullptr};
  return launch<false>(args, stream);
}

cudaError_t backward_states(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  const bool alone = params.dk == nullptr;
  int* const turns = w.segment_flags + w.num_flags / 3 * (alone ? 1 : 2);
  StateArgs args{.w = w,
                 .x = maps.q,
                 .y = maps.dh,
                 .c = maps.c,
                 .c_in = params.dc_last,
                 .n_in = params.dn_last,
                 .c_out = params.dc0,
                 .n_out = params.dn0,
                 .turns = turns,
                 .flags = turns + 1,
                 .log = w.grad_log,
                 .log0 = w.state_log,
                 .alone = alone};
  return launch<true>(args, stream);
}

}  // namespace flash_xlstm::cuda::hopper
