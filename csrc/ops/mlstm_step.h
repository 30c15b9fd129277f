// What mlstm_step, mlstm_block_step and mlstm_prefill share.
#pragma once

#include "ops/checks.h"
#include "params/mlstm.h"

namespace flash_xlstm {

// The state's sizes in slots of a pool, and who uses them: `rows` named `name`, "batch" or "num_seqs".
struct SlotSizes {
  int64_t rows, heads, dqk, dv;
  const char* name;
};
// Checks a state that is updated in place, on the device of `like`. Without `indices` each row has the slot of its own
// number.
MlstmSlots check_slots(const SlotSizes& sizes, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                       const OptTensor& indices);
// Checks the state of a step whose sizes are set.
void set_step_state(MlstmStep& p, const Tensor& like, const Tensor& c, const Tensor& n, const Tensor& m,
                    const OptTensor& state_indices);
void set_step_options(MlstmStep& p, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap);

}  // namespace flash_xlstm
