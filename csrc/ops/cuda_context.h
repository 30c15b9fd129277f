// What an op needs to launch CUDA kernels without linking torch's CUDA libraries.
#pragma once

#include "ops/checks.h"

#ifdef FLASH_XLSTM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flash_xlstm {

#ifdef FLASH_XLSTM_WITH_CUDA
// torch's current stream on the device.
cudaStream_t current_stream(int32_t device);

// Raises RuntimeError with `what` and CUDA's own message.
void check_cuda(cudaError_t status, const char* what);

// Memory of the current device for the launches of one call, from torch's allocator: in the order of torch's current
// stream, as a tensor's is, but the host makes no tensor.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Raises RuntimeError where the device is older than the kernels (compute capability 8.0).
void check_device_supported(int32_t device);
#endif

[[noreturn]] inline void no_cuda_build(const char* op) {
  throw std::runtime_error(join_text(
      op, ": the tensors are on a CUDA device, but this flash-xlstm was built without CUDA kernels "
      "(flash_xlstm.build_info()); reinstall it with nvcc on the PATH and FLASH_XLSTM_CUDA=1"));
}

}  // namespace flash_xlstm
