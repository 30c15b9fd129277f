// The causal depthwise convolution, bound by memory bandwidth. A thread takes 4 neighbouring channels through a run of
// tokens (2 channels with more than 4 taps, 1 where they are not aligned). It keeps the inputs that it still needs in
// registers. So each input is read once, except the kernel - 1 before a run. Taps beyond the kernel's size are left
// out, not multiplied by 0, so that an input that is not finite reaches only outputs that depend on it.
//
// Backward: pre is the sum before the activation, g_t = dy_t act'(pre_t), and dx_t = sum over k of
// weight[k] g_{t + kernel - 1 - k}. A run computes its own g and the next kernel - 1, and writes dx kernel - 1 tokens
// behind. At a sequence's start, dx of inputs before the first token is the state's gradient. A run's sums for dweight
// and dbias go to scratch and are added in a fixed order.
#include <initializer_list>
#include <type_traits>

#include "cuda/common/numeric.cuh"
#include "cuda/common/packed.cuh"
#include "params/conv.h"

namespace flash_xlstm::cuda {
namespace {

constexpr int forward_run = 32, backward_run = 64, threads = 128;
// CUDA kernels have room for 4 or for max_conv_kernel taps. The first taps - kernel of them are unused.
constexpr int few_taps = 4, most_taps = max_conv_kernel;

template <int width>
struct Values {
  float value[width];
};

template <typename T, int width>
__device__ __forceinline__ Values<width> load(const void* data, int64_t index) {
  const auto group = *reinterpret_cast<const Group<T, width>*>(static_cast<const T*>(data) + index);
  Values<width> values;
#pragma unroll
  for (int e = 0; e < width; ++e) values.value[e] = to_float(group.value[e]);
  return values;
}

template <typename T, int width>
__device__ __forceinline__ void store(void* data, int64_t index, const Values<width>& values) {
  Group<T, width> group;
#pragma unroll
  for (int e = 0; e < width; ++e) group.value[e] = from_float<T>(values.value[e]);
  *reinterpret_cast<Group<T, width>*>(static_cast<T*>(data) + index) = group;
}

// A sequence: tokens [start, stop) of a batch row.
struct Row {
  int64_t index, batch, start, stop;
};

__device__ __forceinline__ Row row_at(const ConvProblem& p, int64_t row) {
  if (p.cu_seqlens == nullptr) return {.index = row, .batch = row, .start = 0, .stop = p.seq};
  const TokenRange tokens = packed_tokens(p.cu_seqlens, row, p.seq);
  return {.index = row, .batch = 0, .start = tokens.start, .stop = tokens.stop};
}

// Calls f(row, begin, end) for each sequence's share of tokens [first, last) of a batch row.
template <typename F>
__device__ __forceinline__ void for_each_row(const ConvProblem& p, int64_t batch, int64_t first, int64_t last, F&& f) {
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t end_row = packed ? p.rows : batch + 1;
#pragma unroll 1
  for (int64_t r = packed ? sequence_of(p.cu_seqlens, p.rows, first) : batch; r < end_row; ++r) {
    const Row row = row_at(p, r);
    if (row.start >= last) break;
    const int64_t begin = max(first, row.start), end = min(last, row.stop);
    if (begin < end) f(row, begin, end);
  }
}

// Writes [kernel + 1][channels] float32: the weights, then the bias.
__global__ void prepare_kernel(const __grid_constant__ ConvProblem p, float* to) {
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= (p.kernel + 1) * p.channels) return;
  const int64_t k = x / p.channels, channel = x % p.channels;
  if (k < p.kernel)
    to[x] = load_as_float(p.weight, channel * p.kernel + k, p.weight_dtype);
  else
    to[x] = p.bias == nullptr ? 0.0f : load_as_float(p.bias, channel, p.bias_dtype);
}

template <int width, int taps>
struct Weights {
  Values<width> tap[taps];  // tap[taps - kernel + k] is weight[k]
  Values<width> bias;

  __device__ __forceinline__ Weights(const float* weights, int64_t channels, int64_t channel, int kernel) {
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      tap[j] = Values<width>{};
      if (j >= taps - kernel) tap[j] = load<float, width>(weights, (j - (taps - kernel)) * channels + channel);
    }
    bias = load<float, width>(weights, kernel * channels + channel);
  }
};

// The last inputs of a sequence: window[j] is the input taps - 1 - j tokens back.
template <typename T, int width, int taps>
struct Window {
  Values<width> input[taps];

  // The window before token `token`.
  __device__ __forceinline__ Window(const ConvProblem& p, const Row& row, int64_t token, int64_t channel, int kernel) {
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      input[j] = Values<width>{};
      const int64_t at = token - (taps - j) - row.start;  // within the sequence
      if (j <= taps - kernel) continue;
      if (at >= 0) {
        input[j] = load<T, width>(p.x, row.batch * p.x_batch + (row.start + at) * p.x_seq + channel);
      } else if (p.state != nullptr) {
        input[j] = load<T, width>(p.state, (row.index * (kernel - 1) + at + kernel - 1) * p.channels + channel);
      }
    }
  }

  __device__ __forceinline__ void push(const Values<width>& x) {
#pragma unroll
    for (int j = 0; j + 1 < taps; ++j) input[j] = input[j + 1];
    input[taps - 1] = x;
  }

  __device__ __forceinline__ Values<width> sum(const Weights<width, taps>& weights, int kernel) const {
    Values<width> sum = weights.bias;
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      if (j < taps - kernel) continue;
#pragma unroll
      for (int e = 0; e < width; ++e) sum.value[e] += weights.tap[j].value[e] * input[j].value[e];
    }
    return sum;
  }
};

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_slope(float x) {
  const float s = sigmoid(x);
  return s == 0.0f ? 0.0f : s * (1.0f + x * (1.0f - s));
}

// Gives this thread's channels and run of tokens. Returns false past the last channel.
template <int width>
__device__ __forceinline__ bool locate(const ConvProblem& p, int run, int64_t& channel, int64_t& batch,
                                       int64_t& first) {
  const int64_t blocks = ceil_div(ceil_div(p.channels, width), threads);
  const int64_t runs = ceil_div(p.seq, run), place = blockIdx.x / blocks;
  channel = (blockIdx.x % blocks * threads + threadIdx.x) * width;
  batch = place / runs;
  first = place % runs * run;
  return channel < p.channels;
}

template <typename T, int width, int taps>
__global__ void __launch_bounds__(threads)
    forward_kernel(const __grid_constant__ ConvForward params, const float* prepared) {
  const ConvProblem& p = params.p;
  const int kernel = static_cast<int>(p.kernel);
  int64_t channel, batch, first;
  if (!locate<width>(p, forward_run, channel, batch, first)) return;
  const Weights<width, taps> weights(prepared, p.channels, channel, kernel);
  for_each_row(p, batch, first, min(first + forward_run, p.seq), [&](const Row& row, int64_t begin, int64_t end) {
    Window<T, width, taps> window(p, row, begin, channel, kernel);
#pragma unroll 1
    for (int64_t t = begin; t < end; ++t) {
      window.push(load<T, width>(p.x, batch * p.x_batch + t * p.x_seq + channel));
      Values<width> y = window.sum(weights, kernel);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        if (p.silu) y.value[e] = silu(y.value[e]);
      }
      store<T, width>(params.y, (batch * p.seq + t) * p.channels + channel, y);
    }
  });
}

// Element x of (rows, kernel - 1, channels): sequence, place, channel.
struct StateElement {
  int64_t row, channel;
  int place;
};
__device__ __forceinline__ StateElement state_element(const ConvProblem& p, int64_t x) {
  return {.row = x / p.channels / (p.kernel - 1),
          .channel = x % p.channels,
          .place = static_cast<int>(x / p.channels % (p.kernel - 1))};
}

template <typename T>
__global__ void last_state_kernel(const __grid_constant__ ConvForward params, int64_t count) {
  const ConvProblem& p = params.p;
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= count) return;
  const StateElement e = state_element(p, x);
  const Row row = row_at(p, e.row);
  const int64_t at = row.stop - row.start - (p.kernel - 1) + e.place;
  T value = from_float<T>(0.0f);
  if (at >= 0) {
    value = static_cast<const T*>(p.x)[row.batch * p.x_batch + (row.start + at) * p.x_seq + e.channel];
  } else if (p.state != nullptr) {
    value = static_cast<const T*>(p.state)[(e.row * (p.kernel - 1) + at + p.kernel - 1) * p.channels + e.channel];
  }
  static_cast<T*>(params.last)[x] = value;
}

// sums: [batch x runs][kernel + 1][channels] of dweight and, last, dbias.
template <typename T, int width, int taps>
__global__ void __launch_bounds__(threads)
    backward_kernel(const __grid_constant__ ConvBackward params, const float* prepared, float* sums) {
  const ConvProblem& p = params.p;
  const int kernel = static_cast<int>(p.kernel);
  int64_t channel, batch, first;
  if (!locate<width>(p, backward_run, channel, batch, first)) return;
  const Weights<width, taps> weights(prepared, p.channels, channel, kernel);
  Values<width> first_tap[taps];  // first_tap[k] is weight[k]: constant indices, so registers
#pragma unroll
  for (int k = 0; k < taps; ++k) {
    first_tap[k] = k < kernel ? load<float, width>(prepared, k * p.channels + channel) : Values<width>{};
  }
  Values<width> dweight[taps] = {}, dbias{};
  for_each_row(p, batch, first, min(first + backward_run, p.seq), [&](const Row& row, int64_t begin, int64_t end) {
    Window<T, width, taps> window(p, row, begin, channel, kernel);
    Values<width> g[taps] = {};  // g[k]: k tokens back
#pragma unroll 1
    for (int64_t t = begin; t < end + kernel - 1; ++t) {
      Values<width> now{};
      if (t < row.stop) {
        window.push(load<T, width>(p.x, batch * p.x_batch + t * p.x_seq + channel));
        if (params.dy != nullptr) {
          now = load<T, width>(params.dy, batch * params.dy_batch + t * params.dy_seq + channel);
        }
        if (p.silu) {
          const Values<width> pre = window.sum(weights, kernel);
#pragma unroll
          for (int e = 0; e < width; ++e) now.value[e] *= silu_slope(pre.value[e]);
        }
        if (t < end) {
#pragma unroll
          for (int e = 0; e < width; ++e) {
            dbias.value[e] += now.value[e];
#pragma unroll
            for (int j = 0; j < taps; ++j) {
              if (j >= taps - kernel) dweight[j].value[e] += now.value[e] * window.input[j].value[e];
            }
          }
        }
      }
#pragma unroll
      for (int k = taps - 1; k > 0; --k) g[k] = g[k - 1];
      g[0] = now;
      const int64_t at = t - kernel + 1;
      if (at < begin && begin != row.start) continue;
      Values<width> dx{};
#pragma unroll
      for (int k = 0; k < taps; ++k) {
        if (k >= kernel) continue;
#pragma unroll
        for (int e = 0; e < width; ++e) dx.value[e] += first_tap[k].value[e] * g[k].value[e];
      }
      const int64_t in_last = at - row.stop + kernel - 1;  // its place in the last state
      if (params.dlast != nullptr && in_last >= 0) {
        const Values<width> last =
            load<T, width>(params.dlast, (row.index * (kernel - 1) + in_last) * p.channels + channel);
#pragma unroll
        for (int e = 0; e < width; ++e) dx.value[e] += last.value[e];
      }
      if (at >= row.start) {
        store<T, width>(params.dx, (batch * p.seq + at) * p.channels + channel, dx);
      } else if (params.dstate != nullptr) {
        store<T, width>(params.dstate, (row.index * (kernel - 1) + at - row.start + kernel - 1) * p.channels + channel,
                        dx);
      }
    }
  });
  const int64_t runs = ceil_div(p.seq, backward_run);
  float* to = sums + (batch * runs + first / backward_run) * (kernel + 1) * p.channels + channel;
#pragma unroll
  for (int e = 0; e < width; ++e) {
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      if (j >= taps - kernel) to[(j - (taps - kernel)) * p.channels + e] = dweight[j].value[e];
    }
    to[kernel * p.channels + e] = dbias.value[e];
  }
}

// A sequence without tokens passes the state's gradient through.
template <typename T>
__global__ void empty_rows_kernel(const __grid_constant__ ConvBackward params, int64_t count) {
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= count) return;
  const Row row = row_at(params.p, state_element(params.p, x).row);
  if (row.start < row.stop) return;
  static_cast<T*>(params.dstate)[x] =
      params.dlast == nullptr ? from_float<T>(0.0f) : static_cast<const T*>(params.dlast)[x];
}

__global__ void add_kernel(const __grid_constant__ ConvBackward params, const float* sums, int64_t runs) {
  const ConvProblem& p = params.p;
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, size = (p.kernel + 1) * p.channels;
  if (x >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t r = 0; r < runs; ++r) sum += sums[r * size + x];
  const int64_t k = x / p.channels, channel = x % p.channels;
  if (k < p.kernel)
    store_from_float(params.dweight, channel * p.kernel + k, p.weight_dtype, sum);
  else if (params.dbias != nullptr)
    store_from_float(params.dbias, channel, p.bias_dtype, sum);
}

template <typename T>
__global__ void step_kernel(const __grid_constant__ ConvStep params) {
  const int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (x >= params.batch * params.channels) return;
  const int64_t batch = x / params.channels, channel = x % params.channels;
  const int before = static_cast<int>(params.kernel) - 1;
  T* state = static_cast<T*>(params.state) + batch * before * params.channels + channel;
  const T here = static_cast<const T*>(params.x)[batch * params.x_batch + channel];
  const auto weight = [&](int k) {
    return load_as_float(params.weight, channel * params.kernel + k, params.weight_dtype);
  };
  float sum = params.bias == nullptr ? 0.0f : load_as_float(params.bias, channel, params.bias_dtype);
  T input[most_taps];
#pragma unroll
  for (int k = 0; k < most_taps - 1; ++k) {
    if (k < before) input[k] = state[k * params.channels];
  }
#pragma unroll
  for (int k = 0; k < most_taps - 1; ++k) {
    if (k >= before) continue;
    sum += weight(k) * to_float(input[k]);
    state[k * params.channels] = k + 1 < before ? input[k + 1] : here;
  }
  sum += weight(before) * to_float(here);
  static_cast<T*>(params.y)[x] = from_float<T>(params.silu ? silu(sum) : sum);
}

// Whether groups of 4 channels are aligned in all of these.
bool wide(const ConvProblem& p, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  bool good = p.channels % 4 == 0;
  for (const void* at : pointers) good &= reinterpret_cast<uintptr_t>(at) % 16 == 0;
  for (int64_t stride : strides) good &= stride % 4 == 0;
  return good;
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(ceil_div(count, 256)); }

unsigned run_blocks(const ConvProblem& p, int run, int width) {
  const int64_t blocks = ceil_div(ceil_div(p.channels, width), threads);
  return static_cast<unsigned>(blocks * p.batch * ceil_div(p.seq, run));
}

int64_t prepared_floats(const ConvProblem& p) { return ceil_div((p.kernel + 1) * p.channels, 64) * 64; }

void prepare(const ConvProblem& p, float* to, cudaStream_t stream) {
  prepare_kernel<<<blocks_for((p.kernel + 1) * p.channels), 256, 0, stream>>>(p, to);
}

// Calls f(width, taps) with constants: channels a thread, and the fewest taps that hold the kernel.
template <typename F>
void with_sizes(bool aligned, int64_t kernel, F&& f) {
  using std::integral_constant;
  if (!aligned)
    f(integral_constant<int, 1>{}, integral_constant<int, most_taps>{});
  else if (kernel <= few_taps)
    f(integral_constant<int, 4>{}, integral_constant<int, few_taps>{});
  else
    f(integral_constant<int, 2>{}, integral_constant<int, most_taps>{});
}

}  // namespace

int64_t conv_forward_workspace_bytes(const ConvForward& params) { return prepared_floats(params.p) * 4; }

cudaError_t conv_forward(const ConvForward& params, void* workspace, cudaStream_t stream) {
  const ConvProblem& p = params.p;
  float* prepared = static_cast<float*>(workspace);
  prepare(p, prepared, stream);
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_sizes(wide(p, {p.x, p.state, params.y}, {p.x_batch, p.x_seq}), p.kernel, [&](auto width, auto taps) {
      forward_kernel<T, width(), taps()><<<run_blocks(p, forward_run, width()), threads, 0, stream>>>(params, prepared);
    });
    const int64_t count = p.rows * (p.kernel - 1) * p.channels;
    if (params.last != nullptr && count > 0) {
      last_state_kernel<T><<<blocks_for(count), 256, 0, stream>>>(params, count);
    }
    return cudaGetLastError();
  });
}

int64_t conv_backward_workspace_bytes(const ConvBackward& params) {
  const ConvProblem& p = params.p;
  const int64_t runs = p.batch * ceil_div(p.seq, backward_run);
  return (prepared_floats(p) + runs * (p.kernel + 1) * p.channels) * 4;
}

cudaError_t conv_backward(const ConvBackward& params, void* workspace, cudaStream_t stream) {
  const ConvProblem& p = params.p;
  float *prepared = static_cast<float*>(workspace), *sums = prepared + prepared_floats(p);
  prepare(p, prepared, stream);
  return dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = wide(p, {p.x, p.state, params.dy, params.dlast, params.dx, params.dstate},
                              {p.x_batch, p.x_seq, params.dy_batch, params.dy_seq});
    with_sizes(aligned, p.kernel, [&](auto width, auto taps) {
      backward_kernel<T, width(), taps()>
          <<<run_blocks(p, backward_run, width()), threads, 0, stream>>>(params, prepared, sums);
    });
    const int64_t count = p.rows * (p.kernel - 1) * p.channels;
    if (params.dstate != nullptr && count > 0 && p.cu_seqlens != nullptr) {
      empty_rows_kernel<T><<<blocks_for(count), 256, 0, stream>>>(params, count);
    }
    const int64_t runs = p.batch * ceil_div(p.seq, backward_run);
    add_kernel<<<blocks_for((p.kernel + 1) * p.channels), 256, 0, stream>>>(params, sums, runs);
    return cudaGetLastError();
  });
}

cudaError_t conv_step(const ConvStep& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    step_kernel<T><<<blocks_for(params.batch * params.channels), 256, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace flash_xlstm::cuda
