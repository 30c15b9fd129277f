// States in the slots of a pool (MlstmProblem::pool): which sequences have one, and where m lies.
#pragma once

#include <cmath>
#include <cstdint>

#include "params/mlstm.h"

namespace flash_xlstm::cuda {

#ifdef __CUDACC__
// Whether the sequence has no slot. Then no kernel reads or writes a state for it, and its h is `h_left_out`.
__device__ __forceinline__ bool is_left_out(const MlstmProblem& p, int64_t seq) {
  if (p.pool.indices == nullptr) return false;
  const int32_t slot = p.pool.indices[seq];
  return slot < 0 || slot >= p.pool.num_slots;
}
__device__ __forceinline__ float h_left_out(const MlstmProblem& p, int64_t seq) {
  return p.pool.indices[seq] == -1 ? 0.0f : NAN;
}

// The slot of a sequence that is not left out. Without a pool, states are numbered as the sequences are.
__device__ __forceinline__ int64_t slot_of(const MlstmProblem& p, int64_t seq) {
  return p.pool.indices == nullptr ? seq : p.pool.indices[seq];
}

// Whether a sequence of the pool starts from zero.
__device__ __forceinline__ bool is_fresh(const MlstmProblem& p, int64_t seq) {
  return p.fresh != nullptr && p.fresh[seq];
}

// m before the first token.
__device__ __forceinline__ float initial_m(const MlstmProblem& p, int64_t seq, int64_t head) {
  if (p.pool.indices != nullptr) {
    const bool reads = !is_left_out(p, seq) && !is_fresh(p, seq);
    return reads ? p.pool.m[slot_of(p, seq) * p.pool.m_stride + head] : 0.0f;
  }
  return p.m0 == nullptr ? p.first_m : p.m0[seq * p.heads + head];
}

// Where m after the last token goes: m_last, or the pool. nullptr: nowhere.
__device__ __forceinline__ float* final_m(const MlstmProblem& p, float* m_last, int64_t seq, int64_t head) {
  if (p.pool.indices != nullptr) {
    return is_left_out(p, seq) ? nullptr : p.pool.m + slot_of(p, seq) * p.pool.m_stride + head;
  }
  return m_last == nullptr ? nullptr : m_last + seq * p.heads + head;
}
#endif

}  // namespace flash_xlstm::cuda
