// Loading tiles of global matrices into shared memory.
#pragma once

#include "cuda/common/warp_mma.cuh"

namespace flash_xlstm::cuda::portable {

constexpr int threads_per_block = 128;

// A row-major matrix in global memory: `rows` x `cols`, row r at data + r * stride.
// vectors: data, stride and every column offset used are multiples of 16 bytes.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  int rows;
  int64_t cols;
  bool vectors;
};

// Copies rows [row0, row0 + tile_rows) and columns [col0, col0 + tile_cols) to shared memory, with zeros outside the
// matrix. By cp.async, where the element types agree and `vectors` holds: the caller commits and waits.
template <int tile_rows, int tile_cols, int pitch, typename S, typename G>
__device__ __forceinline__ void load_tile(S* tile, const Matrix<G>& matrix, int64_t row0, int64_t col0) {
  constexpr int width = 16 / sizeof(G);
  constexpr int vectors_per_row = tile_cols / width;
  static_assert(tile_cols % width == 0 && (tile_rows * vectors_per_row) % threads_per_block == 0);
#pragma unroll
  for (int it = 0; it < tile_rows * vectors_per_row / threads_per_block; ++it) {
    const int index = it * threads_per_block + threadIdx.x;
    const int r = index / vectors_per_row, c = index % vectors_per_row * width;
    const int64_t left = row0 + r < matrix.rows ? matrix.cols - (col0 + c) : 0;
    const int count = left <= 0 ? 0 : left < width ? static_cast<int>(left) : width;
    const G* from = count > 0 ? matrix.data + (row0 + r) * matrix.stride + col0 + c : matrix.data;
    S* to = tile + r * pitch + c;
    if constexpr (std::is_same_v<S, G>) {
      if (matrix.vectors) {
        ptx::cp_async_16(to, from, count * static_cast<int>(sizeof(G)));
        continue;
      }
    }
    alignas(16) G part[width];
    if (matrix.vectors && count == width) {
      *reinterpret_cast<uint4*>(part) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int x = 0; x < width; ++x) part[x] = x < count ? from[x] : from_float<G>(0.0f);
    }
#pragma unroll
    for (int x = 0; x < width; ++x) {
      if constexpr (std::is_same_v<S, G>) to[x] = part[x];
      else to[x] = to_float(part[x]);
    }
  }
}

// A chunk's rows of a (batch, seq, heads, dim) tensor, as its own matrix. Null data reads as zeros.
template <typename T>
__device__ __forceinline__ Matrix<T> chunk_rows(const Strided& t, bool vectors, int64_t row, int64_t first, int head,
                                                int length, int64_t dim) {
  const T* data = static_cast<const T*>(t.data);
  if (data == nullptr) return {.data = data, .stride = 0, .rows = 0, .cols = 0, .vectors = false};
  return {.data = data + row * t.batch + first * t.seq + head * t.head,
          .stride = t.seq,
          .rows = length,
          .cols = dim,
          .vectors = vectors};
}

inline bool can_vectorize(const Strided& t, int64_t item) {
  const int64_t width = 16 / item;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % width == 0 && t.seq % width == 0 &&
         t.head % width == 0;
}

}  // namespace flash_xlstm::cuda::portable
