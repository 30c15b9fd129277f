// dR[gate, head] = sum over tokens of dx_t h_{t-1}^T and db = sum of dx_t: one product over all tokens of all rows,
// after the loop. Tiles of 64 outputs x 64 inputs, 4 warps of 32 x 32, tokens 32 at a time: the next ones are read into
// registers while these are multiplied (warp_mma.cuh: float32 as three tf32 products, float16 as tf32). Where there are
// few tiles, the tokens are split among blocks; sums of the parts lie in scratch and are added in a fixed order.
#include <algorithm>

#include "cuda/mlstm/warp_mma.cuh"
#include "cuda/slstm/cell.cuh"
#include "cuda/slstm/weights.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int tile = 64, chunk = 32, threads = 128;

// starts[token]: the row whose first token it is, else -1.
__global__ void starts_kernel(const __grid_constant__ SlstmProblem p, int32_t* starts) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (token >= p.batch * p.seq) return;
  if (p.cu_seqlens == nullptr) {
    starts[token] = token % p.seq == 0 ? static_cast<int32_t>(token / p.seq) : -1;
    return;
  }
  int64_t low = 0, high = p.rows;  // the last row that starts at the token or before
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  starts[token] = p.cu_seqlens[low] == token || token == 0 ? static_cast<int32_t>(low) : -1;
}

template <typename T>
struct alignas(16) Group {
  static constexpr int width = 16 / sizeof(T);
  T value[width];
};

// A chunk of dx and of h before it, in registers: each thread holds columns [column, column + width) of some tokens.
template <typename T>
struct Loader {
  using Vector = Group<T>;
  static constexpr int width = Vector::width, per_row = tile / width, rows_a_pass = threads / per_row;
  static constexpr int passes = chunk / rows_a_pass;
  Vector dx[passes], h[passes];

  __device__ __forceinline__ void load(const SlstmBackward& params, const int32_t* starts, int gate, int head,
                                       int64_t out, int64_t in, int64_t first, int64_t stop, bool vectors) {
    const SlstmProblem& p = params.p;
    const int column = threadIdx.x % per_row * width;
    const T *dx_from = static_cast<const T*>(params.dx), *h_from = static_cast<const T*>(params.h);
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      const int64_t token = first + pass * rows_a_pass + threadIdx.x / per_row;
      dx[pass] = h[pass] = Vector{};
      if (token >= stop) continue;
      load_row(dx[pass], dx_from + ((token * 4 + gate) * p.heads + head) * p.dim, out + column, p.dim, vectors);
      const int64_t row = starts[token];
      if (row < 0) {
        load_row(h[pass], h_from + ((token - 1) * p.heads + head) * p.dim, in + column, p.dim, vectors);
      } else if (p.h0 != nullptr) {
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const int64_t unit = in + column + e;
          if (unit < p.dim) h[pass].value[e] = from_float<T>(p.h0[(row * p.heads + head) * p.dim + unit]);
        }
      }
    }
  }

  static __device__ __forceinline__ void load_row(Vector& to, const T* from, int64_t column, int64_t dim,
                                                  bool vectors) {
    if (vectors) {
      if (column < dim) to = *reinterpret_cast<const Vector*>(from + column);
      return;
    }
#pragma unroll
    for (int e = 0; e < width; ++e) {
      if (column + e < dim) to.value[e] = from[column + e];
    }
  }

  template <typename E>
  __device__ __forceinline__ void store(E* dx_to, E* h_to, int pitch) const {
    const int column = threadIdx.x % per_row * width;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      const int at = (pass * rows_a_pass + static_cast<int>(threadIdx.x) / per_row) * pitch + column;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        dx_to[at + e] = static_cast<E>(dx[pass].value[e]);
        h_to[at + e] = static_cast<E>(h[pass].value[e]);
      }
    }
  }
};

// sums: [splits][4 heads dim dim] of dR, then [splits][4 heads dim] of db.
template <typename T>
__global__ void __launch_bounds__(threads)
    product_kernel(const __grid_constant__ SlstmBackward params, const int32_t* starts, float* sums, float* bias_sums,
                   int64_t tokens_a_split, bool vectors) {
  using E = typename Arithmetic<T>::Element;
  constexpr int pitch = Arithmetic<T>::pitch_mn(tile);
  __shared__ alignas(16) E dx[chunk * pitch];
  __shared__ alignas(16) E h[chunk * pitch];
  const SlstmProblem& p = params.p;
  const int64_t tiles = (p.dim + tile - 1) / tile, matrix = blockIdx.x / (tiles * tiles);
  const int gate = static_cast<int>(matrix / p.heads), head = static_cast<int>(matrix % p.heads);
  const int64_t out = blockIdx.x / tiles % tiles * tile, in = blockIdx.x % tiles * tile;
  const int64_t begin = blockIdx.y * tokens_a_split, stop = min(begin + tokens_a_split, p.batch * p.seq);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_out = warp / 2 * 32, warp_in = warp % 2 * 32;

  float acc[2][4][4] = {};
  float bias = 0.0f;
  Loader<T> next;
  next.load(params, starts, gate, head, out, in, begin, stop, vectors);
  for (int64_t t = begin; t < stop; t += chunk) {
    __syncthreads();
    next.store(dx, h, pitch);
    __syncthreads();
    if (t + chunk < stop) next.load(params, starts, gate, head, out, in, t + chunk, stop, vectors);
    warp_mma<T, true, true, 2, 4>(acc, dx + warp_out, pitch, h + warp_in, pitch, 0, chunk);
    if (in == 0 && threadIdx.x < tile) {
      for (int k = 0; k < chunk; ++k) bias += to_float(dx[k * pitch + threadIdx.x]);
    }
  }
  const int64_t rows_of_all = 4 * p.heads * p.dim;
  sums += (blockIdx.y * rows_of_all + matrix * p.dim) * p.dim;
#pragma unroll
  for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
    for (int nt = 0; nt < 4; ++nt) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t row = out + warp_out + mt * 16 + lane / 4 + r / 2 * 8;
        const int64_t column = in + warp_in + nt * 8 + lane % 4 * 2 + r % 2;
        if (row < p.dim && column < p.dim) sums[row * p.dim + column] = acc[mt][nt][r];
      }
    }
  }
  if (in == 0 && threadIdx.x < tile && out + threadIdx.x < p.dim) {
    bias_sums[blockIdx.y * rows_of_all + matrix * p.dim + out + threadIdx.x] = bias;
  }
}

__global__ void add_kernel(const float* sums, int splits, int64_t count, void* to, DType dtype) {
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += sums[s * count + x];
  store_from_float(to, x, dtype, sum);
}

struct Plan {
  int64_t blocks, tokens, tokens_a_split, weights;
  int splits;
};

Plan plan(const SlstmProblem& p) {
  constexpr int64_t wanted_blocks = 4 * 132, fewest_tokens = 512;
  const int64_t tiles = (p.dim + tile - 1) / tile;
  Plan plan{};
  plan.blocks = tiles * tiles * 4 * p.heads;
  plan.tokens = p.batch * p.seq;
  plan.weights = 4 * p.heads * p.dim * p.dim;
  const int64_t splits =
      std::clamp<int64_t>(wanted_blocks / plan.blocks, 1, (plan.tokens + fewest_tokens - 1) / fewest_tokens);
  plan.tokens_a_split = ((plan.tokens + splits - 1) / splits + chunk - 1) / chunk * chunk;
  plan.splits = static_cast<int>((plan.tokens + plan.tokens_a_split - 1) / plan.tokens_a_split);
  return plan;
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + 255) / 256); }

}  // namespace

int64_t slstm_weight_gradients_workspace_bytes(const SlstmBackward& params) {
  const Plan at = plan(params.p);
  return (at.tokens + at.splits * (at.weights + 4 * params.p.heads * params.p.dim)) * 4;
}

cudaError_t slstm_weight_gradients(const SlstmBackward& params, void* workspace, cudaStream_t stream) {
  const SlstmProblem& p = params.p;
  const Plan at = plan(p);
  const int64_t biases = 4 * p.heads * p.dim;
  float* sums = static_cast<float*>(workspace);
  float* bias_sums = sums + at.splits * at.weights;
  int32_t* starts = reinterpret_cast<int32_t*>(bias_sums + at.splits * biases);
  starts_kernel<<<blocks_for(at.tokens), 256, 0, stream>>>(p, starts);
  dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = p.dim % Group<T>::width == 0;
    product_kernel<T><<<dim3(static_cast<unsigned>(at.blocks), at.splits), threads, 0, stream>>>(
        params, starts, sums, bias_sums, at.tokens_a_split, vectors);
  });
  add_kernel<<<blocks_for(at.weights), 256, 0, stream>>>(sums, at.splits, at.weights, params.dweights, p.weight_dtype);
  add_kernel<<<blocks_for(biases), 256, 0, stream>>>(bias_sums, at.splits, biases, params.dbias, p.bias_dtype);
  return cudaGetLastError();
}

}  // namespace flash_xlstm::cuda
