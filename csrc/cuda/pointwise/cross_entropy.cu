// Rows of a cross entropy (params/loss.h). Every logit is read from memory once, every gradient is written once.
//
// A cluster of 1, 2, 4 or 8 blocks takes a row, each block a slice of it. A thread takes packs of four logits.
//   Pass 1 reads the logits and leaves v in shared memory: v = tanh(logit / cap), or the logit itself without a cap.
//     Each thread keeps its largest v, the sum of exp(c - its largest c) and the sum of v. Here c = cap v, or v without
//     a cap. These are added across the warp, the block and, through the blocks' shared memory, the cluster. The order
//     is always the same.
//   Pass 2 makes the gradients from what the same thread left in shared memory.
// Float32 gradients need the slope of the cap to float32's rounding, also where tanh nears 1. For them pass 1 leaves
// the logits, and pass 2 makes v and the slope from these.
//
// A slice has at most 112 KiB, so that an SM holds two blocks: one reads while the other writes. A row of 50,304 logits
// has two slices. Rows longer than eight slices are read twice, by one block. So are rows longer than one slice on GPUs
// without clusters.
#include <cfloat>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"
#include "cuda/ptx/cluster.cuh"
#include "params/loss.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int threads = 512, warps = threads / 32;
constexpr int width = cross_entropy_pack;  // logits
constexpr int batch = 4;                   // packs that a thread has in flight
constexpr int max_slices = 8;
constexpr int64_t slice_bytes = 112 * 1024, pack_bytes = width * sizeof(float);
constexpr float log2_e = 1.44269504f;

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sums over values v, of which exp(c) is 2^(unit v).
struct Sums {
  float top;    // the largest v
  float exps;   // sum of 2^(unit (v - top))
  float total;  // sum of v

  __device__ __forceinline__ void add(const Sums& other, float unit) {
    const float higher = fmaxf(top, other.top);
    exps = exps * exp2_of((top - higher) * unit) + other.exps * exp2_of((other.top - higher) * unit);
    top = higher;
    total += other.total;
  }
};

template <int lanes>
__device__ __forceinline__ void add_over_lanes(Sums& sums, float unit) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Sums other;
    other.top = __shfl_xor_sync(0xffffffffu, sums.top, distance);
    other.exps = __shfl_xor_sync(0xffffffffu, sums.exps, distance);
    other.total = __shfl_xor_sync(0xffffffffu, sums.total, distance);
    sums.add(other, unit);
  }
}

// The row's sums, in every thread of its blocks. A block must call end_row before it ends: another block may still read
// its shared memory.
__device__ __forceinline__ Sums add_over_row(Sums sums, float unit, int slices) {
  __shared__ float parts[3][warps];
  __shared__ double2 own[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  add_over_lanes<32>(sums, unit);
  if (lane == 0) parts[0][warp] = sums.top, parts[1][warp] = sums.exps, parts[2][warp] = sums.total;
  __syncthreads();
  if (warp == 0) {
    sums = {.top = parts[0][lane % warps], .exps = parts[1][lane % warps], .total = parts[2][lane % warps]};
    add_over_lanes<warps>(sums, unit);
    if (lane == 0) {
      own[0] = make_double2(sums.top, sums.exps);
      own[1] = make_double2(sums.total, 0.0);
    }
    __syncwarp();
  }
#if __CUDA_ARCH__ >= 900
  if (slices > 1) {
    ptx::cluster_barrier();
    for (int rank = 0; rank < slices; ++rank) {
      const double2 pair = ptx::load_peer(own, rank), rest = ptx::load_peer(own + 1, rank);
      const Sums part{
          .top = static_cast<float>(pair.x), .exps = static_cast<float>(pair.y), .total = static_cast<float>(rest.x)};
      if (rank == 0)
        sums = part;
      else
        sums.add(part, unit);
    }
    ptx::cluster_arrive();
    return sums;
  }
#endif
  __syncthreads();
  return {
      .top = static_cast<float>(own[0].x), .exps = static_cast<float>(own[0].y), .total = static_cast<float>(own[1].x)};
}

__device__ __forceinline__ void end_row([[maybe_unused]] int slices) {
#if __CUDA_ARCH__ >= 900
  if (slices > 1) ptx::cluster_wait();
#endif
}

// v of four logits.
template <typename T, bool capped>
__device__ __forceinline__ float4 values_of(float4 z, float cap, float inverse_cap) {
  if constexpr (capped) {
    const auto value = [&](float x) { return sizeof(T) == 4 ? tanhf(x / cap) : fast_tanh(x * inverse_cap); };
    z = make_float4(value(z.x), value(z.y), value(z.z), value(z.w));
  }
  return z;
}

__device__ __forceinline__ float4 load_logits(const float* row, int64_t pack) {
  const uint4 bits = load_16_once(row + pack * width);
  return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                     __uint_as_float(bits.w));
}

__device__ __forceinline__ float element(const float4& v, int which) {
  return which == 0 ? v.x : which == 1 ? v.y : which == 2 ? v.z : v.w;
}

// kept: pass 2 reads what pass 1 left in shared memory; otherwise it reads the logits again. slices: blocks of a row.
// slice_packs: packs of a slice; the last slice of a row may have fewer.
template <typename T, bool capped, bool kept>
__global__ void __launch_bounds__(threads, 2)
    cross_entropy_kernel(CrossEntropy p, int slices, int slice_packs, float inverse_cap) {
  constexpr bool raw = capped && sizeof(T) == 4;
  extern __shared__ float4 slice[];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x / slices;
  const int rank = static_cast<int>(blockIdx.x % slices);
  const int all_packs = static_cast<int>(ceil_div(p.columns, width));
  const int begin = rank * slice_packs, count = min(slice_packs, all_packs - begin);  // the block's packs
  const int64_t label =
      p.labels_are_int32 ? static_cast<const int32_t*>(p.labels)[row] : static_cast<const int64_t*>(p.labels)[row];
  T* const gradient = p.dlogits == nullptr ? nullptr : static_cast<T*>(p.dlogits) + row * p.dlogits_stride;
  // Columns of the row's last pack, or 0 where that is full. The stride of rows is a multiple of packs, so the last
  // pack is read and written as a whole.
  const int ragged = static_cast<int>(p.columns % width);
  if (label == p.ignore_index) {  // in all blocks of the cluster or none
    if (rank == 0 && threadIdx.x == 0) p.loss[row] = 0.0f;
    if (gradient == nullptr) return;
    for (int at = threadIdx.x; at < count; at += threads)
      store_pack(gradient, static_cast<int64_t>(begin + at) * width, Pack<T, width>{});
    return;
  }
  const bool has_label = label >= 0 && label < p.columns;
  const int label_pack = has_label ? static_cast<int>(label / width) - begin : -1;
  const int label_place = static_cast<int>(label % width);
  const float* const logits = p.logits + row * p.logits_stride + static_cast<int64_t>(begin) * width;
  const float unit = capped ? p.cap * log2_e : log2_e;

  Sums sums{.top = capped ? -1.0f : -2e38f, .exps = 0.0f, .total = 0.0f};
  float labelled = 0.0f;
  for (int first = threadIdx.x; first < count; first += threads * batch) {
    float4 z[batch];
#pragma unroll
    for (int x = 0; x < batch; ++x) {
      if (first + x * threads < count) z[x] = load_logits(logits, first + x * threads);
    }
#pragma unroll
    for (int x = 0; x < batch; ++x) {
      const int at = first + x * threads;
      if (at >= count) break;
      float4 v = values_of<T, capped>(z[x], p.cap, inverse_cap);
      if constexpr (kept) slice[at] = raw ? z[x] : v;
      if (at == label_pack) labelled = element(v, label_place);
      if (ragged > 0 && begin + at == all_packs - 1) {  // what is beyond the row's end adds nothing
        sums.total += v.x + (ragged > 1 ? v.y : 0.0f) + (ragged > 2 ? v.z : 0.0f);
        if (ragged < 2) v.y = -INFINITY;
        if (ragged < 3) v.z = -INFINITY;
        v.w = -INFINITY;
      } else {
        sums.total += (v.x + v.y) + (v.z + v.w);
      }
      const float top = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
      if (top > sums.top) {
        sums.exps *= exp2_of((sums.top - top) * unit);
        sums.top = top;
      }
      const float shift = sums.top * unit;  // its rounding does not matter to 16-bit gradients
      const auto exp_of = [&](float x) {
        return exp2_of(sizeof(T) == 4 ? (x - sums.top) * unit : fmaf(x, unit, -shift));
      };
      sums.exps += (exp_of(v.x) + exp_of(v.y)) + (exp_of(v.z) + exp_of(v.w));
    }
  }
  sums = add_over_row(sums, unit, slices);

  // float64: the differences below lose no digits.
  const double c_of_v = capped ? p.cap : 1.0;
  const double lse = c_of_v * sums.top + logf(sums.exps);
  if (has_label ? label_pack >= 0 && label_pack < count && threadIdx.x == label_pack % threads
                : rank == 0 && threadIdx.x == 0) {
    const double s = p.label_smoothing;
    double loss = __longlong_as_double(0x7ff8000000000000ll);
    if (has_label) {
      loss = s == 1.0 ? 0.0 : (1.0 - s) * (lse - c_of_v * labelled);
      if (s > 0.0) loss += s * (lse - c_of_v * sums.total / static_cast<double>(p.columns));
      if (p.z_loss > 0.0f) loss += p.z_loss * lse * lse;
    }
    p.loss[row] = static_cast<float>(loss);
  }
  if (gradient != nullptr) {
    const float scale = p.scale == nullptr ? 1.0f : p.scale[row];
    const float of_p = scale * (1.0f + 2.0f * p.z_loss * static_cast<float>(lse));
    const float everywhere = scale * p.label_smoothing / static_cast<float>(p.columns);
    const float at_label = scale * (1.0f - p.label_smoothing);
    const float shift = static_cast<float>(static_cast<double>(sums.top) * unit + log2f(sums.exps));
    T* const out = gradient + static_cast<int64_t>(begin) * width;
#pragma unroll 2
    for (int at = threadIdx.x; at < count; at += threads) {
      const float4 z = kept ? slice[at] : load_logits(logits, at);
      const float4 four = kept && !raw ? z : values_of<T, capped>(z, p.cap, inverse_cap);
      const float v[width] = {four.x, four.y, four.z, four.w};
      float d[width];
#pragma unroll
      for (int x = 0; x < width; ++x) d[x] = exp2_of(v[x] * unit - shift) * of_p - everywhere;
      if (at == label_pack) {
#pragma unroll
        for (int x = 0; x < width; ++x) d[x] -= x == label_place ? at_label : 0.0f;
      }
      if constexpr (capped) {
#pragma unroll
        for (int x = 0; x < width; ++x) d[x] *= raw ? cap_gate_slope(element(z, x), p.cap) : 1.0f - v[x] * v[x];
      }
      if (ragged > 0 && begin + at == all_packs - 1) {
#pragma unroll
        for (int x = 1; x < width; ++x) d[x] = x < ragged ? d[x] : 0.0f;
      }
      store_pack(out, static_cast<int64_t>(at) * width, round_pack<T>(d));
    }
  }
  end_row(slices);
}

// The blocks of a row, or 0 where the row is read twice.
int slices_of(int64_t packs) {
  const int64_t room = std::min<int64_t>(shared_memory_limit() - 1024, slice_bytes);
  const int limit = code_knows_hopper() ? max_slices : 1;
  for (int slices = 1; slices <= limit; slices *= 2) {
    if (ceil_div(packs, slices) * pack_bytes <= room) return slices;
  }
  return 0;
}

template <typename T, bool capped, bool kept>
cudaError_t launch(const CrossEntropy& p, int slices, int64_t packs, cudaStream_t stream) {
  const auto kernel = cross_entropy_kernel<T, capped, kept>;
  const int64_t slice_packs = ceil_div(packs, slices);
  const size_t bytes = kept ? static_cast<size_t>(slice_packs * pack_bytes) : 0;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  const float inverse_cap = capped ? std::min(1.0f / p.cap, FLT_MAX) : 1.0f;  // 1 / cap may be infinite
  return launch_early(kernel, dim3(static_cast<unsigned>(p.rows * slices)), dim3(threads), bytes, slices, stream, p,
                      slices, static_cast<int>(slice_packs), inverse_cap);
}

}  // namespace

cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream) {
  const int64_t packs = ceil_div(p.columns, width);
  if (packs > INT32_MAX / 2 || p.rows > INT32_MAX / max_slices) return cudaErrorInvalidValue;
  const int slices = slices_of(packs);
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (slices == 0)
      return p.cap == 0.0f ? launch<T, false, false>(p, 1, packs, stream) : launch<T, true, false>(p, 1, packs, stream);
    return p.cap == 0.0f ? launch<T, false, true>(p, slices, packs, stream)
                         : launch<T, true, true>(p, slices, packs, stream);
  });
}

}  // namespace flash_xlstm::cuda
