// The four outputs that have a row per token, by one kernel: h, dq, dk, dv of one chunk of one head.
//
//   output  rows   A   B   T = A B^T        state S (at the chunk's)   Z    out row
//   h       t      q   k   q_t . k_j        c (start)  q_t S           v    (sum_j P_tj v_j + a_t S-term) / d_t
//   dq      t      dh  v   dh_t . v_j       c (start)  S dh_t          k    sum_j P_tj k_j + a_t (S-term) + delta n
//   dk      j      v   dh  dh_t . v_j       dc (end)   S v_j           q    sum_t P_jt q_t + w_j (S-term + dn)
//   dv      j      k   q   q_t . k_j        dc (end)   k_j S           dh   sum_t P_jt dh_t + w_j S-term
//
// where, with D_tj = exp(b_t - b_j + i_j - m_t):  P = scale D T (h);  scale D (T / d_t + delta_t) (dq, dk);
// scale D T / d_t (dv).  1 / d_t is applied in float32, never to an operand.
//
// A block of four warps (two by two) makes 64 rows by tile_n columns of the output.
//   A loop over the inner dimension of T (dqk or dv), in steps of tile_k, makes T = A B^T and A S at once. They share
//     the fragments of A. A, B and S come through three cp.async stages. Column tiles of the same rows compute T again.
//   P is made from T in registers and stored to shared memory, in bfloat16 where the inputs are.
//   The product P Z is added to the scaled A S.
// Row sums come from the float32 accumulators: s_t of h, and the shares of q . dq and k . dk in the state's term, for
// the gates' gradients. chunk_sums.cu makes the other shares.
#pragma once

#include "cuda/mlstm/chunked/pool.cuh"
#include "cuda/mlstm/portable/kernels.h"
#include "cuda/mlstm/portable/tiles.cuh"

namespace flash_xlstm::cuda::portable {

constexpr int num_stages = 3;

template <Output output, typename T, int tile_n>
struct OutputShared {
  using E = typename Arithmetic<T>::Element;
  static constexpr bool state_rows_are_k = output == Output::h || output == Output::dv;  // S lies as [k][n]
  static constexpr int tile_k = 64 / sizeof(E);
  static constexpr int ab_pitch = Arithmetic<T>::pitch_k(tile_k);
  static constexpr int s_pitch = state_rows_are_k ? Arithmetic<T>::pitch_mn(tile_n) : Arithmetic<T>::pitch_k(tile_k);
  static constexpr int s_rows = state_rows_are_k ? tile_k : tile_n;
  static constexpr int s_cols = state_rows_are_k ? tile_n : tile_k;
  static constexpr int p_pitch = Arithmetic<T>::pitch_k(chunk_tokens);
  static constexpr int z_pitch = Arithmetic<T>::pitch_mn(tile_n);
  struct Stage {
    E a[chunk_tokens * ab_pitch];
    E b[chunk_tokens * ab_pitch];
    E s[s_rows * s_pitch];
  };
  struct Tail {
    E p[chunk_tokens * p_pitch];
    E z[chunk_tokens * z_pitch];
  };
  union {
    Stage stage[num_stages];
    Tail tail;
  };
  float2 row[chunk_tokens], column[chunk_tokens];
  float m[chunk_tokens];          // h
  float row_scale[chunk_tokens];  // of the state's term
  float inv_d[chunk_tokens], delta[chunk_tokens];
  float n[2][tile_k];             // h: the slice of n beside S
  float row_sum[2][chunk_tokens];
  float q_n[chunk_tokens];
};

template <Output output, typename T, int tile_n>
__global__ void __launch_bounds__(threads_per_block, Arithmetic<T>::split && tile_n == 128 ? 2 : 3)
    outputs_kernel(const __grid_constant__ OutputArgs args, const Strided ta, const Strided tb, const Strided tz,
                   bool a_vectors, bool b_vectors, bool z_vectors) {
  using E = typename Arithmetic<T>::Element;
  using Shared = OutputShared<output, T, tile_n>;
  constexpr bool rows_are_t = output == Output::h || output == Output::dq;
  constexpr bool inner_is_dqk = output == Output::h || output == Output::dv;
  constexpr int tile_k = Shared::tile_k;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes);

  const Work& w = args.w;
  const Layout& l = w.layout;
  const int64_t inner = inner_is_dqk ? l.dqk : l.dv;
  const int64_t columns = inner_is_dqk ? l.dv : l.dqk;
  const int tiles = static_cast<int>(ceil_div(columns, tile_n));
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int64_t item = blockIdx.x / tiles + l.range_begin * l.heads;  // over all chunks and heads
  const int head = static_cast<int>(item % l.heads);
  Chunk chunk;
  if (!l.locate(item / l.heads, chunk)) return;
  const int64_t col0 = static_cast<int64_t>(tile) * tile_n;
  if constexpr (output == Output::h) {
    if (is_left_out(w.p, chunk.seq)) {
      const T value = from_float<T>(h_left_out(w.p, chunk.seq));
      for (int x = threadIdx.x; x < chunk.length * tile_n; x += threads_per_block) {
        const int64_t token = chunk.row * l.seq + chunk.first + x / tile_n, col = col0 + x % tile_n;
        if (col < columns) static_cast<T*>(args.out)[(token * l.heads + head) * columns + col] = value;
      }
      return;
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int n_tiles = tile_n / 16;  // of the output, a warp
  const int warp_row = (warp / 2) * 32;
  const int warp_col = (warp % 2) * 32;              // of T
  const int warp_out = (warp % 2) * (tile_n / 2);    // of the output
  const int group = lane / 4, pos = lane % 4;

  const Matrix<T> a = chunk_rows<T>(ta, a_vectors, chunk.row, chunk.first, head, chunk.length, inner);
  const Matrix<T> b = chunk_rows<T>(tb, b_vectors, chunk.row, chunk.first, head, chunk.length, inner);
  const Matrix<T> z = chunk_rows<T>(tz, z_vectors, chunk.row, chunk.first, head, chunk.length, columns);
  const int64_t slot = (l.slot(chunk.chunk, chunk.seq) + (rows_are_t ? 0 : 1)) * l.heads + head;
  const Matrix<E> state{.data = static_cast<const E*>(w.scratch.c) + slot * l.dqk * w.dv_pitch,
                        .stride = w.dv_pitch,
                        .rows = static_cast<int>(l.dqk),
                        .cols = l.dv,
                        .vectors = true};
  const float* n = w.scratch.n + slot * l.dqk;

  if (threadIdx.x < chunk_tokens) {
    const int t = threadIdx.x;
    const int64_t at = item * chunk_tokens + t;
    const float m_boundary = w.scratch.m_boundary[(chunk.boundary + (rows_are_t ? 0 : 1)) * l.heads + head];
    const float2 row = w.scratch.row[at], column = w.scratch.column[at];
    sh.row[t] = row;
    sh.column[t] = column;
    if constexpr (output == Output::h) {
      sh.m[t] = w.scratch.m[at];
    } else {
      sh.inv_d[t] = w.scratch.inv_d[at];
      sh.delta[t] = w.scratch.delta[at];
    }
    if constexpr (rows_are_t) {
      sh.row_scale[t] = w.p.scale * exp_sum(row, m_boundary);
    } else {
      sh.row_scale[t] = end_weight(column, w.scratch.chunk_b[item], m_boundary);
    }
  }

  const auto fetch = [&](int64_t k, int stage_index) {
    if (k < inner) {
      auto& stage = sh.stage[stage_index];
      load_tile<chunk_tokens, tile_k, Shared::ab_pitch>(stage.a, a, 0, k);
      load_tile<chunk_tokens, tile_k, Shared::ab_pitch>(stage.b, b, 0, k);
      if constexpr (Shared::state_rows_are_k) {
        load_tile<Shared::s_rows, Shared::s_cols, Shared::s_pitch>(stage.s, state, k, col0);
      } else {
        load_tile<Shared::s_rows, Shared::s_cols, Shared::s_pitch>(stage.s, state, col0, k);
      }
    }
    ptx::cp_async_commit();
  };

  float product[2][4][4], out[2][n_tiles][4];
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int nt = 0; nt < 4; ++nt) product[mt][nt][r] = 0.0f;
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) out[mt][nt][r] = 0.0f;
    }

  float q_n = 0.0f;  // h: half a row of q . n for each thread
  for (int x = 0; x < num_stages - 1; ++x) fetch(static_cast<int64_t>(x) * tile_k, x);
  int step = 0;
  for (int64_t k = 0; k < inner; k += tile_k, ++step) {
    if constexpr (output == Output::h) {
      if (threadIdx.x < tile_k) sh.n[step % 2][threadIdx.x] = k + threadIdx.x < inner ? n[k + threadIdx.x] : 0.0f;
    }
    ptx::cp_async_wait<num_stages - 2>();
    __syncthreads();  // this stage has arrived, and all warps have read the stage that is refilled next
    fetch(k + (num_stages - 1) * tile_k, (step + num_stages - 1) % num_stages);
    const auto& stage = sh.stage[step % num_stages];
    const E* const state_columns =
        Shared::state_rows_are_k ? stage.s + warp_out : stage.s + warp_out * Shared::s_pitch;
#pragma unroll 1
    for (int kk = 0; kk < tile_k; kk += Arithmetic<T>::mma_k) {
      FragmentA<T, 2> rows;
      load_a<T, false>(rows, stage.a + warp_row * Shared::ab_pitch, Shared::ab_pitch, kk);
      multiply<T, false>(product, rows, stage.b + warp_col * Shared::ab_pitch, Shared::ab_pitch, kk);
      multiply<T, Shared::state_rows_are_k, Computed::b>(out, rows, state_columns, Shared::s_pitch, kk);
    }
    if constexpr (output == Output::h) {
      constexpr int width = Group<E>::width;
      const int half = (threadIdx.x % 2) * (tile_k / 2);
#pragma unroll
      for (int x = 0; x < tile_k / 2; x += width) {
        const auto part = *reinterpret_cast<const Group<E>*>(stage.a + (threadIdx.x / 2) * Shared::ab_pitch + half + x);
#pragma unroll
        for (int y = 0; y < width; ++y) q_n += to_float(part.value[y]) * sh.n[step % 2][half + x + y];
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  auto& tail = sh.tail;
  load_tile<chunk_tokens, tile_n, Shared::z_pitch>(tail.z, z, 0, col0);
  ptx::cp_async_commit();

  // P, masked to j <= t. A weight of exactly 0 gives 0, whatever k or v hold.
  float row_sum[2][2] = {};
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp_row + mt * 16 + group + half_row * 8;
#pragma unroll
      for (int nt = 0; nt < 4; ++nt)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int col = warp_col + nt * 8 + pos * 2 + x;
          const int t = rows_are_t ? row : col, j = rows_are_t ? col : row;
          float p = 0.0f;
          if (j <= t) {
            const float decay = exp_sum(sh.row[t], sh.column[j]);
            const float value = product[mt][nt][half_row * 2 + x];
            float weighted = value;
            if constexpr (output == Output::dq || output == Output::dk) weighted = value * sh.inv_d[t] + sh.delta[t];
            if constexpr (output == Output::dv) weighted = value * sh.inv_d[t];
            p = decay == 0.0f ? 0.0f : w.p.scale * decay * weighted;
          }
          row_sum[mt][half_row] += p;
          tail.p[row * Shared::p_pitch + col] = to_operand<T>(p);
        }
    }
  if constexpr (output == Output::h) {
    q_n += __shfl_xor_sync(all_lanes, q_n, 1);
    if (threadIdx.x % 2 == 0) sh.q_n[threadIdx.x / 2] = q_n;
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        float sum = row_sum[mt][half_row];
        sum += __shfl_xor_sync(all_lanes, sum, 1);
        sum += __shfl_xor_sync(all_lanes, sum, 2);
        if (pos == 0) sh.row_sum[warp % 2][warp_row + mt * 16 + group + half_row * 8] = sum;
      }
  }
  // Scales the state's term; adds those of dn and n.
  constexpr bool gate_sums = output == Output::dq || output == Output::dk;
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp_row + mt * 16 + group + half_row * 8;
      float scale = sh.row_scale[row], n_scale = scale;
      if constexpr (output == Output::dq) n_scale = scale * sh.delta[row], scale *= sh.inv_d[row];
      const Strided& other = output == Output::dq ? w.p.q : w.p.k;
      const bool inside = row < chunk.length;
      const T* with = gate_sums ? static_cast<const T*>(other.data) + chunk.row * other.batch +
                                      (chunk.first + row) * other.seq + head * other.head
                                : nullptr;
      float sum = 0.0f;
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          float& o = out[mt][nt][half_row * 2 + x];
          o = scale == 0.0f ? 0.0f : o * scale;
          if constexpr (gate_sums) {
            const int64_t col = col0 + warp_out + nt * 8 + pos * 2 + x;
            if (col < columns && n_scale != 0.0f) o += n_scale * n[col];
            if (col < columns && inside && o != 0.0f) sum += o * to_float(with[col]);
          }
        }
      if constexpr (gate_sums) {
        sum += __shfl_xor_sync(all_lanes, sum, 1);
        sum += __shfl_xor_sync(all_lanes, sum, 2);
        if (pos == 0) sh.row_sum[warp % 2][row] = sum;
      }
    }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // A product turns 0 times NaN or infinity into NaN. So a token of Z that is not finite would reach rows that do not
  // depend on it. A tile with such a token takes plain sums over the tokens of weight other than 0.
  bool odd = false;
  for (int x = threadIdx.x; x < chunk_tokens * tile_n; x += threads_per_block) {
    const float value = to_float(tail.z[x / tile_n * Shared::z_pitch + x % tile_n]);
    odd |= !(fabsf(value) <= 3.4e38f);
  }
  if (!__syncthreads_or(odd)) {
    const int k_begin = rows_are_t ? 0 : warp_row, k_end = rows_are_t ? warp_row + 32 : chunk_tokens;
    warp_mma<T, false, true, Computed::a>(out, tail.p + warp_row * Shared::p_pitch, Shared::p_pitch, tail.z + warp_out,
                                          Shared::z_pitch, k_begin, k_end);
  } else {
    for (int mt = 0; mt < 2; ++mt)
      for (int nt = 0; nt < n_tiles; ++nt)
        for (int r = 0; r < 4; ++r) {
          const int row = warp_row + mt * 16 + group + (r / 2) * 8, col = warp_out + nt * 8 + pos * 2 + r % 2;
          float sum = 0.0f;
          for (int x = rows_are_t ? 0 : row; x < (rows_are_t ? row + 1 : chunk_tokens); ++x) {
            const float p = to_float(tail.p[row * Shared::p_pitch + x]);
            if (p != 0.0f) sum += p * to_float(tail.z[x * Shared::z_pitch + col]);
          }
      // Indexed by constants, so that `out` stays in registers.
#pragma unroll
          for (int m2 = 0; m2 < 2; ++m2)
#pragma unroll
            for (int n2 = 0; n2 < n_tiles; ++n2)
#pragma unroll
              for (int r2 = 0; r2 < 4; ++r2)
                if (m2 == mt && n2 == nt && r2 == r) out[m2][n2][r2] += sum;
        }
  }

  T* const result = static_cast<T*>(args.out);
  const bool paired = columns % 2 == 0;  // `result` is an allocation of its own
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp_row + mt * 16 + group + half_row * 8;
      if (row >= chunk.length) continue;
      const int64_t token = chunk.row * l.seq + chunk.first + row;
      float factor = 1.0f;
      if constexpr (output == Output::h) {
        if (w.p.normalize) {
          const float s = sh.row_sum[0][row] + sh.row_sum[1][row] + sh.row_scale[row] * sh.q_n[row];
          factor = Normalizer(s, sh.m[row], w.p.eps).inverse;
          if (tile == 0 && warp % 2 == 0 && pos == 0 && args.s_out != nullptr) args.s_out[token * l.heads + head] = s;
        }
      }
      T* to = result + (token * l.heads + head) * columns;
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) {
        const int64_t col = col0 + warp_out + nt * 8 + pos * 2;
        const Pair<T> value{from_float<T>(out[mt][nt][half_row * 2] * factor),
                            from_float<T>(out[mt][nt][half_row * 2 + 1] * factor)};
        if (paired && col < columns) {
          *reinterpret_cast<Pair<T>*>(to + col) = value;
        } else {
          if (col < columns) to[col] = value.x;
          if (col + 1 < columns) to[col + 1] = value.y;
        }
      }
    }
  if constexpr (gate_sums) {
    if (threadIdx.x < chunk_tokens) {
      const int64_t items = l.max_chunks * l.heads;
      args.partial[(tile * items + item) * chunk_tokens + threadIdx.x] =
          sh.row_sum[0][threadIdx.x] + sh.row_sum[1][threadIdx.x];
    }
  }
}

template <Output output, typename T, int tile_n>
cudaError_t launch_outputs(const OutputArgs& args, int64_t columns, cudaStream_t stream) {
  const MlstmProblem& p = args.w.p;
  const Strided a = output == Output::h ? p.q : output == Output::dq ? args.dh : output == Output::dk ? p.v : p.k;
  const Strided b = output == Output::h ? p.k : output == Output::dq ? p.v : output == Output::dk ? args.dh : p.q;
  const Strided z = output == Output::h ? p.v : output == Output::dq ? p.k : output == Output::dk ? p.q : args.dh;
  const auto kernel = outputs_kernel<output, T, tile_n>;
  const int bytes = sizeof(OutputShared<output, T, tile_n>);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const Layout& l = args.w.layout;
  const int64_t blocks = (l.range_end - l.range_begin) * p.heads * ceil_div(columns, tile_n);
  kernel<<<static_cast<unsigned>(blocks), threads_per_block, bytes, stream>>>(
      args, a, b, z, can_vectorize(a, sizeof(T)), can_vectorize(b, sizeof(T)), can_vectorize(z, sizeof(T)));
  return cudaGetLastError();
}

template <Output output, typename T>
cudaError_t chunk_outputs(const OutputArgs& args, cudaStream_t stream) {
  const int64_t columns = output == Output::h || output == Output::dv ? args.w.p.dv : args.w.p.dqk;
  return column_tile(columns) == 64 ? launch_outputs<output, T, 64>(args, columns, stream)
                                    : launch_outputs<output, T, 128>(args, columns, stream);
}

}  // namespace flash_xlstm::cuda::portable
