// The mLSTM for compute capability 9.0: wgmma and the copy engine.
#pragma once

#include <cuda_runtime_api.h>

#include "params/mlstm.h"

namespace flash_xlstm::cuda::hopper {

// Whether these kernels serve the problem on the current device: 16-bit dtype, sizes that are multiples of 8, strides
// that the copy engine can follow.
bool serves(const MlstmForward& params);
bool serves(const MlstmBackward& params);

int64_t forward_workspace_bytes(const MlstmForward& params);
cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

int64_t backward_workspace_bytes(const MlstmBackward& params);
cudaError_t backward(const MlstmBackward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::hopper
