// What the norms share: a group of threads holds one row in registers, 16 bytes a thread and pack, so that a row is
// read once; sums over a row go through shuffles and, where a group has several warps, a barrier of its own.
//
//   dim up to        threads a row   packs a thread
//   1 KiB            32              2
//   8 KiB            128             4
//   32 KiB           512             4
//   any, unaligned   512             32 single elements
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/numeric.cuh"
#include "cuda/pointwise/launch.h"

namespace flash_xlstm::cuda {

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T value[width];
};

template <typename T_, int width_, int row_threads_, int packs_>
struct RowLayout {
  using T = T_;
  static constexpr int width = width_;              // elements of a pack
  static constexpr int row_threads = row_threads_;  // that share a row
  static constexpr int packs = packs_;              // of a thread
  static constexpr int row_warps = row_threads / 32;
  static constexpr int block_threads = std::max(256, row_threads);
  static constexpr int groups = block_threads / row_threads;  // rows of a block
  static constexpr int capacity = row_threads * packs * width;
};

// Rows are read once: the first-level cache is for the weight.
template <typename T, int width>
__device__ __forceinline__ Pack<T, width> load_once(const void* data, int64_t element) {
  const T* at = static_cast<const T*>(data) + element;
  Pack<T, width> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 bits = load_16_once(at);
    memcpy(&pack, &bits, 16);
  } else {
    pack = *reinterpret_cast<const Pack<T, width>*>(at);
  }
  return pack;
}

// The same of what is read again.
template <typename T, int width>
__device__ __forceinline__ Pack<T, width> load_pack(const void* data, int64_t element) {
  const T* at = static_cast<const T*>(data) + element;
  Pack<T, width> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(at));
    memcpy(&pack, &bits, 16);
  } else {
    pack = *reinterpret_cast<const Pack<T, width>*>(at);
  }
  return pack;
}

template <typename T, int width>
__device__ __forceinline__ void store_pack(void* data, int64_t element, const Pack<T, width>& pack) {
  T* at = static_cast<T*>(data) + element;
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, 16);
    store_16(at, bits);
  } else {
    *reinterpret_cast<Pack<T, width>*>(at) = pack;
  }
}

// The weight is float32 or a T.
template <typename T, int width>
__device__ __forceinline__ void load_weight(float (&to)[width], const void* data, int64_t element, bool is_float) {
  if (is_float) {
    const float* at = static_cast<const float*>(data) + element;
    if constexpr (width % 4 == 0) {
#pragma unroll
      for (int x = 0; x < width; x += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(at + x));
        to[x] = four.x, to[x + 1] = four.y, to[x + 2] = four.z, to[x + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int x = 0; x < width; ++x) to[x] = __ldg(at + x);
    }
  } else {
    const auto pack = load_pack<T, width>(data, element);
#pragma unroll
    for (int x = 0; x < width; ++x) to[x] = to_float(pack.value[x]);
  }
}

// Each value becomes its sum over the group's threads. `buffer`, row_warps * values floats of shared memory, must be
// another than in the group's last call: a thread may still read that one.
template <typename Layout, int values>
__device__ __forceinline__ void row_sums(float (&x)[values], float* buffer) {
#pragma unroll
  for (int v = 0; v < values; ++v) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
  }
  if constexpr (Layout::row_warps > 1) {
    const int warp = threadIdx.x % Layout::row_threads / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int v = 0; v < values; ++v) buffer[v * Layout::row_warps + warp] = x[v];
    }
    // Barrier 0 is __syncthreads.
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(1 + threadIdx.x / Layout::row_threads)),
                 "n"(Layout::row_threads)
                 : "memory");
#pragma unroll
    for (int v = 0; v < values; ++v) {
      x[v] = 0.0f;
#pragma unroll
      for (int w = 0; w < Layout::row_warps; ++w) x[v] += buffer[v * Layout::row_warps + w];
    }
  }
}

// A group's sums, as its row of `partial`.
template <typename Layout>
__device__ __forceinline__ void write_partial(const float (&sums)[Layout::packs][Layout::width], float* partial,
                                              int count) {
  const int thread = threadIdx.x % Layout::row_threads;
#pragma unroll
  for (int k = 0; k < Layout::packs; ++k) {
    const int at = (thread + k * Layout::row_threads) * Layout::width;
    if (at >= count) continue;
#pragma unroll
    for (int x = 0; x < Layout::width; ++x) partial[at + x] = sums[k][x];
  }
}

inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with the layout that holds rows of `dim` elements; `vectors`: every row begins at a multiple of 16 bytes.
template <typename F>
cudaError_t dispatch_layout(DType dtype, int64_t dim, bool vectors, F&& f) {
  return dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int width = 16 / sizeof(T);
    if (vectors && dim % width == 0) {
      const int64_t packs = dim / width;
      if (packs <= 32 * 2) return f(RowLayout<T, width, 32, 2>{});
      if (packs <= 128 * 4) return f(RowLayout<T, width, 128, 4>{});
      if (packs <= 512 * 4) return f(RowLayout<T, width, 512, 4>{});
    }
    return dim <= max_norm_dim ? f(RowLayout<T, 1, 512, 32>{}) : cudaErrorInvalidValue;
  });
}

// Blocks that walk over the rows, for the gradients: two a multiprocessor, 0 on an error.
inline int64_t walking_blocks() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  return 2 * count;
}

// The rows of a layout's block.
inline int64_t rows_of_block(DType dtype, int64_t dim, bool vectors) {
  int64_t groups = 1;
  static_cast<void>(dispatch_layout(dtype, dim, vectors, [&](auto layout) {
    groups = decltype(layout)::groups;
    return cudaSuccess;
  }));
  return groups;
}

// out (columns; float32 or bfloat16 or float16) = the sums of `rows` rows of partial, in a fixed order.
cudaError_t sum_rows(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
