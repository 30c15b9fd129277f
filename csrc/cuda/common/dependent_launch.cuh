// Programmatic dependent launch: the blocks of a kernel may start while the kernel before it in the stream still runs.
// So a chain of short kernels does not pay the launch latency of each.
//
// Rules for a kernel launched by `launch_early`:
//   - Every thread that goes on calls `wait_for_earlier_kernels` before it reads or writes what another kernel writes
//     or reads. Before this wait it may only prefetch into the L2 cache, which is coherent, and read what the caller
//     has promised to be at rest (FusedLinearRows::constant_weights, MlstmStep::settled_state).
//   - It calls `let_next_kernel_start` where the next kernel may begin to do that. Mostly it does so first, so that
//     several kernels may run at once. With `holds_next` it does so after its own wait. The next kernel's promise then
//     has to hold only for what comes before this kernel.
//
// Kernels of other libraries may also let the next kernel start early, and still write afterwards. So a read before the
// wait is safe only in two cases: behind a kernel that lets the next one start after its own wait (a block step's
// norm), or in a captured chain that begins when all work before it has ended (models/decoding.py).
//
// The mLSTM's h of small heads waits only at its end. It finds by flags what the kernel before it writes. Everything
// else it reads was written when that kernel let it start, after its own wait (mlstm/hopper/output_small.cuh).
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/common/device.h"

namespace flash_xlstm::cuda {

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Blocks until all earlier kernels in the stream have ended and their writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void prefetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// A launch whose blocks may start early. cluster: blocks of a thread block cluster; 1: no clusters.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                         cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (code_knows_hopper()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& clusters = attributes[config.numAttrs++];
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = static_cast<unsigned>(cluster);
    clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace flash_xlstm::cuda
