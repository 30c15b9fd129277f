// Plain descriptions of pointwise problems and of products with few rows, shared by the op layer, the CPU kernels and
// the CUDA kernels.
#pragma once

#include <cstdint>

#include "mlstm_params.h"

namespace flash_xlstm {

struct SoftCap {
  DType dtype;
  int64_t count;
  float cap;
  const void* x;
  const void* dy;  // nullptr: out is the capped x, else the gradient
  void* out;
};

// y = x / sqrt(mean(x^2) + eps) * weight over rows of `dim`, everything contiguous.
struct RmsNorm {
  DType dtype, weight_dtype;  // the weight is float32 or has the dtype of x
  int64_t rows, dim;
  float eps;
  const void* x;
  const void* residual;  // nullptr: none; else x + residual, rounded to the dtype, takes x's place
  const void* weight;
  void* y;
  void* sum;  // x + residual; nullptr without residual
  bool holds_next = false;  // the next kernel starts only when all before this one have ended
};

struct RmsNormBackward {
  DType dtype, weight_dtype;
  int64_t rows, dim;
  float eps;
  const void* dy;
  const void* dsum;  // what reaches x past the norm; nullptr: nothing
  const void* x;     // what was normalized
  const void* weight;
  void* dx;
  void* dweight;  // nullptr: not wanted
};

// y = sigmoid(gate) * (h - mean(h)) / sqrt(var(h) + eps) * weight over the last dimension of h (tokens, heads, dim);
// gate and y (tokens, heads * dim), weight (heads * dim). Contiguous but for the gate's rows.
struct GatedHeadNorm {
  DType dtype, weight_dtype;
  int64_t tokens, heads, dim;
  float eps;
  const void* h;
  const void* gate;
  int64_t gate_stride;
  const void* weight;
  void* y;
};

struct GatedHeadNormBackward {
  GatedHeadNorm p;  // without y
  const void* dy;
  void *dh, *dgate;
  void* dweight;  // nullptr: not wanted
};

// out = silu(x) * y, or with dout the gradients; (rows, columns), rows of x and y any distance apart.
struct Swiglu {
  DType dtype;
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const void* y;
  int64_t y_stride;
  const void* dout;  // nullptr: forward
  void* out;         // forward
  void *dx, *dy;     // backward
};

// y = x weight^T + bias for few rows of x: (rows, in) x_stride apart, weight (out, in) and y (rows, out) contiguous,
// all of one dtype.
struct LinearRows {
  DType dtype;
  int64_t rows, in, out;
  const void* x;
  int64_t x_stride;
  const void* weight;
  const void* bias;  // (out); nullptr: none
  void* y;
};

// Several such products of one x, and what comes behind them: a sum with `residual` (one product), or silu(y of the
// first) * (y of the second).
struct FusedLinearRows {
  static constexpr int max_parts = 8;
  struct Part {
    const void* weight;  // (out, in)
    const void* bias;    // (out); nullptr: none
    void* y;             // (rows, out); swiglu: the first part's is the result
    int64_t out;
  };
  DType dtype;
  int64_t rows, in;
  const void* x;
  int64_t x_stride;
  int count;
  Part part[max_parts];
  const void* residual;  // (rows, out) residual_stride apart; nullptr: none
  int64_t residual_stride;
  bool swiglu;            // two parts of equal out
  bool constant_weights;  // nothing that may still run writes the weights: they may be read before it has ended
  bool holds_next;        // the next kernel starts only when all before this one have ended
};

}  // namespace flash_xlstm
