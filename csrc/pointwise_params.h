// Plain descriptions of pointwise problems, shared by the op layer, the CPU kernels and the CUDA kernels.
#pragma once

#include <cstdint>

#include "mlstm_params.h"

namespace flash_xlstm {

struct SoftCap {
  DType dtype;
  int64_t count;
  float cap;
  const void* x;
  const void* dy;  // nullptr: out is the capped x, else the gradient
  void* out;
};

}  // namespace flash_xlstm
