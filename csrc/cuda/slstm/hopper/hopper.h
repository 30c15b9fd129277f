// The sLSTM's loop over the tokens on Hopper: one launch, R in registers (and shared memory), a cluster a head.
#pragma once

#include <string>

#include "params/slstm.h"

namespace flash_xlstm::cuda::slstm_hopper {

constexpr int units_a_group = 8, max_dim = 768;

inline std::string words() {
  return "Hopper (a cluster a head, R in registers) for bfloat16 and float16 with dim a multiple of " +
         std::to_string(units_a_group) + ", up to " + std::to_string(max_dim);
}

// Whether this problem can run on the current device: compute capability 9.0, a 16-bit dtype, dim a multiple of
// units_a_group and at most max_dim, heads * dim less than 2^28, strides of x (backward: of dh) that are multiples of 16
// bytes, tensors that begin at such, seq less than 2^31 (backward: 2^30), and a cluster of the size that it takes fits.
bool serves(const SlstmForward& params);
bool serves(const SlstmBackward& params);

cudaError_t forward(const SlstmForward& params, cudaStream_t stream);
// dx and the initial state's gradients.
cudaError_t backward(const SlstmBackward& params, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::slstm_hopper
