// States at chunk boundaries, forward (c, n) and backward (dc, dn), by one kernel in two directions.
//
//   forward   c <- g c + sum_j w_j k_j v_j^T          w_j = exp(b_end - b_j + i_j - m_end)
//   backward  dc <- g dc + sum_t w_t q_t dh_t^T       w_t = scale exp(b_t + m_start - m_t) / d_t
//   with g = exp(b_end + m_start - m_end); n and dn likewise with 1 for v and delta_t d_t for dh.
//
// A block of four warps owns a 64 x tile_dv piece of one head's state, keeps it in float32 registers as the product's
// accumulator, and walks the chunks of one sequence. k and v (q and dh) come through a two-stage cp.async ring. For
// each chunk a block
//   writes the piece to its slot;
//   weights the k rows in shared memory; the float32 weighted rows also make n;
//   makes one 64 x tile_dv x 64 product.
// Backward, it overwrites the c at a chunk's end with dc. It also reads the c at the chunk's start, for
// g (<c, dc> + <n, dn>): the gradient of the chunk's forget gates from the pairs that lie on either side of the chunk.
// Blocks of the first dv tile also keep n. Where the forward's range of chunks ends within a sequence, that sequence's
// state is carried to the next launch in float32.
#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/portable/kernels.h"
#include "cuda/mlstm/portable/tiles.cuh"

namespace flash_xlstm::cuda::portable {
namespace {

constexpr int tile_dqk = 64;
constexpr int tile_dv = 64;
constexpr int row_groups = threads_per_block / 32;  // warps, each weights 16 tokens

struct StateArgs {
  Work w;
  Strided x, y;  // k and v, or q and dh
  bool x_vectors, y_vectors;
  // By sequence, or by slot of the pool: c0, or dc_last; nullptr: zeros. c_last, or dc0; nullptr: not wanted. The pool's
  // c_in and c_out are the same: a thread reads and writes the same elements.
  const void* c_in;
  const float* n_in;
  void* c_out;
  float* n_out;
  DType c_dtype;               // backward: float32
  int64_t c_stride, n_stride;  // from a sequence, or a slot, to the next
  int carry_in;                // forward: which of the carried states to read
  int64_t first_seq;           // forward: of the first block
};

template <typename T>
struct StateShared {
  using E = typename Arithmetic<T>::Element;
  static constexpr int x_pitch = Arithmetic<T>::pitch_mn(tile_dqk);
  static constexpr int y_pitch = Arithmetic<T>::pitch_mn(tile_dv);
  struct Stage {
    E x[chunk_tokens * x_pitch];
    E y[chunk_tokens * y_pitch];
  };
  alignas(16) Stage stage[2];
  float weight[2][chunk_tokens];    // of the x y^T product
  float weight_n[2][chunk_tokens];  // of the n sum
  float keep[2];                    // g
  float n_part[row_groups][tile_dqk];
  float inner[threads_per_block / 32];
};

template <typename T, bool backward>
__global__ void __launch_bounds__(threads_per_block) states_kernel(const __grid_constant__ StateArgs args) {
  using E = typename Arithmetic<T>::Element;
  using Shared = StateShared<T>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes);

  const Work& w = args.w;
  const Layout& l = w.layout;
  const int dqk_tiles = static_cast<int>(ceil_div(l.dqk, tile_dqk));
  const int dv_tiles = static_cast<int>(ceil_div(l.dv, tile_dv));
  int64_t block = blockIdx.x;
  const int tile_v = static_cast<int>(block % dv_tiles);
  block /= dv_tiles;
  const int tile_k = static_cast<int>(block % dqk_tiles);
  block /= dqk_tiles;
  const int head = static_cast<int>(block % l.heads);
  const int64_t seq = block / l.heads + args.first_seq;
  const int64_t row0 = tile_k * tile_dqk, col0 = tile_v * tile_dv;
  const bool has_n = tile_v == 0;
  const int tiles = dqk_tiles * dv_tiles, tile = tile_k * dv_tiles + tile_v;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = (warp / 2) * 32, warp_col = (warp % 2) * 32;
  const int group = lane / 4, pos = lane % 4;

  int64_t begin, end;
  l.chunk_range(seq, begin, end);
  const int64_t seq_begin = begin, seq_end = end;
  const bool empty = seq_begin == seq_end;  // the first range handles it, wherever it lies
  if (!empty) begin = max(begin, l.range_begin), end = min(end, l.range_end);
  const int64_t count = end - begin;
  if (empty ? l.range_begin > 0 : count <= 0) return;
  if (!backward && is_left_out(w.p, seq)) return;

  float acc[2][4][4];
  // Calls f(first of two neighbouring accumulators, row, column) for those inside the (padded) state.
  const auto for_each_pair = [&](auto&& f) {
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < 4; ++nt)
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          const int64_t row = row0 + warp_row + mt * 16 + group + (r / 2) * 8;
          const int64_t col = col0 + warp_col + nt * 8 + pos * 2;
          if (row < l.dqk && col < w.dv_pitch) f(&acc[mt][nt][r], row, col, mt, nt, r / 2);
        }
  };
  // The same for single elements of an unpadded state.
  const auto for_each = [&](auto&& f) {
    for_each_pair([&](float* a, int64_t row, int64_t col, int, int, int) {
      if (col < l.dv) f(a[0], row, col);
      if (col + 1 < l.dv) f(a[1], row, col + 1);
    });
  };
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int r = 0; r < 4; ++r) acc[mt][nt][r] = 0.0f;
  const bool n_lane = has_n && threadIdx.x < tile_dqk && row0 + threadIdx.x < l.dqk;
  float n = 0.0f;
  // `at`: where the head's c and n begin. c of the pool may be bfloat16.
  const auto read_state = [&](const void* c_from, const float* n_from, int64_t c_at, int64_t n_at, DType c_dtype) {
    const auto read_c = [&](const auto* from) {
      for_each([&](float& a, int64_t row, int64_t col) { a = to_float(from[c_at + row * l.dv + col]); });
    };
    if (!backward && c_dtype == DType::bfloat16) {
      read_c(static_cast<const bf16*>(c_from));
    } else if (c_from != nullptr) {
      read_c(static_cast<const float*>(c_from));
    }
    if (n_from != nullptr && n_lane) n = n_from[n_at + row0 + threadIdx.x];
  };
  const auto write_state = [&](void* c_to, float* n_to, int64_t c_at, int64_t n_at, DType c_dtype) {
    const auto write_c = [&](auto* to) {
      using C = std::remove_pointer_t<decltype(to)>;
      for_each([&](float& a, int64_t row, int64_t col) { to[c_at + row * l.dv + col] = from_float<C>(a); });
    };
    if (!backward && c_dtype == DType::bfloat16) {
      write_c(static_cast<bf16*>(c_to));
    } else if (c_to != nullptr) {
      write_c(static_cast<float*>(c_to));
    }
    if (n_to != nullptr && n_lane) n_to[n_at + row0 + threadIdx.x] = n;
  };
  const auto c_at = [&] { return slot_of(w.p, seq) * args.c_stride + head * l.dqk * l.dv; };
  const auto n_at = [&] { return slot_of(w.p, seq) * args.n_stride + head * l.dqk; };
  if (begin > seq_begin) {
    read_state(w.scratch.c_carry[args.carry_in], w.scratch.n_carry[args.carry_in], head * l.dqk * l.dv, head * l.dqk,
               DType::float32);
  } else if (!is_fresh(w.p, seq)) {
    read_state(args.c_in, args.n_in, c_at(), n_at(), args.c_dtype);
  }

  E* const slots = static_cast<E*>(w.scratch.c);
  const auto base_of = [&](int64_t chunk) { return (l.slot(chunk, seq) * l.heads + head) * l.dqk; };
  const auto write_slot = [&](int64_t chunk) {
    const int64_t base = base_of(chunk);
    for_each_pair([&](float* a, int64_t row, int64_t col, int, int, int) {
      *reinterpret_cast<Pair<E>*>(slots + (base + row) * w.dv_pitch + col) = {to_operand<T>(a[0]), to_operand<T>(a[1])};
    });
    if (n_lane) w.scratch.n[base + row0 + threadIdx.x] = n;
  };
  // Backward: the state at a chunk's start, read early to hide its latency behind the weighting. With the gradient at
  // the chunk's end it makes this tile's share of <c, dc> + <n, dn>.
  Pair<E> start[2][4][2];
  float n_start = 0.0f;
  const auto read_slot = [&](int64_t chunk) {
    const int64_t base = base_of(chunk);
    for_each_pair([&](float*, int64_t row, int64_t col, int mt, int nt, int half_row) {
      start[mt][nt][half_row] = *reinterpret_cast<const Pair<E>*>(slots + (base + row) * w.dv_pitch + col);
    });
    if (n_lane) n_start = w.scratch.n[base + row0 + threadIdx.x];
  };
  const auto inner_share = [&] {
    float inner = n_lane ? n * n_start : 0.0f;
    for_each_pair([&](float* a, int64_t, int64_t, int mt, int nt, int half_row) {
      inner += a[0] * to_float(start[mt][nt][half_row].x) + a[1] * to_float(start[mt][nt][half_row].y);
    });
    for (int d = 16; d > 0; d /= 2) inner += __shfl_xor_sync(all_lanes, inner, d);
    if (lane == 0) sh.inner[warp] = inner;
  };

  const auto chunk_at = [&](int64_t step) { return backward ? end - 1 - step : begin + step; };
  const auto fetch = [&](int64_t step) {
    if (step < count) {
      Chunk chunk;
      l.locate(chunk_at(step), chunk);
      auto& stage = sh.stage[step % 2];
      load_tile<chunk_tokens, tile_dqk, Shared::x_pitch>(
          stage.x, chunk_rows<T>(args.x, args.x_vectors, chunk.row, chunk.first, head, chunk.length, l.dqk), 0, row0);
      load_tile<chunk_tokens, tile_dv, Shared::y_pitch>(
          stage.y, chunk_rows<T>(args.y, args.y_vectors, chunk.row, chunk.first, head, chunk.length, l.dv), 0, col0);
      if (threadIdx.x < chunk_tokens) {
        const int t = threadIdx.x;
        const int64_t item = chunk.chunk * l.heads + head, at = item * chunk_tokens + t;
        const double chunk_b = w.scratch.chunk_b[item];
        const float m_start = w.scratch.m_boundary[chunk.boundary * l.heads + head];
        const float m_end = w.scratch.m_boundary[(chunk.boundary + 1) * l.heads + head];
        if (backward) {
          const float g = w.p.scale * exp_sum(w.scratch.row[at], m_start);
          sh.weight[step % 2][t] = g * w.scratch.inv_d[at];
          sh.weight_n[step % 2][t] = g * w.scratch.delta[at];
        } else {
          const float weight = end_weight(w.scratch.column[at], chunk_b, m_end);
          sh.weight[step % 2][t] = weight;
          sh.weight_n[step % 2][t] = w.p.normalize ? weight : 0.0f;  // n stays 0
        }
        if (t == 0) sh.keep[step % 2] = expf(static_cast<float>(chunk_b + m_start - m_end));
      }
    }
    ptx::cp_async_commit();
  };

  fetch(0);
  for (int64_t step = 0; step < count; ++step) {
    if constexpr (backward) read_slot(chunk_at(step));
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's stage has arrived, and all have read the other stage
    fetch(step + 1);
    auto& stage = sh.stage[step % 2];
    const float* weight = sh.weight[step % 2];
    const float* weight_n = sh.weight_n[step % 2];

    // A warp weights tokens [16 warp, 16 warp + 16), a lane columns 2 lane and 2 lane + 1. A token of weight 0 adds
    // nothing, whatever its k and v hold.
    float part[2] = {0.0f, 0.0f};
    for (int x = 0; x < chunk_tokens / row_groups; ++x) {
      const int t = warp * (chunk_tokens / row_groups) + x;
      E* at = stage.x + t * Shared::x_pitch + lane * 2;
      const float wt = weight[t], wn = weight_n[t];
      for (int y = 0; y < 2; ++y) {
        const float raw = to_float(at[y]);
        part[y] += wn == 0.0f ? 0.0f : wn * raw;
        at[y] = to_operand<T>(wt == 0.0f ? 0.0f : wt * raw);
      }
      if (wt == 0.0f) {
        for (int y = lane; y < tile_dv; y += 32) stage.y[t * Shared::y_pitch + y] = to_operand<T>(0.0f);
      }
    }
    if constexpr (backward) inner_share();
    write_slot(chunk_at(step) + (backward ? 1 : 0));
    const float keep = sh.keep[step % 2];
    if (has_n) {
      sh.n_part[warp][lane * 2] = part[0];
      sh.n_part[warp][lane * 2 + 1] = part[1];
    }
    __syncthreads();
    if (backward && threadIdx.x == 0) {
      float sum = 0.0f;
      for (int x = 0; x < threads_per_block / 32; ++x) sum += sh.inner[x];
      w.scratch.through[(chunk_at(step) * l.heads + head) * tiles + tile] = keep * sum;
    }
    if (n_lane) {
      n *= keep;
      for (int x = 0; x < row_groups; ++x) n += sh.n_part[x][threadIdx.x];
    }
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < 4; ++nt)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[mt][nt][r] *= keep;
    warp_mma<T, true, true, Computed::a>(acc, stage.x + warp_row, Shared::x_pitch, stage.y + warp_col, Shared::y_pitch,
                                         0, chunk_tokens);
  }

  if (end < seq_end) {
    write_state(w.scratch.c_carry[args.carry_in ^ 1], w.scratch.n_carry[args.carry_in ^ 1], head * l.dqk * l.dv,
                head * l.dqk, DType::float32);
  } else {
    write_state(args.c_out, args.n_out, c_at(), n_at(), args.c_dtype);
  }
}

template <bool backward>
cudaError_t launch(const StateArgs& args, int64_t num_seqs, cudaStream_t stream) {
  return dispatch_dtype(args.w.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int bytes = sizeof(StateShared<T>);
    const auto kernel = states_kernel<T, backward>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const int64_t blocks = num_seqs * args.w.layout.heads * state_tiles(args.w.p);
    kernel<<<static_cast<unsigned>(blocks), threads_per_block, bytes, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace

int state_tiles(const MlstmProblem& p) {
  return static_cast<int>(ceil_div(p.dqk, tile_dqk) * ceil_div(p.dv, tile_dv));
}

cudaError_t forward_states(const Work& w, float* c_last, float* n_last, int64_t range_index, cudaStream_t stream) {
  const int64_t bytes = element_bytes(w.p.dtype);
  const Layout& l = w.layout;
  // The sequences with chunks in the range. Packed: all, since only the device knows which.
  const bool packed = l.first_chunk != nullptr;
  const MlstmSlots& pool = w.p.pool;
  const bool pooled = pool.indices != nullptr;
  const int64_t first = packed ? 0 : l.range_begin / l.chunks_per_seq;
  const int64_t stop = packed ? l.num_seqs : ceil_div(l.range_end, l.chunks_per_seq);
  const StateArgs args{.w = w,
                       .x = w.p.k,
                       .y = w.p.v,
                       .x_vectors = can_vectorize(w.p.k, bytes),
                       .y_vectors = can_vectorize(w.p.v, bytes),
                       .c_in = pooled ? pool.c : w.p.c0,
                       .n_in = pooled ? pool.n : w.p.n0,
                       .c_out = pooled ? pool.c : c_last,
                       .n_out = pooled ? pool.n : n_last,
                       .c_dtype = pool.c_dtype,
                       .c_stride = pooled ? pool.c_stride : l.heads * l.dqk * l.dv,
                       .n_stride = pooled ? pool.n_stride : l.heads * l.dqk,
                       .carry_in = static_cast<int>(range_index % 2),
                       .first_seq = first};
  return launch<false>(args, stop - first, stream);
}

cudaError_t backward_states(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  const int64_t bytes = element_bytes(w.p.dtype);
  const StateArgs args{.w = w,
                       .x = w.p.q,
                       .y = params.dh,
                       .x_vectors = can_vectorize(w.p.q, bytes),
                       .y_vectors = can_vectorize(params.dh, bytes),
                       .c_in = params.dc_last,
                       .n_in = params.dn_last,
                       .c_out = params.dc0,
                       .n_out = params.dn0,
                       .c_stride = w.p.heads * w.p.dqk * w.p.dv,
                       .n_stride = w.p.heads * w.p.dqk};
  return launch<true>(args, w.layout.num_seqs, stream);
}

}  // namespace flash_xlstm::cuda::portable
