// Pointwise ops.
#pragma once

#include "params/types.h"

namespace flash_xlstm {

struct SoftCap {
  DType dtype = DType::float32;
  int64_t count = 0;
  float cap = 0;
  const void* x = nullptr;
  const void* dy = nullptr;  // nullptr: out is the capped x, else the gradient
  void* out = nullptr;
};
namespace cpu {
void soft_cap(const SoftCap& params);
}
namespace cuda {
cudaError_t soft_cap(const SoftCap& params, cudaStream_t stream);
}

// On CUDA, rows of the norms have at most this many elements.
constexpr int64_t max_norm_dim = 16384;

// y = x / sqrt(mean(x^2) + eps) * weight over rows of `dim`, everything contiguous.
struct RmsNorm {
  DType dtype = DType::float32, weight_dtype = DType::float32;  // the weight is float32 or has the dtype of x
  int64_t rows = 0, dim = 0;
  float eps = 0;
  const void* x = nullptr;
  const void* residual = nullptr;  // nullptr: none; else x + residual, rounded to the dtype, takes x's place
  const void* weight = nullptr;
  void* y = nullptr;
  void* sum = nullptr;      // x + residual; nullptr without residual
  bool holds_next = false;  // the next kernel starts only when all before this one have ended
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
  const void* dsum = nullptr;  // what reaches x past the norm; nullptr: nothing
  const void* x = nullptr;     // what was normalized
  const void* weight = nullptr;
  void* dx = nullptr;
  void* dweight = nullptr;  // nullptr: not wanted
  void* y = nullptr;        // the forward's output, made again; nullptr: not wanted
};
namespace cpu {
void rms_norm_backward(const RmsNormBackward& params);
}
namespace cuda {
int64_t rms_norm_backward_workspace_bytes(const RmsNormBackward& params);
cudaError_t rms_norm_backward(const RmsNormBackward& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

// y = sigmoid(gate) * (h - mean(h)) / sqrt(var(h) + eps) * weight over the last dimension of h (tokens, heads, dim);
// gate and y (tokens, heads * dim), weight (heads * dim). Contiguous but for the gate's rows.
struct GatedHeadNorm {
  DType dtype = DType::float32, weight_dtype = DType::float32;
  int64_t tokens = 0, heads = 0, dim = 0;
  float eps = 0;
  const void* h = nullptr;
  const void* gate = nullptr;
  int64_t gate_stride = 0;
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
  GatedHeadNorm p;  // without y
  const void* dy = nullptr;
  void *dh = nullptr, *dgate = nullptr;
  bool dgate_as_gate = false;  // rows of dgate as far apart as the gate's; else contiguous
  void* dweight = nullptr;  // nullptr: not wanted
};
namespace cpu {
void gated_head_norm_backward(const GatedHeadNormBackward& params);
}
namespace cuda {
int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& params);
cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

// out = silu(x) * y, or with dout the gradients; (rows, columns), rows of x and y any distance apart.
struct Swiglu {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* y = nullptr;
  int64_t y_stride = 0;
  const void* dout = nullptr;         // nullptr: forward
  void* out = nullptr;                // contiguous; backward: made again, nullptr: not wanted
  void *dx = nullptr, *dy = nullptr;  // backward
  int64_t gradient_stride = 0;        // of rows of dx and of dy
};
namespace cpu {
void swiglu(const Swiglu& params);
}
namespace cuda {
cudaError_t swiglu(const Swiglu& params, cudaStream_t stream);
}

}  // namespace flash_xlstm
