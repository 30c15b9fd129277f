// Casts to float8 e4m3 (params/float8.h): 3 bytes of memory traffic an element of 16 bits for rows alone, 5 for columns
// alone, 6 for both.
//
// Pass A reads x once. An SM holds one block. The block walks over rows, several at once where they are short. A warp
// takes two or three slots: 512 bytes of a row each, always of the same columns. It reads one step ahead. The
// largest absolute value of a row goes through a warp's reduction and shared memory, with one barrier a step; then the
// row is cast from registers. Columns' largest values stay in registers. At the end the rows of a block are joined in
// shared memory, and one atomic maximum a column and block goes to the workspace, on unsigned bits: the result does not
// depend on the order, and NaN is above all.
//
// Pass B reads x again, in tiles of 128 rows and 64 columns. A thread casts 4 rows of 8 columns. One conversion takes
// two rows of a column, so that its two bytes lie as in the transposed result. 4-byte words of 4 rows go to shared
// memory. Their 16-byte chunks are swizzled by column, and neither the words' stores nor the chunks' loads have bank
// conflicts. Tiles begin with the rows that pass A read last, which the L2 cache still has. 8 tiles, one below the
// other, come before the next columns, so that what is written at one time is longer than a tile.
//
// Rows that are not aligned to 16 bytes, or longer than pass A's slots, go by plain kernels of single elements.
#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/pointwise/rows.cuh"
#include "params/float8.h"

namespace flash_xlstm::cuda {
namespace {

struct Scale {
  float factor, inverse;
};

template <typename T>
__device__ __forceinline__ Scale scale_of(uint32_t amax) {
  constexpr uint32_t infinity = 0x7f800000u;
  if (amax >= infinity) {
    const float inverse = __uint_as_float(amax);  // infinity or NaN
    return {.factor = amax == infinity ? 0.0f : inverse, .inverse = inverse};
  }
  int k = float8_exponent(amax);
  if (sizeof(T) == 4 && float8_exponent_may_round(amax)) {
    const double ratio = 448.0 / fmax(static_cast<double>(__uint_as_float(amax)), 1e-12);
    k = static_cast<int>(floorf(log2f(static_cast<float>(ratio))));
  }
  return {.factor = __uint_as_float(static_cast<uint32_t>(127 + k) << 23),
          .inverse = __uint_as_float(static_cast<uint32_t>(127 - k) << 23)};
}

// a in the low byte.
__device__ __forceinline__ uint32_t to_float8(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t absolute_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// A word holds one float32 or two 16-bit elements. NaN is above all.
template <typename T>
__device__ __forceinline__ uint32_t absolute(uint32_t word) {
  return word & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu);
}
template <typename T>
__device__ __forceinline__ uint32_t higher(uint32_t a, uint32_t b) {  // of absolute values
  if constexpr (sizeof(T) == 4) {
    return max(a, b);
  } else {
    using Two = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
    Two x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hmax2_nan(x, y);
    memcpy(&a, &x, 4);
    return a;
  }
}
template <typename T>
__device__ __forceinline__ uint4 higher(const uint4& a, const uint4& b) {
  return make_uint4(higher<T>(a.x, b.x), higher<T>(a.y, b.y), higher<T>(a.z, b.z), higher<T>(a.w, b.w));
}
// The elements of a word of absolute values, as bits of float32.
template <typename T>
__device__ __forceinline__ uint2 wide_bits(uint32_t word) {
  const float2 two = unpack<T>(word);
  return make_uint2(__float_as_uint(two.x), __float_as_uint(two.y));
}
template <typename T>
__device__ __forceinline__ uint32_t highest(const uint4& top) {
  const uint32_t word = higher<T>(higher<T>(top.x, top.y), higher<T>(top.z, top.w));
  if constexpr (sizeof(T) == 4) {
    return word;
  } else {
    const uint2 two = wide_bits<T>(word);
    return max(two.x, two.y);
  }
}

constexpr int threads_a = 1024, walk_warps = threads_a / 32;
template <typename T>
constexpr int slots_of = sizeof(T) == 4 ? 2 : 3;  // of a thread; float32 has no registers for three
template <typename T>
constexpr int all_slots = slots_of<T> * walk_warps;
constexpr int none = INT32_MAX;
constexpr int64_t longest = int64_t{1} << 30;  // of rows and of columns, which pass A counts in 32 bits

struct Walk {
  const void* x;
  int64_t stride;
  int rows, columns, row_slots, rows_at_once;
  uint8_t* out;
  float* scales;
  uint32_t* column_top;
};

template <typename T>
__device__ __forceinline__ void store_float8(uint8_t* at, const uint4& bits, float factor) {
  constexpr int width = 16 / sizeof(T);
  Pack<T, width> pack;
  memcpy(&pack, &bits, 16);
  float x[width];
  unpack(x, pack);
#pragma unroll
  for (int e = 0; e < width; ++e) x[e] *= factor;
  uint32_t words[width / 4];
#pragma unroll
  for (int e = 0; e < width; e += 4) words[e / 4] = to_float8(x[e], x[e + 1]) | to_float8(x[e + 2], x[e + 3]) << 16;
  if constexpr (width == 8)
    *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
  else
    *reinterpret_cast<uint32_t*>(at) = words[0];
}

template <typename T, bool by_row, bool by_column>
__global__ void __launch_bounds__(threads_a, 1) float8_rows_kernel(const __grid_constant__ Walk p) {
  constexpr int width = 16 / sizeof(T), slots = slots_of<T>;
  extern __shared__ uint4 column_packs[];  // [all_slots<T>][32], by_column
  __shared__ uint32_t slot_top[2][all_slots<T>];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int row_of[slots], column_of[slots];  // row_of: beyond all rows where a slot has none
#pragma unroll
  for (int s = 0; s < slots; ++s) {
    const int slot = s * walk_warps + warp;
    row_of[s] = slot / p.row_slots;
    column_of[s] = (slot % p.row_slots * 32 + lane) * width;
    if (row_of[s] >= p.rows_at_once) row_of[s] = none;
  }
  const auto load = [&](uint4(&to)[slots], int row) {
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      to[s] = make_uint4(0, 0, 0, 0);
      if (row_of[s] < p.rows - row && column_of[s] < p.columns)
        to[s] =
            load_16_once(static_cast<const T*>(p.x) + static_cast<int64_t>(row + row_of[s]) * p.stride + column_of[s]);
    }
  };
  uint4 next[slots], top[slots];
#pragma unroll
  for (int s = 0; s < slots; ++s) top[s] = make_uint4(0, 0, 0, 0);
  const int step = static_cast<int>(gridDim.x) * p.rows_at_once;
  int row = static_cast<int>(blockIdx.x) * p.rows_at_once;
  load(next, row);
  for (int turn = 0; row < p.rows; row += step, turn ^= 1) {
    uint4 now[slots];
#pragma unroll
    for (int s = 0; s < slots; ++s) now[s] = next[s];
    load(next, row + step);
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      const uint4 size =
          make_uint4(absolute<T>(now[s].x), absolute<T>(now[s].y), absolute<T>(now[s].z), absolute<T>(now[s].w));
      if constexpr (by_column) top[s] = higher<T>(top[s], size);
      if constexpr (by_row) {
        const uint32_t most = __reduce_max_sync(all_lanes, highest<T>(size));
        if (lane == 0) slot_top[turn][s * walk_warps + warp] = most;
      }
    }
    if constexpr (by_row) {
      __syncthreads();
#pragma unroll
      for (int s = 0; s < slots; ++s) {
        if (row_of[s] >= p.rows - row) continue;
        uint32_t most = 0;
#pragma unroll 1
        for (int c = lane; c < p.row_slots; c += 32) most = max(most, slot_top[turn][row_of[s] * p.row_slots + c]);
        const Scale scale = scale_of<T>(__reduce_max_sync(all_lanes, most));
        if (column_of[s] >= p.columns) continue;
        store_float8<T>(p.out + static_cast<int64_t>(row + row_of[s]) * p.columns + column_of[s], now[s], scale.factor);
        if (column_of[s] == 0) p.scales[row + row_of[s]] = scale.inverse;
      }
    }
  }
  if constexpr (by_column) {
#pragma unroll
    for (int s = 0; s < slots; ++s) column_packs[(s * walk_warps + warp) * 32 + lane] = top[s];
    __syncthreads();
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(column_packs);
    const int row_words = p.row_slots * 32 * 4, count = static_cast<int>(p.columns / width) * 4;
    for (int at = threadIdx.x; at < count; at += threads_a) {
      uint32_t most = 0;
      for (int r = 0; r < p.rows_at_once; ++r) most = higher<T>(most, words[r * row_words + at]);
      if constexpr (sizeof(T) == 4) {
        atomicMax(p.column_top + at, most);
      } else {
        const uint2 two = wide_bits<T>(most);
        atomicMax(p.column_top + 2 * at, two.x);
        atomicMax(p.column_top + 2 * at + 1, two.y);
      }
    }
  }
}

constexpr int plain_threads = 256;

// The rows of any matrix: a block takes a row, and reads it twice.
template <typename T>
__global__ void __launch_bounds__(plain_threads) float8_plain_rows_kernel(const __grid_constant__ Walk p) {
  __shared__ uint32_t warp_top[plain_threads / 32];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(p.x) + row * p.stride;
    uint32_t most = 0;
    for (int64_t c = threadIdx.x; c < p.columns; c += plain_threads) most = max(most, absolute_bits(to_float(x[c])));
    most = __reduce_max_sync(all_lanes, most);
    __syncthreads();  // the last row's values have been read
    if (threadIdx.x % 32 == 0) warp_top[threadIdx.x / 32] = most;
    __syncthreads();
    const Scale scale = scale_of<T>(__reduce_max_sync(all_lanes, warp_top[threadIdx.x % (plain_threads / 32)]));
    for (int64_t c = threadIdx.x; c < p.columns; c += plain_threads)
      p.out[row * p.columns + c] = static_cast<uint8_t>(to_float8(to_float(x[c]) * scale.factor, 0.0f));
    if (threadIdx.x == 0) p.scales[row] = scale.inverse;
  }
}

// The largest absolute values of the columns of any matrix.
template <typename T>
__global__ void __launch_bounds__(plain_threads) float8_plain_columns_kernel(const __grid_constant__ Walk p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * plain_threads + threadIdx.x;
  if (column >= p.columns) return;
  uint32_t most = 0;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
    most = max(most, absolute_bits(to_float(static_cast<const T*>(p.x)[row * p.stride + column])));
  atomicMax(p.column_top + column, most);
}

constexpr int tile_rows = 128, tile_columns = 64, tile_threads = 256, tiles_below = 8;

struct Transpose {
  const void* x;
  int64_t stride, rows, columns;
  const uint32_t* column_top;
  uint8_t* out;  // (columns, out_stride)
  int64_t out_stride;
  float* scales;  // nullptr: another part writes them
  unsigned row_tiles, column_tiles;
};

// Eight neighbouring elements of a row as float32.
template <typename T, bool vectors>
__device__ __forceinline__ void load_eight(float (&to)[8], const T* row, int64_t column, int64_t columns) {
  if constexpr (vectors) {
    constexpr int width = 16 / sizeof(T);
#pragma unroll
    for (int e = 0; e < 8; e += width) {
      const uint4 bits = load_16_once(row + column + e);
      Pack<T, width> pack;
      memcpy(&pack, &bits, 16);
      float values[width];
      unpack(values, pack);
#pragma unroll
      for (int x = 0; x < width; ++x) to[e + x] = values[x];
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = column + e < columns ? to_float(row[column + e]) : 0.0f;
  }
}

template <typename T, bool vectors, bool chunks>
__global__ void __launch_bounds__(tile_threads) float8_columns_kernel(const __grid_constant__ Transpose p) {
  __shared__ uint4 tile[tile_columns * tile_rows / 16];
  __shared__ float4 factors[tile_columns / 4];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const unsigned group = blockIdx.x / (tiles_below * p.column_tiles),
                 within = blockIdx.x % (tiles_below * p.column_tiles);
  const unsigned below = min(static_cast<unsigned>(tiles_below), p.row_tiles - group * tiles_below);
  const unsigned row_tile = p.row_tiles - 1 - (group * tiles_below + within % below), column_tile = within / below;
  const int64_t first_row = static_cast<int64_t>(row_tile) * tile_rows;
  const int64_t first_column = static_cast<int64_t>(column_tile) * tile_columns;
  const int thread = static_cast<int>(threadIdx.x), place = thread % 8, four = thread / 8;
  float x[4][8];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = first_row + four * 4 + r, column = first_column + place * 8;
    if (row < p.rows && column < p.columns) {
      load_eight<T, vectors>(x[r], static_cast<const T*>(p.x) + row * p.stride, column, p.columns);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[r][e] = 0.0f;
    }
  }
  if (thread < tile_columns) {
    const int64_t column = first_column + thread;
    const Scale scale = scale_of<T>(column < p.columns ? p.column_top[column] : 0u);
    reinterpret_cast<float*>(factors)[thread] = scale.factor;
    if (p.scales != nullptr && row_tile == 0 && column < p.columns) p.scales[column] = scale.inverse;
  }
  __syncthreads();
  float factor[8];
  memcpy(factor, &factors[place * 2], 32);
  // Word (column, four) is in chunk four / 4 of its column.
  uint32_t* const words = reinterpret_cast<uint32_t*>(tile);
  const int chunk = (four / 4 ^ place) * 4 + four % 4;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t upper = to_float8(x[0][e] * factor[e], x[1][e] * factor[e]);
    const uint32_t lower = to_float8(x[2][e] * factor[e], x[3][e] * factor[e]);
    words[(place * 8 + e) * (tile_rows / 4) + chunk] = upper | lower << 16;
  }
  __syncthreads();
#pragma unroll
  for (int half_tile = 0; half_tile < 2; ++half_tile) {
    const int at = thread + half_tile * tile_threads, column = at / 8, place_of = at % 8;
    const uint4 bytes = tile[column * (tile_rows / 16) + (place_of ^ column / 8)];
    const int64_t row = first_row + place_of * 16;
    if (first_column + column >= p.columns || row >= p.rows) continue;
    uint8_t* const to = p.out + (first_column + column) * p.out_stride + row;
    if constexpr (chunks) {
      store_16(to, bytes);
    } else {
      uint8_t each[16];
      memcpy(each, &bytes, 16);
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        if (row + b < p.rows) to[b] = each[b];
      }
    }
  }
}

// How many rows a block of pass A takes at once, of at most `most`: where the blocks have least to do.
int rows_at_once(int64_t rows, int most, int blocks) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int r = most; r > most / 2; --r) {
    const int64_t steps = ceil_div(rows, static_cast<int64_t>(blocks) * r) * r;
    if (steps < least) least = steps, best = r;
  }
  return best;
}

template <typename T>
cudaError_t pass_a(Walk& w, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const bool vectors =
      aligned_16(w.x) && w.columns % width == 0 && w.stride % width == 0 && w.columns <= all_slots<T> * 32 * width;
  const bool rows = w.out != nullptr, columns = w.column_top != nullptr;
  const int blocks = processor_count();
  if (vectors) {
    w.row_slots = static_cast<int>(ceil_div(w.columns, 32 * width));
    w.rows_at_once = rows_at_once(w.rows, all_slots<T> / w.row_slots, blocks);
    const auto kernel = !columns ? float8_rows_kernel<T, true, false>
                        : rows   ? float8_rows_kernel<T, true, true>
                                 : float8_rows_kernel<T, false, true>;
    const size_t bytes = columns ? all_slots<T> * 32 * sizeof(uint4) : 0;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
    const int steps = ceil_div(w.rows, w.rows_at_once);
    const dim3 grid(static_cast<unsigned>(std::min(steps, blocks)));
    return launch_early(kernel, grid, dim3(threads_a), bytes, 1, stream, w);
  }
  cudaError_t status = cudaSuccess;
  if (rows) {
    const dim3 grid(static_cast<unsigned>(std::min(w.rows, blocks * 8)));
    status = launch_early(float8_plain_rows_kernel<T>, grid, dim3(plain_threads), 0, 1, stream, w);
  }
  if (columns && status == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(ceil_div(w.columns, plain_threads)),
                    static_cast<unsigned>(std::min(w.rows, 128)));
    status = launch_early(float8_plain_columns_kernel<T>, grid, dim3(plain_threads), 0, 1, stream, w);
  }
  return status;
}

template <typename T>
cudaError_t pass_b(Transpose& t, cudaStream_t stream) {
  const int64_t row_tiles = ceil_div(t.rows, int64_t{tile_rows}),
                column_tiles = ceil_div(t.columns, int64_t{tile_columns});
  if (row_tiles > INT32_MAX / column_tiles) return cudaErrorInvalidValue;
  t.row_tiles = static_cast<unsigned>(row_tiles), t.column_tiles = static_cast<unsigned>(column_tiles);
  const bool vectors = aligned_16(t.x) && t.columns % 8 == 0 && t.stride % (16 / sizeof(T)) == 0;
  const bool chunks = aligned_16(t.out) && t.out_stride % 16 == 0 && t.rows % 16 == 0;
  const auto kernel = vectors
                          ? (chunks ? float8_columns_kernel<T, true, true> : float8_columns_kernel<T, true, false>)
                          : (chunks ? float8_columns_kernel<T, false, true> : float8_columns_kernel<T, false, false>);
  const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles));
  return launch_early(kernel, grid, dim3(tile_threads), 0, 1, stream, t);
}

}  // namespace

int64_t float8_cast_workspace_bytes(const Float8Cast& p) {
  return p.by_column == nullptr ? 0 : p.columns * static_cast<int64_t>(sizeof(uint32_t));
}

cudaError_t float8_cast(const Float8Cast& p, void* workspace, cudaStream_t stream) {
  uint32_t* const column_top = p.by_column == nullptr ? nullptr : static_cast<uint32_t*>(workspace);
  if (p.rows > longest || p.columns > longest) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  if (column_top != nullptr) status = cudaMemsetAsync(column_top, 0, float8_cast_workspace_bytes(p), stream);
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t before = 0;
    for (int x = 0; x < p.count && status == cudaSuccess; before += p.part[x++].rows) {
      Walk walk{.x = p.part[x].x,
                .stride = p.part[x].stride,
                .rows = static_cast<int>(p.part[x].rows),
                .columns = static_cast<int>(p.columns),
                .row_slots = 0,
                .rows_at_once = 0,
                .out = p.by_row == nullptr ? nullptr : p.by_row + before * p.columns,
                .scales = p.row_scales == nullptr ? nullptr : p.row_scales + before,
                .column_top = column_top};
      status = pass_a<T>(walk, stream);
    }
    if (column_top == nullptr) return status;
    for (int x = p.count - 1; x >= 0 && status == cudaSuccess; --x) {  // the part that was read last comes first
      before -= p.part[x].rows;
      Transpose transpose{.x = p.part[x].x,
                          .stride = p.part[x].stride,
                          .rows = p.part[x].rows,
                          .columns = p.columns,
                          .column_top = column_top,
                          .out = p.by_column + before,
                          .out_stride = p.rows,
                          .scales = x == 0 ? p.column_scales : nullptr,
                          .row_tiles = 0,
                          .column_tiles = 0};
      status = pass_b<T>(transpose, stream);
    }
    return status;
  });
}

}  // namespace flash_xlstm::cuda
