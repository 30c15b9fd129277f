// Tensor maps of 16-bit elements: the description of a tensor in memory that the TMA of compute capability 9.0 needs.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace flash_xlstm::cuda {

// Looked up at the first use, so that nothing links libcuda. nullptr where the driver does not have it.
inline auto encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// strides: in bytes, of all dimensions except the first. Elements outside the tensor are read as 0.
template <int rank>
cudaError_t encode(CUtensorMap& map, const void* data, const std::array<uint64_t, rank>& sizes,
                   const std::array<uint64_t, rank - 1>& strides, const std::array<uint32_t, rank>& boxes,
                   CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  const std::array<uint32_t, rank> ones = [] {
    std::array<uint32_t, rank> x;
    x.fill(1);
    return x;
  }();
  const CUresult status =
      encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, rank, const_cast<void*>(data), sizes.data(),
                        strides.data(), boxes.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash_xlstm::cuda
