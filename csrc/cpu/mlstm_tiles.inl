// The mLSTM's loops over a chunk's pairs of tokens and over its tokens' rows, a part of vector_kernels.inl. Sums stay in
// registers.

// Numbers of a row from `column` on, `columns` in all.
IN_LOOPS Vector row_lanes(const float* row, int64_t column, int64_t columns) {
  return load_lanes<Float32>(row + column, columns - column);
}
IN_LOOPS void put_lanes(float* row, int64_t column, int64_t columns, const Vector& x) {
  store_lanes<Float32>(row + column, x, columns - column);
}
IN_LOOPS void clear(float* row, int64_t begin, int64_t columns) {
  for (int64_t c = begin; c < columns; c += vector_lanes) put_lanes(row, c, columns, Vector{});
}

IN_LOOPS Vector product_or_zero(const Vector& a, const Vector& b) { return a != 0.0f ? a * b : Vector{}; }
IN_LOOPS Vector absolute(const Vector& a) { return (Vector)((Words)a & 0x7fffffffu); }
// The first `count` lanes; zeros behind them.
IN_LOOPS Vector first_lanes(const Vector& a, int64_t count) {
  Integers lane;
  for (int x = 0; x < vector_lanes; ++x) lane[x] = x;
  return lane < static_cast<int32_t>(count) ? a : Vector{};
}
IN_LOOPS float total(const Vector& a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a);
#else
  float sum[vector_lanes];
  store_vector(sum, a);
  for (int half = vector_lanes / 2; half > 0; half /= 2) {
    for (int x = 0; x < half; ++x) sum[x] += sum[x + half];
  }
  return sum[0];
#endif
}

float dot(const float* a, const float* b, int64_t count) {
  Vector sums[4] = {};  // a sum waits four cycles for itself
  int64_t c = 0;
  for (; c + 4 * vector_lanes <= count; c += 4 * vector_lanes) {
    for (int x = 0; x < 4; ++x)
      sums[x] += load_vector(a + c + x * vector_lanes) * load_vector(b + c + x * vector_lanes);
  }
  for (; c < count; c += vector_lanes) sums[0] += row_lanes(a, c, count) * row_lanes(b, c, count);
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Cache lines that arrive from L3 in the time of a token's row of a tile, or of the normalizer.
constexpr int64_t lines_a_row = 5;

// --- gates ---------------------------------------------------------------------------------------------------------

// log(1 + y) for y from 0 to 1: a polynomial with float32's error, and a step of Newton's method on exp. Near 0, where
// that step's rounding is not small beside the result, the series.
IN_LOOPS double logarithm_1p(double y) {
  double p = -3.176057018e-3;
  p = p * y + 1.954252726e-2;
  p = p * y - 5.637361283e-2;
  p = p * y + 1.054362380e-1;
  p = p * y - 1.526966707e-1;
  p = p * y + 1.966327426e-1;
  p = p * y - 2.495161626e-1;
  p = p * y + 3.332971050e-1;
  p = p * y - 4.999989265e-1;
  p = p * y + 1.0;
  const double first = p * y, near = y - y * y * (0.5 - y * (1.0 / 3.0 - y * (0.25 - y * 0.2)));
  return y < 0x1p-10 ? near : first + ((1.0 + y) * exponential(-first) - 1.0);
}
template <bool caps>
IN_LOOPS double capped(double x, double cap) {
  if constexpr (!caps) return x;
  const double size = __builtin_fabs(x), e = exponential(-2.0 * (size / cap)), y = cap * ((1.0 - e) / (1.0 + e));
  return size == __builtin_huge_val() ? x : x < 0.0 ? -y : y;
}

template <bool caps, bool log_sigmoid>
void gate_values_of(double* y, const float* x, double cap, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const double value = capped<caps>(static_cast<double>(x[t]), cap);
    y[t] = log_sigmoid ? (value < 0.0 ? value : 0.0) - logarithm_1p(exponential(-__builtin_fabs(value))) : value;
  }
}
template <bool caps, bool log_sigmoid>
void gate_slopes_of(double* slope, const float* x, double cap, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const double raw = static_cast<double>(x[t]), value = capped<caps>(raw, cap);
    double y = 1.0;
    if (caps) {  // 1 - tanh^2 without the difference, which would be all rounding error where tanh is near 1
      const double e = exponential(-2.0 * __builtin_fabs(raw / cap));
      y = 4.0 * e / ((1.0 + e) * (1.0 + e));
    }
    if (log_sigmoid) {
      const double e = exponential(-__builtin_fabs(value));
      y *= (value < 0.0 ? 1.0 : e) / (1.0 + e);
    }
    slope[t] = y;
  }
}
// f(caps, log_sigmoid), as constants.
template <typename F>
void with_gate(double cap, bool log_sigmoid, const F& f) {
  if (cap == 0.0) {
    log_sigmoid ? f(Constant<0>{}, Constant<1>{}) : f(Constant<0>{}, Constant<0>{});
  } else {
    log_sigmoid ? f(Constant<1>{}, Constant<1>{}) : f(Constant<1>{}, Constant<0>{});
  }
}
void gate_values(double* y, const float* x, double cap, bool log_sigmoid, int64_t count) {
  with_gate(cap, log_sigmoid, [&](auto caps, auto logarithm) {
    gate_values_of<decltype(caps)::value != 0, decltype(logarithm)::value != 0>(y, x, cap, count);
  });
}
void gate_slopes(double* slope, const float* x, double cap, bool log_sigmoid, int64_t count) {
  with_gate(cap, log_sigmoid, [&](auto caps, auto logarithm) {
    gate_slopes_of<decltype(caps)::value != 0, decltype(logarithm)::value != 0>(slope, x, cap, count);
  });
}

// --- the normalizer ------------------------------------------------------------------------------------------------

typedef double Doubles __attribute__((vector_size(vector_bytes)));
constexpr int double_lanes = vector_lanes / 2;

IN_LOOPS Doubles load_doubles(const double* from) {
  Doubles to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
IN_LOOPS Doubles load_doubles(const float* from) {
  typedef float Floats __attribute__((vector_size(vector_bytes / 2)));
  Floats to;
  std::memcpy(&to, from, sizeof(to));
  return __builtin_convertvector(to, Doubles);
}

// n = keep n + take k, and q . n where there is a q. take == 0 leaves k out, whatever it is.
template <bool takes>
double next_n(double* n, const float* q, const float* k, double keep, double take, int64_t dqk) {
  constexpr int side_by_side = 4;
  Doubles sums[side_by_side] = {};
  int64_t c = 0;
  for (; c + side_by_side * double_lanes <= dqk; c += side_by_side * double_lanes) {
#pragma GCC unroll 4
    for (int x = 0; x < side_by_side; ++x) {
      const int64_t at = c + x * double_lanes;
      Doubles value = keep * load_doubles(n + at);
      if constexpr (takes) value += take * load_doubles(k + at);
      std::memcpy(n + at, &value, sizeof(value));
      if (q != nullptr) sums[x] += load_doubles(q + at) * value;
    }
  }
  double rest = 0.0;
  for (; c < dqk; ++c) {
    n[c] = keep * n[c] + (takes ? take * static_cast<double>(k[c]) : 0.0);
    if (q != nullptr) rest += static_cast<double>(q[c]) * n[c];
  }
  const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int x = 0; x < double_lanes; ++x) rest += sum[x];
  return rest;
}

void normalizer(double* n, float* s, const float* q, const float* k, const ChunkGates& g, double scale, int64_t dqk,
                double* weights, Ahead* ahead) {
  double *keep = weights, *take = weights + g.length;
  const auto row = [&](int64_t t) { return static_cast<double>(g.row_high[t]) + g.row_low[t]; };
  keep[0] = exponential(row(0) + static_cast<double>(g.m_start));
  for (int64_t t = 1; t < g.length; ++t) keep[t] = exponential(row(t) - row(t - 1));
  for (int64_t t = 0; t < g.length; ++t) {
    take[t] = exponential(row(t) + (static_cast<double>(g.column_high[t]) + g.column_low[t]));
  }
  for (int64_t t = 0; t < g.length; ++t) {
    if (ahead != nullptr) ahead->prefetch(lines_a_row);
    const float *k_row = k + t * dqk, *q_row = q == nullptr ? nullptr : q + t * dqk;
    const double sum = take[t] == 0.0 ? next_n<false>(n, q_row, k_row, keep[t], take[t], dqk)
                                      : next_n<true>(n, q_row, k_row, keep[t], take[t], dqk);
    if (q != nullptr) s[t] = static_cast<float>(scale * sum);
  }
}

// --- tiles ---------------------------------------------------------------------------------------------------------

// Row t of D from token j on, with zeros behind token t.
IN_LOOPS Vector decay(const ChunkGates& g, int64_t t, int64_t j) {
  const Vector sum =
      (g.row_high[t] + row_lanes(g.column_high, j, g.length)) + (g.row_low[t] + row_lanes(g.column_low, j, g.length));
  return first_lanes(exponential(Vectors<1>{{sum}}).v[0], t + 1 - j);
}

void end_weights(float* weight, const ChunkGates& g) {
  for (int64_t j = 0; j < g.length; j += vector_lanes) put_lanes(weight, j, g.length, decay(g, g.length - 1, j));
}

void forward_tile(float* w, int64_t w_stride, const float* qk, const ChunkGates& g, float scale, Ahead* ahead) {
  const int64_t length = g.length;
  for (int64_t t = 0; t < length; ++t) {
    if (ahead != nullptr) ahead->prefetch(lines_a_row);
    float* row = w + t * w_stride;
    int64_t j = 0;
    for (; j <= t; j += vector_lanes) {
      put_lanes(row, j, length, product_or_zero(decay(g, t, j), scale * row_lanes(qk + t * length, j, length)));
    }
    clear(row, j, length);
  }
}

// Whether d = max(|s|, exp(-m)) is |s|.
IN_LOOPS Integers depends_on_s(const Vector& s, const Vector& m) {
  return (Integers)(absolute(s) >= exponential(Vectors<1>{{-m}}).v[0]);
}

// What depends on one token only is computed for all of them at once, between walks over the rows: a row's sums would
// wait for one another, and a branch on them for the sums.
void backward_tile(float* x, float* w, const float* qk, const float* gv, const ChunkGates& g, float scale, float eps,
                   const float* inv_d, const float* s, const float* across, const float* across_n, float* delta,
                   float* e, float* within, float* column, Ahead* ahead) {
  const int64_t length = g.length;
  float sums[max_chunk], sizes[max_chunk], shifted_sums[max_chunk], shifted_sizes[max_chunk], shifts[max_chunk],
      rests[max_chunk];
  for (int64_t t = 0; t < length; ++t) {
    if (ahead != nullptr) ahead->prefetch(lines_a_row);
    const int64_t row = t * length;
    const Vector factor = all(scale * inv_d[t]);
    Vector sum = {}, size = {};
    int64_t j = 0;
    for (; j <= t; j += vector_lanes) {
      const Vector decayed = product_or_zero(decay(g, t, j), factor);
      const Vector weight = product_or_zero(decayed, row_lanes(qk + row, j, length));
      const Vector term = product_or_zero(weight, row_lanes(gv + row, j, length));
      put_lanes(x + row, j, length, decayed);
      put_lanes(w + row, j, length, weight);
      sum += term;
      size += absolute(term);
    }
    clear(x + row, j, length);
    clear(w + row, j, length);
    sums[t] = total(sum);
    sizes[t] = total(size);
  }

  for (int64_t t = 0; t < length; t += vector_lanes) {
    const auto of = [&](const float* values) IN_LAMBDA { return row_lanes(values, t, length); };
    const Vector u = of(sums) + of(across);  // dh_t . h_t
    const Vector shift = depends_on_s(of(s), of(g.m)) ? (of(s) < 0.0f ? -u : u) : Vector{};
    put_lanes(shifts, t, length, shift);
  }
  // gv - sign(s) u cancels where one token dominates, so u is corrected by a sum of these differences: the weights w and
  // across_n sum to s / d = sign(s) (1 - eps / d). Only there. Where s is the small difference of large weights, this
  // sum is less exact than u.
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = t * length;
    const Vector shift = all(shifts[t]);
    Vector sum = {}, size = {};
    for (int64_t j = 0; j <= t; j += vector_lanes) {
      const Vector term = product_or_zero(row_lanes(w + row, j, length), row_lanes(gv + row, j, length) - shift);
      sum += term;
      size += absolute(term);
    }
    shifted_sums[t] = total(sum);
    shifted_sizes[t] = total(size);
  }
  for (int64_t t = 0; t < length; t += vector_lanes) {
    const auto of = [&](const float* values) IN_LAMBDA { return row_lanes(values, t, length); };
    const Vector of_s = of(s), inverse = of(inv_d), at_start = of(across);
    const Vector plain = of(sums) + at_start, shifted = at_start - of(shifts) * of(across_n);
    const Integers is_of_s = depends_on_s(of_s, of(g.m));
    const auto is_better = (Integers)(of(shifted_sizes) + absolute(shifted) < of(sizes) + absolute(at_start));
    const Vector correction = (is_of_s & is_better) ? of(shifted_sums) + shifted - plain * eps * inverse : Vector{};
    const Vector u = plain + correction, ratio = u * inverse;
    put_lanes(rests, t, length, of_s < 0.0f ? -correction : correction);
    put_lanes(delta, t, length, is_of_s ? (of_s < 0.0f ? ratio : -ratio) : (of_s != of_s ? of_s : Vector{}));
    put_lanes(e, t, length, -ratio * eps);
  }

  // From the last row to the first. column_j holds the sum over the rows so far.
  clear(column, 0, length);
  for (int64_t t = length - 1; t >= 0; --t) {
    if (ahead != nullptr) ahead->prefetch(lines_a_row);
    const int64_t row = t * length;
    const Vector shift = all(shifts[t]), rest = all(rests[t]);
    Vector sum = {};
    for (int64_t j = 0; j <= t; j += vector_lanes) {
      const Vector value =
          product_or_zero(row_lanes(x + row, j, length), (row_lanes(gv + row, j, length) - shift) - rest);
      const Vector so_far = row_lanes(column, j, length) + product_or_zero(value, row_lanes(qk + row, j, length));
      put_lanes(x + row, j, length, value);
      put_lanes(column, j, length, so_far);
      sum += first_lanes(so_far, t - j);
    }
    within[t] = total(sum);
  }
}

void row_dots(float* sums, const float* a, const float* b, int64_t b_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) sums[r] = dot(a + r * columns, b + r * b_stride, columns);
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
    Vector sum = {};
    for (int64_t c = 0; c < columns; c += vector_lanes) {
      const Vector term = w * row_lanes(in, c, columns) + nw * row_lanes(n, c, columns);
      put_lanes(out, c, columns, row_lanes(out, c, columns) + term);
      sum += term * row_lanes(other, c, columns);
    }
    sums[r] = total(sum);
  }
}
