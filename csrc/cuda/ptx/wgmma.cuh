// wgmma.mma_async m64nNk16, 16-bit operands, float32 accumulators (sm_90a). Lane l of warp w of the warpgroup holds in
// d[4 g + r] the accumulator's row 16 w + l / 4 + 8 (r / 2), column 8 g + 2 (l % 4) + r % 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_xlstm::cuda::ptx {

// Operand tiles lie in shared memory as the TMA writes them: boxes with rows of 64 elements (128 bytes), 128-byte
// swizzle, aligned to 1024 bytes.
//   K-major: a row is one index of M or N, and the box holds 64 of K. The next k16 step is 32 bytes further on.
//   Transposed (B only): a row is one index of K, and the box holds 64 of N. The next k16 step is 2048 bytes further
//   on, the next 64 of N `box_bytes`.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared_address, uint32_t box_bytes = 16) {
  constexpr uint64_t swizzle_128 = 1ull << 62, eight_rows = 1024 >> 4;
  return swizzle_128 | (eight_rows << 32) | (static_cast<uint64_t>(box_bytes >> 4) << 16) |
         ((shared_address & 0x3ffff) >> 4);
}
// `bytes` further on, by one addition: the field of the address does not overflow.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000ull) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across a fence or a wait.
template <int count>
__device__ __forceinline__ void hold(float (&d)[count]) {
#pragma unroll
  for (int x = 0; x < count; ++x) asm volatile("" : "+f"(d[x])::"memory");
}

// Arithmetic on accumulators in place. The plain operators give the results new registers, which spills.
__device__ __forceinline__ void mul_in_place(float& x, float factor) {
  asm volatile("mul.f32 %0, %0, %1;" : "+f"(x) : "f"(factor));
}
__device__ __forceinline__ void fma_in_place(float& x, float a, float y) {
  asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(x) : "f"(a), "f"(y));
}

// T: bf16 or half.
template <typename T, int n>
struct Wgmma;

#define WGMMA_TYPE __nv_bfloat16
#define WGMMA_NAME "bf16"
#include "cuda/ptx/wgmma_shapes.inc"
#undef WGMMA_TYPE
#undef WGMMA_NAME
#define WGMMA_TYPE __half
#define WGMMA_NAME "f16"
#include "cuda/ptx/wgmma_shapes.inc"
#undef WGMMA_TYPE
#undef WGMMA_NAME

}  // namespace flash_xlstm::cuda::ptx
