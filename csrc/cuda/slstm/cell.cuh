// One unit of the sLSTM at one token, forward and backward. All sLSTM kernels share it.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/packed.cuh"
#include "params/slstm.h"

namespace flash_xlstm::cuda {

// Where a row's tokens lie: a row of the batch, or a packed sequence.
struct SlstmRow {
  int64_t batch;
  int64_t start, length;
};

__device__ __forceinline__ SlstmRow slstm_row(const SlstmProblem& p, int64_t row) {
  if (row >= p.rows) return {.batch = 0, .start = 0, .length = 0};
  if (p.cu_seqlens == nullptr) return {.batch = row, .start = 0, .length = p.seq};
  const TokenRange tokens = packed_tokens(p.cu_seqlens, row, p.seq);
  return {.batch = 0, .start = tokens.start, .length = tokens.stop - tokens.start};
}

// An element of `state` (rows, heads, dim); 0 beyond the last row and where there is no state.
__device__ __forceinline__ float initial(const float* state, const SlstmProblem& p, int64_t row, int64_t head,
                                         int64_t unit) {
  return state == nullptr || row >= p.rows ? 0.0f : state[(row * p.heads + head) * p.dim + unit];
}

struct SlstmUnit {
  float h, c, n, m;
};

struct SlstmUnitKept {
  float value[slstm_kept];
};

// ExactMath is for the kernels that serve float32, FastMath for those of 16-bit types only. FastMath takes exp and log
// from the special function unit; their errors (2^-21 and less) are far below the rounding of x and h.
struct ExactMath {
  static __device__ __forceinline__ float exponential(float x) { return expf(x); }
  static __device__ __forceinline__ float log_1p(float x) { return log1pf(x); }
  static __device__ __forceinline__ float tangent(float x) { return tanhf(x); }
  static __device__ __forceinline__ float quotient(float x, float y) { return x / y; }
};
struct FastMath {
  static __device__ __forceinline__ float exponential(float x) { return __expf(x); }
  // For x from 0 to 1. __logf has an absolute error of 2^-21, and m is a sum of thousands of these.
  static __device__ __forceinline__ float log_1p(float x) {
    return x < 0.01f ? x * (1.0f - x * (0.5f - x * (1.0f / 3.0f))) : __logf(1.0f + x);
  }
  static __device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
  // From exp(-2 |x|), which does not overflow. Near 0 a polynomial, since 1 - exp would cancel.
  static __device__ __forceinline__ float tangent(float x) {
    const float y = __expf(-2.0f * fabsf(x));
    const float far = copysignf(__fdividef(1.0f - y, 1.0f + y), x);
    return fabsf(x) < 0.02f ? x * (1.0f - x * x * (1.0f / 3.0f)) : far;
  }
};

// The weights of the old state (keep) and of the input (take). One is 1, the other exp(-|margin|); a fresh unit (n is
// 0) may have a keep of up to exp(slstm_max_log_keep).
template <typename Math>
__device__ __forceinline__ void slstm_weights(float margin, bool reset, float& keep, float& take) {
  const float weight = Math::exponential(reset ? fminf(-margin, slstm_max_log_keep) : margin);
  keep = reset ? weight : 1.0f;
  take = reset ? 1.0f : weight;
}

// Takes the unit's state from t - 1 to t. i, f, z, o are pre-activations, the recurrent part included.
template <typename Math>
__device__ __forceinline__ SlstmUnitKept slstm_unit(float i, float f, float z, float o, SlstmUnit& unit) {
  const bool padding = i == -INFINITY && f == INFINITY;
  const float y = Math::exponential(-fabsf(f));
  const float carried = fminf(f, 0.0f) - Math::log_1p(y) + unit.m;
  SlstmUnitKept kept;
  const float margin = i - carried;
  const bool reset = unit.n == 0.0f || margin >= 0.0f;
  float keep, take;
  slstm_weights<Math>(margin, reset, keep, take);
  z = Math::tangent(z);
  o = Math::quotient(1.0f, 1.0f + Math::exponential(-o));
  const SlstmUnit before = unit;
  unit.c = keep * before.c + take * z;
  unit.n = keep * before.n + take;
  unit.m = reset ? i : carried;
  unit.h = o * Math::quotient(unit.c, unit.n);
  if (padding) unit = before;
  kept.value[kept_margin] = margin;
  kept.value[kept_z] = z;
  kept.value[kept_o] = o;
  kept.value[kept_forget] = padding ? -1.0f : Math::quotient(f >= 0.0f ? y : 1.0f, 1.0f + y);
  kept.value[kept_c] = unit.c;
  kept.value[kept_n] = unit.n;
  return kept;
}

// Gradients of a unit's state. `excess` is dm - (dc c + dn n), the part of dm that does not come from the scaling of c
// and n. It stays the same from token to token until m took the input gate's branch. It is carried instead of dm,
// because the difference would cancel at every token.
struct SlstmUnitGradient {
  float dh, dc, dn, excess;
};

// In: g of the state after t, dh complete. Out: dx[4], and g of the state before t. Its dh is 0, or for a padding unit
// the dh that came in.
template <typename Math>
__device__ __forceinline__ void slstm_unit_backward(const float (&kept)[slstm_kept], float c_before, float n_before,
                                                    SlstmUnitGradient& g, float (&dx)[4]) {
  if (kept[kept_forget] < 0.0f) {  // padding
    dx[0] = dx[1] = dx[2] = dx[3] = 0.0f;
    return;
  }
  const float z = kept[kept_z], o = kept[kept_o], margin = kept[kept_margin];
  const bool reset = n_before == 0.0f || margin >= 0.0f;
  float keep, take;
  slstm_weights<Math>(margin, reset, keep, take);
  const float inverse_n = Math::quotient(1.0f, kept[kept_n]), ratio = kept[kept_c] * inverse_n;
  const float through = g.dh * o * inverse_n;
  const float dc = g.dc + through, dn = g.dn - through * ratio;
  dx[0] = (dc * z + dn) * take + (reset ? g.excess : 0.0f);
  dx[1] = ((dc * c_before + dn * n_before) * keep + (reset ? 0.0f : g.excess)) * kept[kept_forget];
  dx[2] = dc * take * (1.0f - z * z);
  dx[3] = g.dh * ratio * o * (1.0f - o);
  g.dh = 0.0f;
  g.dc = keep * dc;
  g.dn = keep * dn;
  if (reset) g.excess = 0.0f;
}

__device__ __forceinline__ float clip_gradient(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

}  // namespace flash_xlstm::cuda
