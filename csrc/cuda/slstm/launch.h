// Launch functions of the sLSTM kernels. No torch; the caller allocates everything, the scratch buffer included
// (256-byte aligned).
#pragma once

#include <cuda_runtime_api.h>

#include "slstm_params.h"

namespace flash_xlstm::cuda {

int64_t slstm_forward_workspace_bytes(const SlstmForward& params);
cudaError_t slstm_forward(const SlstmForward& params, void* workspace, cudaStream_t stream);

int64_t slstm_backward_workspace_bytes(const SlstmBackward& params);
cudaError_t slstm_backward(const SlstmBackward& params, void* workspace, cudaStream_t stream);

int64_t slstm_step_workspace_bytes(const SlstmStep& params);
cudaError_t slstm_step(const SlstmStep& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
