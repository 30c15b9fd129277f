// What the norms share. A group of threads holds one row. A thread holds packs of 16 bytes, or single elements where
// the rows are not aligned or longer than 32 KiB. Sums over a row go through shuffles. Where a group has several warps,
// they meet at a barrier of the group.
//
//   forward, row up to     threads a row         packs a thread
//   1, 2 KiB               32                    2, 4
//   4, 8, 16, 32 KiB       64, 128, 256, 512     4
//   any                    512                   32 single elements
//
// Forward, a group has one row and keeps it in registers.
//
// Backward, an SM holds one block at a time. A block walks over rows and keeps its share of the weight's gradient in
// registers. It reads one row ahead: while a thread works on a row, its packs of the next row are copied into slots of
// shared memory. A thread reads only slots that it filled itself, so it waits only for its own copies. At the end the
// groups of a block add up their shares, in a fixed order, into the block's row of a workspace. A second launch adds up
// these rows (sum_rows).
//
//   walking, row up to        threads a row             packs a thread
//   1, 2, 4, 8, 16 KiB        32, 64, 128, 256, 512     2
//   32 KiB                    512                       4
//   128 elements              32                        4 single elements
//   any                       512                       32 single elements
//
// Nothing overlaps the last rows of a walking block. They are done sooner with fewer packs a thread. With two packs, a
// row's elements also fit in registers between the sums and the gradients.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/ptx/mma_sync.cuh"
#include "params/pointwise.h"

namespace flash_xlstm::cuda {

constexpr int walk_threads = 512;  // threads of a walking block

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T value[width];
};

template <typename T_, int width_, int row_threads_, int packs_>
struct RowLayout {
  using T = T_;
  static constexpr int width = width_;              // elements of a pack
  static constexpr int row_threads = row_threads_;  // threads of a group, which share a row
  static constexpr int packs = packs_;              // packs of a thread
  static constexpr int row_warps = row_threads / 32;
  static constexpr int block_threads = std::max(256, row_threads);
  static constexpr int groups = block_threads / row_threads;  // of a forward block: its rows
  static constexpr int walk_groups = walk_threads / row_threads;
  static constexpr int kept_packs = width > 1 && packs <= 2 ? packs : 1;  // packs a walking thread keeps of a row
  static constexpr bool kept = kept_packs == packs;
  static constexpr int row_slots = width == 1 ? 0 : packs * walk_threads;  // 16 bytes each; of a tensor and stage
  static constexpr int capacity = row_threads * packs * width;             // elements of the longest row
};

// For __launch_bounds__ of a forward kernel: how many blocks fit an SM if their registers allow `threads` threads an
// SM. With two packs a thread it takes half as many threads again, so that enough loads are in flight.
template <typename L>
constexpr int resident_blocks(int threads) {
  return L::width == 1 ? 1 : std::max(1, (L::packs == 2 ? threads * 3 / 2 : threads) / L::block_threads);
}

// Loads a pack that is read once. The L1 cache does not keep 16-byte packs, and is left to the weight.
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

// Loads a pack that is read again.
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

template <typename T, int width>
__device__ __forceinline__ void unpack(float (&to)[width], const Pack<T, width>& pack) {
  if constexpr (std::is_same_v<T, bf16> && width % 2 == 0) {  // one instruction an element
    uint32_t pairs[width / 2];
    memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int x = 0; x < width / 2; ++x) {
      to[2 * x] = __uint_as_float(pairs[x] << 16);
      to[2 * x + 1] = __uint_as_float(pairs[x] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int x = 0; x < width; ++x) to[x] = to_float(pack.value[x]);
  }
}

// Rounds to T. One instruction rounds two elements of a 16-bit type.
template <typename T, int width>
__device__ __forceinline__ Pack<T, width> round_pack(const float (&from)[width]) {
  Pack<T, width> pack;
  if constexpr (sizeof(T) == 2 && width % 2 == 0) {
    using Two = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
    Two pairs[width / 2];
#pragma unroll
    for (int x = 0; x < width / 2; ++x) {
      if constexpr (std::is_same_v<T, bf16>)
        pairs[x] = __floats2bfloat162_rn(from[2 * x], from[2 * x + 1]);
      else
        pairs[x] = __floats2half2_rn(from[2 * x], from[2 * x + 1]);
    }
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int x = 0; x < width; ++x) pack.value[x] = from_float<T>(from[x]);
  }
  return pack;
}

// Keeps a pack in its own registers. The compiler might otherwise keep its elements as floats, in up to twice as many.
template <typename T, int width>
__device__ __forceinline__ void keep_packed(Pack<T, width>& pack) {
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, 16);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&pack, &bits, 16);
  }
}

// Loads elements of the weight, which is float32 (is_float) or of type T.
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
    unpack(to, load_pack<T, width>(data, element));
  }
}

// The weight of a forward row's packs. It is loaded beside the row, so it has arrived when the row's sums are made. Two
// kinds are loaded only when they are read (late): single elements, and float32 beside a 16-bit T, which would take
// twice the registers.
template <typename L>
struct RowWeight {
  using T = typename L::T;

  __device__ __forceinline__ RowWeight(const void* data, int64_t start, int count, bool is_float)
      : first(static_cast<const char*>(data) + start * (is_float ? 4 : sizeof(T))),
        is_float(is_float),
        late(L::width == 1 || (is_float && sizeof(T) < 4)) {
    if (late) return;
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (element(k) < count) early[k] = load_pack<T, L::width>(first, element(k));
    }
  }

  // The weight of pack k, which must lie within the row.
  __device__ __forceinline__ void read(float (&to)[L::width], int k) {
    if (late) {
      load_weight<T>(to, first, element(k), is_float);
    } else {
      keep_packed(early[k]);
      unpack(to, early[k]);
    }
  }

  static __device__ __forceinline__ int element(int k) {
    return (static_cast<int>(threadIdx.x) % L::row_threads + k * L::row_threads) * L::width;
  }

  const char* first;
  bool is_float, late;
  Pack<T, L::width> early[L::packs];
};

// Each value becomes its sum over `lanes` neighbouring lanes.
template <int lanes, int values>
__device__ __forceinline__ void lane_sums(float (&x)[values]) {
#pragma unroll
  for (int v = 0; v < values; ++v) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
  }
}

// A barrier of a group's threads. Barrier 0 is that of __syncthreads.
template <typename L>
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(L::row_threads) : "memory");
}

// Each value becomes its sum over the group's threads. `buffer` is row_warps * values floats of shared memory. It must
// not be that of the group's last call, which a thread may still read.
template <typename Layout, int values>
__device__ __forceinline__ void row_sums(float (&x)[values], float* buffer) {
  lane_sums<32>(x);
  if constexpr (Layout::row_warps > 1) {
    const int warp = threadIdx.x % Layout::row_threads / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int v = 0; v < values; ++v) buffer[v * Layout::row_warps + warp] = x[v];
    }
    group_barrier<Layout>(static_cast<int>(threadIdx.x / Layout::row_threads));
#pragma unroll
    for (int v = 0; v < values; ++v) {
      if constexpr (Layout::row_warps <= 4) {
        x[v] = 0.0f;
#pragma unroll
        for (int w = 0; w < Layout::row_warps; ++w) x[v] += buffer[v * Layout::row_warps + w];
      } else {  // each thread reads the sum of one warp
        x[v] = buffer[v * Layout::row_warps + threadIdx.x % Layout::row_warps];
#pragma unroll
        for (int distance = Layout::row_warps / 2; distance > 0; distance /= 2)
          x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
      }
    }
  }
}

// A walking thread's slots. A stage has the thread's packs of one row of each of `tensors` tensors. The stages form a
// ring. All are addresses within shared memory.
template <typename L, int tensors>
struct Slots {
  static constexpr uint32_t tensor_bytes = L::row_slots * 16, stage_bytes = tensors * tensor_bytes;

  __device__ __forceinline__ Slots(const uint4* slots, int stages)
      : first(ptx::shared_address(slots + threadIdx.x)), end(first + stages * stage_bytes) {}
  __device__ __forceinline__ uint32_t after(uint32_t stage) const {
    stage += stage_bytes;
    return stage == end ? first : stage;
  }

  uint32_t first, end;
};

// Starts the copies of the thread's packs of a row into its slots. `start` is the element where its first pack begins.
// Packs beyond the row's end become zeros. Single elements are not copied.
template <typename L>
__device__ __forceinline__ void copy_row(uint32_t slots, const void* data, int64_t start, int count) {
  if constexpr (L::width > 1) {
    const int thread = threadIdx.x % L::row_threads;
    const auto* from = static_cast<const typename L::T*>(data) + start;
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      const bool within = (thread + k * L::row_threads) * L::width < count;
      ptx::cp_async_16(slots + k * walk_threads * 16, from + k * L::row_threads * L::width, within ? 16 : 0);
    }
  }
}

// Prefetches the thread's packs of a row into the L2 cache. It may come before wait_for_earlier_kernels, while memory
// has little else to do.
template <typename L, typename Element = typename L::T>
__device__ __forceinline__ void prefetch_row(const void* data, int64_t start, int count) {
  constexpr int threads = 128 / (L::width * sizeof(Element));  // that share one line of the cache
  const int thread = threadIdx.x % L::row_threads;
  if (L::width == 1 || thread % threads != 0) return;
  const Element* from = static_cast<const Element*>(data) + start;
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = k * L::row_threads * L::width;
    if (thread * L::width + at < count) prefetch_to_l2(from + at);
  }
}

// The same for the weight. It comes before the prefetch of the rows, since the weight is needed first. Without that of
// the rows it has no measurable effect.
template <typename L>
__device__ __forceinline__ void prefetch_row_weight(const void* data, int64_t start, int count, bool is_float) {
  if (is_float)
    prefetch_row<L, float>(data, start, count);
  else
    prefetch_row<L>(data, start, count);
}

// Pack k of the row that copy_row copied, after wait_for_copies. Single elements come from memory. The load is
// volatile: the compiler must read a pack again, not keep it in registers.
template <typename L>
__device__ __forceinline__ Pack<typename L::T, L::width> read_pack(uint32_t slots, const void* data, int64_t start,
                                                                   int k, int count) {
  Pack<typename L::T, L::width> pack{};
  if constexpr (L::width > 1) {
    uint4 bits;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(slots + k * walk_threads * 16));
    memcpy(&pack, &bits, 16);
  } else {
    const int at = threadIdx.x % L::row_threads + k * L::row_threads;
    if (at < count) pack = load_once<typename L::T, 1>(data, start + k * L::row_threads);
  }
  return pack;
}

// Waits until all but the last `pending` (0 or 1) groups of this thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending == 0)
    ptx::cp_async_wait<0>();
  else
    ptx::cp_async_wait<1>();
}

// fetch_row_weight loads the weight of a thread's packs, 0 beyond the row's end. Packs of 16-bit elements stay as they
// are, in the first half of to[k]. widen_row_weight makes them float32 when they have arrived. The copies of the first
// rows start between the two calls. Behind these copies the weight would arrive last and hold up everything.
template <typename L>
__device__ __forceinline__ void fetch_row_weight(float (&to)[L::packs][L::width], const void* data, int64_t start,
                                                 int count, bool is_float) {
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (static_cast<int>(threadIdx.x) % L::row_threads + k * L::row_threads) * L::width;
#pragma unroll
    for (int e = 0; e < L::width; ++e) to[k][e] = 0.0f;
    if (at >= count) continue;
    if (L::width == 8 && !is_float) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(static_cast<const typename L::T*>(data) + start + at));
      memcpy(to[k], &bits, 16);
    } else {
      load_weight<typename L::T>(to[k], data, start + at, is_float);
    }
  }
}
template <typename L>
__device__ __forceinline__ void widen_row_weight(float (&weight)[L::packs][L::width], bool is_float) {
  if constexpr (L::width == 8) {
    if (is_float) return;
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      Pack<typename L::T, L::width> pack;
      memcpy(&pack, weight[k], sizeof(pack));
      unpack(weight[k], pack);
    }
  }
}

// Writes the sums of a walking block's groups to `partial`, the block's row of the workspace. The groups meet in
// `shared`, which takes the place of the slots. All threads must call it.
template <typename L>
__device__ __forceinline__ void write_partial(const float (&sums)[L::packs][L::width], float* shared, float* partial,
                                              int count) {
  constexpr int step = L::width % 4 == 0 ? 4 : 1;
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  float* to = L::walk_groups == 1 ? partial : shared + group * L::capacity;
  if (L::walk_groups > 1) __syncthreads();  // until all threads have read their slots
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * L::width;
    if (at >= count) continue;
#pragma unroll
    for (int e = 0; e < L::width; e += step) {
      Pack<float, step> some;
#pragma unroll
      for (int x = 0; x < step; ++x) some.value[x] = sums[k][e + x];
      *reinterpret_cast<Pack<float, step>*>(to + at + e) = some;
    }
  }
  if constexpr (L::walk_groups > 1) {
    __syncthreads();
    for (int column = threadIdx.x; column < count; column += walk_threads) {
      float sum = shared[column];
#pragma unroll
      for (int g = 1; g < L::walk_groups; ++g) sum += shared[g * L::capacity + column];
      partial[column] = sum;
    }
  }
}

inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with the forward layout that holds rows of `dim` elements. `vectors`: every row begins at a multiple of 16
// bytes if dim fills whole packs.
template <typename F>
cudaError_t dispatch_layout(DType dtype, int64_t dim, bool vectors, F&& f) {
  return dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int width = 16 / sizeof(T);
    if (vectors && dim % width == 0) {
      const int64_t packs = dim / width;
      if (packs <= 32 * 2) return f(RowLayout<T, width, 32, 2>{});
      if (packs <= 32 * 4) return f(RowLayout<T, width, 32, 4>{});
      if (packs <= 64 * 4) return f(RowLayout<T, width, 64, 4>{});
      if (packs <= 128 * 4) return f(RowLayout<T, width, 128, 4>{});
      if (packs <= 256 * 4) return f(RowLayout<T, width, 256, 4>{});
      if (packs <= 512 * 4) return f(RowLayout<T, width, 512, 4>{});
    }
    return dim <= max_norm_dim ? f(RowLayout<T, 1, 512, 32>{}) : cudaErrorInvalidValue;
  });
}

// The same with the layout of a walking kernel.
template <typename F>
cudaError_t dispatch_walking_layout(DType dtype, int64_t dim, bool vectors, F&& f) {
  return dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int width = 16 / sizeof(T);
    if (vectors && dim % width == 0) {
      const int64_t packs = dim / width;
      if (packs <= 32 * 2) return f(RowLayout<T, width, 32, 2>{});
      if (packs <= 64 * 2) return f(RowLayout<T, width, 64, 2>{});
      if (packs <= 128 * 2) return f(RowLayout<T, width, 128, 2>{});
      if (packs <= 256 * 2) return f(RowLayout<T, width, 256, 2>{});
      if (packs <= 512 * 2) return f(RowLayout<T, width, 512, 2>{});
      if (packs <= 512 * 4) return f(RowLayout<T, width, 512, 4>{});
    }
    if (dim <= 32 * 4) return f(RowLayout<T, 1, 32, 4>{});
    return dim <= max_norm_dim ? f(RowLayout<T, 1, 512, 32>{}) : cudaErrorInvalidValue;
  });
}

// The rows that a walking block takes at a time.
inline int64_t walking_rows(DType dtype, int64_t dim, bool vectors) {
  int64_t groups = 1;
  static_cast<void>(dispatch_walking_layout(dtype, dim, vectors, [&](auto layout) {
    groups = decltype(layout)::walk_groups;
    return cudaSuccess;
  }));
  return groups;
}

// The stages of a walking block: two, or one where the shared memory does not suffice. A thread then does not read
// ahead. With more than two the kernels are slower.
template <typename L>
int walking_stages(int tensors) {
  constexpr int reserved = 4096;  // for the kernels' other buffers
  return 2 * tensors * L::row_slots * 16 + reserved <= shared_memory_limit() ? 2 : 1;
}

// Bytes of a walking block's shared memory: its slots. At the end its groups' sums take their place (write_partial).
template <typename L>
int walking_bytes(int tensors, int stages) {
  const int sums = L::walk_groups == 1 ? 0 : L::walk_groups * L::capacity * static_cast<int>(sizeof(float));
  return std::max(stages * tensors * L::row_slots * 16, sums);
}

// How many blocks walk over `rows` rows, where a block takes `groups` rows a turn: at most one an SM, and no more than
// the number of turns needs.
inline int64_t walking_blocks(int64_t rows, int64_t groups, int64_t processors) {
  const int64_t turns = std::max<int64_t>(1, ceil_div(rows, groups * processors));
  return ceil_div(rows, groups * turns);
}

// out (columns, of `dtype`) = the sum of `rows` rows of `partial`, added in a fixed order.
cudaError_t sum_rows(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
