// What m before a sequence gets through eps: the sum of e over the tokens before the first whose m took the input
// gate's branch, and whether there is none.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/mlstm/chunked/layout.cuh"

namespace flash_xlstm::cuda {

#ifdef __CUDACC__
// A warp has one head of one sequence. reset, e: [chunk][head][tokens].
template <int tokens>
__global__ void open_sum_kernel(const __grid_constant__ ChunkLayout<tokens> l, const uint8_t* reset, const float* e,
                                float* sum, float* is_open) {
  const int64_t seq = blockIdx.x / l.heads, head = blockIdx.x % l.heads;
  const int lane = static_cast<int>(threadIdx.x);
  int64_t begin, end;
  l.chunk_range(seq, begin, end);
  double total = 0.0;
  bool open = true;
  for (int64_t chunk = begin; chunk < end && open; ++chunk) {
    const int64_t at = (chunk * l.heads + head) * tokens + lane;
    for (int t = 0; t < tokens && open; t += 32) {
      const unsigned resets = __ballot_sync(all_lanes, reset[at + t] != 0);
      if (lane < (resets != 0 ? __ffs(static_cast<int>(resets)) - 1 : 32)) total += e[at + t];
      open = resets == 0;
    }
  }
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(all_lanes, total, d);
  if (lane != 0) return;
  sum[blockIdx.x] = static_cast<float>(total);
  is_open[blockIdx.x] = open ? 1.0f : 0.0f;
}

template <int tokens>
cudaError_t sum_open(const ChunkLayout<tokens>& l, const uint8_t* reset, const float* e, float* sum, float* is_open,
                     cudaStream_t stream) {
  open_sum_kernel<tokens><<<static_cast<unsigned>(l.num_seqs * l.heads), 32, 0, stream>>>(l, reset, e, sum, is_open);
  return cudaGetLastError();
}
#endif

}  // namespace flash_xlstm::cuda
