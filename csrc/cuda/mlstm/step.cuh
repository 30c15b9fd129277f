// What the step kernels share: elements and groups of a state in memory, slots, gates.
#pragma once

#include <cstring>

#include "cuda/numeric.cuh"
#include "mlstm_params.h"

namespace flash_xlstm::cuda {

template <typename C, int width>
struct alignas(sizeof(C) * width) Group {
  C value[width];
};

template <typename C, int width>
__device__ __forceinline__ Group<C, width> load_state(const C* at) {
  Group<C, width> group;
  if constexpr (width > 1) {
    const uint4 bits = load_16_once(at);
    memcpy(&group, &bits, 16);
  } else {
    group.value[0] = *at;
  }
  return group;
}
template <typename C, int width>
__device__ __forceinline__ void store_state(C* at, const Group<C, width>& group) {
  if constexpr (width > 1) {
    uint4 bits;
    memcpy(&bits, &group, 16);
    store_16(at, bits);
  } else {
    *at = group.value[0];
  }
}

// An element as it lies in memory, to be converted when it is needed: a conversion right behind each load would wait
// for one after the other.
struct Raw {
  uint32_t bits;
};
__device__ __forceinline__ Raw load_raw(const void* data, int64_t index, bool is_float) {
  if (is_float) return {static_cast<const uint32_t*>(data)[index]};
  return {static_cast<const uint16_t*>(data)[index]};
}
__device__ __forceinline__ float raw_to_float(Raw raw, DType dtype) {
  const float from_half = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.bits)));
  return dtype == DType::float16 ? from_half : __uint_as_float(dtype == DType::float32 ? raw.bits : raw.bits << 16);
}

// Relaxed: what has to come before the barrier are reads whose values have been used, and nothing has been written that
// another block reads. A release would wait for memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// The slot of a row's state; `skipped_slot` where the row is left out, `no_slot` where its index is outside the states.
constexpr int64_t skipped_slot = -1, no_slot = -2;
__device__ __forceinline__ int64_t step_slot(const MlstmStep& p, int64_t row) {
  const int64_t slot = p.state_indices == nullptr ? row : p.state_indices[row];
  return slot >= -1 && slot < p.num_slots ? slot : no_slot;
}

// A token's stabilizer, and what its gates keep of the old state and take in of k v^T.
struct StepGates {
  float m, keep, take;

  __device__ StepGates(float i, float f, float m_before, float cap) {
    i = cap_gate(i, cap);
    const float carried = log_sigmoid(cap_gate(f, cap)) + m_before;
    m = fmaxf(carried, i), keep = expf(carried - m), take = expf(i - m);
  }
  // What q c is multiplied by, where q n is `s`.
  __device__ float factor(float s, float scale, float eps) const {
    s *= scale;
    // fmaxf would drop a NaN.
    return isnan(s) ? s : scale / (fmaxf(fabsf(s), expf(-m)) + eps);
  }
};

__device__ __forceinline__ float warp_sum(float s) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) s += __shfl_xor_sync(0xffffffffu, s, distance);
  return s;
}

}  // namespace flash_xlstm::cuda
