// What the Hopper kernels of the sLSTM share: how a head is spread over a cluster, fragments, launches.
//
// Units come in groups of 8. A warp owns a group for all tokens: as rows of an m16n8k16 accumulator the group's gates
// are (i; f) and (z; o), 8 units each, and columns are 8 rows of the batch, so that a thread holds all four gates of
// unit lane / 4 for rows 2 (lane % 4) and the next: the cell needs no exchange. A block has `block_groups` groups, a
// cluster as many blocks as the head needs, and `n_tiles` times 8 rows of the batch. From dim 264 on a block has more
// warps than groups, whose registers hold more of R: warp w has group w % block_groups, and of the cell's n tiles
// `cell_tiles` from (w / block_groups) * cell_tiles on, where there are so many.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

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
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack<half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, half>)
    ptx::mma_f16(d, a, b0, b1);
  else
    ptx::mma_bf16(d, a, b0, b1);
}

__device__ __forceinline__ void load_16_bytes(uint32_t (&to)[4], const void* shared) {
  const uint4 value = *static_cast<const uint4*>(shared);
  to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
}

// Of `state` (rows, heads, dim), 0 beyond the rows.
__device__ __forceinline__ float initial(const float* state, const SlstmProblem& p, int64_t row, int64_t head,
                                         int64_t unit) {
  return state == nullptr || row >= p.rows ? 0.0f : state[(row * p.heads + head) * p.dim + unit];
}

// How many clusters of a kernel run at once on the current device; 0 where none fits. Asked once a device and size.
template <typename Kernel>
int active_clusters(Kernel kernel, int cluster, int threads, int shared_bytes, std::atomic<int> (&known)[16][17]) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  std::atomic<int>* slot = device < 16 ? &known[device][cluster] : nullptr;
  if (slot != nullptr && slot->load(std::memory_order_relaxed) > 0) return slot->load(std::memory_order_relaxed) - 1;
  int major = 0, minor = 0, limit = 0, clusters = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (major == 9 && minor == 0 && shared_bytes <= limit &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) == cudaSuccess &&
      (cluster <= 8 ||
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
  cudaGetLastError();  // what was refused is no error of the launch that follows
  if (slot != nullptr) slot->store(clusters + 1, std::memory_order_relaxed);
  return clusters;
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

inline int64_t row_tiles(const SlstmProblem& p, int n_tiles) {
  return (p.rows + n_tiles * rows_a_tile - 1) / (n_tiles * rows_a_tile);
}

// Time of a launch, in units of what 8 rows add to a step: the steps of clusters that do not fit at once come after
// each other, and each step waits for what does not depend on its rows.
inline int64_t launch_cost(const SlstmProblem& p, int n_tiles, int active) {
  constexpr int64_t waiting = 3;
  const int64_t clusters = p.heads * row_tiles(p, n_tiles);
  return (clusters + active - 1) / active * (waiting + n_tiles);
}

inline bool aligned_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace flash_xlstm::cuda::slstm_hopper
