// The sLSTM's loop over the tokens on Hopper: one launch, R in registers (and shared memory), a cluster a head.
#pragma once

#include <cuda_runtime_api.h>

#include "params/slstm.h"

namespace flash_xlstm::cuda::slstm_hopper {

// Whether this problem can run on the current device: compute capability 9.0, a 16-bit dtype (backward: bfloat16), dim
// a multiple of 8 and at most 768 (backward: 512), strides that are multiples of 16 bytes, and a cluster of the size
// that it takes fits.
bool serves(const SlstmForward& params);
bool serves(const SlstmBackward& params);

cudaError_t forward(const SlstmForward& params, cudaStream_t stream);
// dx and the initial state's gradients.
cudaError_t backward(const SlstmBackward& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::slstm_hopper
