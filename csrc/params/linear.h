// Products with few rows, and float32 products of many rows on the CPU.
#pragma once

#include <string>

#include "params/types.h"

namespace flash_xlstm {

constexpr int64_t linear_max_rows = 16;
// On CUDA: the only dtype; `in` is a multiple of linear_in_multiple; weights and rows of x are aligned to
// linear_alignment bytes.
constexpr DType linear_cuda_dtype = DType::bfloat16;
constexpr int64_t linear_in_multiple = 8, linear_alignment = 16;
// On the CPU: the most rows of x for which this is faster than torch's product.
constexpr int64_t linear_faster_rows = 4;

// y = x weight^T + bias for few rows of x, all of one dtype. x is (rows, in) with rows x_stride apart; weight (out, in)
// and y (rows, out) are contiguous.
struct LinearRows {
  DType dtype = DType::float32;
  int64_t rows = 0, in = 0, out = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;  // (out); nullptr: none
  void* y = nullptr;
};

// Several such products of one x, with an epilogue: y + residual (one product), or silu(first y) * second y (two).
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
  bool constant_weights = false;  // no kernel that may still run writes the weights: they are read before the wait
  bool holds_next = false;        // lets the next kernel start only after all kernels before this one have ended
};

// out = a b for several b with one a, float32. a (rows x depth), b (depth x columns) and out (rows x columns) have
// contiguous rows, `row` apart; a and b may be transposed instead.
struct FloatProducts {
  struct Matrix {
    const float* data = nullptr;
    int64_t row = 0;
    bool transposed = false;
  };
  struct Part {
    Matrix b;
    int64_t columns = 0;
    float* out = nullptr;
    int64_t out_row = 0;
  };
  int64_t rows = 0, depth = 0;
  Matrix a;
  const Part* parts = nullptr;
  int64_t count = 0;
};

// A product of many rows, a (rows, depth) times b, and what follows it; everything is contiguous and of a 16-bit dtype.
struct Product {
  enum class Then {
    nothing,          // out (rows, columns) = a b^T. b has `parts` parts (part_columns[n], depth), side by side in out.
    residual,         // out (rows, columns) = a b^T + residual; b is (columns, depth)
    swiglu,           // b has two parts (columns, depth). out (rows, 2 columns) = a b^T, second_out (rows, columns) =
                      // SwiGLU of its halves.
    swiglu_backward,  // b is (depth, columns). a b is the gradient of SwiGLU's output; its inputs lie side by side in z
                      // (rows, 2 columns), and their gradients in out. second_out (rows, columns) is SwiGLU's output;
                      // nullptr: not wanted.
  };
  static constexpr int max_parts = 4;
  Then then = Then::nothing;
  DType dtype = DType::bfloat16;
  int64_t rows = 0, depth = 0, columns = 0;
  const void *a = nullptr, *b[max_parts] = {};
  int parts = 1, part_columns[max_parts] = {};  // multiples of product_part where there are several
  const void *residual = nullptr, *z = nullptr;
  void *out = nullptr, *second_out = nullptr;
};
constexpr int product_part = 128;
// Depth and columns are multiples of this many elements, and tensors begin at multiples of linear_alignment bytes.
constexpr int64_t product_multiple = 8;
// The largest rows, depth and columns, which the TMA counts in 32 bits.
constexpr int64_t product_max_size = (int64_t{1} << 31) - 1024;

namespace cpu {
// On AMX tiles. false, with anything in the outs, where this machine has none or they would not be exact (amx.h).
bool float_products(const FloatProducts& p);

// `count` products of the same x.
void linear_rows(const LinearRows* products, int64_t count);
}  // namespace cpu

namespace cuda {
// The kernels that a device of this compute capability has, for people.
std::string linear_words(int major, int minor);

// Within the limits above.
cudaError_t fused_linear_rows(const FusedLinearRows& params, cudaStream_t stream);

// On compute capability 9.0.
cudaError_t product(const Product& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
