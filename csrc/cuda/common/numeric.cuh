// Element types of the CUDA kernels: conversion to float and rounding back; scalar functions of gates.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "params/types.h"

namespace flash_xlstm::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

constexpr unsigned all_lanes = 0xffffffffu;  // of a warp, for shuffles and votes

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}

// Two neighbouring 16-bit elements, as a thread of an mma fragment holds them.
template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  } else {
    const __half2 two = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  if constexpr (std::is_same_v<T, bf16>) {
    // One instruction each; __bfloat1622float2 takes three for both.
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&two));
  }
}

// Neighbouring elements that one load or store moves; 16 bytes unless `count` says otherwise.
template <typename T, int count = 16 / sizeof(T)>
struct alignas(count * sizeof(T)) Group {
  static constexpr int width = count;
  T value[count];
};

// One element of a tensor whose dtype is known only at run time (gates).
__device__ __forceinline__ float load_as_float(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::float32: return static_cast<const float*>(data)[index];
    case DType::bfloat16: return to_float(static_cast<const bf16*>(data)[index]);
    default: return to_float(static_cast<const half*>(data)[index]);
  }
}

__device__ __forceinline__ void store_from_float(void* data, int64_t index, DType dtype, float x) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(data)[index] = x; break;
    case DType::bfloat16: static_cast<bf16*>(data)[index] = from_float<bf16>(x); break;
    default: static_cast<half*>(data)[index] = from_float<half>(x);
  }
}

// Loads 16 bytes that are read once, so it does not allocate them in the L1 cache.
__device__ __forceinline__ uint4 load_16_once(const void* at) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(at));
  return bits;
}
// Stores 16 bytes in one instruction. The compiler may store the elements of a struct one by one.
__device__ __forceinline__ void store_16(void* at, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// log(sigmoid(x)) to float32 rounding at both ends; 0 at +inf.
__device__ __forceinline__ float log_sigmoid(float x) { return x >= 0.0f ? -log1pf(expf(-x)) : x - log1pf(expf(x)); }

__device__ __forceinline__ double log_sigmoid(double x) { return x >= 0.0 ? -log1p(exp(-x)) : x - log1p(exp(x)); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// open = sigmoid(x) and shut = sigmoid(-x), from one exponential and without a difference. Relative error: 1e-6 for
// small |x|, 1e-5 elsewhere. Results below the smallest normal float become 0. shut becomes 0 where open does, so that
// their product is right.
struct Sigmoids {
  float open, shut;
};
__device__ __forceinline__ Sigmoids sigmoids(float x) {
  constexpr float log2_e = 1.44269504f, largest = 3.40282347e38f;
  float e, open;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -log2_e));  // inf from x = -89 on
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(open) : "f"(1.0f + e));
  return {.open = open, .shut = fminf(e, largest) * open};
}

// A gate's pre-activation, soft-capped. cap 0: unchanged. Infinities are kept: they mark padding.
__device__ __forceinline__ float cap_gate(float x, float cap) {
  return cap == 0.0f || isinf(x) ? x : cap * tanhf(x / cap);
}
__device__ __forceinline__ double cap_gate(double x, double cap) {
  return cap == 0.0 || isinf(x) ? x : cap * tanh(x / cap);
}
// The cap's slope, 1 - tanh^2, without the difference: that would be all rounding error where tanh is near 1. 0 for an
// infinite x.
__device__ __forceinline__ float cap_gate_slope(float x, float cap) {
  if (cap == 0.0f) return 1.0f;
  const float e = expf(-2.0f * fabsf(x / cap));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// tanh, relative to float64 within 6e-7: x P(x^2) / Q(x^2), fitted to |x| up to 8, where tanh is 1 to a rounding. One
// instruction of the special function unit, where an exponential and a division take two. NaN stays.
__device__ __forceinline__ float fast_tanh(float x) {
  asm("max.NaN.f32 %0, %0, 0fC1000000;\n\tmin.NaN.f32 %0, %0, 0f41000000;" : "+f"(x));  // -8, 8
  const float s = x * x;
  const float p = fmaf(fmaf(fmaf(1.1428421e-5f, s, 2.9510234e-3f), s, 0.12925662f), s, 0.9999999f);
  const float q = fmaf(fmaf(fmaf(fmaf(2.45921e-7f, s, 2.3866913e-4f), s, 2.3815554e-2f), s, 0.4625888f), s, 1.0f);
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(q));
  return x * p * reciprocal;
}

// Calls f with a value of the element type that `dtype` names.
template <typename F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::bfloat16: return f(bf16{});
    default: return f(half{});
  }
}

}  // namespace flash_xlstm::cuda
