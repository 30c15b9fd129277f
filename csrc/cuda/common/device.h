// What launch functions ask about the current device, looked up once for each.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace flash_xlstm::cuda {

// A number other than 0 of each device, found when it is first asked for.
class PerDevice {
 public:
  // find(device, value): false on an error, and asked again next time. `otherwise`: on an error.
  template <typename F>
  int get(int otherwise, F find) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
    std::atomic<int>* known = device < static_cast<int>(known_.size()) ? &known_[device] : nullptr;
    if (known != nullptr && (value = known->load(std::memory_order_acquire)) != 0) return value;
    if (!find(device, value)) return otherwise;
    if (known != nullptr) known->store(value, std::memory_order_release);
    return value;
  }

 private:
  std::array<std::atomic<int>, 64> known_{};
};

// Compute capability 9.0, whose 90a target has wgmma.
bool device_is_hopper();
// SMs; 1 on an error.
int processor_count();
// Bytes of shared memory that a block may ask for; 0 on an error.
int shared_memory_limit();
// Whether the code that runs on the current device was compiled for one that knows dependent launches and clusters (9.0
// and later).
bool code_knows_hopper();

// Blocks of a cluster: what every device with clusters runs, and the most that a kernel may ask for.
constexpr int portable_cluster = 8, largest_cluster = 16;

// How large clusters of the kernel's blocks may be: 16 (which it is prepared for), 8, or 1 where there are none. One
// `known` for each kernel, number of threads and shared_bytes.
int cluster_limit(PerDevice& known, const void* kernel, int threads, size_t shared_bytes);

}  // namespace flash_xlstm::cuda
