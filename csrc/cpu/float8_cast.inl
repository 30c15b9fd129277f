// Casts to float8, with rows and columns in parallel. Part of vector_kernels.inl.

namespace {

struct Float8Scale {
  float factor, inverse;
};

Float8Scale float8_scale(uint32_t amax) {
  constexpr uint32_t inf = 0x7f800000u;
  if (amax >= inf) {
    const float inverse = bits_to_float(amax);  // infinity or NaN
    return {.factor = amax == inf ? 0.0f : inverse, .inverse = inverse};
  }
  int k = float8_exponent(amax);
  if (float8_exponent_may_round(amax)) {
    const double least = 1e-12, wide = bits_to_float(amax);
    k = static_cast<int>(__builtin_floorf(__builtin_log2f(static_cast<float>(448.0 / (wide > least ? wide : least)))));
  }
  return {.factor = bits_to_float(static_cast<uint32_t>(127 + k) << 23),
          .inverse = bits_to_float(static_cast<uint32_t>(127 - k) << 23)};
}

// Rounds to e4m3, half to even. What is beyond 448 becomes 448.
IN_LOOPS uint8_t to_float8(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  constexpr uint32_t most = 0x43e00000u, least_normal = 0x3c800000u;  // 448, 2^-6
  const uint32_t within = size < most ? size : most;
  const uint32_t normal = ((within + 0x7ffffu + (within >> 20 & 1u)) >> 20) - (120u << 3);
  constexpr float spaced = 16384.0f;  // floats here are 2^-9 apart, as subnormal e4m3 are
  const uint32_t subnormal = float_to_bits(bits_to_float(within) + spaced) - float_to_bits(spaced);
  const uint32_t finite = within < least_normal ? subnormal : normal;
  return static_cast<uint8_t>(sign | (size > 0x7f800000u ? 0x7fu : finite));
}

void float8_cast_row(const Float8Cast& p, const Float8Cast::Part& part, int64_t row, int64_t row_of_all, float* x) {
  with_dtype(p.dtype, [&](auto type) { load_row<decltype(type)>(x, part.x, row * part.stride, p.columns); });
  uint32_t amax = 0;
  for (int64_t c = 0; c < p.columns; ++c) {
    const uint32_t size = float_to_bits(x[c]) & 0x7fffffffu;
    amax = amax > size ? amax : size;
  }
  const Float8Scale scale = float8_scale(amax);
  uint8_t* out = p.by_row + row_of_all * p.columns;
  for (int64_t c = 0; c < p.columns; ++c) out[c] = to_float8(x[c] * scale.factor);
  p.row_scales[row_of_all] = scale.inverse;
}

// Columns [begin, end), at most 32.
void float8_cast_columns(const Float8Cast& p, int64_t begin, int64_t end) {
  constexpr int64_t most = 32;
  const int64_t count = end - begin;
  uint32_t amax[most] = {};
  float x[most], factor[most];
  const auto rows = [&](const auto& f) {
    int64_t row_of_all = 0;
    for (int each = 0; each < p.count; ++each) {
      for (int64_t row = 0; row < p.part[each].rows; ++row, ++row_of_all) {
        with_dtype(p.dtype, [&](auto type) {
          load_row<decltype(type)>(x, p.part[each].x, row * p.part[each].stride + begin, count);
        });
        f(row_of_all);
      }
    }
  };
  rows([&](int64_t) {
    for (int64_t c = 0; c < count; ++c) {
      const uint32_t size = float_to_bits(x[c]) & 0x7fffffffu;
      amax[c] = amax[c] > size ? amax[c] : size;
    }
  });
  for (int64_t c = 0; c < count; ++c) {
    const Float8Scale scale = float8_scale(amax[c]);
    factor[c] = scale.factor;
    p.column_scales[begin + c] = scale.inverse;
  }
  rows([&](int64_t row) {
    for (int64_t c = 0; c < count; ++c) p.by_column[(begin + c) * p.rows + row] = to_float8(x[c] * factor[c]);
  });
}

}  // namespace

CPU_KERNEL(float8_cast, Float8Cast) {
  if (p.by_row != nullptr) {
    int64_t before = 0;
    for (int each = 0; each < p.count; ++each) {
      const Float8Cast::Part& part = p.part[each];
      parallel(part.rows, grain_of_rows(p.columns), [&](int64_t begin, int64_t end) {
        const Floats x(p.columns);
        for (int64_t row = begin; row < end; ++row) float8_cast_row(p, part, row, before + row, x.data());
      });
      before += part.rows;
    }
  }
  if (p.by_column != nullptr) {
    constexpr int64_t piece = 32;
    parallel(ceil_div(p.columns, piece), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t stop = (item + 1) * piece;
        float8_cast_columns(p, item * piece, stop < p.columns ? stop : p.columns);
      }
    });
  }
}
