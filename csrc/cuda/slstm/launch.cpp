// Which kernels serve an sLSTM problem. A path for another GPU is a branch here.
#include "params/slstm.h"

#include <algorithm>
#include <string>

#include "cuda/slstm/portable.h"
#include "cuda/slstm/weights.h"
#ifdef FLASH_XLSTM_WITH_HOPPER
#include "cuda/slstm/hopper/hopper.h"
#endif

namespace flash_xlstm::cuda {
namespace {

template <typename Params>
bool on_hopper(const Params& params) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  return slstm_hopper::serves(params);
#else
  static_cast<void>(params);
  return false;
#endif
}

cudaError_t backward_loop(const SlstmBackward& params, void* workspace, cudaStream_t stream) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (on_hopper(params)) return slstm_hopper::backward(params, stream);
#endif
  return slstm_portable::backward(params, workspace, stream);
}

}  // namespace

int64_t slstm_forward_workspace_bytes(const SlstmForward& params) {
  return on_hopper(params) ? 0 : slstm_portable::forward_workspace_bytes(params);
}

cudaError_t slstm_forward(const SlstmForward& params, void* workspace, cudaStream_t stream) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (on_hopper(params)) return slstm_hopper::forward(params, stream);
#endif
  return slstm_portable::forward(params, workspace, stream);
}

// The loop over the tokens and the weights' product run one after the other and share the workspace.
int64_t slstm_backward_workspace_bytes(const SlstmBackward& params) {
  const int64_t loop = on_hopper(params) ? 0 : slstm_portable::backward_workspace_bytes(params);
  return std::max(loop, slstm_weight_gradients_workspace_bytes(params));
}

cudaError_t slstm_backward(const SlstmBackward& params, void* workspace, cudaStream_t stream) {
  const cudaError_t status = backward_loop(params, workspace, stream);
  return status == cudaSuccess ? slstm_weight_gradients(params, workspace, stream) : status;
}

std::string slstm_words([[maybe_unused]] int major, [[maybe_unused]] int minor) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (major == 9 && minor == 0) return slstm_hopper::words() + ", else portable";
#endif
  return "portable";
}

}  // namespace flash_xlstm::cuda
