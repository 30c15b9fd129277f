#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_xlstm::cuda {

// For a of at least 0.
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flash_xlstm::cuda
