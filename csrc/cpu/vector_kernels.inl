// Inner loops of the CPU kernels, compiled once for each instruction set, which FLASH_XLSTM_ISA names. They are plain
// loops that the compiler vectorises: no branches on data, no library calls. Standard headers with inline functions
// must not be included: their code would be compiled for AVX-512, and the linker might choose it for the whole module.
// immintrin.h's are always inlined.
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/thread_memory.h"
#include "cpu/vector_kernels.h"
#include "params/float8.h"
#include "params/loss.h"
#include "params/pointwise.h"
#include "params/slstm.h"

namespace flash_xlstm::cpu::FLASH_XLSTM_ISA {
namespace {

// For functions of one element. A call that is left in a loop keeps it from being vectorised. Without this attribute
// the link's optimizer leaves calls of exp in loops, the sLSTM's without gradients among them.
#define IN_LOOPS __attribute__((always_inline)) inline

IN_LOOPS float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
IN_LOOPS uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

constexpr float infinity = __builtin_huge_valf();

IN_LOOPS float absolute(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// a b, or 0 where a is 0, whatever b is. By bits, because GCC 12 miscompiles the plain conditional for AVX2: in a loop
// over 16 lanes it takes the first eight lanes' conditions for the next eight too.
IN_LOOPS float product_or_zero(float a, float b) {
  const uint32_t keep = a == 0.0f ? 0u : ~0u;
  return bits_to_float(float_to_bits(a * b) & keep);
}

// exp to about one unit in the last place. 0 below -103, inf above 88.7, NaN for NaN.
IN_LOOPS float exponential(float x) {
  const float shifted = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
  const float n = __builtin_rintf(shifted * 1.44269504f);
  float r = shifted - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, so that subnormal results are right too.
  const int32_t whole = static_cast<int32_t>(n), half = whole / 2;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  const float y = p * first * second;
  return x != x ? x : x > 88.73f ? infinity : y;
}

// exp in float64 for x <= 1, to a few units in the 14th digit. 0 below -700.
IN_LOOPS double exponential(double x) {
  constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the integer in the low bits
  const double shifted = x < -700.0 ? -700.0 : x;
  const double biased = shifted * 1.4426950408889634 + to_integer;
  int64_t n;
  std::memcpy(&n, &biased, 8);
  const double r = (shifted - (biased - to_integer) * 0.6931471803691238) - (biased - to_integer) * 1.9082149292705877e-10;
  double p = 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const uint64_t bits = (static_cast<uint64_t>(n) + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return x != x ? x : x < -700.0 ? 0.0 : p * power;
}

IN_LOOPS float hyperbolic_tangent(float x) {
  const float a = absolute(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
  return a < 0.625f ? near : x < 0.0f ? -far : far;
}

// Calls f(begin, end) for parts of [0, count) of at least `grain`, on torch's threads.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(0, count);
    return;
  }
  parallel_for(
      0, count, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &f);
}

// An array of floats at the start of a cache line, zero at first unless not wanted.
class Floats {
 public:
  explicit Floats(int64_t count, bool zero = true)
      : bytes_(count * static_cast<int64_t>(sizeof(float))), data_(static_cast<float*>(take_memory(bytes_))) {
    if (zero) std::memset(data_, 0, bytes_);
  }
  ~Floats() { give_memory(data_, bytes_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* data() const { return data_; }

 private:
  int64_t bytes_;
  float* data_;
};

// A number known when the code is compiled, as a value.
template <int number>
struct Constant {
  static constexpr int value = number;
};

// --- element types -------------------------------------------------------------------------------------------------

struct Float32 {
  using Bits = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static float load(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
  static uint16_t store(float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u | (bits >> 16) : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static float load(uint16_t x) {
    const uint32_t sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    // A shift puts exponent and fraction in place. The factor 2^112 corrects the exponent's bias, also for subnormals.
    const float scaled = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
    const uint32_t bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : float_to_bits(scaled);
    return bits_to_float(bits | sign);
  }
  static uint16_t store(float x) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal results are rounded to nearest even at bit 13. Subnormal results are rounded by an addition.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return static_cast<uint16_t>(result | sign);
  }
};

template <typename F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(Float32{});
    case DType::bfloat16: return f(BFloat16{});
    default: return f(Float16{});
  }
}

// A sum in independent lanes, so that the compiler may vectorise it without reordering other sums.
constexpr int lanes = 16;
struct LaneSum {
  float lane[lanes] = {};
  IN_LOOPS float total() const {  // a chain of 4 additions instead of 16
    float eight[8], four[4];
    for (int x = 0; x < 8; ++x) eight[x] = lane[x] + lane[x + 8];
    for (int x = 0; x < 4; ++x) four[x] = eight[x] + eight[x + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

// --- packing -------------------------------------------------------------------------------------------------------

bool pack(float* to, const void* from, DType dtype, int64_t stride, int64_t rows, int64_t columns,
          int64_t padded_rows) {
  uint32_t odd = 0;
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* source = static_cast<const typename Type::Bits*>(from);
    for (int64_t r = 0; r < rows; ++r) {
      const auto* row = source + r * stride;
      float* out = to + r * columns;
      uint32_t row_odd = 0;
      for (int64_t c = 0; c < columns; ++c) {
        out[c] = Type::load(row[c]);
        row_odd |= (float_to_bits(out[c]) & 0x7f800000u) == 0x7f800000u;
      }
      odd |= row_odd;
    }
  });
  std::memset(to + rows * columns, 0, sizeof(float) * (padded_rows - rows) * columns);
  return odd == 0;
}

void unpack(void* to, DType dtype, int64_t stride, const float* from, const float* factor, int64_t rows,
            int64_t columns) {
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    auto* target = static_cast<typename Type::Bits*>(to);
    for (int64_t r = 0; r < rows; ++r) {
      const float f = factor == nullptr ? 1.0f : factor[r];
      auto* row = target + r * stride;
      const float* in = from + r * columns;
      for (int64_t c = 0; c < columns; ++c) row[c] = Type::store(in[c] * f);
    }
  });
}

void add_and_unpack(void* to, DType dtype, int64_t stride, const float* x, const float* y, const float* weight,
                    const float* factor, int64_t rows, int64_t columns) {
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    auto* target = static_cast<typename Type::Bits*>(to);
    for (int64_t r = 0; r < rows; ++r) {
      const float f = factor == nullptr ? 1.0f : factor[r];
      auto* row = target + r * stride;
      const float* in = x + r * columns;
      if (y == nullptr || weight[r] == 0.0f) {
        for (int64_t c = 0; c < columns; ++c) row[c] = Type::store(in[c] * f);
      } else {
        const float w = weight[r], *other = y + r * columns;
        for (int64_t c = 0; c < columns; ++c) row[c] = Type::store((in[c] + w * other[c]) * f);
      }
    }
  });
}

// --- gates ---------------------------------------------------------------------------------------------------------

void start_weights(float* start, const ChunkGates& g) {
  const float m_start = g.m_start;
  for (int64_t t = 0; t < g.length; ++t) start[t] = exponential((g.row_high[t] + m_start) + g.row_low[t]);
}

void weight_rows(float* to, int64_t to_stride, const float* from, const float* weight, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const float w = weight[r];
    float* out = to + r * to_stride;
    const float* in = from + r * columns;
    if (w == 0.0f) {
      std::memset(out, 0, sizeof(float) * columns);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = w * in[c];
    }
  }
}

void weighted_sum(float* sum, const float* from, const float* weight, int64_t rows, int64_t columns) {
  std::memset(sum, 0, sizeof(float) * columns);
  for (int64_t r = 0; r < rows; ++r) {
    const float w = weight[r];
    if (w == 0.0f) continue;
    const float* in = from + r * columns;
    for (int64_t c = 0; c < columns; ++c) sum[c] += w * in[c];
  }
}

void inverse_normalizer(float* inv_d, const float* s, const float* m, float eps, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const float floor = exponential(-m[t]), size = absolute(s[t]);
    const float inverse = 1.0f / ((size >= floor ? size : floor) + eps);
    inv_d[t] = s[t] != s[t] ? s[t] : inverse;
  }
}

// --- states --------------------------------------------------------------------------------------------------------

void advance(float* to, const float* from, float keep, const float* add, int64_t size) {
  if (from == nullptr) {
    std::memcpy(to, add, sizeof(float) * size);
  } else {
    for (int64_t x = 0; x < size; ++x) to[x] = keep * from[x] + add[x];
  }
}

void add_not_finite(float* out, const float* a, int64_t a_row, int64_t a_k, const float* z, int64_t rows,
                    int64_t columns, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < columns; ++c) {
      const float value = z[k * columns + c];
      if (absolute(value) < infinity) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const float weight = a[r * a_row + k * a_k];
        if (weight != 0.0f) out[r * columns + c] += weight * value;
      }
    }
  }
}

// --- one token -----------------------------------------------------------------------------------------------------

// `rows` rows of the state at once: h is read and written once for all of them.
template <typename Type, int rows>
void step_rows(typename Type::Bits* __restrict c, const float* __restrict v, float* __restrict h, const float* keys,
               const float* queries, float keep, int64_t dv) {
  for (int64_t x = 0; x < dv; ++x) {
    float sum = h[x];
    for (int r = 0; r < rows; ++r) {
      const float value = keep * Type::load(c[r * dv + x]) + keys[r] * v[x];
      c[r * dv + x] = Type::store(value);
      sum += queries[r] * value;
    }
    h[x] = sum;
  }
}

template <typename Type>
float step_state(typename Type::Bits* c, float* n, const float* q, float* k, const float* v, float* h, float keep,
                 float take, int64_t dqk, int64_t dv) {
  float s = 0.0f;
  for (int64_t r = 0; r < dqk; ++r) {
    k[r] = take == 0.0f ? 0.0f : take * k[r];
    n[r] = keep * n[r] + k[r];
    s += q[r] * n[r];
  }
  for (int64_t x = 0; x < dv; ++x) h[x] = 0.0f;
  int64_t r = 0;
  for (; r + 4 <= dqk; r += 4) step_rows<Type, 4>(c + r * dv, v, h, k + r, q + r, keep, dv);
  for (; r < dqk; ++r) step_rows<Type, 1>(c + r * dv, v, h, k + r, q + r, keep, dv);
  return s;
}

void step(const MlstmStep& p, int64_t row, int64_t head, int64_t slot, float* scratch) {
  float *q = scratch, *k = q + p.dqk, *v = k + p.dqk, *h = v + p.dv;
  const auto read = [&](float* to, const Strided& from, int64_t count) {
    with_dtype(p.dtype, [&](auto type) {
      using Type = decltype(type);
      const auto* source =
          static_cast<const typename Type::Bits*>(from.data) + row * from.batch + head * from.head;
      for (int64_t x = 0; x < count; ++x) to[x] = Type::load(source[x]);
    });
  };
  read(q, p.q, p.dqk);
  read(k, p.k, p.dqk);
  read(v, p.v, p.dv);
  const auto gate = [&](const Strided& from) {
    float value;
    with_dtype(p.gate_dtype, [&](auto type) {
      using Type = decltype(type);
      value = Type::load(
          static_cast<const typename Type::Bits*>(from.data)[row * from.batch + head * from.head]);
    });
    return value;
  };
  const auto capped = [&](float x) {
    const float cap = p.gate_soft_cap;
    return cap == 0.0f || absolute(x) == infinity ? x : cap * hyperbolic_tangent(x / cap);
  };
  const float i = capped(gate(p.i)), f = capped(gate(p.f));
  const float log_forget = f >= 0.0f ? -__builtin_log1pf(__builtin_expf(-f)) : f - __builtin_log1pf(__builtin_expf(f));
  float& m_slot = p.state.m[slot * p.state.m_stride + head];
  const float carried = log_forget + m_slot, m = carried >= i ? carried : i;
  const float keep = exponential(carried - m), take = exponential(i - m);
  if (take == 0.0f) std::memset(v, 0, sizeof(float) * p.dv);
  float* n = p.state.n + slot * p.state.n_stride + head * p.dqk;
  const int64_t offset = slot * p.state.c_stride + head * p.dqk * p.dv;
  const auto step_c = [&](auto type) {
    using Type = decltype(type);
    auto* c = static_cast<typename Type::Bits*>(p.state.c) + offset;
    return step_state<Type>(c, n, q, k, v, h, keep, take, p.dqk, p.dv);
  };
  const float s = p.scale * (p.state.c_dtype == DType::float32 ? step_c(Float32{}) : step_c(BFloat16{}));
  m_slot = m;
  const float floor = exponential(-m), size = absolute(s);
  const float factor = s != s ? s : p.scale / ((size >= floor ? size : floor) + p.eps);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    auto* out = static_cast<typename Type::Bits*>(p.h) + (row * p.heads + head) * p.dv;
    for (int64_t x = 0; x < p.dv; ++x) out[x] = Type::store(h[x] * factor);
  });
}

#include "cpu/vector_math.inl"

#include "cpu/mlstm_tiles.inl"

#include "cpu/conv.inl"
#include "cpu/linear.inl"
#include "cpu/gemm.inl"

}  // namespace

extern const VectorKernels vector_kernels;
const VectorKernels vector_kernels = {
    .pack = pack,
    .unpack = unpack,
    .add_and_unpack = add_and_unpack,
    .gate_values = gate_values,
    .gate_slopes = gate_slopes,
    .end_weights = end_weights,
    .start_weights = start_weights,
    .weight_rows = weight_rows,
    .weighted_sum = weighted_sum,
    .normalizer = normalizer,
    .inverse_normalizer = inverse_normalizer,
    .forward_tile = forward_tile,
    .backward_tile = backward_tile,
    .row_dots = row_dots,
    .add_state_term = add_state_term,
    .advance = advance,
    .dot = dot,
    .add_not_finite = add_not_finite,
    .step = step,
    .gemm = gemm,
    .transpose = transpose,
    .conv_token = conv_token,
    .add_product = add_product,
    .linear_rows_x = linear_rows_x,
    .linear_rows = linear_rows,
};

#include "cpu/pointwise.inl"

// These use functions of the one above.
#include "cpu/cross_entropy.inl"
#include "cpu/float8_cast.inl"
#include "cpu/slstm.inl"

}  // namespace flash_xlstm::cpu::FLASH_XLSTM_ISA
