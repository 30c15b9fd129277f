// The mLSTM. Strides are in elements; the last dimension of q, k, v, dh is contiguous.
#pragma once

#include <string>

#include "params/types.h"

namespace flash_xlstm {

constexpr int64_t max_chunk_size = 4096;

enum class InputGate : int { exponential = 0, sigmoid = 1 };

// m of a state that has no weight: it stands for minus infinity, which would give NaN where a difference is taken. Small
// enough that no log weight reaches it, large enough that it stays finite in base 2.
constexpr float no_weight_m = -1e30f;

// States that lie in the slots of a pool. Strides are in elements; within a slot each tensor is contiguous.
struct MlstmSlots {
  DType c_dtype = DType::float32;                    // float32 or bfloat16; n and m are float32
  void* c = nullptr;                                 // (num_slots, heads, dqk, dv)
  float* n = nullptr;                                // (num_slots, heads, dqk)
  float* m = nullptr;                                // (num_slots, heads)
  int64_t c_stride = 0, n_stride = 0, m_stride = 0;  // from a slot to the next
  int64_t num_slots = 0;
  // The slot of each row, or of each sequence; -1 leaves it out: its h is 0. On CUDA other slots outside the pool leave
  // it out too, with NaN for h.
  const int32_t* indices = nullptr;
};

struct MlstmProblem {
  DType dtype = DType::float32;       // of q, k, v, h and their gradients
  DType gate_dtype = DType::float32;  // of i, f, di, df
  int64_t batch = 0, seq = 0, heads = 0, dqk = 0, dv = 0;
  int64_t num_seqs = 0;  // batch, or the number of packed sequences
  float scale = 0, eps = 0;
  int64_t chunk_size = 0;  // 0: the kernel chooses
  // Applied to i and f first: cap * tanh(x / cap), with infinities kept, since they mark padding. 0: none.
  float gate_soft_cap = 0.0f;
  // sigmoid: log weights have logsigmoid(i) in the place of i, and m stays 0. m0, m and their gradients are null.
  InputGate input_gate = InputGate::exponential;
  bool normalize = true;  // false (with sigmoid only): d_t = 1; n and s are null
  Strided q, k, v, i, f;
  // Initial state of each sequence, contiguous float32; all or none, none means zeros.
  const float* c0 = nullptr;            // (num_seqs, heads, dqk, dv)
  const float* n0 = nullptr;            // (num_seqs, heads, dqk)
  const float* m0 = nullptr;            // (num_seqs, heads)
  float first_m = 0.0f;                 // m before the first token where m0 is null
  const int32_t* cu_seqlens = nullptr;  // (num_seqs + 1), on the kernel's device; nullptr: not packed
  // Forward, if its indices (num_seqs) are not null: states are read from the pool, in the place of c0, n0 and m0, and
  // written there, in the place of c_last, n_last and m_last. All of these are then null.
  MlstmSlots pool;
  const bool* fresh = nullptr;  // (num_seqs): sequences that start from zero, whatever their slots hold; nullptr: none
};

struct MlstmForward {
  MlstmProblem p;
  void* h = nullptr;        // (batch, seq, heads, dv) contiguous, dtype; nullptr: not wanted, and no q is read
  float* s = nullptr;       // (batch, seq, heads): the signed normalizer sum s_t; nullptr: not wanted
  float* m = nullptr;       // (batch, seq, heads): the stabilizer m_t; nullptr: not wanted
  float* c_last = nullptr;  // final state, contiguous float32; nullptr: not wanted (all or none)
  float* n_last = nullptr;
  float* m_last = nullptr;
  float* log_decay = nullptr;    // (num_seqs, heads): the sum of the log forget gates; nullptr: not wanted
  float* kept_states = nullptr;  // see mlstm_kept_floats; nullptr: not wanted
  int64_t kept_floats = 0;       // that there is room for
};

struct MlstmBackward {
  MlstmProblem p;
  Strided dh;               // data == nullptr: zero; s, m and h are then not read
  const void* h = nullptr;  // as the forward wrote it; given for float32 on CUDA only
  const float* s = nullptr;
  const float* m = nullptr;
  const float* dc_last = nullptr;  // gradients of the final state, contiguous float32; each may be nullptr: zero
  const float* dn_last = nullptr;
  const float* dm_last = nullptr;
  const float* dlog_decay = nullptr;  // (num_seqs, heads)
  // (batch, seq, heads, dim), dtype; heads of a token side by side. dq == nullptr: not wanted; dh is then zero.
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t dq_token = 0, dk_token = 0, dv_token = 0;  // elements from a token to the next; heads * dim: contiguous
  void *di = nullptr, *df = nullptr;                 // (batch, seq, heads), gate dtype; heads of a token side by side
  int64_t gate_token = 0;                            // elements from a token to the next; heads: contiguous
  float* dc0 = nullptr;  // gradients of the initial state; nullptr: not wanted (all or none)
  float* dn0 = nullptr;
  float* dm0 = nullptr;
  // dk == nullptr: of the gradients only dc0 and dn0 are wanted, and for each (num_seqs, heads) the sum of e over the
  // tokens before the first reset and 1 where there is none, else 0. dq is made too where mlstm_begins_backward, else it
  // is scratch. There dc0 may be null: dq alone.
  float* open_e = nullptr;
  float* is_open = nullptr;
  const float* kept_states = nullptr;  // what the forward left there; nullptr: the states are made again
  int64_t kept_floats = 0;
  // The workspace is that of such a call with the same inputs, but for the gradients of the final state, and dq is made.
  bool is_begun = false;
};

// One token for every row; the state is read and written in place.
struct MlstmStep {
  DType dtype = DType::float32, gate_dtype = DType::float32;
  int64_t batch = 0, heads = 0, dqk = 0, dv = 0;
  float scale = 0, eps = 0;
  float gate_soft_cap = 0.0f;  // as in MlstmProblem
  Strided q, k, v, i, f;       // (batch, heads, dim) and (batch, heads): .seq is unused
  MlstmSlots state;            // without indices row b uses slot b
  void* h = nullptr;           // (batch, heads, dv) contiguous, dtype
  bool settled_state = false;  // no kernel that may still run writes the state: it is read before the wait
  bool holds_next = false;     // lets the next kernel start only after all kernels before this one have ended
};

constexpr int64_t mlstm_kept_tokens = 128;

namespace cpu {
// A forward can leave the states at the starts of its chunks to the backward, which else makes them again. There is room
// for one of `floats` at every `tokens`th token of a row and head but the first.
struct KeptStates {
  int64_t floats, tokens;
};
KeptStates mlstm_kept_states(int64_t dqk, int64_t dv);

void mlstm_forward(const MlstmForward& params);
void mlstm_backward(const MlstmBackward& params);
void mlstm_step(const MlstmStep& params);
}  // namespace cpu

namespace cuda {
// Inputs to copy, so that they are contiguous and 16-byte aligned, before the fastest path for the problem's sizes and
// dtypes on the current device can read them. Slower paths read every layout.
struct MlstmCopies {
  bool q = false, k = false, v = false, dh = false;
  bool any() const { return q || k || v || dh; }
};
MlstmCopies mlstm_copies(const MlstmForward& params);
MlstmCopies mlstm_copies(const MlstmBackward& params);
// Whether a backward of the initial state alone makes dq and leaves its workspace to a second call, which makes the rest.
bool mlstm_begins_backward(const MlstmBackward& params);
// A forward can leave the states at the starts of chunks to the backward, which else makes them again: the floats of a
// chunk of mlstm_kept_tokens and head, 0 where the kernels for these sizes on the current device keep none. There are
// ceil(seq / mlstm_kept_tokens) chunks in each row of the batch; packed, num_seqs more than in one row.
int64_t mlstm_kept_floats(DType dtype, int64_t dqk, int64_t dv);
// Whether the kernels that serve the problem write dq, dk and dv that are not contiguous.
bool mlstm_writes_apart(const MlstmBackward& params);

int64_t mlstm_forward_workspace_bytes(const MlstmForward& params);
cudaError_t mlstm_forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

int64_t mlstm_backward_workspace_bytes(const MlstmBackward& params);
cudaError_t mlstm_backward(const MlstmBackward& params, void* workspace, cudaStream_t stream);

// The kernels that a device of this compute capability has, for people.
std::string mlstm_words(int major, int minor);

constexpr int64_t max_step_dqk = 8192;  // q and k in float32 take 64 KiB of a block's shared memory
int64_t mlstm_step_workspace_bytes(const MlstmStep& params);
cudaError_t mlstm_step(const MlstmStep& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
