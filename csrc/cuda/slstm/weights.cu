// dR[gate, head] = sum over tokens of dx_t h_{t-1}^T and db = sum of dx_t: one product over all tokens of all rows,
// after the loop over the tokens. Where tiles are few, the tokens are split among blocks. Their sums go to scratch and
// are added in a fixed order.
//
// 16-bit types, dim a multiple of 8 and at least 128: tiles of 128 outputs x 128 inputs, 8 warps of 64 x 32. Tokens
// come 32 at a time through a ring of three stages that cp.async fills. Both operands lie as [token][column], with the
// 16-byte pieces of a row permuted, and ldmatrix transposes them.
// Otherwise: tiles of 64 x 64, 4 warps of 32 x 32. Tokens come 32 at a time, and the next 32 load into registers while
// these are multiplied (warp_mma.cuh: float32 as three tf32 products, float16 as tf32).
#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/common/warp_mma.cuh"
#include "cuda/slstm/cell.cuh"
#include "cuda/slstm/weights.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int tile = 64, chunk = 32, threads = 128;

// starts[token]: the row that starts at the token, else -1.
__global__ void starts_kernel(const __grid_constant__ SlstmProblem p, int32_t* starts) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (token >= p.batch * p.seq) return;
  if (p.cu_seqlens == nullptr) {
    starts[token] = token % p.seq == 0 ? static_cast<int32_t>(token / p.seq) : -1;
    return;
  }
  const int64_t row = sequence_of(p.cu_seqlens, p.rows, token);
  starts[token] = p.cu_seqlens[row] == token || token == 0 ? static_cast<int32_t>(row) : -1;
}

// A chunk of dx_t and of h_{t-1}, in registers. Each thread holds columns [column, column + width) of some tokens.
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
  const int64_t tiles = ceil_div(p.dim, tile), matrix = blockIdx.x / (tiles * tiles);
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
    warp_mma<T, true, true>(acc, dx + warp_out, pitch, h + warp_in, pitch, 0, chunk);
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

namespace wide {

constexpr int tile = 128, threads = 256, stages = 3, blocks_a_multiprocessor = 2;
constexpr int row_bytes = tile * 2, operand_bytes = chunk * row_bytes;
static_assert(stages * 2 * operand_bytes <= 48 * 1024);

// Offset in an operand of a 16-byte piece, 8 columns. The pieces of 8 successive tokens lie in different banks.
__device__ __forceinline__ int chunk_offset(int token, int column_chunk) {
  return token * row_bytes + ((column_chunk ^ (token % 8)) * 16);
}

// As product_kernel.
template <typename T>
__global__ void __launch_bounds__(threads, blocks_a_multiprocessor)
    product_kernel(const __grid_constant__ SlstmBackward params, const int32_t* starts, float* sums, float* bias_sums,
                   int64_t tokens_a_split) {
  __shared__ alignas(128) char ring[stages * 2 * operand_bytes];  // a stage: dx, then h
  const SlstmProblem& p = params.p;
  const int64_t tiles = ceil_div(p.dim, tile), matrix = blockIdx.x / (tiles * tiles);
  const int64_t gate = matrix / p.heads, head = matrix % p.heads;
  const int64_t out = blockIdx.x / tiles % tiles * tile, in = blockIdx.x % tiles * tile;
  const int64_t begin = blockIdx.y * tokens_a_split, stop = min(begin + tokens_a_split, p.batch * p.seq);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // This thread loads column chunk threadIdx.x % 16 of tokens threadIdx.x / 16 and 16 after it. A row's first token
  // takes h from the initial state. `starts`, which tells, is loaded a stage ahead.
  const int column_chunk = threadIdx.x % 16, load_token = threadIdx.x / 16;
  const bool out_within = out + column_chunk * 8 < p.dim, in_within = in + column_chunk * 8 < p.dim;
  const int64_t width = p.heads * p.dim;
  const T* dx_from = static_cast<const T*>(params.dx) + ((begin + load_token) * 4 + gate) * width + head * p.dim + out +
                     column_chunk * 8;
  const T* h_from =
      static_cast<const T*>(params.h) + (begin + load_token - 1) * width + head * p.dim + in + column_chunk * 8;
  int64_t next = begin + load_token;
  int32_t start[2];
  const auto ask = [&] {
#pragma unroll
    for (int x = 0; x < 2; ++x) start[x] = next + 16 * x < stop ? starts[next + 16 * x] : -1;
  };
  ask();
  const auto load = [&](int stage) {
    char* to = ring + stage * 2 * operand_bytes;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const bool there = next + 16 * x < stop;
      const int at = chunk_offset(load_token + 16 * x, column_chunk);
      const bool dx_there = there && out_within, h_there = there && in_within && start[x] < 0;
      ptx::cp_async_16(to + at, dx_there ? dx_from + 16 * x * 4 * width : static_cast<const T*>(params.dx),
                       dx_there ? 16 : 0);
      if (there && in_within && start[x] >= 0 && p.h0 != nullptr) {
        const float* from = p.h0 + (start[x] * p.heads + head) * p.dim + in + column_chunk * 8;
        Group<T> initial;
#pragma unroll
        for (int e = 0; e < 8; ++e) initial.value[e] = from_float<T>(from[e]);
        *reinterpret_cast<Group<T>*>(to + operand_bytes + at) = initial;
      } else {
        ptx::cp_async_16(to + operand_bytes + at, h_there ? h_from + 16 * x * width : static_cast<const T*>(params.h),
                         h_there ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
    next += chunk, dx_from += chunk * 4 * width, h_from += chunk * width;
    ask();
  };

  float acc[4][4][4] = {};
  float bias[2] = {};  // of columns 2 (threadIdx.x % 64) and the next, a quarter of the tokens
  const int a_row = (lane % 8 + lane / 16 * 8) * row_bytes + warp / 4 * 128;
  const int b_row = operand_bytes + (lane % 8 + lane / 8 % 2 * 8) * row_bytes + warp % 4 / 2 * 128;
  const int a_column = ((lane / 8 % 2) ^ (lane % 8)) * 16, b_column = ((warp % 2 * 4 + lane / 16) ^ (lane % 8)) * 16;
  load(0);
  load(1);
  int stage = 0;
  for (int64_t t = begin; t < stop; t += chunk) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    load((stage + 2) % stages);
    const char* from = ring + stage * 2 * operand_bytes;
#pragma unroll
    for (int k = 0; k < chunk; k += 16) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int mt = 0; mt < 4; ++mt) {
        ptx::ldmatrix_x4<true>(a[mt], from + k * row_bytes + a_row + (a_column ^ (mt * 32)));
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        ptx::ldmatrix_x4<true>(b[x], from + k * row_bytes + b_row + (b_column ^ (x * 32)));
      }
#pragma unroll
      for (int mt = 0; mt < 4; ++mt) {
#pragma unroll
        for (int nt = 0; nt < 4; ++nt) {
          if constexpr (std::is_same_v<T, half>)
            ptx::mma_f16(acc[mt][nt], a[mt], b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]);
          else
            ptx::mma_bf16(acc[mt][nt], a[mt], b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]);
        }
      }
    }
    if (in == 0) {
#pragma unroll
      for (int x = 0; x < chunk / 4; ++x) {
        const int token = threadIdx.x / 64 * (chunk / 4) + x, pair = threadIdx.x % 64;
        const Pair<T> value = *reinterpret_cast<const Pair<T>*>(from + chunk_offset(token, pair / 4) + pair % 4 * 4);
        bias[0] += to_float(value.x), bias[1] += to_float(value.y);
      }
    }
    stage = stage == stages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();

  const int64_t rows_of_all = 4 * width;
  sums += (blockIdx.y * rows_of_all + matrix * p.dim) * p.dim;
#pragma unroll
  for (int mt = 0; mt < 4; ++mt) {
#pragma unroll
    for (int nt = 0; nt < 4; ++nt) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = out + warp / 4 * 64 + mt * 16 + lane / 4 + r * 8;
        const int64_t column = in + warp % 4 * 32 + nt * 8 + lane % 4 * 2;
        if (row < p.dim && column < p.dim) {
          *reinterpret_cast<float2*>(sums + row * p.dim + column) =
              make_float2(acc[mt][nt][2 * r], acc[mt][nt][2 * r + 1]);
        }
      }
    }
  }
  if (in != 0) return;
  __syncthreads();
  float* quarters = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int x = 0; x < 2; ++x) quarters[threadIdx.x / 64 * tile + threadIdx.x % 64 * 2 + x] = bias[x];
  __syncthreads();
  if (threadIdx.x < tile && out + threadIdx.x < p.dim) {
    float sum = 0.0f;
    for (int x = 0; x < 4; ++x) sum += quarters[x * tile + threadIdx.x];
    bias_sums[blockIdx.y * rows_of_all + matrix * p.dim + out + threadIdx.x] = sum;
  }
}

}  // namespace wide

__global__ void add_kernel(const float* sums, int splits, int64_t count, void* to, DType dtype) {
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += sums[s * count + x];
  store_from_float(to, x, dtype, sum);
}

struct Plan {
  bool wide;
  int64_t blocks, tokens, tokens_a_split, weights;
  int splits;
};

Plan plan(const SlstmProblem& p) {
  constexpr int64_t fewest_tokens = 512;
  const int64_t multiprocessors = processor_count();
  Plan plan{};
  plan.wide = p.dtype != DType::float32 && p.dim >= wide::tile && p.dim % 8 == 0;
  const int64_t side = plan.wide ? wide::tile : tile, tiles = ceil_div(p.dim, side);
  plan.blocks = tiles * tiles * 4 * p.heads;
  plan.tokens = p.batch * p.seq;
  plan.weights = 4 * p.heads * p.dim * p.dim;
  const int64_t most = ceil_div(plan.tokens, fewest_tokens);
  int64_t splits = std::clamp<int64_t>(4 * multiprocessors / plan.blocks, 1, most);
  if (plan.wide) {
    // The fewest splits with which blocks fill their waves to 95 %, or the best of 16.
    const int64_t at_once = multiprocessors * wide::blocks_a_multiprocessor;
    double best = 0.0;
    for (int64_t x = 1; x <= std::min<int64_t>(most, 16) && best < 0.95; ++x) {
      const int64_t all = plan.blocks * x, rounds = ceil_div(all, at_once);
      const double busy = static_cast<double>(all) / static_cast<double>(rounds * at_once);
      if (busy > best) best = busy, splits = x;
    }
  }
  plan.tokens_a_split = ceil_div(ceil_div(plan.tokens, splits), chunk) * chunk;
  plan.splits = static_cast<int>(ceil_div(plan.tokens, plan.tokens_a_split));
  return plan;
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(ceil_div(count, 256)); }

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
    if constexpr (sizeof(T) == 2) {
      if (at.wide) {
        wide::product_kernel<T><<<dim3(static_cast<unsigned>(at.blocks), at.splits), wide::threads, 0, stream>>>(
            params, starts, sums, bias_sums, at.tokens_a_split);
        return;
      }
    }
    const bool vectors = p.dim % Group<T>::width == 0;
    product_kernel<T><<<dim3(static_cast<unsigned>(at.blocks), at.splits), threads, 0, stream>>>(
        params, starts, sums, bias_sums, at.tokens_a_split, vectors);
  });
  add_kernel<<<blocks_for(at.weights), 256, 0, stream>>>(sums, at.splits, at.weights, params.dweights, p.weight_dtype);
  add_kernel<<<blocks_for(biases), 256, 0, stream>>>(bias_sums, at.splits, biases, params.dbias, p.bias_dtype);
  return cudaGetLastError();
}

}  // namespace flash_xlstm::cuda
