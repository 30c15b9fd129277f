// Plain descriptions of one sLSTM problem, shared by the op layer, the CPU kernels and the CUDA kernels. No torch here.
//
// A row is one sequence: a batch row, or one packed sequence. Gates are in the order i, f, z, o.
#pragma once

#include <cstdint>

#include "mlstm_params.h"

namespace flash_xlstm {

// What the forward keeps of a token for the backward, float32, (batch, seq, heads, slstm_kept, dim). `margin` is
// i - (logsigmoid(f) + m_{t-1}): m took the input gate's branch where it is not negative or n_{t-1} is 0. `forget` is
// sigmoid(-f), and -1 marks a unit that is padding.
enum SlstmKept : int { kept_margin, kept_z, kept_o, kept_forget, kept_c, kept_n, slstm_kept };

// A unit whose n is 0 is fresh and takes m = i, however large log weights of the empty past are: e^80 is the most that
// these reach (c = n = 0 there, so that it only keeps 0 * inf from becoming NaN).
constexpr float slstm_max_log_keep = 80.0f;

struct SlstmProblem {
  DType dtype;         // of x, h, dh, dx
  DType weight_dtype;  // of R and dR
  DType bias_dtype;    // of b and db
  int64_t batch, seq, heads, dim;
  int64_t rows;                         // batch, or the number of packed sequences
  const void* weights;                  // R (4, heads, out, in) contiguous
  const void* bias;                     // b (4, heads, dim) contiguous
  const int32_t* cu_seqlens = nullptr;  // (rows + 1), on the kernel's device; nullptr: not packed
  // Initial state, (rows, heads, dim) contiguous float32; all or none, none means zeros.
  const float *h0 = nullptr, *c0 = nullptr, *n0 = nullptr, *m0 = nullptr;
};

struct SlstmForward {
  SlstmProblem p;
  const void* x;  // (batch, seq, 4, heads, dim), strides in elements, the last dimension contiguous
  int64_t x_batch, x_seq, x_gate, x_head;
  void* h;                // (batch, seq, heads, dim) contiguous, dtype
  float* kept = nullptr;  // nullptr: no backward will follow
  // Final state, (rows, heads, dim) contiguous float32; all or none. May be the initial state's memory.
  float *h_last = nullptr, *c_last = nullptr, *n_last = nullptr, *m_last = nullptr;
};

struct SlstmBackward {
  SlstmProblem p;  // of the initial state, m0 is not read
  const void* dh;  // (batch, seq, heads, dim), strides in elements, the last contiguous; nullptr: zero
  int64_t dh_batch, dh_seq, dh_head;
  const void* h;      // as the forward wrote it
  const float* kept;  // as the forward wrote it
  float clip;         // the gradient that reaches h_{t-1} through R stays within -clip and clip; may be infinite
  // Gradients of the final state, contiguous float32; each may be nullptr: zero.
  const float *dh_last = nullptr, *dc_last = nullptr, *dn_last = nullptr, *dm_last = nullptr;
  void* dx;        // (batch, seq, 4, heads, dim) contiguous, dtype
  void* dweights;  // (4, heads, out, in) contiguous
  void* dbias;     // (4, heads, dim) contiguous
  // Gradients of the initial state; all or none.
  float *dh0 = nullptr, *dc0 = nullptr, *dn0 = nullptr, *dm0 = nullptr;
};

// One token for every row; the state is read and written in place.
struct SlstmStep {
  DType dtype, weight_dtype, bias_dtype;
  int64_t batch, heads, dim;
  const void* weights;
  const void* bias;
  const void* x;  // (batch, 4, heads, dim), the last dimension contiguous
  int64_t x_batch, x_gate, x_head;
  float *h_state, *c_state, *n_state, *m_state;  // (batch, heads, dim) contiguous
  void* h;                                       // (batch, heads, dim) contiguous, dtype
};

}  // namespace flash_xlstm
