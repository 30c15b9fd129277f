// Products with few rows for compute capability 9.0, within the limits of params/linear.h.
#pragma once

#include <cuda_runtime_api.h>

#include "params/linear.h"

namespace flash_xlstm::cuda::linear_hopper {

bool serves(const FusedLinearRows& params);
cudaError_t fused_linear_rows(const FusedLinearRows& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::linear_hopper
