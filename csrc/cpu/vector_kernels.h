// The CPU kernels' inner loops, as a table of functions; one table for each instruction set (vector_kernels.inl).
// Everything here is float32 in memory, rows are contiguous, and matrices are row-major.
#pragma once

#include <cstdint>

#include "mlstm_params.h"
#include "pointwise_params.h"

namespace flash_xlstm::cpu {

// A chunk's gates, one entry a token, `length` of them (padded with tokens that change nothing).
struct ChunkGates {
  int64_t length;
  const float *b_high, *b_low;  // cumulative log forget gate, in two parts so that differences keep float32 precision
  const float *i, *m;
  float m_start, m_end;
};

struct VectorKernels {
  // to (padded_rows x columns) <- from (rows x columns, row stride in elements, dtype), zeros below.
  // Returns whether every value is finite.
  bool (*pack)(float* to, const void* from, DType dtype, int64_t stride, int64_t rows, int64_t columns,
               int64_t padded_rows);
  // to (rows x columns, row stride, dtype) <- factor[row] * from; factor may be null.
  void (*unpack)(void* to, DType dtype, int64_t stride, const float* from, const float* factor, int64_t rows,
                 int64_t columns);

  // weight_j = exp(b_end - b_j + i_j - m_end): what token j adds to the state at the chunk's end.
  void (*end_weights)(float* weight, const ChunkGates& g);
  // start_t = exp(b_t + m_start - m_t): what the state at the chunk's start is worth at token t.
  void (*start_weights)(float* start, const ChunkGates& g);
  // to = weight[row] * from (a weight of 0 gives 0 whatever is there); sum (columns) += sum of sum_weight[row] * from.
  void (*weight_rows)(float* to, int64_t to_stride, const float* from, const float* weight, const float* sum_weight,
                      float* sum, int64_t rows, int64_t columns);

  // Forward tile. In: qk = q k^T (length x length), state_weight_t = scale start_t, q, n. Out: a_t = W_tj, in rows of
  // a_stride; s; inv_d = 1 / (max(|s|, exp(-m)) + eps).
  void (*forward_tile)(float* a, int64_t a_stride, const float* qk, const ChunkGates& g, float scale, float eps,
                       const float* state_weight, const float* q, const float* n, int64_t dqk, float* s, float* inv_d);

  // Backward tile. In: qk, gv = dh v^T, inv_d, s, and across_t = scale start_t / d_t q_t . (c dh_t), the part of u that
  // comes through the state. Out: x_tj = scale D (gv / d + delta), w_tj = scale D qk / d, both zero above the diagonal;
  // delta, e; row_sum, col_sum of x qk.
  void (*backward_tile)(float* x, float* w, const float* qk, const float* gv, const ChunkGates& g, float scale,
                        float eps, const float* inv_d, const float* s, const float* across, float* delta, float* e,
                        float* row_sum, float* col_sum);

  // sums[row] = sum over columns of a * b.
  void (*row_dots)(float* sums, const float* a, const float* b, int64_t rows, int64_t columns);
  // y[row] += weight[row] * x[row] + n_weight[row] * n;  sums[row] = with[row] . (what was added).
  void (*add_state_term)(float* y, const float* x, const float* weight, const float* n_weight, const float* n,
                         const float* with, float* sums, int64_t rows, int64_t columns);

  // One row of the state through `count` chunks: slot[r] (slot_stride apart) = state; state = keep[r] state + update[r].
  void (*scan_row)(float* state, float* slot, int64_t slot_stride, const float* update, int64_t update_stride,
                   const float* keep, int64_t count, int64_t columns);
  // The same from the last chunk to the first, for the state's gradient; through[r] += keep[r] <start[r], state>
  // before the update, start[r] being the state at chunk r's start.
  void (*scan_row_back)(float* state, float* slot, int64_t slot_stride, const float* update, int64_t update_stride,
                        const float* keep, const float* start, int64_t start_stride, double* through, int64_t count,
                        int64_t columns);

  // y[row] = sum over the columns c of `p` that count (c <= row, or c >= row with upper) and are not 0 of
  // p[row][c] z[c]: the product for a z that is not finite everywhere.
  void (*guarded_product)(float* y, const float* p, int64_t p_stride, const float* z, bool upper, int64_t rows,
                          int64_t columns);

  // One token of one row and head, with the state in `slot`; scratch holds 2 dqk + 2 dv floats.
  void (*step)(const MlstmStep& p, int64_t row, int64_t head, int64_t slot, float* scratch);

  // Elements [begin, end).
  void (*soft_cap)(const SoftCap& p, int64_t begin, int64_t end);
};

// The table for this machine, and its name ("AVX-512", "AVX2", "baseline").
const VectorKernels& vector_kernels();
const char* isa_name();

}  // namespace flash_xlstm::cpu
