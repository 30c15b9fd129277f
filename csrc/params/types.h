// What the problem descriptions share.
//
// A header of this folder describes the problems of one op family as structs, and declares the kernels that take them:
// CPU kernels in cpu::, launch functions of CUDA kernels in cuda::. Nothing here depends on torch. Callers allocate all
// memory. A launch function with a `workspace` needs as many bytes as its `_workspace_bytes` gives, 256-byte aligned.
#pragma once

#include <cstdint>

#if defined(FLASH_XLSTM_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
namespace flash_xlstm {
using cudaError_t = int;  // for the declarations of launch functions, which a CPU-only build does not have
using cudaStream_t = void*;
}  // namespace flash_xlstm
#endif

namespace flash_xlstm {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// a / b rounded up, a at least 0.
template <typename A, typename B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// A tensor (batch, seq, heads, dim) with a contiguous last dimension, or (batch, seq, heads). Strides are in elements.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

}  // namespace flash_xlstm
