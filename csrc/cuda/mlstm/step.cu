// One token of the mLSTM for every row, the state updated in place.
//
// Two launches: the first takes one block per row and head for the gates, n, m and 1 / d (every part of h needs the
// new n, so n cannot change under a block that still reads it); the second streams c, each float4 column group read
// and written once, and makes h from it.
#include "cuda/mlstm/launch.h"
#include "cuda/numeric.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int warps = 8;
constexpr int columns_per_thread = 4;
constexpr int tile_dv = 32 * columns_per_thread;

// What the first kernel leaves for the second, per row and head.
struct Gates {
  float keep, take, factor;  // factor: scale / d, NaN for a slot outside the pool
  int32_t slot;              // -1: leave the row out
};

template <typename T>
__global__ void __launch_bounds__(128) step_gates_kernel(const __grid_constant__ MlstmStep p, Gates* gates) {
  const int64_t row = blockIdx.x / p.heads;
  const int head = static_cast<int>(blockIdx.x % p.heads);
  const int64_t slot = p.state_indices == nullptr ? row : p.state_indices[row];
  Gates g{0.0f, 0.0f, slot == -1 ? 0.0f : NAN, -1};
  if (slot < 0 || slot >= p.num_slots) {
    if (threadIdx.x == 0) gates[blockIdx.x] = g;
    return;
  }
  const auto gate = [&](const Strided& t) {
    return cap_gate(load_as_float(t.data, row * t.batch + head * t.head, p.gate_dtype), p.gate_soft_cap);
  };
  const float i = gate(p.i), f = gate(p.f);
  const float m_before = p.m[slot * p.heads + head];
  const float carried = log_sigmoid(f) + m_before;
  const float m = fmaxf(carried, i);
  g.keep = expf(carried - m);
  g.take = expf(i - m);
  g.slot = static_cast<int32_t>(slot);
  const T* q = static_cast<const T*>(p.q.data) + row * p.q.batch + head * p.q.head;
  const T* k = static_cast<const T*>(p.k.data) + row * p.k.batch + head * p.k.head;
  float* n = p.n + (slot * p.heads + head) * p.dqk;
  float s = 0.0f;
  for (int64_t x = threadIdx.x; x < p.dqk; x += blockDim.x) {
    float value = g.keep * n[x];
    if (g.take != 0.0f) value += g.take * to_float(k[x]);
    n[x] = value;
    s += to_float(q[x]) * value;
  }
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(0xffffffffu, s, d);
  __shared__ float part[4];
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    s = p.scale * (part[0] + part[1] + part[2] + part[3]);
    g.factor = p.scale / (fmaxf(fabsf(s), expf(-m)) + p.eps);
    p.m[slot * p.heads + head] = m;
    gates[blockIdx.x] = g;
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(warps * 32) step_state_kernel(const __grid_constant__ MlstmStep p,
                                                                const Gates* gates, int dv_tiles, bool vectors) {
  const int64_t item = blockIdx.x / dv_tiles;
  const int64_t row = item / p.heads;
  const int head = static_cast<int>(item % p.heads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t col = blockIdx.x % dv_tiles * static_cast<int64_t>(tile_dv) + lane * columns_per_thread;
  const Gates g = gates[item];
  T* h = static_cast<T*>(p.h) + item * p.dv;
  if (g.slot < 0) {
    for (int x = 0; x < columns_per_thread; ++x) {
      if (warp == 0 && col + x < p.dv) h[col + x] = from_float<T>(g.factor);
    }
    return;
  }
  const T* q = static_cast<const T*>(p.q.data) + row * p.q.batch + head * p.q.head;
  const T* k = static_cast<const T*>(p.k.data) + row * p.k.batch + head * p.k.head;
  const T* v = static_cast<const T*>(p.v.data) + row * p.v.batch + head * p.v.head;
  C* c = static_cast<C*>(p.c) + (static_cast<int64_t>(g.slot) * p.heads + head) * p.dqk * p.dv;
  float vt[columns_per_thread], acc[columns_per_thread] = {};
  for (int x = 0; x < columns_per_thread; ++x) {
    vt[x] = col + x < p.dv && g.take != 0.0f ? g.take * to_float(v[col + x]) : 0.0f;
  }
  struct alignas(sizeof(C) * columns_per_thread) Group {
    C value[columns_per_thread];
  };
#pragma unroll 4
  for (int64_t r = warp; r < p.dqk; r += warps) {
    const float qr = to_float(q[r]), kr = g.take != 0.0f ? to_float(k[r]) : 0.0f;
    C* at = c + r * p.dv + col;
    if (vectors) {
      if (col >= p.dv) continue;
      Group group = *reinterpret_cast<const Group*>(at);
#pragma unroll
      for (int x = 0; x < columns_per_thread; ++x) {
        const float value = g.keep * to_float(group.value[x]) + kr * vt[x];
        acc[x] += qr * value;
        group.value[x] = from_float<C>(value);
      }
      *reinterpret_cast<Group*>(at) = group;
    } else {
      for (int x = 0; x < columns_per_thread; ++x) {
        if (col + x >= p.dv) break;
        const float value = g.keep * to_float(at[x]) + kr * vt[x];
        acc[x] += qr * value;
        at[x] = from_float<C>(value);
      }
    }
  }
  __shared__ float part[warps][tile_dv];
  for (int x = 0; x < columns_per_thread; ++x) part[warp][lane * columns_per_thread + x] = acc[x];
  __syncthreads();
  if (threadIdx.x < tile_dv) {
    const int64_t out = blockIdx.x % dv_tiles * static_cast<int64_t>(tile_dv) + threadIdx.x;
    float sum = 0.0f;
    for (int x = 0; x < warps; ++x) sum += part[x][threadIdx.x];
    if (out < p.dv) h[out] = from_float<T>(sum * g.factor);
  }
}

template <typename T, typename C>
cudaError_t launch(const MlstmStep& p, void* workspace, cudaStream_t stream) {
  Gates* gates = static_cast<Gates*>(workspace);
  const int64_t items = p.batch * p.heads;
  const int dv_tiles = static_cast<int>((p.dv + tile_dv - 1) / tile_dv);
  const bool vectors = p.dv % columns_per_thread == 0 &&
                       reinterpret_cast<uintptr_t>(p.c) % (sizeof(C) * columns_per_thread) == 0;
  step_gates_kernel<T><<<static_cast<unsigned>(items), 128, 0, stream>>>(p, gates);
  step_state_kernel<T, C><<<static_cast<unsigned>(items * dv_tiles), warps * 32, 0, stream>>>(p, gates, dv_tiles,
                                                                                              vectors);
  return cudaGetLastError();
}

}  // namespace

int64_t mlstm_step_workspace_bytes(const MlstmStep& p) { return p.batch * p.heads * sizeof(Gates); }

cudaError_t mlstm_step(const MlstmStep& p, void* workspace, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.state_dtype == DType::float32 ? launch<T, float>(p, workspace, stream)
                                           : launch<T, bf16>(p, workspace, stream);
  });
}

}  // namespace flash_xlstm::cuda
