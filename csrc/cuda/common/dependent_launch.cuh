// Programmatic dependent launch: the blocks of a kernel may start while the kernel before it in the stream still runs,
// so that a chain of short kernels does not pay a start for each.
//
// A kernel launched by `launch_early` must call `wait_for_earlier_kernels` in every thread that goes on, before it
// reads or writes what another kernel writes or reads; until then it may fetch into the L2 cache, which
// serves everyone, or read what the caller has promised is at rest (FusedLinearRows::constant_weights,
// MlstmStep::settled_state), and nothing else. It calls `let_next_kernel_start` where the next may begin to do that:
// mostly at once, so that several kernels may be under way; behind its own wait (`holds_next`) where the next one's
// promise holds only for what comes before the kernel just before it.
//
// Kernels of other libraries may do the same, so a kernel of theirs that has let ours start may still be about to write:
// what is read ahead of the wait is safe only behind a kernel that lets the next start after its own wait (a block
// step's norm), or within a captured chain that begins when all before it have ended (models/decoding.py).
//
// The mLSTM's h of small heads waits at its end only: what it reads of the kernel before it, it finds by flags, and the
// rest was there when that kernel let it start, behind its own wait (mlstm/hopper/outputs.cuh).
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
// Until all kernels before this one in the stream have ended and what they wrote can be seen.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void prefetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// A launch whose blocks may start early. clusters: blocks of a cluster; 1: none.
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
