// States of the mLSTM's sequences where they begin and end: in tensors of their own, or in the slots of a pool.
#pragma once

#include "params/mlstm.h"

namespace flash_xlstm::cpu {

// Where the state of a lane, a head of a sequence, lies in the pool.
struct LaneSlot {
  int64_t c, n, m;  // elements from the pool's start
  bool is_fresh;
};
LaneSlot slot_of(const MlstmProblem& p, int64_t lane);

inline bool is_pooled(const MlstmProblem& p) { return p.pool.indices != nullptr; }

// Whether a lane's initial c is zero.
bool begins_with_zeros(const MlstmProblem& p, int64_t lane);
// c from and to the pool.
void read_pool(float* to, const MlstmProblem& p, int64_t lane);
void write_pool(const MlstmProblem& p, int64_t lane, const float* from);

const float* initial_n(const MlstmProblem& p, int64_t lane);       // nullptr: zeros
float* final_n(float* n_last, const MlstmProblem& p, int64_t lane);  // nullptr: not wanted
float initial_m(const MlstmProblem& p, int64_t lane);

}  // namespace flash_xlstm::cpu
