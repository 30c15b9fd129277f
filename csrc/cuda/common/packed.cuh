// Packed sequences: the tokens of sequence x are [cu_seqlens[x], cu_seqlens[x + 1]) of one row of `seq` tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flash_xlstm::cuda {

struct TokenRange {
  int64_t start, stop;
};

// Wrong offsets are clamped, so that they cannot lead outside the tensors.
__device__ __forceinline__ TokenRange packed_tokens(const int32_t* cu_seqlens, int64_t sequence, int64_t seq) {
  const int64_t start = min(max(static_cast<int64_t>(cu_seqlens[sequence]), int64_t{0}), seq);
  const int64_t stop = min(max(static_cast<int64_t>(cu_seqlens[sequence + 1]), start), seq);
  return {.start = start, .stop = stop};
}

// The last of `count` packed sequences that starts at the token or before.
__device__ __forceinline__ int64_t sequence_of(const int32_t* cu_seqlens, int64_t count, int64_t token) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace flash_xlstm::cuda
