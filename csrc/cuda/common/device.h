// What launch functions ask about the current device. The answers are looked up once for each device.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace flash_xlstm::cuda {

// A number other than 0 for each device, looked up at the first use.
class PerDevice {
 public:
  // find(device, value) sets `value`, or returns false on an error: `get` then gives `otherwise` and tries again next
  // time.
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
  std::array<std::atomic<int>, 64> known_{};  // devices beyond are looked up every time
};

// Whether the device has compute capability 9.0, whose target 90a has wgmma.
bool device_is_hopper();
// SMs; 1 on an error.
int processor_count();
// Bytes of shared memory that a block may ask for; 0 on an error.
int shared_memory_limit();
// Whether the code that runs on the current device was compiled for 9.0 or later. Only such code has programmatic
// dependent launches and clusters.
bool code_knows_hopper();

// Blocks of a cluster: what every device with clusters runs, and the most that a kernel may ask for.
constexpr int portable_cluster = 8, largest_cluster = 16;

// The largest cluster of the kernel's blocks: largest_cluster (the kernel's attribute is set for it), portable_cluster,
// or 1 where there are no clusters. `known` belongs to one kernel, number of threads and shared_bytes.
int cluster_limit(PerDevice& known, const void* kernel, int threads, size_t shared_bytes);

}  // namespace flash_xlstm::cuda
