// Which kernels serve an mLSTM problem. A faster path for one GPU is a branch here.
#include "params/mlstm.h"

#include "cuda/mlstm/portable/portable.h"
#ifdef FLASH_XLSTM_WITH_HOPPER
#include "cuda/mlstm/hopper/hopper.h"
#else
namespace flash_xlstm::cuda {
namespace hopper = portable;  // not built: FLASH_XLSTM_CUDA_ARCHS without 90a
}
#endif

namespace flash_xlstm::cuda {
namespace {

template <typename Params>
bool serves(const Params& params) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  return hopper::serves(params);
#else
  static_cast<void>(params);
  return false;
#endif
}

}  // namespace

int64_t mlstm_forward_workspace_bytes(const MlstmForward& params) {
  return serves(params) ? hopper::forward_workspace_bytes(params) : portable::forward_workspace_bytes(params);
}

cudaError_t mlstm_forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  return serves(params) ? hopper::forward(params, workspace, stream)
                                : portable::forward(params, workspace, stream);
}

int64_t mlstm_backward_workspace_bytes(const MlstmBackward& params) {
  return serves(params) ? hopper::backward_workspace_bytes(params)
                                : portable::backward_workspace_bytes(params);
}

cudaError_t mlstm_backward(const MlstmBackward& params, void* workspace, cudaStream_t stream) {
  return serves(params) ? hopper::backward(params, workspace, stream)
                                : portable::backward(params, workspace, stream);
}

}  // namespace flash_xlstm::cuda
