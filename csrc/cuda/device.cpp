#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace flash_xlstm::cuda {
namespace {

constexpr int max_devices = 64;
using Known = std::array<std::atomic<int>, max_devices>;  // 0: unknown

// `find` where the current device's value is unknown; `otherwise` on an error.
template <typename F>
int look_up(Known& known, int otherwise, F find) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= max_devices) return otherwise;
  if ((value = known[device].load(std::memory_order_relaxed)) != 0) return value;
  if (!find(device, value)) return otherwise;
  known[device].store(value, std::memory_order_relaxed);
  return value;
}

}  // namespace

bool device_is_hopper() {
  static Known known{};  // 1 no, 2 yes
  return look_up(known, 1, [](int device, int& value) {
           int major = 0, minor = 0;
           const bool found =
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
           value = major == 9 && minor == 0 ? 2 : 1;
           return found;
         }) == 2;
}

int processor_count() {
  static Known known{};
  return look_up(known, 1, [](int device, int& value) {
    return cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  });
}

}  // namespace flash_xlstm::cuda
