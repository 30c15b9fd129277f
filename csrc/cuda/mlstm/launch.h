// Launch functions of the mLSTM kernels. No torch; the caller allocates everything, the scratch buffer included
// (256-byte aligned).
#pragma once

#include <cuda_runtime_api.h>

#include "mlstm_params.h"

namespace flash_xlstm::cuda {

int64_t mlstm_forward_workspace_bytes(const MlstmForward& params);
cudaError_t mlstm_forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

int64_t mlstm_backward_workspace_bytes(const MlstmBackward& params);
cudaError_t mlstm_backward(const MlstmBackward& params, void* workspace, cudaStream_t stream);

constexpr int64_t max_step_dqk = 8192;  // q and k fit a block's shared memory
int64_t mlstm_step_workspace_bytes(const MlstmStep& params);
cudaError_t mlstm_step(const MlstmStep& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
