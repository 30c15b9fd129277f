// Plain descriptions of one mLSTM problem, shared by the op layer, the CPU kernels and the CUDA kernels.
// No torch here. Strides are in elements; the last dimension of q, k, v, dh is contiguous.
#pragma once

#include <cstdint>

namespace flash_xlstm {

enum class InputGate : int { exponential = 0, sigmoid = 1 };

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// (batch, seq, heads, dim) with a contiguous last dimension; also (batch, seq, heads).
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

struct MlstmProblem {
  DType dtype;        // of q, k, v, h and their gradients
  DType gate_dtype;   // of i, f, di, df
  int64_t batch, seq, heads, dqk, dv;
  int64_t num_seqs;   // batch, or the number of packed sequences
  float scale, eps;
  int64_t chunk_size;  // 0: the kernel chooses
  // Of i and f before anything else: cap * tanh(x / cap), infinities kept (they mark padding); 0: none.
  float gate_soft_cap = 0.0f;
  // sigmoid: log weights have logsigmoid(i) for i, m stays 0 (m0, m and their gradients are not touched: null).
  InputGate input_gate = InputGate::exponential;
  bool normalize = true;  // false (sigmoid only): d_t = 1, and no n, s (null)
  Strided q, k, v, i, f;
  // Initial state, one per sequence, contiguous float32; c0 == nullptr means zeros (all are given or none).
  const float* c0 = nullptr;  // (num_seqs, heads, dqk, dv)
  const float* n0 = nullptr;  // (num_seqs, heads, dqk)
  const float* m0 = nullptr;  // (num_seqs, heads)
  const int32_t* cu_seqlens = nullptr;  // (num_seqs + 1), on the kernel's device; nullptr: not packed
};

struct MlstmForward {
  MlstmProblem p;
  void* h;          // (batch, seq, heads, dv) contiguous, dtype
  float* s;         // (batch, seq, heads): the signed normalizer sum s_t; nullptr: not wanted
  float* m;         // (batch, seq, heads): the stabilizer m_t; nullptr: not wanted
  float* c_last = nullptr;  // final state, contiguous float32; nullptr: not wanted (all or none)
  float* n_last = nullptr;
  float* m_last = nullptr;
};

struct MlstmBackward {
  MlstmProblem p;
  Strided dh;       // data == nullptr: zero
  const void* h;    // as the forward wrote it; float32 on CUDA only, else nullptr
  const float* s;
  const float* m;
  const float* dc_last = nullptr;  // gradients of the final state, contiguous float32; each may be nullptr: zero
  const float* dn_last = nullptr;
  const float* dm_last = nullptr;
  void *dq, *dk, *dv;  // contiguous, dtype
  void *di, *df;       // (batch, seq, heads) contiguous, gate dtype
  float* dc0 = nullptr;  // gradients of the initial state; nullptr: not wanted (all or none)
  float* dn0 = nullptr;
  float* dm0 = nullptr;
};

// One token for every row; the state is read and written in place.
struct MlstmStep {
  DType dtype, gate_dtype, state_dtype;  // state_dtype of c: float32 or bfloat16; n and m are float32
  int64_t batch, heads, dqk, dv;
  int64_t num_slots;  // first dimension of the state
  float scale, eps;
  float gate_soft_cap = 0.0f;  // as in MlstmProblem
  Strided q, k, v, i, f;  // (batch, heads, dim) and (batch, heads): .seq is unused
  void* c;   // (num_slots, heads, dqk, dv) contiguous
  float* n;  // (num_slots, heads, dqk) contiguous
  float* m;  // (num_slots, heads) contiguous
  // (batch): the slot of each row; -1 leaves the row out (its h is 0). nullptr: row b uses slot b.
  const int32_t* state_indices = nullptr;
  void* h;  // (batch, heads, dv) contiguous, dtype
  bool settled_state = false;  // nothing that may still run writes the state: it may be read before it has ended
  bool holds_next = false;     // the next kernel starts only when all before this one have ended
};

}  // namespace flash_xlstm
