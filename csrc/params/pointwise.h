// The pointwise ops: soft cap, norms and SwiGLU.
#pragma once

#include "params/types.h"

namespace flash_xlstm {

struct SoftCap {
  DType dtype = DType::float32;
  int64_t count = 0;
  float cap = 0;
  const void* x = nullptr;
  const void* dy = nullptr;  // nullptr: forward, out is the capped x; else out is the gradient of x
  void* out = nullptr;
};
namespace cpu {
void soft_cap(const SoftCap& params);
}
namespace cuda {
cudaError_t soft_cap(const SoftCap& params, cudaStream_t stream);
}

// On CUDA a row of a norm has at most this many elements.
constexpr int64_t max_norm_dim = 16384;

// y = x / sqrt(mean(x^2) + eps) * weight over rows of `dim` elements. All tensors are contiguous.
struct RmsNorm {
  DType dtype = DType::float32, weight_dtype = DType::float32;  // the weight is float32 or has the dtype of x
  int64_t rows = 0, dim = 0;
  float eps = 0;
  const void* x = nullptr;
  const void* residual = nullptr;  // nullptr: none; else x + residual, rounded to the dtype, is normalized
  const void* weight = nullptr;
  void* y = nullptr;
  void* sum = nullptr;      // x + residual; nullptr without residual
  bool holds_next = false;  // the next kernel starts only when all kernels before this one have ended
};
namespace cpu {
void rms_norm(const RmsNorm& params);
}
namespace cuda {
cudaError_t rms_norm(const RmsNorm& params, cudaStream_t stream);
}

struct RmsNormBackward {
  DType dtype = DType::float32, weight_dtype = DType::float32;
  int64_t rows = 0, dim = 0;
  float eps = 0;
  const void* dy = nullptr;
  const void* dsum = nullptr;  // gradient that reaches x past the norm, added to dx; nullptr: none
  const void* x = nullptr;     // what the forward normalized
  const void* weight = nullptr;
  void* dx = nullptr;
  void* dweight = nullptr;  // nullptr: not wanted
  void* y = nullptr;        // the forward's output, recomputed; nullptr: not wanted
};
namespace cpu {
void rms_norm_backward(const RmsNormBackward& params);
}
namespace cuda {
int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& params);
cudaError_t rms_norm_backward(const RmsNormBackward& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

// y = sigmoid(gate) * (h - mean(h)) / sqrt(var(h) + eps) * weight over the last dimension of h. h is (tokens, heads,
// dim), gate and y are (tokens, heads * dim), weight is (heads * dim). All are contiguous, except that rows of the gate
// may lie further apart.
struct GatedHeadNorm {
  DType dtype = DType::float32, weight_dtype = DType::float32;
  int64_t tokens = 0, heads = 0, dim = 0;
  float eps = 0;
  const void* h = nullptr;
  const void* gate = nullptr;
  int64_t gate_stride = 0;  // between rows of the gate
  const void* weight = nullptr;
  void* y = nullptr;
};
namespace cpu {
void gated_head_norm(const GatedHeadNorm& params);
}
namespace cuda {
cudaError_t gated_head_norm(const GatedHeadNorm& params, cudaStream_t stream);
}

struct GatedHeadNormBackward {
  GatedHeadNorm p;  // y is not used
  const void* dy = nullptr;
  void *dh = nullptr, *dgate = nullptr;
  int64_t dgate_stride = 0;  // between rows of dgate
  void* dweight = nullptr;   // nullptr: not wanted
};
namespace cpu {
void gated_head_norm_backward(const GatedHeadNormBackward& params);
}
namespace cuda {
int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& params);
cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

// out = silu(x) * y; with dout, the gradients of x and y. All are (rows, columns). Rows of x and y may lie any distance
// apart.
struct Swiglu {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* y = nullptr;
  int64_t y_stride = 0;
  const void* dout = nullptr;         // nullptr: forward
  void* out = nullptr;                // contiguous; backward: recomputed, nullptr: not wanted
  void *dx = nullptr, *dy = nullptr;  // backward only
  int64_t gradient_stride = 0;        // between rows of dx, and of dy
};
namespace cpu {
void swiglu(const Swiglu& params);
}
namespace cuda {
cudaError_t swiglu(const Swiglu& params, cudaStream_t stream);
}

}  // namespace flash_xlstm
