// Which kernels serve an sLSTM problem. A faster path for one GPU is a branch here.
#include "cuda/slstm/launch.h"

#include <algorithm>

#include "cuda/slstm/portable.h"
#include "cuda/slstm/weights.h"

namespace flash_xlstm::cuda {

int64_t slstm_forward_workspace_bytes(const SlstmForward& params) {
  return slstm_portable::forward_workspace_bytes(params);
}

cudaError_t slstm_forward(const SlstmForward& params, void* workspace, cudaStream_t stream) {
  return slstm_portable::forward(params, workspace, stream);
}

// The loop and the weights' product run one after the other and share the scratch.
int64_t slstm_backward_workspace_bytes(const SlstmBackward& params) {
  return std::max(slstm_portable::backward_workspace_bytes(params), slstm_weight_gradients_workspace_bytes(params));
}

cudaError_t slstm_backward(const SlstmBackward& params, void* workspace, cudaStream_t stream) {
  const cudaError_t status = slstm_portable::backward(params, workspace, stream);
  return status == cudaSuccess ? slstm_weight_gradients(params, workspace, stream) : status;
}

}  // namespace flash_xlstm::cuda
