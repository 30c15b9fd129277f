// The portable mLSTM: any GPU from compute capability 8.0 on, every dtype, size and layout.
#pragma once

#include <string>

#include "params/mlstm.h"

namespace flash_xlstm::cuda::portable {

inline std::string words() {
  return "portable (mma.sync tensor cores: bfloat16, tf32 and a bfloat16 rest for float16, 3x split tf32 for float32)";
}

int64_t forward_workspace_bytes(const MlstmForward& params);
cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

int64_t backward_workspace_bytes(const MlstmBackward& params);
cudaError_t backward(const MlstmBackward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::portable
