// Products with few rows.
#pragma once

#include <string>

#include "params/types.h"

namespace flash_xlstm {

constexpr int64_t linear_max_rows = 16;
// On CUDA: the one dtype, what `in` is a multiple of, and where weights begin and rows of x.
constexpr DType linear_cuda_dtype = DType::bfloat16;
constexpr int64_t linear_in_multiple = 8, linear_alignment = 16;
// On the CPU; with more rows of x, torch's product is as fast.
constexpr int64_t linear_faster_rows = 4;

// y = x weight^T + bias for few rows of x: (rows, in) x_stride apart, weight (out, in) and y (rows, out) contiguous,
// all of one dtype.
struct LinearRows {
  DType dtype = DType::float32;
  int64_t rows = 0, in = 0, out = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;  // (out); nullptr: none
  void* y = nullptr;
};

// Several such products of one x, and what comes behind them: a sum with `residual` (one product), or silu(y of the
// first) * (y of the second).
struct FusedLinearRows {
  static constexpr int max_parts = 8;
  struct Part {
    const void* weight = nullptr;  // (out, in)
    const void* bias = nullptr;    // (out); nullptr: none
    void* y = nullptr;             // (rows, out); swiglu: the first part's is the result
    int64_t out = 0;
  };
  DType dtype = DType::float32;
  int64_t rows = 0, in = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  int count = 0;
  Part part[max_parts];
  const void* residual = nullptr;  // (rows, out) residual_stride apart; nullptr: none
  int64_t residual_stride = 0;
  bool swiglu = false;            // two parts of equal out
  bool constant_weights = false;  // nothing that may still run writes the weights: they may be read before it has ended
  bool holds_next = false;        // the next kernel starts only when all before this one have ended
};

namespace cpu {
// `count` products of the same x.
void linear_rows(const LinearRows* products, int64_t count);
}  // namespace cpu

namespace cuda {
// The kernels that a device of this compute capability has, for people.
std::string linear_words(int major, int minor);

// Within the limits above.
cudaError_t fused_linear_rows(const FusedLinearRows& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
