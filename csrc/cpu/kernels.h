// Entry points of the CPU kernels.
#pragma once

#include "mlstm_params.h"
#include "pointwise_params.h"

namespace flash_xlstm::cpu {

void mlstm_forward(const MlstmForward& params);
void mlstm_backward(const MlstmBackward& params);
void mlstm_step(const MlstmStep& params);
void soft_cap(const SoftCap& params);
void rms_norm(const RmsNorm& params);
void rms_norm_backward(const RmsNormBackward& params);
void gated_head_norm(const GatedHeadNorm& params);
void gated_head_norm_backward(const GatedHeadNormBackward& params);
void swiglu(const Swiglu& params);
void linear_rows(const LinearRows& params);

}  // namespace flash_xlstm::cpu
