// Sums over the pairs within one chunk, from the float32 tiles q k^T and dh v^T (exact products, float32 sums). A block
// of four warps (two by two) makes both 64 x 64 tiles of one chunk of one head. It has two uses.
//
// gates: the shares of q_t . dq_t and k_j . dk_j from within the chunk. They are the row and column sums of
//
//   Y_tj = scale D_tj (q_t . k_j) (dh_t . v_j / d_t + delta_t),   j <= t.
//
// dq and dk themselves would not do: their operands are rounded, and the gates' gradients are small differences of
// these sums.
//
// tokens (16-bit dtypes): u_t = dh_t . h_t without the rounding of h, and delta and e from it:
//
//   u_t d_t = sum_j scale D_tj (q_t . k_j) (dh_t . v_j) + scale g_t q_t . (c dh_t),   c at the chunk's start.
//
// c is read as dq's kernel reads it. So numerator and normalizer cancel where h does not depend on their common scale:
// dn, df and dm are such differences.
#include "cuda/mlstm/portable/kernels.h"
#include "cuda/mlstm/portable/tiles.cuh"

namespace flash_xlstm::cuda::portable {
namespace {

template <typename T>
struct ChunkSumsShared {
  using E = typename Arithmetic<T>::Element;
  static constexpr int tile_k = 64 / sizeof(E);
  static constexpr int pitch = Arithmetic<T>::pitch_k(tile_k);
  static constexpr int num_stages = 3;
  struct Stage {
    E a[chunk_tokens * pitch];
    E b[chunk_tokens * pitch];
  };
  alignas(16) Stage stage[num_stages];
  float2 row[chunk_tokens], column[chunk_tokens];
  float m[chunk_tokens], inv_d[chunk_tokens], delta[chunk_tokens];
  float row_sum[2][chunk_tokens], col_sum[2][chunk_tokens];
};

// acc (a warp's 32 x 32 of the 64 x 64 tile) = A B^T over `inner` columns, B from row b_row0 on.
template <typename T, typename G>
__device__ __forceinline__ void product_tile(float (&acc)[2][4][4], ChunkSumsShared<T>& sh, const Matrix<T>& a,
                                             const Matrix<G>& b, int64_t b_row0, int64_t inner, int warp_row,
                                             int warp_col) {
  using Shared = ChunkSumsShared<T>;
  constexpr int tile_k = Shared::tile_k, pitch = Shared::pitch, num_stages = Shared::num_stages;
  constexpr Computed computed = std::is_same_v<T, G> ? Computed::none : Computed::b;  // inputs, or a state
  const auto fetch = [&](int64_t k, int index) {
    if (k < inner) {
      load_tile<chunk_tokens, tile_k, pitch>(sh.stage[index].a, a, 0, k);
      load_tile<chunk_tokens, tile_k, pitch>(sh.stage[index].b, b, b_row0, k);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int r = 0; r < 4; ++r) acc[mt][nt][r] = 0.0f;
  for (int x = 0; x < num_stages - 1; ++x) fetch(static_cast<int64_t>(x) * tile_k, x);
  int step = 0;
  for (int64_t k = 0; k < inner; k += tile_k, ++step) {
    ptx::cp_async_wait<num_stages - 2>();
    __syncthreads();
    fetch(k + (num_stages - 1) * tile_k, (step + num_stages - 1) % num_stages);
    const auto& stage = sh.stage[step % num_stages];
    warp_mma<T, false, false, computed>(acc, stage.a + warp_row * pitch, pitch, stage.b + warp_col * pitch, pitch, 0,
                                        tile_k);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

enum class Sums { tokens, gates };

template <Sums sums, typename T>
__global__ void __launch_bounds__(threads_per_block, Arithmetic<T>::split ? 3 : 4)
    chunk_sums_kernel(const __grid_constant__ Work w, const Strided dh, const float* s, bool qk_vectors,
                      bool v_vectors, bool dh_vectors) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& sh = *reinterpret_cast<ChunkSumsShared<T>*>(shared_bytes);
  const Layout& l = w.layout;
  const int64_t item = blockIdx.x;
  const int head = static_cast<int>(item % l.heads);
  Chunk chunk;
  if (!l.locate(item / l.heads, chunk)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = (warp / 2) * 32, warp_col = (warp % 2) * 32;
  const int group = lane / 4, pos = lane % 4;

  if (threadIdx.x < chunk_tokens) {
    const int64_t at = item * chunk_tokens + threadIdx.x;
    sh.row[threadIdx.x] = w.scratch.row[at];
    sh.column[threadIdx.x] = w.scratch.column[at];
    sh.m[threadIdx.x] = w.scratch.m[at];
    if constexpr (sums == Sums::gates) {
      sh.inv_d[threadIdx.x] = w.scratch.inv_d[at];
      sh.delta[threadIdx.x] = w.scratch.delta[at];
    }
  }
  const auto rows = [&](const Strided& t, bool vectors, int64_t dim) {
    return chunk_rows<T>(t, vectors, chunk.row, chunk.first, head, chunk.length, dim);
  };
  float qk[2][4][4], gv[2][4][4];
  product_tile<T>(qk, sh, rows(w.p.q, qk_vectors, l.dqk), rows(w.p.k, qk_vectors, l.dqk), 0, l.dqk, warp_row, warp_col);
  product_tile<T>(gv, sh, rows(dh, dh_vectors, l.dv), rows(w.p.v, v_vectors, l.dv), 0, l.dv, warp_row, warp_col);

  float row_sum[2][2] = {}, col_sum[4][2] = {};
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int t = warp_row + mt * 16 + group + (r / 2) * 8, j = warp_col + nt * 8 + pos * 2 + r % 2;
        if (j > t) continue;
        const float decay = exp_sum(sh.row[t], sh.column[j]);
        float weighted = gv[mt][nt][r];
        if constexpr (sums == Sums::gates) weighted = weighted * sh.inv_d[t] + sh.delta[t];
        const float y = decay == 0.0f ? 0.0f : w.p.scale * decay * qk[mt][nt][r] * weighted;
        row_sum[mt][r / 2] += y;
        col_sum[nt][r % 2] += y;
      }
  if constexpr (sums == Sums::tokens) {
    const int64_t state_row = (l.slot(chunk.chunk, chunk.seq) * l.heads + head) * l.dqk;
    using E = typename Arithmetic<T>::Element;
    const Matrix<E> state{.data = static_cast<const E*>(w.scratch.c) + state_row * w.dv_pitch,
                          .stride = w.dv_pitch,
                          .rows = static_cast<int>(l.dqk),
                          .cols = l.dv,
                          .vectors = true};
    const float m_start = w.scratch.m_boundary[chunk.boundary * l.heads + head];
    const T* const q = static_cast<const T*>(w.p.q.data) + chunk.row * w.p.q.batch + head * w.p.q.head;
    for (int64_t col0 = 0; col0 < l.dqk; col0 += chunk_tokens) {
      product_tile<T>(gv, sh, rows(dh, dh_vectors, l.dv), state, col0, l.dv, warp_row, warp_col);
#pragma unroll
      for (int mt = 0; mt < 2; ++mt)
#pragma unroll
        for (int half_row = 0; half_row < 2; ++half_row) {
          const int t = warp_row + mt * 16 + group + half_row * 8;
          if (t >= chunk.length) continue;
          const float g = w.p.scale * exp_sum(sh.row[t], m_start);
          const T* const q_row = q + (chunk.first + t) * w.p.q.seq;
          float sum = 0.0f;
#pragma unroll
          for (int nt = 0; nt < 4; ++nt)
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              const int64_t col = col0 + warp_col + nt * 8 + pos * 2 + x;
              if (col < l.dqk) sum += gv[mt][nt][half_row * 2 + x] * to_float(q_row[col]);
            }
          row_sum[mt][half_row] += g == 0.0f ? 0.0f : g * sum;
        }
    }
  }
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      float sum = row_sum[mt][half_row];
      for (int d = 1; d < 4; d *= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
      if (pos == 0) sh.row_sum[warp % 2][warp_row + mt * 16 + group + half_row * 8] = sum;
    }
  if constexpr (sums == Sums::gates) {
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float sum = col_sum[nt][x];
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
        if (group == 0) sh.col_sum[warp / 2][warp_col + nt * 8 + pos * 2 + x] = sum;
      }
  }
  __syncthreads();
  if (threadIdx.x >= chunk_tokens) return;
  const float row_total = sh.row_sum[0][threadIdx.x] + sh.row_sum[1][threadIdx.x];
  if constexpr (sums == Sums::tokens) {
    const int t = threadIdx.x;
    const int64_t token = (chunk.row * l.seq + chunk.first + t) * l.heads + head;
    const int64_t at = item * chunk_tokens + t;
    if (t < chunk.length) {
      const Normalizer d(s[token], sh.m[t], w.p.eps);
      store_token_gradients(w, at, d, row_total * d.inverse);
    } else {
      store_no_gradients(w, at);
    }
  } else {
    const int64_t at = (column_tiles(l.dqk) * l.max_chunks * l.heads + item) * chunk_tokens + threadIdx.x;
    w.scratch.q_dq[at] = row_total;
    w.scratch.k_dk[at] = sh.col_sum[0][threadIdx.x] + sh.col_sum[1][threadIdx.x];
  }
}

template <Sums sums, typename T>
cudaError_t launch_chunk_sums(const Work& w, const Strided& dh, const float* s, cudaStream_t stream) {
  const int bytes = sizeof(ChunkSumsShared<T>), element = sizeof(T);
  const auto kernel = chunk_sums_kernel<sums, T>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t blocks = w.layout.max_chunks * w.layout.heads;
  kernel<<<static_cast<unsigned>(blocks), threads_per_block, bytes, stream>>>(
      w, dh, s, can_vectorize(w.p.q, element) && can_vectorize(w.p.k, element), can_vectorize(w.p.v, element),
      can_vectorize(dh, element));
  return cudaGetLastError();
}

}  // namespace

cudaError_t token_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  if (!w.p.normalize) return token_gradients_from_h(w, params, stream);
  switch (w.p.dtype) {
    case DType::bfloat16: return launch_chunk_sums<Sums::tokens, bf16>(w, params.dh, params.s, stream);
    case DType::float16: return launch_chunk_sums<Sums::tokens, half>(w, params.dh, params.s, stream);
    case DType::float32: return token_gradients_from_h(w, params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t chunk_gate_sums(const Work& w, const Strided& dh, cudaStream_t stream) {
  return dispatch_dtype(w.p.dtype, [&](auto zero) {
    return launch_chunk_sums<Sums::gates, decltype(zero)>(w, dh, nullptr, stream);
  });
}

}  // namespace flash_xlstm::cuda::portable
