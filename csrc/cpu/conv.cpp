// The causal depthwise convolution on the CPU. The forward has a task for each sequence and block of channels. The
// backward has a task for each block of channels, which goes through all sequences and sums the weights' gradients.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/vector_kernels.h"
#include "params/conv.h"

namespace flash_xlstm::cpu {
namespace {

constexpr int64_t channels_a_task = 128;

void load(float* to, const void* data, int64_t index, DType dtype, int64_t count) {
  const void* from = static_cast<const char*>(data) + index * element_bytes(dtype);
  vector_kernels().pack(to, from, dtype, count, 1, count, 1);
}
void store(void* data, int64_t index, DType dtype, const float* from, int64_t count) {
  void* to = static_cast<char*>(data) + index * element_bytes(dtype);
  vector_kernels().unpack(to, dtype, count, from, nullptr, 1, count);
}

// A block of channels, its weights as [kernel][count] and bias in float32.
struct Channels {
  Channels(int64_t channels, int64_t kernel, int64_t task, const void* weight_data, DType weight_dtype,
           const void* bias_data, DType bias_dtype)
      : first(task * channels_a_task), count(std::min(channels_a_task, channels - first)) {
    std::vector<float> across(count * kernel);
    load(across.data(), weight_data, first * kernel, weight_dtype, count * kernel);
    weight.resize(count * kernel);
    for (int64_t x = 0; x < count; ++x) {
      for (int64_t k = 0; k < kernel; ++k) weight[k * count + x] = across[x * kernel + k];
    }
    bias.resize(count);
    if (bias_data != nullptr) load(bias.data(), bias_data, first, bias_dtype, count);
  }

  int64_t first, count;
  std::vector<float> weight, bias;
};

int64_t blocks_of(int64_t channels) { return ceil_div(channels, channels_a_task); }

// The last `kernel` inputs of a sequence, in float32. Input t lies in place t + kernel - 1 (mod kernel). Inputs before
// the first come from the state.
class Window {
 public:
  Window(const ConvProblem& problem, int64_t row, const Channels& block)
      : p_(problem), row_(row_of(p_, row)), block_(block), inputs_(p_.kernel * block.count), taps_(p_.kernel) {
    for (int64_t j = 0; j + 1 < p_.kernel && p_.state != nullptr; ++j) {
      load(place(j), p_.state, (row * (p_.kernel - 1) + j) * p_.channels + block.first, p_.dtype, block.count);
    }
  }
  // The inputs of output t, the oldest first. Must be called for t = 0, 1, ... in turn.
  const float* const* at(int64_t t) {
    load(place(t + p_.kernel - 1), p_.x, row_.batch * p_.x_batch + (row_.start + t) * p_.x_seq + block_.first, p_.dtype,
         block_.count);
    for (int64_t k = 0; k < p_.kernel; ++k) taps_[k] = place(t + k);
    return taps_.data();
  }

 private:
  float* place(int64_t j) { return inputs_.data() + j % p_.kernel * block_.count; }

  const ConvProblem& p_;
  Row row_;
  const Channels& block_;
  std::vector<float> inputs_;
  std::vector<const float*> taps_;
};

void last_state(const ConvForward& params, int64_t row_index) {
  const ConvProblem& p = params.p;
  const Row row = row_of(p, row_index);
  const int64_t bytes = p.channels * element_bytes(p.dtype), before = p.kernel - 1;
  for (int64_t j = 0; j < before; ++j) {
    const int64_t t = row.length - before + j;
    char* to = static_cast<char*>(params.last) + (row_index * before + j) * bytes;
    if (t >= 0) {
      const int64_t from = row.batch * p.x_batch + (row.start + t) * p.x_seq;
      std::memcpy(to, static_cast<const char*>(p.x) + from * element_bytes(p.dtype), bytes);
    } else if (p.state != nullptr) {
      std::memcpy(to, static_cast<const char*>(p.state) + (row_index * before + t + before) * bytes, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
}

// The gradients of one sequence, for a block of channels.
void backward_row(const ConvBackward& params, int64_t row_index, const Channels& block, float* dweight, float* dbias) {
  const ConvProblem& p = params.p;
  const VectorKernels& kernels = vector_kernels();
  const Row row = row_of(p, row_index);
  const int64_t count = block.count, kernel = p.kernel;
  Window window(p, row_index, block);
  std::vector<float> g(kernel * count), y(count), slope(count), dx(count);  // g of token t in place t mod kernel
  for (int64_t t = 0; t < row.length + kernel - 1; ++t) {
    float* now = g.data() + t % kernel * count;
    std::fill_n(now, count, 0.0f);
    if (t < row.length) {
      const float* const* taps = window.at(t);
      kernels.conv_token(y.data(), slope.data(), taps, block.weight.data(), block.bias.data(), kernel, p.silu, count);
      if (params.dy != nullptr) {
        std::vector<float>& dy = y;
        load(dy.data(), params.dy, row.batch * params.dy_batch + (row.start + t) * params.dy_seq + block.first, p.dtype,
             count);
        for (int64_t x = 0; x < count; ++x) now[x] = dy[x] * slope[x];
      }
      for (int64_t k = 0; k < kernel; ++k) kernels.add_product(dweight + k * count, now, taps[k], count);
      for (int64_t x = 0; x < count; ++x) dbias[x] += now[x];
    }
    // dx of token t - kernel + 1, or the gradient of an input before the first.
    const int64_t at = t - kernel + 1, in_last = at - row.length + kernel - 1;
    std::fill_n(dx.data(), count, 0.0f);
    for (int64_t k = 0; k < kernel && k <= t; ++k) {
      kernels.add_product(dx.data(), block.weight.data() + k * count, g.data() + (t - k) % kernel * count, count);
    }
    if (params.dlast != nullptr && in_last >= 0) {
      load(y.data(), params.dlast, (row_index * (kernel - 1) + in_last) * p.channels + block.first, p.dtype, count);
      for (int64_t x = 0; x < count; ++x) dx[x] += y[x];
    }
    if (at >= 0) {
      store(params.dx, (row.batch * p.seq + row.start + at) * p.channels + block.first, p.dtype, dx.data(), count);
    } else if (params.dstate != nullptr) {
      store(params.dstate, (row_index * (kernel - 1) + at + kernel - 1) * p.channels + block.first, p.dtype, dx.data(),
            count);
    }
  }
}

}  // namespace

void conv_forward(const ConvForward& params) {
  const ConvProblem& p = params.p;
  const int64_t blocks = blocks_of(p.channels);
  parallel(blocks * p.rows, [&](int64_t task) {
    const Channels block(p.channels, p.kernel, task % blocks, p.weight, p.weight_dtype, p.bias, p.bias_dtype);
    const Row row = row_of(p, task / blocks);
    Window window(p, task / blocks, block);
    std::vector<float> y(block.count);
    for (int64_t t = 0; t < row.length; ++t) {
      vector_kernels().conv_token(y.data(), nullptr, window.at(t), block.weight.data(), block.bias.data(), p.kernel,
                                  p.silu, block.count);
      store(params.y, (row.batch * p.seq + row.start + t) * p.channels + block.first, p.dtype, y.data(), block.count);
    }
  });
  if (params.last != nullptr) parallel(p.rows, [&](int64_t row) { last_state(params, row); });
}

void conv_backward(const ConvBackward& params) {
  const ConvProblem& p = params.p;
  parallel(blocks_of(p.channels), [&](int64_t task) {
    const Channels block(p.channels, p.kernel, task, p.weight, p.weight_dtype, p.bias, p.bias_dtype);
    std::vector<float> dweight(p.kernel * block.count), dbias(block.count), across(block.count * p.kernel);
    for (int64_t row = 0; row < p.rows; ++row) backward_row(params, row, block, dweight.data(), dbias.data());
    for (int64_t x = 0; x < block.count; ++x) {
      for (int64_t k = 0; k < p.kernel; ++k) across[x * p.kernel + k] = dweight[k * block.count + x];
    }
    store(params.dweight, block.first * p.kernel, p.weight_dtype, across.data(), block.count * p.kernel);
    if (params.dbias != nullptr) store(params.dbias, block.first, p.bias_dtype, dbias.data(), block.count);
  });
}

void conv_step(const ConvStep& params) {
  const int64_t blocks = blocks_of(params.channels), before = params.kernel - 1;
  parallel(blocks * params.batch, [&](int64_t task) {
    const Channels block(params.channels, params.kernel, task % blocks, params.weight, params.weight_dtype, params.bias,
                         params.bias_dtype);
    const int64_t row = task / blocks, bytes = block.count * element_bytes(params.dtype);
    std::vector<float> inputs(params.kernel * block.count), y(block.count);
    std::vector<const float*> taps(params.kernel);
    const auto state = [&](int64_t j) {
      return static_cast<char*>(params.state) +
             ((row * before + j) * params.channels + block.first) * element_bytes(params.dtype);
    };
    const int64_t from = row * params.x_batch + block.first;
    for (int64_t k = 0; k < params.kernel; ++k) {
      float* to = inputs.data() + k * block.count;
      if (k < before)
        load(to, state(k), 0, params.dtype, block.count);
      else
        load(to, params.x, from, params.dtype, block.count);
      taps[k] = to;
    }
    for (int64_t j = 0; j + 1 < before; ++j) std::memcpy(state(j), state(j + 1), bytes);
    if (before > 0) {
      std::memcpy(state(before - 1), static_cast<const char*>(params.x) + from * element_bytes(params.dtype), bytes);
    }
    vector_kernels().conv_token(y.data(), nullptr, taps.data(), block.weight.data(), block.bias.data(), params.kernel,
                                params.silu, block.count);
    store(params.y, row * params.channels + block.first, params.dtype, y.data(), block.count);
  });
}

}  // namespace flash_xlstm::cpu
