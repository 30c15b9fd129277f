// What the operators that contain a norm share.
#pragma once

#include "ops/checks.h"
#include "ops/launch.h"

namespace flash_xlstm {

// As the operators of these names; dgate goes to `dgate_to` if given: shape and strides of gate.
Tensor gated_head_norm(Tensor h, Tensor gate, Tensor weight, double eps);
Tensors<3> gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps, bool weight_gradient,
                                    const OptTensor& dgate_to);

}  // namespace flash_xlstm
