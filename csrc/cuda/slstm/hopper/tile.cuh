// What the Hopper kernels of the sLSTM share: how a head is spread over a cluster, fragments, launches.
//
// Units come in groups of 8. A warp owns a group for all tokens. Its gates are two m16n8k16 accumulators, (i; f) and
// (z; o): 8 units of each gate as rows, 8 rows of the batch as columns. So a thread holds all four gates of unit lane /
// 4 for rows 2 (lane % 4) and the next, and the cell needs no exchange.
//
// A block has `block_groups` groups, a cluster as many blocks as the head needs. A cluster has `n_tiles` times 8 rows
// of the batch. From dim 264 on a block has more warps than groups, whose registers together hold more of R. Warp w
// then has group w % block_groups, and of that group's cells the `cell_tiles` n tiles from (w / block_groups) *
// cell_tiles on, if there are so many.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/slstm/cell.cuh"
#include "cuda/slstm/hopper/hopper.h"

namespace flash_xlstm::cuda::slstm_hopper {

constexpr int rows_a_tile = 8;
constexpr int header_bytes = 1024;  // two barriers, then the rows
constexpr int rows_offset = 64;
constexpr int fragment_bytes = 512;  // a 16 x 16 operand tile, or a 16 x 8 float32 one, of a warp
static_assert(rows_offset + 4 * rows_a_tile * sizeof(SlstmRow) <= header_bytes);

struct Geometry {
  int cluster;       // blocks
  int warps;         // a block
  int block_groups;  // of units, a block
  int groups;        // of units, in all: dim / 8
};

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, half>)
    ptx::mma_f16(d, a, b0, b1);
  else
    ptx::mma_bf16(d, a, b0, b1);
}

__device__ __forceinline__ void load_16_bytes(uint32_t (&to)[4], const void* shared) {
  const uint4 value = *static_cast<const uint4*>(shared);
  to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
}

// Of one kernel: 1 + how many clusters run at once, for each cluster size up to 16.
using KnownClusters = std::array<PerDevice, 17>;

// How many clusters of a kernel run at once on the current device; 0 where none fits. Looked up once a device and size.
template <typename Kernel>
int active_clusters(Kernel kernel, int cluster, int threads, int shared_bytes, KnownClusters& known) {
  return known[cluster].get(1, [&](int, int& value) {
    int clusters = 0;
    const int limit = shared_memory_limit();
    if (device_is_hopper() && shared_bytes <= limit &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) == cudaSuccess &&
        (cluster <= portable_cluster ||
         cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess)) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(cluster);
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared_bytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) clusters = 0;
    }
    cudaGetLastError();  // a refusal above is an answer, not an error of the launch that follows
    value = clusters + 1;
    return true;
  }) - 1;
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params, Geometry), const Params& params, const Geometry& g, int64_t clusters,
                   int shared_bytes, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(g.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * g.cluster));
  config.blockDim = dim3(32 * g.warps);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, g);
}

inline int64_t row_tiles(const SlstmProblem& p, int n_tiles) { return ceil_div(p.rows, n_tiles * rows_a_tile); }

// Estimated time of a launch, in units of what 8 rows add to a step: waves of clusters times the time of a step, which
// has a part that does not depend on its rows.
inline int64_t launch_cost(const SlstmProblem& p, int n_tiles, int active) {
  constexpr int64_t waiting = 3;
  const int64_t clusters = p.heads * row_tiles(p, n_tiles);
  return ceil_div(clusters, active) * (waiting + n_tiles);
}

inline bool aligned_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace flash_xlstm::cuda::slstm_hopper
