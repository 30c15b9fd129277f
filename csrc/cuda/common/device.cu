#include "cuda/common/device.h"

namespace flash_xlstm::cuda {
namespace {

// Tells which code runs on a device: all kernels are compiled for the same targets.
__global__ void probe_kernel() {}

bool attribute(cudaDeviceAttr which, int device, int& value) {
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess;
}

}  // namespace

bool device_is_hopper() {
  static PerDevice known;  // 1 no, 2 yes
  return known.get(1, [](int device, int& value) {
    int major = 0, minor = 0;
    const bool found = attribute(cudaDevAttrComputeCapabilityMajor, device, major) &&
                       attribute(cudaDevAttrComputeCapabilityMinor, device, minor);
    value = major == 9 && minor == 0 ? 2 : 1;
    return found;
  }) == 2;
}

int processor_count() {
  static PerDevice known;
  return known.get(1, [](int device, int& value) { return attribute(cudaDevAttrMultiProcessorCount, device, value); });
}

int shared_memory_limit() {
  static PerDevice known;
  return known.get(
      0, [](int device, int& value) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, value); });
}

bool code_knows_hopper() {
  static PerDevice known;  // 1 no, 2 yes
  return known.get(1, [](int device, int& value) {
    cudaFuncAttributes code{};
    int major = 0;
    const bool yes = cudaFuncGetAttributes(&code, probe_kernel) == cudaSuccess && code.ptxVersion >= 90 &&
                     attribute(cudaDevAttrComputeCapabilityMajor, device, major) && major >= 9;
    value = yes ? 2 : 1;
    return true;
  }) == 2;
}

int cluster_limit(PerDevice& known, const void* kernel, int threads, size_t shared_bytes) {
  return known.get(1, [&](int, int& value) {
    value = code_knows_hopper() ? portable_cluster : 1;
    if (value == 1) return true;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess) {
      cudaLaunchConfig_t config{};
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = largest_cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.gridDim = dim3(largest_cluster);
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = shared_bytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
      if (status == cudaSuccess && clusters > 0) value = largest_cluster;
    }
    cudaGetLastError();  // a refusal above is an answer, not an error
    return true;
  });
}

}  // namespace flash_xlstm::cuda
