// dR and db of the sLSTM from dx and h, after the loop over the tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "params/slstm.h"

namespace flash_xlstm::cuda {

int64_t slstm_weight_gradients_workspace_bytes(const SlstmBackward& params);
cudaError_t slstm_weight_gradients(const SlstmBackward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
