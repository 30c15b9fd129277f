// The causal depthwise convolution.
//
//   y_t = act(bias + sum over k of weight[k] x_{t - kernel + 1 + k})
//
// A row is one sequence: a row of the batch, or one packed sequence. Inputs before the first come from the state,
// (rows, kernel - 1, channels), the oldest first.
#pragma once

#include "params/types.h"

namespace flash_xlstm {

constexpr int max_conv_kernel = 8;

struct ConvProblem {
  DType dtype = DType::float32;         // of x, y, state and their gradients
  DType weight_dtype = DType::float32;  // of weight and dweight
  DType bias_dtype = DType::float32;    // of bias and dbias
  int64_t batch = 0, seq = 0, channels = 0, kernel = 0;
  int64_t rows = 0;  // batch, or the number of packed sequences
  bool silu = false;
  const void* x = nullptr;  // (batch, seq, channels), strides in elements, the last dimension contiguous
  int64_t x_batch = 0, x_seq = 0;
  const void* weight = nullptr;         // (channels, kernel) contiguous
  const void* bias = nullptr;           // (channels) contiguous
  const void* state = nullptr;          // contiguous; nullptr: zeros
  const int32_t* cu_seqlens = nullptr;  // (rows + 1), on the kernel's device; nullptr: not packed
};

struct ConvForward {
  ConvProblem p;
  void* y = nullptr;     // (batch, seq, channels) contiguous, dtype
  void* last = nullptr;  // the state after the last token; nullptr: not wanted
};

struct ConvBackward {
  ConvProblem p;
  const void* dy = nullptr;  // as x; nullptr: zero
  int64_t dy_batch = 0, dy_seq = 0;
  const void* dlast = nullptr;  // contiguous; nullptr: zero
  void* dx = nullptr;           // (batch, seq, channels) contiguous, dtype
  void* dweight = nullptr;      // (channels, kernel) contiguous
  void* dbias = nullptr;
  void* dstate = nullptr;
};

// One token for every row; the state is read and written in place.
struct ConvStep {
  DType dtype = DType::float32, weight_dtype = DType::float32, bias_dtype = DType::float32;
  int64_t batch = 0, channels = 0, kernel = 0;
  bool silu = false;
  const void* x = nullptr;  // (batch, channels), the last dimension contiguous
  int64_t x_batch = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* state = nullptr;  // (batch, kernel - 1, channels) contiguous
  void* y = nullptr;      // (batch, channels) contiguous
};

namespace cpu {
void conv_forward(const ConvForward& params);
void conv_backward(const ConvBackward& params);
void conv_step(const ConvStep& params);
}  // namespace cpu

namespace cuda {
int64_t conv_forward_workspace_bytes(const ConvForward& params);
cudaError_t conv_forward(const ConvForward& params, void* workspace, cudaStream_t stream);

int64_t conv_backward_workspace_bytes(const ConvBackward& params);
cudaError_t conv_backward(const ConvBackward& params, void* workspace, cudaStream_t stream);

cudaError_t conv_step(const ConvStep& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
