// The sLSTM.
//
// A row is one sequence: a row of the batch, or one packed sequence. Gates are in the order i, f, z, o.
#pragma once

#include <string>

#include "params/types.h"

namespace flash_xlstm {

// What the forward keeps of a token for the backward, float32; on CUDA (batch, seq, heads, slstm_kept, dim). `margin`
// is i - (logsigmoid(f) + m_{t-1}). m took the input gate's branch where margin >= 0 or n_{t-1} is 0. The CPU keeps the
// weight that follows in its place: minus that of the past in that branch, else that of the input. `forget` is
// sigmoid(-f), or -1 for a unit that is padding.
enum SlstmKept : int { kept_margin, kept_z, kept_o, kept_forget, kept_c, kept_n, slstm_kept };

// The CPU keeps c and n of every other token, and the backward makes the others again: (batch, 1, heads,
// slstm_kept_arrays, dim), for two tokens c and n before the first, and then of each the four that come before kept_c.
constexpr int64_t slstm_kept_arrays(int64_t seq) { return kept_c * seq + 2 * ceil_div(seq, 2); }
// Where the arrays of two tokens begin, and the four of a token.
constexpr int64_t slstm_kept_pair(int64_t token) { return token / 2 * (2 + 2 * kept_c); }
constexpr int64_t slstm_kept_at(int64_t token) { return slstm_kept_pair(token) + 2 + token % 2 * kept_c; }

// A fresh unit, whose n is 0, takes m = i, whatever the log weight of its past is. That log weight is capped at this.
// Its c and n are 0, so the cap changes no result; it keeps 0 * inf from becoming NaN.
constexpr float slstm_max_log_keep = 80.0f;

struct SlstmProblem {
  DType dtype = DType::float32;         // of x, h, dh, dx
  DType weight_dtype = DType::float32;  // of R and dR
  DType bias_dtype = DType::float32;    // of b and db
  int64_t batch = 0, seq = 0, heads = 0, dim = 0;
  int64_t rows = 0;               // batch, or the number of packed sequences
  const void* weights = nullptr;  // R (4, heads, out, in)
  // Its strides in elements. On CUDA it is contiguous, elsewhere one of the last two is 1.
  int64_t weights_gate = 0, weights_head = 0, weights_out = 0, weights_in = 0;
  const void* bias = nullptr;           // b (4, heads, dim) contiguous
  const int32_t* cu_seqlens = nullptr;  // (rows + 1), on the kernel's device; nullptr: not packed
  // Initial state, (rows, heads, dim) contiguous float32; all or none, none means zeros.
  const float *h0 = nullptr, *c0 = nullptr, *n0 = nullptr, *m0 = nullptr;
};

struct SlstmForward {
  SlstmProblem p;
  const void* x = nullptr;  // (batch, seq, 4, heads, dim), strides in elements, the last dimension contiguous
  int64_t x_batch = 0, x_seq = 0, x_gate = 0, x_head = 0;
  void* h = nullptr;      // (batch, seq, heads, dim) contiguous, dtype
  float* kept = nullptr;  // nullptr: no backward will follow
  // Final state, (rows, heads, dim) contiguous float32; all or none. May be the initial state's memory.
  float *h_last = nullptr, *c_last = nullptr, *n_last = nullptr, *m_last = nullptr;
};

struct SlstmBackward {
  SlstmProblem p;            // m0 is not read
  const void* dh = nullptr;  // (batch, seq, heads, dim), strides in elements, the last contiguous; nullptr: zero
  int64_t dh_batch = 0, dh_seq = 0, dh_head = 0;
  const void* h = nullptr;      // as the forward wrote it
  const float* kept = nullptr;  // as the forward wrote it
  float clip = 0;               // clips the gradient that reaches h_{t-1} through R to [-clip, clip]; may be infinite
  // Gradients of the final state, contiguous float32; each may be nullptr: zero.
  const float *dh_last = nullptr, *dc_last = nullptr, *dn_last = nullptr, *dm_last = nullptr;
  void* dx = nullptr;        // (batch, seq, 4, heads, dim) contiguous, dtype
  void* dweights = nullptr;  // (4, heads, out, in) contiguous
  void* dbias = nullptr;     // (4, heads, dim) contiguous
  // Gradients of the initial state; all or none.
  float *dh0 = nullptr, *dc0 = nullptr, *dn0 = nullptr, *dm0 = nullptr;
};

// One token for every row; the state is read and written in place.
struct SlstmStep {
  DType dtype = DType::float32, weight_dtype = DType::float32, bias_dtype = DType::float32;
  int64_t batch = 0, heads = 0, dim = 0;
  const void* weights = nullptr;
  const void* bias = nullptr;
  const void* x = nullptr;  // (batch, 4, heads, dim), the last dimension contiguous
  int64_t x_batch = 0, x_gate = 0, x_head = 0;
  float *h_state = nullptr, *c_state = nullptr, *n_state = nullptr,
        *m_state = nullptr;  // (batch, heads, dim) contiguous
  void* h = nullptr;         // (batch, heads, dim) contiguous, dtype
};

namespace cpu {
void slstm_forward(const SlstmForward& params);
void slstm_backward(const SlstmBackward& params);
void slstm_step(const SlstmStep& params);
}  // namespace cpu

namespace cuda {
// The kernels that a device of this compute capability has, for people.
std::string slstm_words(int major, int minor);

int64_t slstm_forward_workspace_bytes(const SlstmForward& params);
cudaError_t slstm_forward(const SlstmForward& params, void* workspace, cudaStream_t stream);

int64_t slstm_backward_workspace_bytes(const SlstmBackward& params);
cudaError_t slstm_backward(const SlstmBackward& params, void* workspace, cudaStream_t stream);

int64_t slstm_step_workspace_bytes(const SlstmStep& params);
cudaError_t slstm_step(const SlstmStep& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
