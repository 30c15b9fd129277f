// P' and g', by one warpgroup, 16 tokens t to each warp. For a chunk
//   T = q k^T and q n, one product of 72 columns;
//   D T below the diagonal, its row sums, s_t = scale (sums + g q n), d_t;
//   P' = scale D T / d_t, rounded, g' = scale g / d_t, and s_t, to shared memory.
// It runs ahead of the states by a chunk. s_t is made from float32 throughout; v's warp stores it.
#pragma once

#include "cuda/mlstm/fused/products.cuh"
#include "cuda/mlstm/fused/shared.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::fused {

// A product takes 0 times what is not finite as NaN. Rows of k that have no weight at the chunk's end, padding or what
// lies behind the sequence's end, are therefore set to 0 once T is made, where T shows that one may not be finite.
__device__ __forceinline__ void clear_rows_without_weight(Shared& sh, int s) {
  const int row = threadIdx.x % 128 / 2, side = threadIdx.x % 2;
  if (sh.gates[s].w[row] != 0.0f) return;
#pragma unroll 1
  for (int x = 0; x < panels * 8; x += 2) {
    *reinterpret_cast<uint4*>(sh.k[s] + x / 8 * k_panel + row * 128 + (x % 8 + side) * 16) = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void make_weights(const Args& args, Shared& sh) {
  const int pos = lane() % 4, quad = lane() / 4, warp = threadIdx.x / 32 % 4;
  const int row0 = warp * 16 + quad;  // and row0 + 8
  Walk walk(args);
  for (int it = 0; walk.goes_on(args); ++it, walk.advance(args)) {
    const int s = it & 1, parity = (it >> 1) & 1;
    ptx::mbarrier_wait(&sh.full_q[s], parity);
    ptx::mbarrier_wait(&sh.full_k[s], parity);
    float t[36];
#pragma unroll
    for (int x = 0; x < 36; ++x) t[x] = 0.0f;
    const uint64_t q = ptx::wgmma_descriptor(address(sh.q[s])), k = ptx::wgmma_descriptor(address(sh.k[s]));
    ptx::hold(t);
    ptx::wgmma_fence();
#pragma unroll
    for (int x = 0; x < dqk / 16; ++x) {
      product_72(t, ptx::advanced(q, x / 4 * q_panel + x % 4 * 32), ptx::advanced(k, x / 4 * k_panel + x % 4 * 32),
                 x > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(t);
    release_everywhere(&sh.empty_q[s]);
    float odd = 0.0f;  // a k that is not finite shows in every row
#pragma unroll
    for (int c = 0; c < 8; ++c) odd = fmaf(t[c * 4], 0.0f, fmaf(t[c * 4 + 1], 0.0f, odd));
    if (ptx::named_barrier_or(1, 128, odd != 0.0f)) {
      clear_rows_without_weight(sh, s);
      ptx::fence_async_shared();
    }
    release(&sh.good_k[s]);

    const GateRecord& gates = sh.gates[s];
    float sum[2];  // g q n first
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = (t[32 + r * 2] + t[33 + r * 2]) * gates.g[row0 + r * 8];
    ptx::keep_order();
    const float2 alpha[2] = {gates.alpha[row0], gates.alpha[row0 + 8]};
    const int ahead = row0 - pos * 2;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 beta = *reinterpret_cast<const float4*>(gates.beta + c * 8 + pos * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          float& x = t[c * 4 + r * 2 + y];
          const float log =
              y ? (alpha[r].x - beta.z) + (alpha[r].y - beta.w) : (alpha[r].x - beta.x) + (alpha[r].y - beta.y);
          const float d = hopper::fast_exp2(log), weighted = x * d;
          x = ahead + r * 8 - c * 8 - y >= 0 && d != 0.0f ? weighted : 0.0f;
          sum[r] += x;
        }
    }
    float factor[2], g[2], s_t[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + r * 8;
      float both = sum[r];
      both += __shfl_xor_sync(all_lanes, both, 1);
      both += __shfl_xor_sync(all_lanes, both, 2);
      s_t[r] = args.scale * both;
      const float floor = gates.exp_neg_m[row];
      const float size = !(fabsf(s_t[r]) < floor) ? fabsf(s_t[r]) : floor;  // a NaN stays
      factor[r] = args.normalize ? __fdividef(args.scale, size + args.eps) : args.scale;
      g[r] = gates.g[row] * factor[r];
    }
    ptx::mbarrier_wait(&sh.empty_p[s], parity ^ 1);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      uint32_t two[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        two[z] = pack<bf16>(t[x * 8 + z * 2] * factor[z % 2], t[x * 8 + z * 2 + 1] * factor[z % 2]);
      }
      ptx::stmatrix_x4(sh.p[s] + swizzled(warp * 16 + lane() % 16, x * 2 + lane() / 16), two[0], two[1], two[2],
                       two[3]);
    }
    // Lane l stores g' or, from 16 on, s of token l % 16 of the warp's 16. By stmatrix, as P': racecheck does not follow
    // it. Of plain stores it takes only the arriving lane's as ordered, and the arrivals of all writing and reading
    // threads would be 384 a chunk instead of 12.
    const int from = lane() % 8 * 4 + lane() / 16;
    const float low = __shfl_sync(all_lanes, pos == 0 ? g[0] : s_t[0], from);
    const float high = __shfl_sync(all_lanes, pos == 0 ? g[1] : s_t[1], from);
    ptx::stmatrix_x1(&sh.g[it & 3][lane() / 4 % 2][warp * 16 + lane() % 4 * 4],
                     __float_as_uint(lane() % 16 < 8 ? low : high));
    ptx::fence_async_shared();
    release(&sh.full_p[s]);
    release_everywhere(&sh.empty_k[s]);
  }
}

}  // namespace flash_xlstm::cuda::fused
