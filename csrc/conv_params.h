// Plain descriptions of one causal depthwise convolution, shared by the op layer, the CPU kernels and the CUDA kernels.
//
// A row is one sequence: a batch row, or one packed sequence. y_t = act(bias + sum over k of weight[k] x_{t - kernel +
// 1 + k}); inputs before the first come from the state, (rows, kernel - 1, channels), the oldest first.
#pragma once

#include <cstdint>

#include "mlstm_params.h"

namespace flash_xlstm {

constexpr int max_conv_kernel = 8;

struct ConvProblem {
  DType dtype;         // of x, y, state and their gradients
  DType weight_dtype;  // of weight and dweight
  DType bias_dtype;    // of bias and dbias
  int64_t batch, seq, channels, kernel;
  int64_t rows;  // batch, or the number of packed sequences
  bool silu;
  const void* x;  // (batch, seq, channels), strides in elements, the last dimension contiguous
  int64_t x_batch, x_seq;
  const void* weight;                   // (channels, kernel) contiguous
  const void* bias = nullptr;           // (channels) contiguous
  const void* state = nullptr;          // contiguous; nullptr: zeros
  const int32_t* cu_seqlens = nullptr;  // (rows + 1), on the kernel's device; nullptr: not packed
};

struct ConvForward {
  ConvProblem p;
  void* y;               // (batch, seq, channels) contiguous, dtype
  void* last = nullptr;  // the state after the last token; nullptr: not wanted
};

struct ConvBackward {
  ConvProblem p;
  const void* dy;  // as x; nullptr: zero
  int64_t dy_batch, dy_seq;
  const void* dlast = nullptr;  // contiguous; nullptr: zero
  void* dx;                     // (batch, seq, channels) contiguous, dtype
  void* dweight;                // (channels, kernel) contiguous
  void* dbias = nullptr;
  void* dstate = nullptr;
};

// One token for every row; the state is read and written in place.
struct ConvStep {
  DType dtype, weight_dtype, bias_dtype;
  int64_t batch, channels, kernel;
  bool silu;
  const void* x;  // (batch, channels), the last dimension contiguous
  int64_t x_batch;
  const void* weight;
  const void* bias = nullptr;
  void* state;  // (batch, kernel - 1, channels) contiguous
  void* y;      // (batch, channels) contiguous
};

}  // namespace flash_xlstm
