// Entry points of the CPU kernels.
#pragma once

#include "conv_params.h"
#include "mlstm_params.h"
#include "pointwise_params.h"
#include "slstm_params.h"

namespace flash_xlstm::cpu {

void mlstm_forward(const MlstmForward& params);
void mlstm_backward(const MlstmBackward& params);
void mlstm_step(const MlstmStep& params);
void slstm_forward(const SlstmForward& params);
void slstm_backward(const SlstmBackward& params);
void slstm_step(const SlstmStep& params);
void conv_forward(const ConvForward& params);
void conv_backward(const ConvBackward& params);
void conv_step(const ConvStep& params);
void soft_cap(const SoftCap& params);
void rms_norm(const RmsNorm& params);
void rms_norm_backward(const RmsNormBackward& params);
void gated_head_norm(const GatedHeadNorm& params);
void gated_head_norm_backward(const GatedHeadNormBackward& params);
void swiglu(const Swiglu& params);
// `count` products of the same x.
void linear_rows(const LinearRows* products, int64_t count);

}  // namespace flash_xlstm::cpu
