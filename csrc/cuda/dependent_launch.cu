#include "cuda/dependent_launch.cuh"

#include <array>
#include <atomic>

namespace flash_xlstm::cuda {
namespace {

// All kernels are compiled for the same targets: what holds for this one does for the others.
__global__ void probe_kernel() {}

}  // namespace

bool knows_dependent_launch() {
  constexpr int max_devices = 64;
  static std::array<std::atomic<int>, max_devices> known{};  // 0 unknown, 1 no, 2 yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= max_devices) return false;
  if (const int value = known[device].load(std::memory_order_relaxed)) return value == 2;
  cudaFuncAttributes code{};
  int major = 0;
  const bool yes = cudaFuncGetAttributes(&code, probe_kernel) == cudaSuccess && code.ptxVersion >= 90 &&
                   cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                   major >= 9;
  known[device].store(yes ? 2 : 1, std::memory_order_relaxed);
  return yes;
}

}  // namespace flash_xlstm::cuda
