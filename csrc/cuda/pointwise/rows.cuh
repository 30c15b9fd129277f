// What the norms share. A group of threads holds one row, 16 bytes a thread and pack; sums over a row go through
// shuffles and, where a group has several warps, a barrier of its own.
//
//   forward, row up to     threads a row         packs a thread
//   1, 2 KiB               32                    2, 4
//   4, 8, 16, 32 KiB       64, 128, 256, 512     4
//   any, unaligned         512                   32 single elements
//
// Forward, a group has one row, in registers. The gradients' blocks, one an SM at a time, walk over rows and
// keep their share of the weight's gradient in registers. They read a row ahead: each thread copies its packs of the
// next row into slots of shared memory while it works on one row. A thread reads only slots that it filled itself, so
// that it waits for nothing but its own copies. At the end a block's groups add up their shares, in a fixed order, into
// the block's row of a workspace, whose rows a second launch adds up (sum_rows).
//
//   walking, row up to        threads a row             packs a thread
//   1, 2, 4, 8, 16 KiB        32, 64, 128, 256, 512     2
//   32 KiB                    512                       4
//   any, unaligned            512                       32 single elements
//
// Walking, the fewer packs a thread has the sooner the last rows of a block are done, which nothing overlaps; with two
// there is room for a row's elements in registers between the sums and the gradients.
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

constexpr int walk_threads = 512;  // of a walking block

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
  static constexpr int walk_groups = walk_threads / row_threads;
  static constexpr int kept_packs = width > 1 && packs <= 2 ? packs : 1;  // that a walking thread has room to keep
  static constexpr bool kept = kept_packs == packs;
  static constexpr int row_slots = width == 1 ? 0 : packs * walk_threads;  // 16 bytes each, of a walking block's rows
  static constexpr int capacity = row_threads * packs * width;
};

// For __launch_bounds__ of a forward kernel: registers for this many threads an SM where a thread has four
// packs, and for half as many again where it has two, so that enough is on its way from memory.
template <typename L>
constexpr int resident_blocks(int threads) {
  return L::width == 1 ? 1 : std::max(1, (L::packs == 2 ? threads * 3 / 2 : threads) / L::block_threads);
}

// Rows are read once: the L1 cache is for the weight.
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

template <typename T, int width>
__device__ __forceinline__ void unpack(float (&to)[width], const Pack<T, width>& pack) {
  if constexpr (std::is_same_v<T, bf16> && width % 2 == 0) {  // in one instruction an element
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

// Rounded to T; the 16-bit types two at a time, in one instruction.
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

// Keeps the compiler from carrying a pack's elements on as floats, in up to twice the registers.
template <typename T, int width>
__device__ __forceinline__ void keep_packed(Pack<T, width>& pack) {
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, 16);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&pack, &bits, 16);
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
    unpack(to, load_pack<T, width>(data, element));
  }
}

// The weight of a forward row's packs: loaded beside the row, so that it is there when the row's sums are; but single
// elements, and float32 beside a narrower T, twice the registers, only when read.
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

  // Of a pack within the row.
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

// Each value becomes its sum over as many neighbouring lanes.
template <int lanes, int values>
__device__ __forceinline__ void lane_sums(float (&x)[values]) {
#pragma unroll
  for (int v = 0; v < values; ++v) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
  }
}

// Of a group's threads. Barrier 0 is __syncthreads.
template <typename L>
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(L::row_threads) : "memory");
}

// Each value becomes its sum over the group's threads. `buffer`, row_warps * values floats of shared memory, must be
// another than in the group's last call: a thread may still read that one.
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
      } else {  // of many warps' sums each thread reads one
        x[v] = buffer[v * Layout::row_warps + threadIdx.x % Layout::row_warps];
#pragma unroll
        for (int distance = Layout::row_warps / 2; distance > 0; distance /= 2)
          x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
      }
    }
  }
}

// A walking thread's slots: of a stage, its packs of a row of each of `tensors` tensors. Addresses within shared
// memory, which go round.
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

// Sends the thread's packs of a row on their way into its slots. `start`: of its first pack. Zeros beyond the row's
// end. Single elements are not copied.
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

// The same into the L2 cache only: for before wait_for_earlier_kernels, while memory has little else to do.
template <typename L, typename Element = typename L::T>
__device__ __forceinline__ void prefetch_row(const void* data, int64_t start, int count) {
  constexpr int threads = 128 / (L::width * sizeof(Element));  // for one line of the cache
  const int thread = threadIdx.x % L::row_threads;
  if (L::width == 1 || thread % threads != 0) return;
  const Element* from = static_cast<const Element*>(data) + start;
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = k * L::row_threads * L::width;
    if (thread * L::width + at < count) prefetch_to_l2(from + at);
  }
}

// To be called before the rows' prefetch: the weight is needed first. Alone it gained nothing that could be measured.
template <typename L>
__device__ __forceinline__ void prefetch_row_weight(const void* data, int64_t start, int count, bool is_float) {
  if (is_float)
    prefetch_row<L, float>(data, start, count);
  else
    prefetch_row<L>(data, start, count);
}

// Pack k of what copy_row was given, once that has arrived. To be read again rather than kept in registers.
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

// Until all but the last `pending` (0 or 1) groups of this thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending == 0)
    ptx::cp_async_wait<0>();
  else
    ptx::cp_async_wait<1>();
}

// The weight of a thread's packs, 0 beyond the row's end: fetched, 16-bit elements as they are in the first half of
// `to`, and when it has arrived widened. Between the two go the copies of the first rows: behind them the weight would
// arrive last and hold up everything.
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

// The sums of a walking block's groups, as the block's `partial`; through `shared`, the slots. All threads must call.
template <typename L>
__device__ __forceinline__ void write_partial(const float (&sums)[L::packs][L::width], float* shared, float* partial,
                                              int count) {
  constexpr int step = L::width % 4 == 0 ? 4 : 1;
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  float* to = L::walk_groups == 1 ? partial : shared + group * L::capacity;
  if (L::walk_groups > 1) __syncthreads();  // all have read their slots
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

// Calls f with the layout that holds rows of `dim` elements; `vectors`: every row begins at a multiple of 16 bytes.
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

// The same of a walking kernel.
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

// The rows that a layout's walking block has at a time.
inline int64_t walking_rows(DType dtype, int64_t dim, bool vectors) {
  int64_t groups = 1;
  static_cast<void>(dispatch_walking_layout(dtype, dim, vectors, [&](auto layout) {
    groups = decltype(layout)::walk_groups;
    return cudaSuccess;
  }));
  return groups;
}

// How many rows of `tensors` tensors a walking group has slots for: two, or one where the device has not the shared
// memory. More than one row ahead made the kernels slower.
template <typename L>
int walking_stages(int tensors) {
  constexpr int reserved = 4096;  // for the kernels' other buffers
  return 2 * tensors * L::row_slots * 16 + reserved <= shared_memory_limit() ? 2 : 1;
}

// Shared memory of a walking block: its slots, and in their place at the end its groups' sums (write_partial).
template <typename L>
int walking_bytes(int tensors, int stages) {
  const int sums = L::walk_groups == 1 ? 0 : L::walk_groups * L::capacity * static_cast<int>(sizeof(float));
  return std::max(stages * tensors * L::row_slots * 16, sums);
}

// How many blocks walk over `rows`, `groups` at a time each: one an SM, but no more than it takes for all to
// be done at once.
inline int64_t walking_blocks(int64_t rows, int64_t groups, int64_t processors) {
  const int64_t turns = std::max<int64_t>(1, (rows + groups * processors - 1) / (groups * processors));
  return (rows + groups * turns - 1) / (groups * turns);
}

// out (columns; float32 or bfloat16 or float16) = the sums of `rows` rows of partial, in a fixed order.
cudaError_t sum_rows(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype, cudaStream_t stream);

}  // namespace flash_xlstm::cuda
