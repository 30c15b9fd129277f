// Launch functions of the causal depthwise convolution. No torch; the caller allocates everything, the scratch buffer
// included (256-byte aligned).
#pragma once

#include <cuda_runtime_api.h>

#include "conv_params.h"

namespace flash_xlstm::cuda {

int64_t conv_forward_workspace_bytes(const ConvForward& params);
cudaError_t conv_forward(const ConvForward& params, void* workspace, cudaStream_t stream);

int64_t conv_backward_workspace_bytes(const ConvBackward& params);
cudaError_t conv_backward(const ConvBackward& params, void* workspace, cudaStream_t stream);

cudaError_t conv_step(const ConvStep& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
