// The mLSTM for compute capability 9.0: wgmma and the TMA.
#pragma once

#include <string>

#include "params/mlstm.h"

namespace flash_xlstm::cuda::hopper {

// 16-bit dtypes; dqk and dv are multiples of dim_step.
constexpr int64_t dim_step = 8, least_dim = 16, most_dim = 1024;

inline std::string words() {
  return "Hopper (wgmma) for 16-bit types with dqk and dv multiples of " + std::to_string(dim_step) + ", " +
         std::to_string(least_dim) + " to " + std::to_string(most_dim);
}

// Whether these kernels serve the problem on the current device, apart from its inputs' layouts (`reads`).
bool serves(const MlstmProblem& p);
// Whether the TMA can follow an input: 16-byte aligned, strides greater than 0 and multiples of 16 bytes.
bool reads(const Strided& t, const MlstmProblem& p);

// See mlstm_kept_floats.
int64_t kept_floats(DType dtype, int64_t dqk, int64_t dv);

int64_t forward_workspace_bytes(const MlstmForward& params);
cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream);

int64_t backward_workspace_bytes(const MlstmBackward& params);
cudaError_t backward(const MlstmBackward& params, void* workspace, cudaStream_t stream);

}  // namespace flash_xlstm::cuda::hopper
