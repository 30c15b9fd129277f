// Launch functions of products with few rows. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "pointwise_params.h"

namespace flash_xlstm::cuda {

// bfloat16, at most 16 rows; `in` a multiple of 8; x, its rows and the weights begin at multiples of 16 bytes.
cudaError_t fused_linear_rows(const FusedLinearRows& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
