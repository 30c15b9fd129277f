// The mLSTM's forward for compute capability 9.0 with the state on the chip.
#pragma once

#include <string>

#include "params/mlstm.h"

namespace flash_xlstm::cuda::fused {

inline std::string words() {
  return "Hopper with the state in registers for the forward of many bfloat16 sequences and heads of 256 x 512";
}

// Whether these kernels serve the problem on the current device and are the faster ones for it. Inputs' layouts are
// those that the Hopper path reads.
bool serves(const MlstmForward& params);

int64_t forward_workspace_bytes(const MlstmForward& params);
cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::fused
