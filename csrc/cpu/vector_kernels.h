// The CPU kernels' inner loops, as a table of functions, one table for each instruction set (vector_kernels.inl).
// Arrays are float32 unless said, rows are contiguous, and matrices are row-major.
#pragma once

#include <cstdint>

#include "cpu/ahead.h"
#include "params/linear.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {

// A chunk's gates: `length` entries, one for each token, padded with tokens that change nothing. The log weight of
// token j at token t is row_t + column_j, with row = b - m and column = i - b. Each is a high and a low part, because
// row and column may be large and nearly cancel.
struct ChunkGates {
  int64_t length;
  const float *row_high, *row_low, *column_high, *column_low;
  const float* m;
  float m_start;
};

constexpr int64_t max_chunk = 256;  // tokens

// What of a square product counts: all of it; of the result only the columns up to a row's own; or a's numbers are 0
// beyond the diagonal, or before it. What does not count may be left out.
enum class Part { all, lower_out, lower_a, upper_a };

// out (rows x columns) = keep from + a (rows x depth) b (depth x columns). from == nullptr: out = a b. a has any
// strides; rows of out, from and b are contiguous.
struct Gemm {
  float* out;
  int64_t out_row;  // of `from` too
  const float* from;
  float keep;
  const float* a;
  int64_t a_row, a_k;
  const float* b;
  int64_t b_row;
  int64_t rows, columns, depth;
  Part part = Part::all;
  Ahead* ahead = nullptr;
};

struct VectorKernels {
  // to (padded_rows x columns) <- from (rows x columns, row stride in elements, dtype), zeros below.
  // Returns whether every value is finite.
  bool (*pack)(float* to, const void* from, DType dtype, int64_t stride, int64_t rows, int64_t columns,
               int64_t padded_rows);
  // to (rows x columns, row stride, dtype) <- factor[row] * from; factor may be null.
  void (*unpack)(void* to, DType dtype, int64_t stride, const float* from, const float* factor, int64_t rows,
                 int64_t columns);

  // to (rows x columns, row stride, dtype) <- factor[row] (x[row] + weight[row] y[row]). Null: y of 0, factor of 1. A
  // weight of 0 leaves y out, whatever it holds.
  void (*add_and_unpack)(void* to, DType dtype, int64_t stride, const float* x, const float* y, const float* weight,
                         const float* factor, int64_t rows, int64_t columns);

  // y = x, or with `log_sigmoid` log sigmoid(x), of gates; after x = cap tanh(x / cap), unless the cap is 0. And dy/dx.
  // Errors are below 1e-13: of max(1, |y|), and of the slope.
  void (*gate_values)(double* y, const float* x, double cap, bool log_sigmoid, int64_t count);
  void (*gate_slopes)(double* slope, const float* x, double cap, bool log_sigmoid, int64_t count);
  // weight_j = D_Tj, T the chunk's last token: the weight of token j in the state at the chunk's end.
  void (*end_weights)(float* weight, const ChunkGates& g);
  // start_t = exp(b_t + m_start - m_t): the weight of the state at the chunk's start at token t.
  void (*start_weights)(float* start, const ChunkGates& g);
  // to = weight[row] * from. A weight of 0 gives 0, whatever `from` holds.
  void (*weight_rows)(float* to, int64_t to_stride, const float* from, const float* weight, int64_t rows,
                      int64_t columns);
  // sum (columns) = sum over the rows of weight[row] * from.
  void (*weighted_sum)(float* sum, const float* from, const float* weight, int64_t rows, int64_t columns);

  // Takes n, in float64, through the chunk's tokens. s_t = scale q_t . n_t where q is given. s is a sum that may cancel
  // and divides everything; in float64 its error is that of its inputs. `weights` is scratch of 2 length doubles. Here
  // and below `ahead` may be null.
  void (*normalizer)(double* n, float* s, const float* q, const float* k, const ChunkGates& g, double scale,
                     int64_t dqk, double* weights, Ahead* ahead);
  // inv_d = 1 / (max(|s|, exp(-m)) + eps).
  void (*inverse_normalizer)(float* inv_d, const float* s, const float* m, float eps, int64_t count);

  // qk = q k^T (length x length) becomes W_tj in rows of w_stride, zero above the diagonal.
  void (*forward_tile)(float* w, int64_t w_stride, const float* qk, const ChunkGates& g, float scale, Ahead* ahead);

  // In: qk; gv = dh v^T; inv_d; s; and the terms of the state at the chunk's start,
  //   across_t = scale start_t / d_t q_t . (c dh_t) of u, across_n_t = scale start_t / d_t q_t . n of s / d.
  // Out: x_tj = scale D (gv / d + delta) and w_tj = scale D qk / d, both zero above the diagonal; delta, e;
  //   within_t = sum of x qk over the pairs j < t <= u; column_j = sum of x qk over u >= j.
  void (*backward_tile)(float* x, float* w, const float* qk, const float* gv, const ChunkGates& g, float scale,
                        float eps, const float* inv_d, const float* s, const float* across, const float* across_n,
                        float* delta, float* e, float* within, float* column, Ahead* ahead);

  // sums[row] = sum over columns of a * b, rows of b b_stride apart.
  void (*row_dots)(float* sums, const float* a, const float* b, int64_t b_stride, int64_t rows, int64_t columns);
  // added = weight[row] * x[row] + n_weight[row] * n;  y[row] += added;  sums[row] = with[row] . added.
  void (*add_state_term)(float* y, const float* x, const float* weight, const float* n_weight, const float* n,
                         const float* with, float* sums, int64_t rows, int64_t columns);

  // The state after a chunk: to = keep from + add; without `from`, which stands for zeros, to = add.
  void (*advance)(float* to, const float* from, float keep, const float* add, int64_t size);
  float (*dot)(const float* a, const float* b, int64_t count);

  // out (rows x columns) += a z (depth x columns), only the terms in which z is not finite and a is not 0.
  void (*add_not_finite)(float* out, const float* a, int64_t a_row, int64_t a_k, const float* z, int64_t rows,
                         int64_t columns, int64_t depth);

  // One token of one row and head, with the state in `slot`. scratch: 2 dqk + 2 dv floats.
  void (*step)(const MlstmStep& p, int64_t row, int64_t head, int64_t slot, float* scratch);

  void (*gemm)(const Gemm& g);
  // to (columns x rows) = from (rows x columns) transposed.
  void (*transpose)(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns);

  // One token: y = act(bias + sum over k of weight[k] taps[k]), and slope = act' of that sum where not null. Arrays of
  // `channels` floats; weight is [kernel][channels].
  void (*conv_token)(float* y, float* slope, const float* const* taps, const float* weight, const float* bias,
                     int64_t kernel, bool silu, int64_t channels);
  // to += a b, element by element.
  void (*add_product)(float* to, const float* a, const float* b, int64_t count);

  // Converts x (rows, in) to float32, in the order in which linear_rows reads it.
  void (*linear_rows_x)(const LinearRows& p, float* x);
  // Makes columns [begin, end) of y from that x.
  void (*linear_rows)(const LinearRows& p, const float* x, int64_t begin, int64_t end);
};

// The table for this machine (isa.h).
const VectorKernels& vector_kernels();

}  // namespace flash_xlstm::cpu
