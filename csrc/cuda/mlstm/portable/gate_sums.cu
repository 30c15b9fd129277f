// The shares of q_t . dq_t and k_j . dk_j from pairs within one chunk: the row and column sums of
//
//   Y_tj = scale D_tj (q_t . k_j) (dh_t . v_j / d_t + delta_t),   j <= t
//
// taken from the float32 tiles q k^T and dh v^T (exact products, float32 sums) rather than from dq and dk, whose
// operands are rounded: the gates' gradients are differences of these sums and would keep the rounding of the whole.
// One block of four warps (two by two) makes both 64 x 64 tiles of one chunk of one head.
#include "cuda/mlstm/portable/kernels.h"
#include "cuda/mlstm/portable/tiles.cuh"

namespace flash_xlstm::cuda::portable {
namespace {

template <typename T>
struct GateSumsShared {
  using E = typename Arithmetic<T>::Element;
  static constexpr int tile_k = 64 / sizeof(E);
  static constexpr int pitch = Arithmetic<T>::pitch_k(tile_k);
  static constexpr int num_stages = 3;
  struct Stage {
    E a[chunk_tokens * pitch];
    E b[chunk_tokens * pitch];
  };
  alignas(16) Stage stage[num_stages];
  float2 b[chunk_tokens];
  float i[chunk_tokens], m[chunk_tokens], inv_d[chunk_tokens], delta[chunk_tokens];
  float row_sum[2][chunk_tokens], col_sum[2][chunk_tokens];
};

// acc (a warp's 32 x 32 of the 64 x 64 tile) = A B^T over `inner` columns.
template <typename T>
__device__ __forceinline__ void product_tile(float (&acc)[2][4][4], GateSumsShared<T>& sh, const Matrix<T>& a,
                                             const Matrix<T>& b, int64_t inner, int warp_row, int warp_col) {
  using Shared = GateSumsShared<T>;
  constexpr int tile_k = Shared::tile_k, pitch = Shared::pitch, num_stages = Shared::num_stages;
  const auto fetch = [&](int64_t k, int index) {
    if (k < inner) {
      load_tile<chunk_tokens, tile_k, pitch>(sh.stage[index].a, a, 0, k);
      load_tile<chunk_tokens, tile_k, pitch>(sh.stage[index].b, b, 0, k);
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
    warp_mma<T, false, false>(acc, stage.a + warp_row * pitch, pitch, stage.b + warp_col * pitch, pitch, 0, tile_k);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(threads_per_block, 4)
    gate_sums_kernel(const __grid_constant__ Work w, const Strided dh, bool qk_vectors, bool v_vectors,
                     bool dh_vectors) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& sh = *reinterpret_cast<GateSumsShared<T>*>(shared_bytes);
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
    sh.b[threadIdx.x] = w.scratch.b[at];
    sh.i[threadIdx.x] = w.scratch.i[at];
    sh.m[threadIdx.x] = w.scratch.m[at];
    sh.inv_d[threadIdx.x] = w.scratch.inv_d[at];
    sh.delta[threadIdx.x] = w.scratch.delta[at];
  }
  const auto rows = [&](const Strided& t, bool vectors, int64_t dim) {
    return chunk_rows<T>(t, vectors, chunk.row, chunk.first, head, chunk.length, dim);
  };
  float qk[2][4][4], gv[2][4][4];
  product_tile<T>(qk, sh, rows(w.p.q, qk_vectors, l.dqk), rows(w.p.k, qk_vectors, l.dqk), l.dqk, warp_row, warp_col);
  product_tile<T>(gv, sh, rows(dh, dh_vectors, l.dv), rows(w.p.v, v_vectors, l.dv), l.dv, warp_row, warp_col);

  float row_sum[2][2] = {}, col_sum[4][2] = {};
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int t = warp_row + mt * 16 + group + (r / 2) * 8, j = warp_col + nt * 8 + pos * 2 + r % 2;
        if (j > t) continue;
        const float decay = expf((sh.b[t].x - sh.b[j].x) + (sh.b[t].y - sh.b[j].y) + (sh.i[j] - sh.m[t]));
        const float y = decay == 0.0f ? 0.0f
                                      : w.p.scale * decay * qk[mt][nt][r] *
                                            (gv[mt][nt][r] * sh.inv_d[t] + sh.delta[t]);
        row_sum[mt][r / 2] += y;
        col_sum[nt][r % 2] += y;
      }
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      float sum = row_sum[mt][half_row];
      for (int d = 1; d < 4; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (pos == 0) sh.row_sum[warp % 2][warp_row + mt * 16 + group + half_row * 8] = sum;
    }
#pragma unroll
  for (int nt = 0; nt < 4; ++nt)
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float sum = col_sum[nt][x];
      for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (group == 0) sh.col_sum[warp / 2][warp_col + nt * 8 + pos * 2 + x] = sum;
    }
  __syncthreads();
  if (threadIdx.x < chunk_tokens) {
    const int64_t at = (column_tiles(l.dqk) * l.max_chunks * l.heads + item) * chunk_tokens + threadIdx.x;
    w.scratch.q_dq[at] = sh.row_sum[0][threadIdx.x] + sh.row_sum[1][threadIdx.x];
    w.scratch.k_dk[at] = sh.col_sum[0][threadIdx.x] + sh.col_sum[1][threadIdx.x];
  }
}

}  // namespace

cudaError_t chunk_gate_sums(const Work& w, const Strided& dh, cudaStream_t stream) {
  return dispatch_dtype(w.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int bytes = sizeof(GateSumsShared<T>), element = sizeof(T);
    const auto kernel = gate_sums_kernel<T>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const int64_t blocks = w.layout.max_chunks * w.layout.heads;
    kernel<<<static_cast<unsigned>(blocks), threads_per_block, bytes, stream>>>(
        w, dh, can_vectorize(w.p.q, element) && can_vectorize(w.p.k, element), can_vectorize(w.p.v, element),
        can_vectorize(dh, element));
    return cudaGetLastError();
  });
}

}  // namespace flash_xlstm::cuda::portable
