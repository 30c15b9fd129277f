// Thin wrappers of the stores and transposes of 8 x 8 matrices (sm_90).
#pragma once

#include "cuda/ptx/mma_sync.cuh"

namespace flash_xlstm::cuda::ptx {

__device__ __forceinline__ void stmatrix_x4(void* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The transposed 8 x 8 matrix of 16-bit elements whose row lane / 4 this thread holds two of.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Stores four 8 x 8 matrices of which each thread holds, of row lane / 4, columns 2 (lane % 4) and the next, so that a
// column lies contiguous: lane l gives the address of column l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4_transposed(void* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace flash_xlstm::cuda::ptx
