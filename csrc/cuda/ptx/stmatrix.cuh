// Thin wrappers for stmatrix and movmatrix: stores and transposes of 8 x 8 matrices of 16-bit elements (sm_90).
#pragma once

#include "cuda/ptx/mma_sync.cuh"

namespace flash_xlstm::cuda::ptx {

// Lane l holds the four bytes 4 (l % 4) .. of row l / 4. Lanes 0 to 7 give the rows' addresses, 16 contiguous bytes.
__device__ __forceinline__ void stmatrix_x1(void* shared, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(shared)), "r"(a) : "memory");
}

// By an address within shared memory.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4(void* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stmatrix_x4(shared_address(shared), a, b, c, d);
}

// Transposes an 8 x 8 matrix. Lane l holds elements 2 (l % 4) and the next of row l / 4, before and after.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Stores four 8 x 8 matrices by columns. A lane l holds elements 2 (l % 4) and the next of row l / 4 of each, and gives
// the address of column l % 8 of matrix l / 8, 16 contiguous bytes.
__device__ __forceinline__ void stmatrix_x4_transposed(void* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace flash_xlstm::cuda::ptx
