// Checks of op arguments, which run before anything is allocated or launched. A ValueError or TypeError names the
// argument, what it was and what it must be. The checks are in C++, so that eager, compiled and direct torch.ops calls
// all run them. Arguments that torch itself rejects (a list where a tensor belongs) are named by
// python/flash_xlstm/ops/_errors.py.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "params/types.h"

namespace flash_xlstm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // a view, also of a braced list: no allocation

// Throw what Python sees as a ValueError and a TypeError (bindings.cpp). std::invalid_argument would not do: torch from
// 2.15 on turns it into a RuntimeError.
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_type_error(const std::string& message);

// Strings without streams: a module that is linked with a static libstdc++ would format through another copy's locale
// and crash.
inline std::string to_text(const char* x) { return x; }
inline std::string to_text(const std::string& x) { return x; }
inline std::string to_text(int64_t x) { return std::to_string(x); }
inline std::string to_text(int x) { return std::to_string(x); }
inline std::string to_text(double x) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", x);
  return digits;
}

template <typename... Args>
std::string join_text(const Args&... args) {
  return (std::string() + ... + to_text(args));
}

template <typename... Args>
[[noreturn]] void value_error(const Args&... args) {
  throw_value_error(join_text(args...));
}

template <typename... Args>
[[noreturn]] void type_error(const Args&... args) {
  throw_type_error(join_text(args...));
}

inline std::string shape_text(const Tensor& t) {
  std::string out = "(";
  for (int64_t d = 0; d < t.dim(); ++d) out += join_text(d ? ", " : "", t.size(d));
  return out + (t.dim() == 1 ? ",)" : ")");
}

inline std::string dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    case ScalarType::Float8_e8m0fnu: return "float8_e8m0fnu";
    default: return join_text("torch's dtype number ", static_cast<int>(t));
  }
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return join_text("cuda:", t.get_device_index());
  return "another device";
}

inline bool is_op_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline DType to_dtype(ScalarType t) {
  return t == ScalarType::Float ? DType::float32 : t == ScalarType::BFloat16 ? DType::bfloat16 : DType::float16;
}

// `want` names the dimensions, e.g. "(batch, seq, heads, dqk)". -1 in `sizes` matches any size.
inline void check_shape(const char* name, const Tensor& t, Sizes sizes, const char* want) {
  const Sizes has = t.sizes();
  bool good = has.size() == sizes.size();
  for (size_t d = 0; good && d < sizes.size(); ++d) good = sizes[d] < 0 || has[d] == sizes[d];
  if (good) return;
  std::string out = join_text(name, " has shape ", shape_text(t), "; it must be ", want);
  bool known = false;
  for (int64_t s : sizes) known |= s >= 0;
  if (known) {
    out += " = (";
    for (size_t d = 0; d < sizes.size(); ++d) {
      out += join_text(d ? ", " : "", sizes[d] < 0 ? std::string("any") : std::to_string(sizes[d]));
    }
    out += ")";
  }
  throw_value_error(out);
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

inline void check_device(const char* name, const Tensor& t, const Tensor& like, const char* like_name = "q") {
  if (device_type(t) == device_type(like) && (t.is_cpu() || t.get_device_index() == like.get_device_index())) return;
  value_error(name, " is on ", device_text(t), "; it must be on the device of ", like_name, ", ", device_text(like));
}

inline void check_op_dtype(const char* name, ScalarType t) {
  if (is_op_dtype(t)) return;
  type_error(name, " has dtype ", dtype_text(t), "; it must be float32, bfloat16 or float16",
             t == ScalarType::Double ? " (for float64 use flash_xlstm.reference)" : "");
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType want, const char* why = "") {
  if (t.scalar_type() == want) return;
  type_error(name, " has dtype ", dtype_text(t.scalar_type()), "; it must be ", dtype_text(want), why);
}

inline void check_last_dim_contiguous(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.stride(last) == 1) return;
  value_error(name, " has stride ", t.stride(last), " in its last dimension; it must be 1: call ", name,
              ".contiguous()");
}

inline void check_contiguous(const char* name, const Tensor& t) {
  if (!t.is_contiguous()) value_error(name, " must be contiguous: it is updated in place");
}

// Checked in float32, as the kernels use it.
inline float check_eps(const char* name, double eps) {
  const float value = static_cast<float>(eps);
  if (!(value >= 0.0f) || !std::isfinite(value)) {
    value_error(name, " is ", eps, "; it must be at least 0, and finite in float32");
  }
  if (value == 0.0f && eps != 0.0) value_error(name, " is ", eps, "; it must be 0, or greater than 0 in float32");
  return value;
}

// Default: dqk ** -0.5.
inline float check_scale(std::optional<double> scale, int64_t dqk) {
  const double given = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(dqk));
  const float value = static_cast<float>(given);
  if (!std::isfinite(value) || value == 0.0f) {
    value_error("scale is ", given, "; it must be None, or finite and other than 0 in float32");
  }
  return value;
}

// Without a cap: 0, which means none to the kernels.
inline float check_gate_soft_cap(std::optional<double> cap) {
  if (!cap) return 0.0f;
  const float value = static_cast<float>(*cap);
  if (!std::isfinite(value) || value <= 0.0f) {
    value_error("gate_soft_cap is ", *cap, "; it must be None, or finite and greater than 0 in float32");
  }
  return value;
}

// The offsets on the CPU: the first 0, the last seq, never decreasing. On CUDA reading them would wait for the device,
// so the kernels clamp them instead.
inline void check_cu_seqlens_values(const Tensor& cu, int64_t seq) {
  const auto* offsets = static_cast<const int32_t*>(cu.data_ptr());
  const int64_t count = cu.size(0);
  if (offsets[0] != 0) value_error("cu_seqlens[0] is ", offsets[0], "; it must be 0");
  for (int64_t n = 1; n < count; ++n) {
    if (offsets[n] < offsets[n - 1]) {
      value_error("cu_seqlens[", n, "] = ", offsets[n], " is less than cu_seqlens[", n - 1, "] = ", offsets[n - 1],
                  "; the offsets must not decrease");
    }
  }
  if (offsets[count - 1] != seq) {
    value_error("cu_seqlens[-1] is ", offsets[count - 1], "; it must be seq = ", seq);
  }
}

// Checks the offsets that pack sequences into the one batch row of `first`; gives the number of sequences.
inline int64_t check_cu_seqlens(const Tensor& cu, const Tensor& first, const char* first_name) {
  if (first.size(0) != 1) value_error(first_name, " has batch ", first.size(0), "; with cu_seqlens it must be 1");
  check_shape("cu_seqlens", cu, {-1}, "(num_seqs + 1,)");
  check_dtype("cu_seqlens", cu, ScalarType::Int);
  check_device("cu_seqlens", cu, first, first_name);
  if (cu.size(0) < 2) value_error("cu_seqlens has ", cu.size(0), " offsets; it must have at least 2");
  if (cu.stride(0) != 1) value_error("cu_seqlens has stride ", cu.stride(0), "; it must be contiguous");
  if (cu.is_cpu()) check_cu_seqlens_values(cu, first.size(1));
  return cu.size(0) - 1;
}

// Of (batch, seq, heads, dim) or (batch, seq, heads).
inline Strided strided(const Tensor& t) {
  const Sizes strides = t.strides();
  return {.data = t.data_ptr(), .batch = strides[0], .seq = strides[1], .head = strides[2]};
}

// The product of sizes. Where it exceeds int64, a ValueError says so of `name`.
inline int64_t checked_product(const char* name, Sizes sizes) {
  int64_t product = 1;
  bool is_empty = false;
  for (int64_t size : sizes) is_empty |= size == 0;
  if (is_empty) return 0;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) {
      std::string all;
      for (int64_t each : sizes) all += join_text(all.empty() ? "" : " x ", each);
      value_error(name, " has ", all, " elements; there must be fewer than 2^63");
    }
  }
  return product;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

// In torch's words, by which other libraries know that a smaller batch may fit.
[[noreturn]] inline void throw_out_of_memory(bool cpu) {
  throw std::runtime_error(cpu ? "flash_xlstm: DefaultCPUAllocator: can't allocate memory; torch's message is above"
                               : "flash_xlstm: CUDA out of memory. torch's message is above");
}

// A copy, contiguous: for torch a call of an operator, whose error would not say that memory is short.
inline Tensor copy_of(const Tensor& t) {
  try {
    return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
  } catch (const std::runtime_error&) {
    throw_out_of_memory(t.is_cpu());
  }
}
// torch's contiguous() takes 0.5 us to return a tensor that is contiguous, and several where its code is not in a cache.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : copy_of(t); }

// The stride between rows (all dimensions but the last), if it is the same everywhere and rows are contiguous; else -1.
inline int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t stride = -1, next = -1;  // next: the stride that the next dimension must have
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (next >= 0 && t.stride(d) != next) return -1;
    if (next < 0) stride = t.stride(d);
    if (__builtin_mul_overflow(t.stride(d), t.size(d), &next)) return -1;  // of a tensor without elements
  }
  return stride < 0 ? t.size(last) : stride;
}
inline Tensor with_uniform_rows(const Tensor& t) { return row_stride(t) >= 0 ? t : as_contiguous(t); }

// Contiguous, on the device of `like`. Bypasses the dispatcher, which takes several times as long as the allocation.
inline Tensor new_empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  constexpr size_t usual_dims = 8;  // the strides of more are on the heap
  int64_t usual[usual_dims];
  std::vector<int64_t> more;
  if (sizes.size() > usual_dims) more.resize(sizes.size());
  int64_t* const strides = more.empty() ? usual : more.data();
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    if (__builtin_mul_overflow(stride, sizes[d] > 1 ? sizes[d] : 1, &stride)) {
      checked_product("a result of these arguments", sizes);  // throws, unless the result is empty
      stride = 1;
    }
  }
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle handle = nullptr;
  const bool failed = aoti_torch_get_device_type(like.get(), &device_type) != AOTI_TORCH_SUCCESS ||
                      aoti_torch_get_device_index(like.get(), &device_index) != AOTI_TORCH_SUCCESS ||
                      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                               device_type, device_index, &handle) != AOTI_TORCH_SUCCESS;
  if (failed) throw_out_of_memory(device_type == aoti_torch_device_type_cpu());
  return Tensor(handle);
}

}  // namespace flash_xlstm
