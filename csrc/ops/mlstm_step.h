// What mlstm_step and mlstm_block_step share.
#pragma once

#include "ops/checks.h"
#include "params/mlstm.h"

namespace flash_xlstm {

// Checks the state of a step whose sizes are set, on the device of `like`, and sets its pointers in `p`.
void set_step_state(MlstmStep& p, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                    const OptTensor& state_indices);
void set_step_options(MlstmStep& p, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap);

}  // namespace flash_xlstm
