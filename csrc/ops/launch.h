// What the ops share around their kernels: dispatch by device, scratch memory, registration.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/checks.h"
#include "params/types.h"

namespace flash_xlstm {

[[noreturn]] inline void no_cuda_build(const char* op) {
  throw std::runtime_error(
      join_text(op,
                ": the tensors are on a CUDA device, but this flash-xlstm was built without CUDA kernels "
                "(flash_xlstm.build_info()); reinstall it with nvcc on the PATH and FLASH_XLSTM_CUDA=1"));
}

#ifdef FLASH_XLSTM_WITH_CUDA
// Memory of the current device for the launches of one call, 512-byte aligned. It comes from torch's caching allocator
// and is ordered by torch's current stream, like a tensor's, but without the host cost of a tensor.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Scratch& operator=(Scratch&&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// torch's current stream on the device.
cudaStream_t current_stream(int32_t device);
// Raises RuntimeError with `what` and CUDA's own message.
void check_cuda(cudaError_t status, const char* what);
// Raises RuntimeError where the device is older than the kernels (compute capability 8.0).
void check_device_supported(int32_t device);

// Calls launch(stream), which returns a cudaError_t, with the device of `t` as the current device.
template <typename F>
void on_cuda(const char* op, const Tensor& t, F&& launch) {
  const int32_t device = t.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_device_supported(device);
  check_cuda(launch(current_stream(device)), op);
}
#endif

inline void nothing() {}

// Runs the kernel of `op` for the device of `t`. With workspace_bytes the CUDA kernel gets so much scratch memory.
// prepare() runs before a CUDA launch, with the device as the current device, and may change `params`.
template <auto cpu_kernel, auto cuda_kernel, auto workspace_bytes = nullptr, typename Params, typename F = void (&)()>
void run(const char* op, const Tensor& t, const Params& params, [[maybe_unused]] F&& prepare = nothing) {
  if (t.is_cpu()) {
    cpu_kernel(params);
    return;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  on_cuda(op, t, [&](cudaStream_t stream) {
    prepare();
    if constexpr (std::is_null_pointer_v<decltype(workspace_bytes)>) {
      return cuda_kernel(params, stream);
    } else {
      const Scratch workspace(workspace_bytes(params));
      return cuda_kernel(params, workspace.data(), stream);
    }
  });
#else
  no_cuda_build(op);
#endif
}

// Tensors<count>: a std::tuple of so many tensors.
template <size_t>
using OneTensor = Tensor;
template <typename Indices>
struct TensorTuple;
template <size_t... indices>
struct TensorTuple<std::index_sequence<indices...>> {
  using type = std::tuple<OneTensor<indices>...>;
};
template <size_t count>
using Tensors = typename TensorTuple<std::make_index_sequence<count>>::type;

// The operators' namespace in torch.ops. A Hugging Face kernel has its own, so that several can be loaded.
#ifndef FLASH_XLSTM_OPS
#define FLASH_XLSTM_OPS flash_xlstm
#endif

// Begins the function that registers a file's operators, for CPU and for CUDA. An operator dispatches by its tensors'
// device. A CPU-only build registers them for CUDA too, and they raise that CUDA kernels were not built.
#define IMPLEMENT_OPS(lib)                                                    \
  static void implement_ops(torch::stable::detail::StableLibrary& lib);       \
  STABLE_TORCH_LIBRARY_IMPL(FLASH_XLSTM_OPS, CPU, on) { implement_ops(on); }  \
  STABLE_TORCH_LIBRARY_IMPL(FLASH_XLSTM_OPS, CUDA, on) { implement_ops(on); } \
  static void implement_ops(torch::stable::detail::StableLibrary& lib)

}  // namespace flash_xlstm
