// Inner loops of the CPU kernels, included once for each instruction set with FLASH_XLSTM_ISA naming it. Plain loops
// that the compiler vectorises: no branches on data, no library calls. Standard headers with inline functions stay
// out of here: compiled for AVX-512, the linker might choose their code for the whole module.
#include <cstdint>
#include <cstring>

#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu::FLASH_XLSTM_ISA {
namespace {

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

constexpr float infinity = __builtin_huge_valf();

inline float absolute(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// exp to about one unit in the last place; 0 below -103, inf above 88.7, NaN for NaN.
inline float exponential(float x) {
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
  // 2^n in two factors, so that results below the normal range come out right too.
  const int32_t whole = static_cast<int32_t>(n), half = whole / 2;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  const float y = p * first * second;
  return x != x ? x : x > 88.73f ? infinity : y;
}

inline float hyperbolic_tangent(float x) {
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
    // Shifting puts exponent and fraction in place, short of the exponents' bias: 2^112 corrects it, subnormals too.
    const float scaled = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
    const uint32_t bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : float_to_bits(scaled);
    return bits_to_float(bits | sign);
  }
  static uint16_t store(float x) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal results: round to nearest even at bit 13. Subnormal ones: an addition does the rounding.
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

// Sums in independent lanes so that the compiler may keep them in vectors without reordering anything else.
constexpr int lanes = 16;
struct LaneSum {
  float lane[lanes] = {};
  float total() const {
    float sum = 0.0f;
    for (int x = 0; x < lanes; ++x) sum += lane[x];
    return sum;
  }
};

inline float dot(const float* a, const float* b, int64_t count) {
  LaneSum sum;
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    for (int x = 0; x < lanes; ++x) sum.lane[x] += a[c + x] * b[c + x];
  }
  float tail = 0.0f;
  for (; c < count; ++c) tail += a[c] * b[c];
  return sum.total() + tail;
}

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

// --- gates ---------------------------------------------------------------------------------------------------------

void end_weights(float* weight, const ChunkGates& g) {
  const float high = g.b_high[g.length - 1], low = g.b_low[g.length - 1], m = g.m_end;
  for (int64_t j = 0; j < g.length; ++j) {
    weight[j] = exponential((high - g.b_high[j]) + (low - g.b_low[j]) + (g.i[j] - m));
  }
}

void start_weights(float* start, const ChunkGates& g) {
  for (int64_t t = 0; t < g.length; ++t) start[t] = exponential(g.b_high[t] + (g.m_start - g.m[t]) + g.b_low[t]);
}

void weight_rows(float* to, int64_t to_stride, const float* from, const float* weight, const float* sum_weight,
                 float* sum, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const float w = weight[r], s = sum_weight[r];
    float* out = to + r * to_stride;
    const float* in = from + r * columns;
    if (w == 0.0f) {
      std::memset(out, 0, sizeof(float) * columns);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = w * in[c];
    }
    if (s != 0.0f) {
      for (int64_t c = 0; c < columns; ++c) sum[c] += s * in[c];
    }
  }
}

// Row t of D: exp(b_t - b_j + i_j - m_t) for j <= t.
inline void decay_row(float* d, const ChunkGates& g, int64_t t) {
  const float high = g.b_high[t], low = g.b_low[t], m = g.m[t];
  for (int64_t j = 0; j <= t; ++j) d[j] = exponential((high - g.b_high[j]) + (low - g.b_low[j]) + (g.i[j] - m));
}

void forward_tile(float* a, int64_t a_stride, const float* qk, const ChunkGates& g, float scale, float eps,
                  const float* state_weight, const float* q, const float* n, int64_t dqk, float* s, float* inv_d) {
  const int64_t length = g.length;
  for (int64_t t = 0; t < length; ++t) {
    float* row = a + t * a_stride;
    const float* product = qk + t * length;
    decay_row(row, g, t);
    LaneSum sum;
    for (int64_t j = 0; j <= t; ++j) row[j] = row[j] == 0.0f ? 0.0f : scale * row[j] * product[j];
    int64_t j = 0;
    for (; j + lanes <= t + 1; j += lanes) {
      for (int x = 0; x < lanes; ++x) sum.lane[x] += row[j + x];
    }
    float tail = 0.0f;
    for (; j <= t; ++j) tail += row[j];
    std::memset(row + t + 1, 0, sizeof(float) * (length - t - 1));
    const float weight = state_weight[t];
    const float across = weight == 0.0f ? 0.0f : weight * dot(q + t * dqk, n, dqk);
    s[t] = sum.total() + tail + across;
    const float floor = exponential(-g.m[t]), size = absolute(s[t]);
    inv_d[t] = 1.0f / ((size >= floor ? size : floor) + eps);
    if (s[t] != s[t]) inv_d[t] = s[t];
  }
}

void backward_tile(float* x, float* w, const float* qk, const float* gv, const ChunkGates& g, float scale, float eps,
                   const float* inv_d, const float* s, const float* across, float* delta, float* e, float* row_sum,
                   float* col_sum) {
  const int64_t length = g.length;
  std::memset(col_sum, 0, sizeof(float) * length);
  for (int64_t t = 0; t < length; ++t) {
    float* x_row = x + t * length;
    float* w_row = w + t * length;
    const float *qk_row = qk + t * length, *gv_row = gv + t * length;
    decay_row(x_row, g, t);
    const float d = inv_d[t];
    LaneSum sum;
    float tail = 0.0f;
    int64_t j = 0;
    for (int64_t c = 0; c <= t; ++c) {
      const float weight = scale * x_row[c];
      w_row[c] = weight == 0.0f ? 0.0f : weight * d * qk_row[c];
    }
    for (; j + lanes <= t + 1; j += lanes) {
      for (int y = 0; y < lanes; ++y) sum.lane[y] += w_row[j + y] == 0.0f ? 0.0f : w_row[j + y] * gv_row[j + y];
    }
    for (; j <= t; ++j) tail += w_row[j] == 0.0f ? 0.0f : w_row[j] * gv_row[j];
    const float u = sum.total() + tail + across[t];  // dh_t . h_t
    const float floor = exponential(-g.m[t]), size = absolute(s[t]);
    const float slope = -u * d;
    delta[t] = size >= floor ? (s[t] < 0.0f ? -slope : slope) : 0.0f;
    e[t] = slope * eps;
    const float dt = delta[t];
    LaneSum sums;
    tail = 0.0f;
    for (int64_t c = 0; c <= t; ++c) {
      const float weight = scale * x_row[c];
      const float value = weight == 0.0f ? 0.0f : weight * (gv_row[c] * d + dt);
      x_row[c] = value;
      const float y = value == 0.0f ? 0.0f : value * qk_row[c];
      col_sum[c] += y;
    }
    for (j = 0; j + lanes <= t + 1; j += lanes) {
      for (int y = 0; y < lanes; ++y) sums.lane[y] += x_row[j + y] == 0.0f ? 0.0f : x_row[j + y] * qk_row[j + y];
    }
    for (; j <= t; ++j) tail += x_row[j] == 0.0f ? 0.0f : x_row[j] * qk_row[j];
    row_sum[t] = sums.total() + tail;
    std::memset(x_row + t + 1, 0, sizeof(float) * (length - t - 1));
    std::memset(w_row + t + 1, 0, sizeof(float) * (length - t - 1));
  }
}

void row_dots(float* sums, const float* a, const float* b, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) sums[r] = dot(a + r * columns, b + r * columns, columns);
}

void add_state_term(float* y, const float* x, const float* weight, const float* n_weight, const float* n,
                    const float* with, float* sums, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const float w = weight[r], nw = n_weight[r];
    if (w == 0.0f && nw == 0.0f) {
      sums[r] = 0.0f;
      continue;
    }
    float* out = y + r * columns;
    const float *in = x + r * columns, *other = with + r * columns;
    LaneSum sum;
    float tail = 0.0f;
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes) {
      for (int z = 0; z < lanes; ++z) {
        const float term = w * in[c + z] + nw * n[c + z];
        out[c + z] += term;
        sum.lane[z] += term * other[c + z];
      }
    }
    for (; c < columns; ++c) {
      const float term = w * in[c] + nw * n[c];
      out[c] += term;
      tail += term * other[c];
    }
    sums[r] = sum.total() + tail;
  }
}

// --- states --------------------------------------------------------------------------------------------------------

void scan_row(float* state, float* slot, int64_t slot_stride, const float* update, int64_t update_stride,
              const float* keep, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; ++r) {
    float* to = slot + r * slot_stride;
    const float* add = update + r * update_stride;
    const float g = keep[r];
    for (int64_t c = 0; c < columns; ++c) {
      to[c] = state[c];
      state[c] = g * state[c] + add[c];
    }
  }
}

void scan_row_back(float* state, float* slot, int64_t slot_stride, const float* update, int64_t update_stride,
                   const float* keep, const float* start, int64_t start_stride, double* through, int64_t count,
                   int64_t columns) {
  for (int64_t r = count - 1; r >= 0; --r) {
    float* to = slot + r * slot_stride;
    const float *add = update + r * update_stride, *from = start + r * start_stride;
    const float g = keep[r];
    if (g != 0.0f) through[r] += static_cast<double>(g) * dot(from, state, columns);
    for (int64_t c = 0; c < columns; ++c) {
      to[c] = state[c];
      state[c] = g * state[c] + add[c];
    }
  }
}

void guarded_product(float* y, const float* p, int64_t p_stride, const float* z, bool upper, int64_t rows,
                     int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out = y + r * columns;
    std::memset(out, 0, sizeof(float) * columns);
    for (int64_t j = upper ? r : 0; j < (upper ? rows : r + 1); ++j) {
      // With upper, the weights lie as p[j][r].
      const float weight = upper ? p[j * p_stride + r] : p[r * p_stride + j];
      if (weight == 0.0f) continue;
      for (int64_t c = 0; c < columns; ++c) out[c] += weight * z[j * columns + c];
    }
  }
}

// --- one token -----------------------------------------------------------------------------------------------------

template <typename Type>
float step_state(typename Type::Bits* c, float* n, const float* q, const float* k, const float* v, float* h, float keep,
                 float take, int64_t dqk, int64_t dv) {
  float s = 0.0f;
  for (int64_t x = 0; x < dv; ++x) h[x] = 0.0f;
  for (int64_t r = 0; r < dqk; ++r) {
    const float kr = take == 0.0f ? 0.0f : take * k[r], qr = q[r];
    n[r] = keep * n[r] + kr;
    s += qr * n[r];
    auto* row = c + r * dv;
    for (int64_t x = 0; x < dv; ++x) {
      const float value = keep * Type::load(row[x]) + kr * v[x];
      row[x] = Type::store(value);
      h[x] += qr * value;
    }
  }
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
  const float i = gate(p.i), f = gate(p.f);
  const float log_forget = f >= 0.0f ? -__builtin_log1pf(__builtin_expf(-f)) : f - __builtin_log1pf(__builtin_expf(f));
  float& m_slot = p.m[slot * p.heads + head];
  const float carried = log_forget + m_slot, m = carried >= i ? carried : i;
  const float keep = exponential(carried - m), take = exponential(i - m);
  if (take == 0.0f) std::memset(v, 0, sizeof(float) * p.dv);
  float* n = p.n + (slot * p.heads + head) * p.dqk;
  const int64_t offset = (slot * p.heads + head) * p.dqk * p.dv;
  const float s = p.scale * (p.state_dtype == DType::float32
                                 ? step_state<Float32>(static_cast<float*>(p.c) + offset, n, q, k, v, h, keep, take,
                                                       p.dqk, p.dv)
                                 : step_state<BFloat16>(static_cast<uint16_t*>(p.c) + offset, n, q, k, v, h, keep, take,
                                                        p.dqk, p.dv));
  m_slot = m;
  const float floor = exponential(-m), size = absolute(s);
  const float factor = s != s ? s : p.scale / ((size >= floor ? size : floor) + p.eps);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    auto* out = static_cast<typename Type::Bits*>(p.h) + (row * p.heads + head) * p.dv;
    for (int64_t x = 0; x < p.dv; ++x) out[x] = Type::store(h[x] * factor);
  });
}

// --- pointwise -----------------------------------------------------------------------------------------------------

void soft_cap(const SoftCap& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    const Bits *x = static_cast<const Bits*>(p.x), *dy = static_cast<const Bits*>(p.dy);
    Bits* out = static_cast<Bits*>(p.out);
    const float cap = p.cap;
    if (dy == nullptr) {
      for (int64_t e = begin; e < end; ++e) out[e] = Type::store(cap * hyperbolic_tangent(Type::load(x[e]) / cap));
    } else {
      for (int64_t e = begin; e < end; ++e) {
        const float t = hyperbolic_tangent(Type::load(x[e]) / cap);
        out[e] = Type::store(Type::load(dy[e]) * (1.0f - t * t));
      }
    }
  });
}

}  // namespace

extern const VectorKernels vector_kernels;
const VectorKernels vector_kernels = {
    pack,          unpack,   end_weights,    start_weights, weight_rows,   forward_tile,    backward_tile,
    row_dots,      add_state_term, scan_row, scan_row_back, guarded_product, step,          soft_cap,
};

}  // namespace flash_xlstm::cpu::FLASH_XLSTM_ISA
