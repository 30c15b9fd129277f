// The four outputs that have a row per token, by one design: h, dq, dk, dv of one chunk (128 tokens) of one head.
//
//   output  rows   A   B   T = A B^T       state S (at the chunk's)   Z    out row
//   h       t      q   k   q_t . k_j       c (start)  q_t S           v    (sum_j P_tj v_j + a_t S-term) scale / d_t
//   dq      t      dh  v   dh_t . v_j      c (start)  S dh_t          k    (sum_j P_tj k_j + a_t S-term + n-term) scale
//   dk      j      v   dh  dh_t . v_j      dc (end)   S v_j           q    sum_t P_jt q_t + w_j (S-term + dn)
//   dv      j      k   q   q_t . k_j       dc (end)   k_j S           dh   sum_t P_jt dh_t + w_j S-term
//
// where, with D_tj = exp(b_t - b_j + i_j - m_t):  P = D T (h);  D (T / d_t + delta_t) (dq; dk with scale);
// scale D T / d_t (dv).  1 / d_t is applied in float32, never to an operand.
//
// A persistent block works through tiles of 128 rows by tile_n columns. A producer warp streams operands by TMA through
// a ring of stages: 64-wide panels of A and B, then of A and S, then Z in two halves of 64 tokens. It prefetches the
// next tile while the two consumer warpgroups (64 rows each) finish the last. The warpgroups share no data and wait
// only for the ring, so the arithmetic of one overlaps the products of the other. A warpgroup
//   makes T in float32 registers: the diagonal 64 x 64 block of its own rows' tokens and, where its rows reach the
//     other 64 tokens, the full block of those;
//   turns T into P, rounded into fragments of an A operand;
//   makes out = A S (64 x tile_n), scales its rows, and adds P Z.
//
// dq makes out = A S first, then both tiles q k^T and dh v^T, because u needs exact products:
//   u_t d_t / scale = sum_j D_tj (q_t . k_j) (dh_t . v_j) + g_t q_t . (c dh_t).
// With these, numerator and normalizer cancel where h does not depend on their common scale: dn, df and dm are such
// differences. delta and e follow from u. The last term runs over all of dqk, so a tile makes the other column tiles'
// A S too, before its own.
//
// The gates' gradients are sums of q . dq and k . dk. dq and dk write the shares that cross the chunk's boundary, from
// their float32 accumulators. The shares from within the chunk all but cancel where forget gates are nearly shut. So
// dq's kernel sums them over rows and columns of the exact tile
//   Y_tj = scale D_tj (q_t . k_j) (dh_t . v_j / d_t + delta_t).
//
// h's kernel makes s_t from float32: row sums of P before rounding, plus q . n. n is a sum of three 16-bit numbers that
// are loaded beside S.
//
// float16: P and the states may leave its range. A row of P and its state term are scaled by a power of two to below 1.
// A chunk's state is kept scaled by a power of two (Work::state_log).
//
// What lies where:
//   output_tile.cuh      a tile, a thread's place in it, which tensors play which part
//   output_ring.cuh      the ring: stages in shared memory, the producer, how consumers take panels
//   output_gates.cuh     D, the state's weight
//   output_scores.cuh    T and P
//   output_state.cuh     A S
//   output_main.cuh      the consumers' way through a tile
//   output_epilogue.cuh  factors, sums for the gates' gradients, rows to memory
//   output_mend.cuh      what is not finite
//   output_small.cuh     the form of heads up to 64 x 64
//   output_dq_chunk.cuh, output_dk_dv_chunk.cuh  dq, and dk with dv, of a whole chunk in one tile: kernels of their own;
//                        output_chunk.cuh has what they share
// This file has the kernel, which deals tiles out to blocks, and its launch.
#pragma once

#include <limits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/hopper/output_main.cuh"
#include "cuda/mlstm/hopper/output_small.cuh"

namespace flash_xlstm::cuda::hopper {

// What a kernel makes: one output, or dk and dv together. dk's and dv's tiles of one chunk share most operands in L2.
template <Output output, int tile_n, typename T>
struct One {
  using Shared = OutputShared<output, tile_n>;
  static constexpr bool is_h = output == Output::h, rows_are_t = Roles<output>::rows_are_t, follows_states = false;
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile) {
    produce<output, tile_n>(args, sh, ring, tile);
  }
  __device__ static void consume_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      const Tile& tile) {
    consume<output, tile_n, T>(args, sh, ring, tile);
  }
};
template <int tile_dqk, int tile_dv, typename T>
struct DkAndDv {
  using Shared = OutputShared<Output::dk, (tile_dqk > tile_dv ? tile_dqk : tile_dv)>;
  static constexpr bool is_h = false, rows_are_t = false, follows_states = false;
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      Tile tile) {
    if (tile.index < args.tiles) {
      produce<Output::dk, tile_dqk>(args, sh, ring, tile);
    } else {
      tile.index -= args.tiles;
      produce<Output::dv, tile_dv>(args, sh, ring, tile);
    }
  }
  __device__ static void consume_tile(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                      Tile tile) {
    if (tile.index < args.tiles) {
      consume<Output::dk, tile_dqk, T>(args, sh, ring, tile);
    } else {
      tile.index -= args.tiles;
      consume<Output::dv, tile_dv, T>(args, sh, ring, tile);
    }
  }
};

// Small tiles: of h, or of dk and dv.
template <int blocks, Output first, Output... others>
struct Small {
  using Shared = SmallShared<blocks>;
  using Ring = RingState<Shared::num_stages>;
  static constexpr bool is_h = first == Output::h, rows_are_t = Roles<first>::rows_are_t;
  static constexpr bool follows_states = first == Output::h;  // starts beside the states' kernel
  __device__ static void produce_tile(const OutputArgs& args, Shared& sh, Ring& ring, const Tile& tile) {
    produce_small<first>(args, sh, ring, tile);
  }
  // A tile without tokens is the end.
  __device__ static void produce_end(Shared& sh, Ring ring) {
    for (int x = 0; x < SmallStages<first>::s; ++x) ring.advance();
    ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
    reinterpret_cast<Tile*>(sh.stage[ring.stage] + Shared::tile_at)->length = 0;
    ptx::mbarrier_arrive(&sh.full[ring.stage]);
  }
  __device__ static bool consume_tile(const OutputArgs& args, Shared& sh, Ring& ring) {
    const int stage = wait_for_stage(sh, ring, SmallStages<first>::s);
    const Tile& tile = *reinterpret_cast<const Tile*>(sh.stage[stage] + Shared::tile_at);
    if (__shfl_sync(all_lanes, tile.length, 0) == 0) return false;
    consume_small<first>(args, sh, ring, tile);
    (consume_small<others>(args, sh, ring, tile), ...);
    return true;
  }
};

template <typename Makes>
__global__ void __launch_bounds__(output_threads, Makes::Shared::blocks_per_processor)
    outputs_kernel(const __grid_constant__ OutputArgs args) {
  using Shared = typename Makes::Shared;
  constexpr int num_stages = Shared::num_stages;
  extern __shared__ unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes + ptx::bytes_to_align<1024>(shared_bytes));
  const Layout& l = args.w.layout;
  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(&sh.full[s], 1);
      ptx::mbarrier_init(&sh.empty[s], consumer_warps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  if constexpr (!Makes::follows_states) wait_for_earlier_kernels();

  const auto tile_of = [&](const Chunk& chunk, int head, int index) {
    const bool is_empty = Makes::rows_are_t ? chunk.is_first && args.w.starts_empty
                                            : chunk.is_last && args.w.ends_empty;
    return Tile{.row = static_cast<int>(chunk.row),
                .first = static_cast<int>(chunk.first),
                .length = chunk.length,
                .item = static_cast<int>(chunk.chunk * l.heads) + head,
                .head = head,
                .index = index,
                .has_state = !is_empty};
  };
  // The states' kernel has written h of sequences that are left out.
  const auto has_no_tiles = [&](const Chunk& chunk) { return Makes::is_h && is_left_out(args.w.p, chunk.seq); };
  // Tiles of one chunk and head go to neighbouring blocks, which share its rows in the L2 cache. Where the number of
  // blocks is a multiple of the number of tiles, a block would always get the same column tile: long ones only (dk's)
  // or short ones only (dv's). So the assignment shifts by one from round to round.
  const auto for_tiles = [&](auto&& f) {
    const int heads = static_cast<int>(l.heads), tiles = args.tiles_of_both, blocks = static_cast<int>(gridDim.x);
    const int count = static_cast<int>(l.max_chunks) * heads * tiles;
    const bool take_turns = blocks % tiles == 0;
    int round = 0;
    for (int index = blockIdx.x; index < count; index += blocks, ++round) {
      const int item = index / tiles, chunk_index = item / heads;
      Chunk chunk;
      if (!l.locate(chunk_index, chunk)) break;
      if (has_no_tiles(chunk)) continue;
      // The round is the same for all tiles of an item.
      const int turn = take_turns ? (index - item * tiles + round) % tiles : index - item * tiles;
      f(tile_of(chunk, item - chunk_index * heads, turn));
    }
  };
  // Tiles in the order in which their states are written, each to the block that asks next. Packed: in chunk order.
  const auto for_tiles_in_turn = [&](auto&& f) {
    const Work& w = args.w;
    const auto heads = static_cast<unsigned>(l.heads);
    const bool packed = l.first_chunk != nullptr;
    const auto segments = static_cast<unsigned>(packed ? 1 : w.segments);
    const auto chunks = static_cast<unsigned>(packed ? l.max_chunks : l.chunks_per_seq);
    const auto rows = static_cast<unsigned>(packed ? 1 : l.num_seqs);
    const unsigned per_segment = ceil_div(chunks, segments), side_by_side = segments * rows * heads;
    const unsigned count = per_segment * side_by_side;
    int* const taken = w.state_flags + w.num_state_flags - 1;
    for (unsigned index = blockIdx.x; index < count;) {
      const unsigned next = gridDim.x + static_cast<unsigned>(atomicAdd(taken, 1));  // early, to hide its latency
      const unsigned step = index / side_by_side;
      unsigned rest = index - step * side_by_side;
      const unsigned head = rest % heads;
      rest /= heads;
      const unsigned row = rest % rows, in_row = rest / rows * per_segment + step;
      index = next;
      if (in_row >= chunks) continue;
      Chunk chunk;
      if (!l.locate(int64_t{row} * chunks + in_row, chunk) || has_no_tiles(chunk)) continue;
      f(tile_of(chunk, static_cast<int>(head), 0));
    }
  };
  RingState<num_stages> ring;
  if (threadIdx.x >= consumer_warps * 32) {
    ptx::fewer_registers<24>();
    if (threadIdx.x != consumer_warps * 32) return;
    const auto produce_tile = [&](const Tile& tile) { Makes::produce_tile(args, sh, ring, tile); };
    if constexpr (Makes::follows_states) {
      for_tiles_in_turn(produce_tile);
      Makes::produce_end(sh, ring);
    } else {
      for_tiles(produce_tile);
    }
  } else {
    ptx::more_registers<Shared::consumer_registers>();
    if constexpr (Makes::follows_states) {
      while (Makes::consume_tile(args, sh, ring)) {
      }
      wait_for_earlier_kernels();  // a kernel that waits for this one has then waited for the states' too
    } else if constexpr (Shared::is_small) {
      const int64_t chunks = l.first_chunk == nullptr ? l.max_chunks : l.first_chunk[l.num_seqs];
      const int count = static_cast<int>(chunks * l.heads) * args.tiles_of_both;
      for (int index = blockIdx.x; index < count; index += gridDim.x) {
        Makes::consume_tile(args, sh, ring);
      }
    } else {
      for_tiles([&](const Tile& tile) { Makes::consume_tile(args, sh, ring, tile); });
    }
  }
}

// `tiles` column tiles a chunk.
template <typename Makes>
cudaError_t launch_outputs(OutputArgs args, int64_t tiles, cudaStream_t stream) {
  static Prepared prepared;
  const auto kernel = outputs_kernel<Makes>;
  const int bytes = sizeof(typename Makes::Shared) + 1024;  // to align
  int resident = 0;
  const cudaError_t status = prepared.resident_blocks(kernel, output_threads, bytes, resident);
  if (status != cudaSuccess) return status;
  args.tiles_of_both = static_cast<int>(tiles);
  const int64_t count = args.w.layout.max_chunks * args.w.layout.heads * tiles;
  if (count > std::numeric_limits<int>::max() - resident) return cudaErrorInvalidConfiguration;  // 2^31 tiles
  return launch_early(kernel, dim3(static_cast<unsigned>(count < resident ? count : resident)), dim3(output_threads),
                      bytes, 1, stream, args);
}

template <Output output, typename T>
cudaError_t launch_one(OutputArgs args, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = ceil_div(columns, column_tile(columns));
  args.tiles = static_cast<int>(tiles);
  switch (column_tile(columns)) {
    case 64: return launch_outputs<One<output, 64, T>>(args, tiles, stream);
    case 128: return launch_outputs<One<output, 128, T>>(args, tiles, stream);
    default: return launch_outputs<One<output, 256, T>>(args, tiles, stream);
  }
}

}  // namespace flash_xlstm::cuda::hopper
