// One token of the mLSTM for every row, the state updated in place, in one launch.
//
// The state c of a (row, head) is dqk x dv. It is cut into tiles of columns, one block each, so that h needs no sum
// across blocks. Every block computes the gates and the normalizer for itself, from the old n and m. So n and m must
// not change before all blocks of the (row, head) have read them. These blocks form a thread block cluster. A block
// arrives at the cluster's barrier once it has read n and m. Block 0 waits for the barrier and writes the new n and m,
// while its loads of c are still in flight. Before compute capability 9.0 there are no clusters. There a counter for
// each (row, head) takes the barrier's place, and the last block to finish writes.
//
// A block has 256 or 512 threads. `lanes` neighbouring threads hold 16 bytes each of one row of c, so a block loads
// threads / lanes rows at once. A thread loads a batch of rows before it uses the first: 32 KiB a block in flight. In
// one wave it is 96 KiB in two halves, of which one loads while the other is used. The first loads of c are issued
// before the block waits for anything else. Sums over rows go through shuffles, then shared memory, in a fixed order.
//
//   tiles            threads  lanes  bytes of a row  blocks at 8 heads, dv 512, float32
//   few (row, head)  512*     8      128             16 for each: batch 1 fills 128 SMs
//   many             256      16     256             8 for each
//   one wave         512      64     1024            2 for each: batch 8 fills 128 SMs
//   dv > 512 x 4 B   256      32     512             dv / 128, at most 16
//   c not aligned    256      32     an element each dv / 32, at most 16
//   * 256 where c is bfloat16, which takes more registers
//
// Clusters of 8 leave some SMs without a block, and a partial second wave takes as long as a full one. So clusters of 2
// are used where they give about one block an SM.
#include <algorithm>
#include <cstring>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "params/mlstm.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int few_resident = 2;  // blocks an SM, where there are few (row, head)
// From so many (row, head) on, a block first prefetches two batches of rows of c into the L2 cache, else one. Tuned.
constexpr int64_t many_items = 2048;

// A row of the state is read once and written once, so neither is kept in the caches.
template <typename C, int width>
__device__ __forceinline__ Group<C, width> load_state(const C* at) {
  Group<C, width> group;
  if constexpr (width > 1) {
    const uint4 bits = __ldcv(reinterpret_cast<const uint4*>(at));
    memcpy(&group, &bits, 16);
  } else {
    group.value[0] = *at;
  }
  return group;
}
template <typename C, int width>
__device__ __forceinline__ void store_state(C* at, const Group<C, width>& group) {
  if constexpr (width > 1) {
    uint4 bits;
    memcpy(&bits, &group, 16);
    __stcs(reinterpret_cast<uint4*>(at), bits);
  } else {
    *at = group.value[0];
  }
}

// An element as it lies in memory. It is converted where it is used: a conversion next to the load would wait for each
// load in turn.
struct Raw {
  uint32_t bits;
};
__device__ __forceinline__ Raw load_raw(const void* data, int64_t index, bool is_float) {
  if (is_float) return {static_cast<const uint32_t*>(data)[index]};
  return {static_cast<const uint16_t*>(data)[index]};
}
__device__ __forceinline__ float raw_to_float(Raw raw, DType dtype) {
  const float from_half = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.bits)));
  return dtype == DType::float16 ? from_half : __uint_as_float(dtype == DType::float32 ? raw.bits : raw.bits << 16);
}

// Relaxed: before the barrier there are only reads, whose values have been used. No other block reads what this one has
// written. A release would wait for memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Prefetches into the L2 cache all that a (row, head) needs except c.
template <int threads>
__device__ __forceinline__ void prefetch_vectors(const MlstmStep& p, int64_t row, int head, int64_t slot) {
  const int64_t item = element_bytes(p.dtype), gate_item = element_bytes(p.gate_dtype);
  const auto fetch = [&](const void* at, int64_t bytes) {
    for (int64_t b = threadIdx.x * 128; b < bytes; b += threads * 128) prefetch_to_l2(static_cast<const char*>(at) + b);
  };
  const auto fetch_row = [&](const Strided& t, int64_t size, int64_t bytes) {
    fetch(static_cast<const char*>(t.data) + (row * t.batch + head * t.head) * bytes, size * bytes);
  };
  fetch(p.state.m + slot * p.state.m_stride + head, 4);
  fetch(p.state.n + slot * p.state.n_stride + head * p.dqk, p.dqk * 4);
  fetch_row(p.i, 1, gate_item), fetch_row(p.f, 1, gate_item);
  fetch_row(p.q, p.dqk, item), fetch_row(p.k, p.dqk, item), fetch_row(p.v, p.dv, item);
}

// tiles: column tiles of a (row, head), which `blocks` blocks share (a cluster, if `clustered`). counters: one zero for
// each (row, head), used if not clustered and blocks > 1. early_batches: batches of c to prefetch into the L2 cache.
template <typename C, int width, int lanes, int threads, int batch_rows, int resident>
__global__ void __launch_bounds__(threads, resident)
    step_kernel(const __grid_constant__ MlstmStep p, int tiles, int blocks, bool clustered, unsigned* counters,
                int early_batches) {
  constexpr int warps = threads / 32;
  constexpr bool one_wave = lanes == 8 || lanes == 64;  // of blocks, more or less
  constexpr int groups = threads / lanes;               // rows loaded at once
  constexpr int tile_columns = lanes * width;
  // 32 bits: a division in 64 is a long call.
  const unsigned item = blockIdx.x / static_cast<unsigned>(blocks);
  const int block = static_cast<int>(blockIdx.x - item * static_cast<unsigned>(blocks));
  const unsigned batch_row = item / static_cast<unsigned>(p.heads);
  const int head = static_cast<int>(item - batch_row * static_cast<unsigned>(p.heads));
  const int64_t row = batch_row;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int dqk = static_cast<int>(p.dqk);

  int64_t column = static_cast<int64_t>(block) * tile_columns + lane * width;
  // With many blocks this gains nothing: prefetching into the L2 cache covers more of c.
  const bool early = one_wave && p.settled_state && p.state.indices == nullptr;
  if (!p.holds_next) let_next_kernel_start();
  // Only for prefetching: an earlier kernel may still change the index.
  const int64_t guess = p.state.indices == nullptr ? row : p.state.indices[row];
  if (guess >= 0 && guess < p.state.num_slots) {
    prefetch_vectors<threads>(p, row, head, guess);
    constexpr int line = 128 / sizeof(C), lines = std::max<int>(1, tile_columns * sizeof(C) / 128);  // of a row
    const int64_t first_column = static_cast<int64_t>(block) * tile_columns;
    const C* const first =
        static_cast<const C*>(p.state.c) + guess * p.state.c_stride + head * p.dqk * p.dv + first_column;
    const int wanted = early ? 0 : min(dqk, early_batches * batch_rows * groups) * lines;
    for (int x = threadIdx.x; x < wanted; x += threads) {
      const int r = x / lines, at = x % lines * line;
      if (first_column + at < p.dv) prefetch_to_l2(first + r * p.dv + at);
    }
  }
  const auto wait = [&] {
    wait_for_earlier_kernels();
    if (p.holds_next) let_next_kernel_start();
  };
  if (!early) wait();

  const int64_t slot = p.state.indices == nullptr ? row : p.state.indices[row];
  if (slot < 0 || slot >= p.state.num_slots) {  // the same for the whole cluster
    const float fill = slot == -1 ? 0.0f : NAN;
    for (int64_t x = block * threads + threadIdx.x; x < p.dv; x += blocks * threads) {
      store_from_float(p.h, static_cast<int64_t>(item) * p.dv + x, p.dtype, fill);
    }
    return;
  }
  C* c = static_cast<C*>(p.state.c) + slot * p.state.c_stride + head * p.dqk * p.dv;
  float* const n_slot = p.state.n + slot * p.state.n_stride + head * p.dqk;
  float* const m_slot = p.state.m + slot * p.state.m_stride + head;
  // For later: kept in registers while the gates are computed, the addresses would spill.
  __shared__ C* c_later;
  __shared__ float *n_later, *m_later;
  if (threadIdx.x == 0) c_later = c, n_later = n_slot, m_later = m_slot;

  constexpr int parts = lanes == 64 ? 2 : 1, part_rows = batch_rows / parts;
  Group<C, width> held[parts][part_rows];
  const auto load_part = [&](Group<C, width>(&to)[part_rows], int first) {
#pragma unroll
    for (int b = 0; b < part_rows; ++b) {
      const int r = first + b * groups;
      if (r < dqk && column < p.dv) to[b] = load_state<C, width>(c + r * p.dv + column);
    }
  };
  const auto load_batch = [&](int first) {
#pragma unroll
    for (int part = 0; part < parts; ++part) load_part(held[part], first + part * part_rows * groups);
  };
  load_batch(group);
  if (early) wait();

  const bool is_float = p.dtype == DType::float32, gates_are_float = p.gate_dtype == DType::float32;
  const auto read = [&](const Strided& from, int64_t x) {
    return load_raw(from.data, row * from.batch + head * from.head + x, is_float);
  };
  Raw v_raw[width];
  const auto load_v = [&] {
#pragma unroll
    for (int x = 0; x < width; ++x) v_raw[x] = column + x < p.dv ? read(p.v, column + x) : Raw{0};
  };
  load_v();
  // All loads are issued before the gates are used: one memory latency in all.
  Raw q_next{0}, k_next{0};
  float n_next = 0.0f;
  const auto load_next = [&](int x) {
    if (x < dqk) q_next = read(p.q, x), k_next = read(p.k, x), n_next = n_slot[x];
  };
  load_next(threadIdx.x);
  const Raw i_raw = load_raw(p.i.data, row * p.i.batch + head * p.i.head, gates_are_float);
  const Raw f_raw = load_raw(p.f.data, row * p.f.batch + head * p.f.head, gates_are_float);
  const float m_before = *m_slot;

  extern __shared__ float shared[];
  float *q = shared, *k = q + dqk;  // as float32; k weighted, and 0 where nothing is taken in
  __shared__ float part[warps];
  constexpr int shares = lanes < 32 ? warps : groups;  // of a column's sum: a warp's, or a row's
  __shared__ float sums[shares][tile_columns];
  const float i = cap_gate(raw_to_float(i_raw, p.gate_dtype), p.gate_soft_cap);
  const float carried = log_sigmoid(cap_gate(raw_to_float(f_raw, p.gate_dtype), p.gate_soft_cap)) + m_before;
  const float m = fmaxf(carried, i), keep = expf(carried - m), take = expf(i - m);
  float s = 0.0f, n_first = 0.0f;  // the thread's first of the new n
  for (int x = threadIdx.x; x < dqk; x += threads) {
    q[x] = raw_to_float(q_next, p.dtype);
    k[x] = take != 0.0f ? take * raw_to_float(k_next, p.dtype) : 0.0f;
    const float updated = keep * n_next + k[x];
    if (x == static_cast<int>(threadIdx.x)) n_first = updated;
    s += q[x] * updated;
    load_next(x + threads);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) s += __shfl_xor_sync(all_lanes, s, distance);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();  // the whole block has read n and m
  // bfloat16 would spill more with it.
  if constexpr (width != 8) c = c_later;
  if (clustered) cluster_arrive();
  s = 0.0f;
#pragma unroll
  for (int w = 0; w < warps; ++w) s += part[w];
  s *= p.scale;
  // fmaxf would drop a NaN in s.
  const float factor = isnan(s) ? s : p.scale / (fmaxf(fabsf(s), expf(-m)) + p.eps);
  const auto write_n_and_m = [&] {
    if (threadIdx.x == 0) *m_later = m;
    float* const n = n_later;
    for (int x = threadIdx.x; x < dqk; x += threads) {
      n[x] = x == static_cast<int>(threadIdx.x) ? n_first : keep * n[x] + k[x];
    }
  };
  if (clustered && block == 0) {  // while the loads of c are in flight
    cluster_wait();
    write_n_and_m();
  }

  for (int tile = block; tile < tiles; tile += blocks) {
    column = static_cast<int64_t>(tile) * tile_columns + lane * width;
    if (tile != block) load_v();
    float v[width], acc[width] = {};
#pragma unroll
    for (int x = 0; x < width; ++x) v[x] = take != 0.0f ? raw_to_float(v_raw[x], p.dtype) : 0.0f;
    for (int first = group; first < dqk; first += batch_rows * groups) {
      if (first == group ? tile != block : parts == 1) load_batch(first);
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const int part_first = first + part * part_rows * groups;
#pragma unroll
        for (int b = 0; b < part_rows; ++b) {
          const int r = part_first + b * groups;
          if (r >= dqk || column >= p.dv) continue;
          const float qr = q[r], kr = k[r];
          Group<C, width> updated;
#pragma unroll
          for (int x = 0; x < width; ++x) {
            const float value = keep * to_float(held[part][b].value[x]) + kr * v[x];
            acc[x] += qr * value;
            updated.value[x] = from_float<C>(value);
          }
          store_state<C, width>(c + r * p.dv + column, updated);
        }
        if constexpr (parts > 1) load_part(held[part], part_first + batch_rows * groups);
      }
    }
    // First over the rows of a warp, where it has several; then over the warps.
#pragma unroll
    for (int x = 0; x < width; ++x) {
#pragma unroll
      for (int distance = 16; distance >= lanes; distance /= 2) {
        acc[x] += __shfl_xor_sync(all_lanes, acc[x], distance);
      }
    }
    if (tile != block) __syncthreads();  // all have read the last tile's sums
    if (threadIdx.x % 32 < lanes) {
      float* const share = sums[lanes < 32 ? threadIdx.x / 32 : group] + lane * width;
#pragma unroll
      for (int x = 0; x < width; ++x) share[x] = acc[x];
    }
    __syncthreads();
    for (int x = threadIdx.x; x < tile_columns; x += threads) {
      const int64_t out = static_cast<int64_t>(tile) * tile_columns + x;
      if (out >= p.dv) break;
      float sum = 0.0f;
#pragma unroll
      for (int y = 0; y < shares; ++y) sum += sums[y][x];
      store_from_float(p.h, static_cast<int64_t>(item) * p.dv + out, p.dtype, sum * factor);
    }
  }

  if (clustered) {
    if (block != 0) cluster_wait();
    return;
  }
  if (blocks > 1) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(counters + item, 1u) == static_cast<unsigned>(blocks - 1);
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
  }
  write_n_and_m();
}

template <typename C, int width, int lanes, int threads, int batch_rows, int resident>
cudaError_t launch(const MlstmStep& p, unsigned* counters, cudaStream_t stream) {
  constexpr int tile_columns = lanes * width;
  const auto kernel = step_kernel<C, width, lanes, threads, batch_rows, resident>;
  const size_t shared_bytes = 2 * sizeof(float) * p.dqk;
  // cluster_limit is looked up once for each step of shared memory, not for each size.
  constexpr size_t shared_step = 8 * 1024, shared_steps = 2 * sizeof(float) * max_step_dqk / shared_step;
  const size_t step = (shared_bytes - 1) / shared_step, step_bytes = (step + 1) * shared_step;
  if (step_bytes > 32 * 1024) {  // with the static part, more than the 48 KiB that need no attribute
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(step_bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t items = p.batch * p.heads;
  const int64_t tiles = ceil_div(p.dv, tile_columns);
  static PerDevice known[shared_steps];
  const int limit = cluster_limit(known[step], reinterpret_cast<const void*>(kernel), threads, step_bytes);
  const bool clusters = limit > 1;
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, clusters ? limit : largest_cluster));
  if (!clusters && blocks > 1) {
    const cudaError_t status = cudaMemsetAsync(counters, 0, sizeof(unsigned) * items, stream);
    if (status != cudaSuccess) return status;
  }
  const bool clustered = clusters && blocks > 1;
  return launch_early(kernel, dim3(static_cast<unsigned>(items * blocks)), dim3(threads), shared_bytes,
                      clustered ? blocks : 1, stream, p, static_cast<int>(tiles), blocks, clustered, counters,
                      items >= many_items ? 2 : 1);
}

template <typename C>
cudaError_t launch_for(const MlstmStep& p, unsigned* counters, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(C);
  // Blocks an SM. 80 registers a thread hold 8 rows of float32; rows of bfloat16 take more.
  constexpr int resident = width == 8 ? 2 : 3;
  if (p.dv % width != 0 || reinterpret_cast<uintptr_t>(p.state.c) % 16 != 0 || p.state.c_stride % width != 0) {
    return launch<C, 1, 32, 256, 8, 3>(p, counters, stream);
  }
  // Few enough (row, head) that largest_cluster blocks of each run at once.
  const int64_t at_once = few_resident * processor_count();
  if (p.batch * p.heads * largest_cluster <= at_once && p.dv <= largest_cluster * 8 * width) {
    if constexpr (width == 8)
      return launch<C, width, 8, 256, 8, few_resident>(p, counters, stream);
    else
      return launch<C, width, 8, 512, 4, few_resident>(p, counters, stream);
  }
  if constexpr (width == 4) {
    const int64_t blocks = p.batch * p.heads * ceil_div(p.dv, 64 * width), most = processor_count();
    if (blocks <= most && blocks * 4 >= most * 3) return launch<C, width, 64, 512, 12, 1>(p, counters, stream);
  }
  if (p.dv <= portable_cluster * 16 * width) return launch<C, width, 16, 256, 8, resident>(p, counters, stream);
  return launch<C, width, 32, 256, 8, resident>(p, counters, stream);
}

}  // namespace

int64_t mlstm_step_workspace_bytes(const MlstmStep& p) {
  return p.batch * p.heads * static_cast<int64_t>(sizeof(unsigned));
}

cudaError_t mlstm_step(const MlstmStep& p, void* workspace, cudaStream_t stream) {
  unsigned* counters = static_cast<unsigned*>(workspace);
  return p.state.c_dtype == DType::float32 ? launch_for<float>(p, counters, stream)
                                           : launch_for<bf16>(p, counters, stream);
}

}  // namespace flash_xlstm::cuda
