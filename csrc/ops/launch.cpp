#ifdef FLASH_XLSTM_WITH_CUDA
#include "ops/launch.h"
#include "ops/kernel_for.h"

#include <dlfcn.h>

#include <array>
#include <atomic>

namespace flash_xlstm {
namespace {

// Looked up at the first use. Linking libtorch_cuda would tie the module to a CUDA build of torch. A weak symbol would
// stay null, because Python loads torch's libraries with local visibility.
template <typename F>
F torch_cuda_function(const char* name) {
  void* lib = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return lib ? reinterpret_cast<F>(dlsym(lib, name)) : nullptr;
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = torch_cuda_function<Get>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) {
    throw std::runtime_error("flash_xlstm: could not get torch's current CUDA stream (is this a CUDA build of torch?)");
  }
  return static_cast<cudaStream_t>(stream);
}

Scratch::Scratch(int64_t bytes) {
  if (bytes == 0) return;
  using Allocate = int32_t (*)(uint64_t, void**);
  static const Allocate allocate = torch_cuda_function<Allocate>("aoti_torch_cuda_caching_allocator_raw_alloc");
  if (!allocate || allocate(static_cast<uint64_t>(bytes), &data_) != 0) {
    throw std::runtime_error("flash_xlstm: CUDA out of memory. torch's message is above");
  }
}

Scratch::~Scratch() {
  using Free = int32_t (*)(void*);
  static const Free free = torch_cuda_function<Free>("aoti_torch_cuda_caching_allocator_raw_delete");
  if (free && data_) free(data_);
}

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(join_text(what, ": ", cudaGetErrorString(status)));
}

void check_device_supported(int32_t device) {
  constexpr int max_devices = 64;
  static std::array<std::atomic<bool>, max_devices> known_good{};
  if (device < max_devices && known_good[device].load(std::memory_order_relaxed)) return;
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "flash_xlstm");
  if (major < min_compute_capability) {
    throw std::runtime_error(join_text("flash_xlstm: cuda:", device, " has compute capability ", major,
                                       ".x; the kernels need 8.0 (Ampere) or later"));
  }
  if (device < max_devices) known_good[device].store(true, std::memory_order_relaxed);
}

}  // namespace flash_xlstm
#endif
