// Launch functions of the pointwise kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "pointwise_params.h"

namespace flash_xlstm::cuda {

cudaError_t soft_cap(const SoftCap& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
