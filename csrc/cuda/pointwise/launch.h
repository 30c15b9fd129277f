// Launch functions of the pointwise kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "pointwise_params.h"

namespace flash_xlstm::cuda {

cudaError_t soft_cap(const SoftCap& params, cudaStream_t stream);

// Rows of the norms have at most this many elements.
constexpr int64_t max_norm_dim = 16384;

cudaError_t rms_norm(const RmsNorm& params, cudaStream_t stream);
int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& params);
cudaError_t rms_norm_backward(const RmsNormBackward& params, void* workspace, cudaStream_t stream);

cudaError_t gated_head_norm(const GatedHeadNorm& params, cudaStream_t stream);
int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& params);
cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& params, void* workspace, cudaStream_t stream);

cudaError_t swiglu(const Swiglu& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
