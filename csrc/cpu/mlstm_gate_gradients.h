// The gradients of the mLSTM's gates from sums that the backward collects chunk by chunk.
#pragma once

#include <vector>

#include "cpu/mlstm_plan.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {

// The terms of the gates' gradients, [items][length]. q_dq and k_dk are a token's shares of the pairs that cross the
// chunk's start and end. within and column are its shares of the pairs inside the chunk (backward_tile).
struct GateSums {
  std::vector<float> q_dq, k_dk, within, column, e;
  std::vector<double> through;  // [items] keep (<c, dc> + <n, dn>), c at the chunk's start, dc at its end

  explicit GateSums(const Plan& plan) : through(plan.items.size(), 0.0) {
    for (auto* v : {&q_dq, &k_dk, &within, &column, &e}) v->resize(plan.items.size() * plan.length);
  }
};

// Writes open_e and is_open: of every lane the sum of e before the first reset, and whether there is none.
void sum_open(const Plan& plan, const GateSums& sums, const MlstmBackward& params);

// Writes di, df and dm0.
void gate_gradients(const Plan& plan, const GateSums& sums, const MlstmBackward& params);

}  // namespace flash_xlstm::cpu
