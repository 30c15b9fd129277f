// One token of the mLSTM for every row, the state updated in place, in one launch, on Hopper: for as many (row, head)
// that every multiprocessor has one, or a few share one. ../portable/step.cu serves the rest.
//
// A block walks through the rows of the states that are its own, (row, head) after (row, head): the copy engine brings
// 16 KiB of c into a stage of shared memory, 8 warps update it there, and the copy engine takes it back. So reads and
// writes never wait for each other, for sums or for gates. A warp of its own gives the orders; a stage is loaded anew
// once the store of what it held has been read.
//
// With fewer (row, head) than multiprocessors, the columns of one are shared by the 2, 4 or 8 blocks of a cluster. Each
// works out the gates and the normalizer for itself, from the old n and m, which must not change before all have read
// them: each block arrives at the cluster's barrier once it has, and block 0 writes the new ones behind it.
#include <algorithm>

#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/mlstm/hopper/hopper.h"
#include "cuda/mlstm/step.cuh"
#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::hopper {
namespace {

constexpr int consumer_threads = 256, threads = consumer_threads + 32;
constexpr int warps = consumer_threads / 32;
constexpr int stages = 6, stage_bytes = 16 * 1024;
constexpr int most_parts = 8;
constexpr int pending_stores = 1;
constexpr int resident_blocks = 2;  // on a multiprocessor, where there is that much to do

__device__ __forceinline__ void load_row(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   ptx::shared_address(shared)),
               "l"(global), "r"(bytes), "r"(ptx::shared_address(barrier))
               : "memory");
}

// The pieces of c that a block works through: `rows` rows at a time of one (row, head) after the other.
template <typename C>
struct Walk {
  const MlstmStep& p;
  const int64_t stride;      // from (row, head) to (row, head)
  const int rows, dqk;
  const int64_t first_column;
  int64_t item;
  C* c = nullptr;
  int row = 0;

  __device__ Walk(const MlstmStep& p, int64_t item, int64_t stride, int rows, int64_t first_column)
      : p(p), stride(stride), rows(rows), dqk(static_cast<int>(p.dqk)), first_column(first_column), item(item) {
    settle();
  }
  __device__ void settle() {
    for (; item < p.batch * p.heads; item += stride) {
      const int64_t slot = step_slot(p, item / p.heads);
      if (slot < 0) continue;
      c = static_cast<C*>(p.c) + (slot * p.heads + item % p.heads) * p.dqk * p.dv + first_column;
      return;
    }
    c = nullptr;
  }
  __device__ bool more() const { return c != nullptr; }
  __device__ int count() const { return min(rows, dqk - row); }
  __device__ C* at(int r) const { return c + (row + r) * p.dv; }
  __device__ void next() {
    row += rows;
    if (row < dqk) return;
    row = 0;
    item += stride;
    settle();
  }
};

template <typename C>
__global__ void __launch_bounds__(threads, 2) step_kernel(const __grid_constant__ MlstmStep p, const int parts) {
  constexpr int width = 16 / sizeof(C);
  extern __shared__ __align__(128) uint8_t shared[];
  const int dqk = static_cast<int>(p.dqk), columns = static_cast<int>(p.dv) / parts;
  const int row_bytes = columns * static_cast<int>(sizeof(C)), stage_rows = stage_bytes / row_bytes;
  float* const sums = reinterpret_cast<float*>(shared + stages * stage_bytes);  // (groups, columns)
  float2* const qk = reinterpret_cast<float2*>(sums + consumer_threads * width);  // q, and k weighted
  float* const n_new = reinterpret_cast<float*>(qk + dqk);                        // parts > 1
  __shared__ uint64_t full[stages], done[stages];
  __shared__ float part_sums[warps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned cluster = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x - cluster * static_cast<unsigned>(parts));
  const int64_t stride = gridDim.x / static_cast<unsigned>(parts);
  const int64_t first_column = static_cast<int64_t>(part) * columns;

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(done + stage, warps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (warp == warps) {
    if (parts > 1) cluster_arrive();
    {  // In vain if an earlier kernel is about to change the index.
      Walk<C> early(p, cluster, stride, stage_rows, first_column);
      for (int stage = 0; stage < stages && early.more(); ++stage, early.next()) {
        for (int r = lane; r < early.count(); r += 32) {
          asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(early.at(r)), "r"(row_bytes) : "memory");
        }
      }
    }
    wait_for_earlier_kernels();
    Walk<C> loads(p, cluster, stride, stage_rows, first_column), stores(p, cluster, stride, stage_rows, first_column);
    int load_stage = 0;
    const auto load = [&] {
      if (!loads.more()) return;
      uint64_t* const barrier = full + load_stage;
      if (lane == 0) ptx::mbarrier_arrive_expect(barrier, loads.count() * row_bytes);
      __syncwarp();
      for (int r = lane; r < loads.count(); r += 32) {
        load_row(shared + load_stage * stage_bytes + r * row_bytes, loads.at(r), row_bytes, barrier);
      }
      loads.next();
      if (++load_stage == stages) load_stage = 0;
    };
    for (int stage = 0; stage < stages; ++stage) load();
    int stage = 0, parity = 0;
    for (int stored = 0; stores.more(); ++stored, stores.next()) {
      ptx::mbarrier_wait(done + stage, parity);
      for (int r = lane; r < stores.count(); r += 32) {
        ptx::bulk_store(stores.at(r), shared + stage * stage_bytes + r * row_bytes, row_bytes);
      }
      ptx::bulk_store_commit();
      if (stored >= pending_stores) {
        ptx::bulk_store_wait_read<pending_stores>();
        __syncwarp();
        load();
      }
      if (++stage == stages) stage = 0, parity ^= 1;
    }
    ptx::bulk_store_wait<0>();
    if (parts > 1) cluster_wait();
    return;
  }

  wait_for_earlier_kernels();
  const int lanes = columns / width, groups = consumer_threads / lanes;  // threads of a row; rows under way
  const int group = threadIdx.x / lanes, column = threadIdx.x % lanes * width;
  const bool is_float = p.dtype == DType::float32, gates_are_float = p.gate_dtype == DType::float32;
  int stage = 0, parity = 0;
  for (int64_t item = cluster; item < p.batch * p.heads; item += stride) {
    const int64_t row = item / p.heads, head = item % p.heads;
    const int64_t slot = step_slot(p, row);
    if (slot < 0) {
      for (int x = threadIdx.x; x < columns; x += consumer_threads) {
        store_from_float(p.h, item * p.dv + first_column + x, p.dtype, slot == skipped_slot ? 0.0f : NAN);
      }
      if (parts > 1) cluster_arrive(), cluster_wait();
      continue;  // parts > 1: there is no other
    }
    const int64_t state = slot * p.heads + head;
    float* const n = p.n + state * p.dqk;
    const auto read = [&](const Strided& from, int64_t x) {
      return load_raw(from.data, row * from.batch + head * from.head + x, is_float);
    };
    Raw v_raw[width];
#pragma unroll
    for (int x = 0; x < width; ++x) v_raw[x] = read(p.v, first_column + column + x);
    Raw q_next{0}, k_next{0};
    float n_next = 0.0f;
    const auto load_next = [&](int x) {
      if (x < dqk) q_next = read(p.q, x), k_next = read(p.k, x), n_next = n[x];
    };
    load_next(threadIdx.x);
    const Raw i_raw = load_raw(p.i.data, row * p.i.batch + head * p.i.head, gates_are_float);
    const Raw f_raw = load_raw(p.f.data, row * p.f.batch + head * p.f.head, gates_are_float);
    const StepGates gates(raw_to_float(i_raw, p.gate_dtype), raw_to_float(f_raw, p.gate_dtype), p.m[state],
                          p.gate_soft_cap);
    float s = 0.0f;
    for (int x = threadIdx.x; x < dqk; x += consumer_threads) {
      const float q = raw_to_float(q_next, p.dtype);
      const float k = gates.take != 0.0f ? gates.take * raw_to_float(k_next, p.dtype) : 0.0f;
      const float updated = gates.keep * n_next + k;
      qk[x] = make_float2(q, k);
      s += q * updated;
      if (parts == 1) {
        n[x] = updated;
      } else {
        n_new[x] = updated;
      }
      load_next(x + consumer_threads);
    }
    s = warp_sum(s);
    if (lane == 0) part_sums[warp] = s;
    ptx::named_barrier(1, consumer_threads);  // behind it, this block has read n and m
    if (parts > 1) cluster_arrive();
    if (parts == 1 && threadIdx.x == 0) p.m[state] = gates.m;
    s = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; ++w) s += part_sums[w];
    const float factor = gates.factor(s, p.scale, p.eps);

    float v[width], acc[width] = {};
#pragma unroll
    for (int x = 0; x < width; ++x) v[x] = gates.take != 0.0f ? raw_to_float(v_raw[x], p.dtype) : 0.0f;
    for (int first = 0; first < dqk; first += stage_rows) {
      ptx::mbarrier_wait(full + stage, parity);
      uint8_t* const piece = shared + stage * stage_bytes + column * sizeof(C);
      const int count = min(stage_rows, dqk - first);
#pragma unroll 4
      for (int r = group; r < count; r += groups) {
        const float2 weights = qk[first + r];
        uint4* const at = reinterpret_cast<uint4*>(piece + r * row_bytes);
        Group<C, width> held, updated;
        const uint4 bits = *at;
        memcpy(&held, &bits, 16);
#pragma unroll
        for (int x = 0; x < width; ++x) {
          const float value = gates.keep * to_float(held.value[x]) + weights.y * v[x];
          acc[x] += weights.x * value;
          updated.value[x] = from_float<C>(value);
        }
        uint4 out;
        memcpy(&out, &updated, 16);
        *at = out;
      }
      ptx::fence_async_shared();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(done + stage);
      if (++stage == stages) stage = 0, parity ^= 1;
    }
#pragma unroll
    for (int x = 0; x < width; ++x) sums[group * columns + column + x] = acc[x];
    ptx::named_barrier(1, consumer_threads);
    for (int x = threadIdx.x; x < columns; x += consumer_threads) {
      float sum = 0.0f;
      for (int g = 0; g < groups; ++g) sum += sums[g * columns + x];
      store_from_float(p.h, item * p.dv + first_column + x, p.dtype, sum * factor);
    }
    if (parts > 1) {
      cluster_wait();
      if (part != 0) break;
      if (threadIdx.x == 0) p.m[state] = gates.m;
      for (int x = threadIdx.x; x < dqk; x += consumer_threads) n[x] = n_new[x];
      break;
    }
  }
}

// Blocks that share a (row, head): as few as give every multiprocessor work; 0: these kernels are not for it.
int parts_for(const MlstmStep& p) {
  const int64_t items = p.batch * p.heads, width = p.state_dtype == DType::float32 ? 4 : 8;
  if (p.dqk > 2048 || reinterpret_cast<uintptr_t>(p.c) % 16 != 0) return 0;
  const auto fits = [&](int parts) {
    const int64_t columns = p.dv / parts, lanes = columns / width;
    return p.dv % parts == 0 && columns % width == 0 && lanes >= 8 && lanes <= consumer_threads &&
           consumer_threads % lanes == 0;
  };
  int found = 0;
  for (int parts = 1; parts <= most_parts; parts *= 2) {
    if (!fits(parts)) continue;
    if (items * parts * 10 >= processor_count() * 9) return parts;
    found = parts;
  }
  // Too few to fill the multiprocessors even so: not where ../portable/step.cu's smaller tiles do.
  return items * found * 2 > processor_count() ? found : 0;
}

template <typename C>
cudaError_t launch(const MlstmStep& p, cudaStream_t stream) {
  const int parts = parts_for(p);
  const auto kernel = step_kernel<C>;
  const int bytes =
      stages * stage_bytes + consumer_threads * 16 / static_cast<int>(sizeof(C)) * 4 + static_cast<int>(p.dqk) * 12;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t items = p.batch * p.heads;
  const int64_t blocks = parts > 1 ? items * parts : std::min<int64_t>(items, processor_count() * resident_blocks);
  return launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, parts, stream, p, parts);
}

}  // namespace

bool serves(const MlstmStep& p) { return device_is_hopper() && parts_for(p) > 0; }

int64_t step_workspace_bytes(const MlstmStep&) { return 0; }

cudaError_t step(const MlstmStep& p, void*, cudaStream_t stream) {
  return p.state_dtype == DType::float32 ? launch<float>(p, stream) : launch<bf16>(p, stream);
}

}  // namespace flash_xlstm::cuda::hopper
