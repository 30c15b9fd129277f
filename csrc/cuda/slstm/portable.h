// The sLSTM on any GPU from compute capability 8.0 on, for every dtype, size and layout.
#pragma once

#include <cuda_runtime_api.h>

#include "params/slstm.h"

namespace flash_xlstm::cuda::slstm_portable {

int64_t forward_workspace_bytes(const SlstmForward& params);
cudaError_t forward(const SlstmForward& params, void* workspace, cudaStream_t stream);

// Makes dx and the initial state's gradients.
int64_t backward_workspace_bytes(const SlstmBackward& params);
cudaError_t backward(const SlstmBackward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::slstm_portable
