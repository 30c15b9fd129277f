// Which kernels serve an mLSTM problem. A faster path for one GPU is a branch here.
#include "cuda/mlstm/launch.h"

#include "cuda/mlstm/portable/portable.h"

namespace flash_xlstm::cuda {

int64_t mlstm_forward_workspace_bytes(const MlstmForward& params) {
  return portable::forward_workspace_bytes(params);
}

cudaError_t mlstm_forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  return portable::forward(params, workspace, stream);
}

int64_t mlstm_backward_workspace_bytes(const MlstmBackward& params) {
  return portable::backward_workspace_bytes(params);
}

cudaError_t mlstm_backward(const MlstmBackward& params, void* workspace, cudaStream_t stream) {
  return portable::backward(params, workspace, stream);
}

}  // namespace flash_xlstm::cuda
