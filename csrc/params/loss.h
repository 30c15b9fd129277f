// The rows of a cross entropy, and the scaling of its gradients.
#pragma once

#include "params/types.h"

namespace flash_xlstm {

// On CUDA a row begins at a multiple of this many elements. Kernels may write beyond its end, up to the next multiple.
constexpr int cross_entropy_pack = 4;

// Losses and gradients of float32 logits (rows, columns), whose rows may lie any distance apart. For a row:
//   c       = cap tanh(logit / cap); with cap 0 the logit itself
//   lse     = log sum exp c,   p = exp(c - lse),   s = label_smoothing
//   loss    = (1 - s) (lse - c_label) + s (lse - mean c) + z_loss lse^2
//   dlogits = (p (1 + 2 z_loss lse) - (1 - s) [label] - s / columns) (1 - (c / cap)^2) scale
// The factor 1 - (c / cap)^2 is 1 with cap 0. Loss and gradient are 0 where the label is ignore_index. Any other label
// outside [0, columns) has a loss of NaN.
struct CrossEntropy {
  int64_t rows = 0, columns = 0;
  const float* logits = nullptr;
  int64_t logits_stride = 0;
  const void* labels = nullptr;  // (rows), int64 or int32
  bool labels_are_int32 = false;
  int64_t ignore_index = 0;
  float cap = 0, label_smoothing = 0, z_loss = 0;
  const float* scale = nullptr;  // (rows); nullptr: 1
  float* loss = nullptr;         // (rows)
  DType dtype = DType::float32;  // of dlogits
  void* dlogits = nullptr;       // nullptr: not wanted
  int64_t dlogits_stride = 0;
};

// out = x factor[0], rounded once. x is float32 or has the dtype of out.
struct Scaling {
  DType x_dtype = DType::float32, out_dtype = DType::float32;
  int64_t count = 0;
  const float* factor = nullptr;
  const void* x = nullptr;
  void* out = nullptr;
};

namespace cpu {
void cross_entropy(const CrossEntropy& params);
void scaling(const Scaling& params);
}  // namespace cpu
namespace cuda {
cudaError_t cross_entropy(const CrossEntropy& params, cudaStream_t stream);
cudaError_t scaling(const Scaling& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace flash_xlstm
