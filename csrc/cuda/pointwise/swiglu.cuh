// SwiGLU and its gradients, of an element and of 16 bytes of elements.
#pragma once

#include <cstring>

#include "cuda/common/numeric.cuh"

namespace flash_xlstm::cuda {

// Sigmoids to the rounding of T. For 16-bit types the approximate ones do. With exact exponentials and divisions their
// gradient takes longer than its memory traffic (docs/experiments.md).
template <typename T>
__device__ __forceinline__ Sigmoids sigmoids_of(float x) {
  if constexpr (sizeof(T) == 2) return sigmoids(x);
  return {.open = 1.0f / (1.0f + expf(-x)), .shut = 1.0f / (1.0f + expf(x))};
}

// silu(x) * y
template <typename T>
__device__ __forceinline__ float swiglu_of(float x, float y) {
  return x * sigmoids_of<T>(x).open * y;
}

struct SwigluGradients {
  float x, y, out;  // out: silu(x) * y, as swiglu_of gives it
};
template <typename T>
__device__ __forceinline__ SwigluGradients swiglu_gradients(float x, float y, float dout) {
  const Sigmoids s = sigmoids_of<T>(x);
  return {.x = dout * y * s.open * (1.0f + x * s.shut), .y = dout * x * s.open, .out = x * s.open * y};
}

// Of 16 bytes of T, 16-bit elements.
template <typename T>
__device__ __forceinline__ uint4 swiglu_of(const uint4& x, const uint4& y) {
  const auto two = [](uint32_t a, uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(swiglu_of<T>(x.x, y.x), swiglu_of<T>(x.y, y.y));
  };
  return {two(x.x, y.x), two(x.y, y.y), two(x.z, y.z), two(x.w, y.w)};
}
template <typename T>
__device__ __forceinline__ void swiglu_gradients(const uint4& x, const uint4& y, const uint4& dout, uint4& dx,
                                                 uint4& dy, uint4& out) {
  const auto two = [](uint32_t a, uint32_t b, uint32_t c, uint32_t& dx, uint32_t& dy, uint32_t& out) {
    const float2 x = unpack<T>(a), y = unpack<T>(b), dout = unpack<T>(c);
    const SwigluGradients one = swiglu_gradients<T>(x.x, y.x, dout.x), other = swiglu_gradients<T>(x.y, y.y, dout.y);
    dx = pack<T>(one.x, other.x);
    dy = pack<T>(one.y, other.y);
    out = pack<T>(one.out, other.out);
  };
  two(x.x, y.x, dout.x, dx.x, dy.x, out.x);
  two(x.y, y.y, dout.y, dx.y, dy.y, out.y);
  two(x.z, y.z, dout.z, dx.z, dy.z, out.z);
  two(x.w, y.w, dout.w, dx.w, dy.w, out.w);
}

}  // namespace flash_xlstm::cuda
