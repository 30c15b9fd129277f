// The sLSTM's loop over the tokens on Hopper: one launch. A thread block cluster has one head of some rows, with R in
// registers, and in shared memory beyond dim 512.
#pragma once

#include <string>

#include "params/slstm.h"

namespace flash_xlstm::cuda::slstm_hopper {

constexpr int units_a_group = 8, max_dim = 768;

inline std::string words() {
  return "Hopper (a cluster a head, R in registers) for bfloat16 and float16 with dim a multiple of " +
         std::to_string(units_a_group) + ", up to " + std::to_string(max_dim);
}

// Whether this problem can run on the current device. Needed:
//   - compute capability 9.0, and the problem's cluster size fits the device;
//   - bfloat16 or float16, dim a multiple of units_a_group and at most max_dim, heads * dim less than 2^28;
//   - strides of x (backward: of dh) multiples of 16 bytes, and tensors aligned to 16 bytes;
//   - seq less than 2^31 (backward: 2^30).
bool serves(const SlstmForward& params);
bool serves(const SlstmBackward& params);

cudaError_t forward(const SlstmForward& params, cudaStream_t stream);
// Makes dx and the initial state's gradients.
cudaError_t backward(const SlstmBackward& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::slstm_hopper
