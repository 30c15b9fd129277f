// The gated head-wise norm, for operators that contain it.
#pragma once

#include "ops/checks.h"
#include "ops/launch.h"

namespace flash_xlstm {

// As the operators of these names. If `dgate_to` is given, dgate is written to it. It must have the shape and the
// strides of gate.
Tensor gated_head_norm(Tensor h, Tensor gate, Tensor weight, double eps);
Tensors<3> gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps, bool weight_gradient,
                                    const OptTensor& dgate_to);

}  // namespace flash_xlstm
