// The pointwise ops, with rows in parallel. Part of vector_kernels.inl. A gradient of a weight is summed in parts. How
// many parts there are depends on the sizes only, so the result does not depend on the number of threads.

namespace {

template <typename Type>
inline void load_row(float* to, const void* from, int64_t offset, int64_t count) {
  const auto* source = static_cast<const typename Type::Bits*>(from) + offset;
  for (int64_t c = 0; c < count; ++c) to[c] = Type::load(source[c]);
}

inline void load_weight(float* to, const void* from, DType dtype, int64_t offset, int64_t count) {
  with_dtype(dtype, [&](auto type) { load_row<decltype(type)>(to, from, offset, count); });
}

inline float sum_of(const float* x, int64_t count) {
  LaneSum sum;
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    for (int y = 0; y < lanes; ++y) sum.lane[y] += x[c + y];
  }
  float tail = 0.0f;
  for (; c < count; ++c) tail += x[c];
  return sum.total() + tail;
}

inline float inverse_root(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

// The rows that a thread takes at least: about 16k elements. For fewer, waking a thread costs more than it saves.
int64_t grain_of_rows(int64_t row_elements) { return 1 + (int64_t{1} << 14) / row_elements; }

// Calls run(begin, end, part_of_dweight) for parts of the rows, and adds up their parts of dweight in order.
template <typename F>
void in_parts(int64_t rows, int64_t columns, void* dweight, DType dtype, const F& run) {
  constexpr int64_t max_parts = 64;
  const int64_t least = grain_of_rows(columns), even = ceil_div(rows, max_parts);
  const int64_t each = even > least ? even : least, parts = ceil_div(rows, each);
  const Floats sums(dweight == nullptr ? 0 : (parts + 1) * columns);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t stop = (part + 1) * each;
      run(part * each, stop < rows ? stop : rows, dweight == nullptr ? nullptr : sums.data() + part * columns);
    }
  });
  if (dweight == nullptr) return;
  float* total = sums.data() + parts * columns;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < columns; ++c) total[c] += sums.data()[part * columns + c];
  }
  unpack(dweight, dtype, columns, total, nullptr, 1, columns);
}

void rms_norm_rows(const RmsNorm& p, int64_t begin, int64_t end, float* scratch) {
  float *x = scratch, *weight = x + p.dim;
  load_weight(weight, p.weight, p.weight_dtype, 0, p.dim);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row * p.dim;
      load_row<Type>(x, p.x, offset, p.dim);
      if (p.residual != nullptr) {
        const Bits* residual = static_cast<const Bits*>(p.residual) + offset;
        Bits* sum = static_cast<Bits*>(p.sum) + offset;
        for (int64_t c = 0; c < p.dim; ++c) {
          sum[c] = Type::store(x[c] + Type::load(residual[c]));
          x[c] = Type::load(sum[c]);
        }
      }
      const float inverse = inverse_root(dot(x, x, p.dim) / static_cast<float>(p.dim), p.eps);
      Bits* y = static_cast<Bits*>(p.y) + offset;
      for (int64_t c = 0; c < p.dim; ++c) y[c] = Type::store(x[c] * inverse * weight[c]);
    }
  });
}

}  // namespace

CPU_KERNEL(rms_norm, RmsNorm) {
  parallel(p.rows, grain_of_rows(p.dim), [&](int64_t begin, int64_t end) {
    const Floats scratch(2 * p.dim);
    rms_norm_rows(p, begin, end, scratch.data());
  });
}

namespace {

void rms_norm_backward_rows(const RmsNormBackward& p, int64_t begin, int64_t end, float* dweight, float* scratch) {
  float *x = scratch, *dy = x + p.dim, *weight = dy + p.dim;
  load_weight(weight, p.weight, p.weight_dtype, 0, p.dim);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row * p.dim;
      load_row<Type>(x, p.x, offset, p.dim);
      load_row<Type>(dy, p.dy, offset, p.dim);
      const float inverse = inverse_root(dot(x, x, p.dim) / static_cast<float>(p.dim), p.eps);
      for (int64_t c = 0; c < p.dim; ++c) {
        x[c] *= inverse;
        if (dweight != nullptr) dweight[c] += dy[c] * x[c];
        dy[c] *= weight[c];
      }
      const float mean = dot(x, dy, p.dim) / static_cast<float>(p.dim);
      if (p.y != nullptr) {
        Bits* y = static_cast<Bits*>(p.y) + offset;
        for (int64_t c = 0; c < p.dim; ++c) y[c] = Type::store(x[c] * weight[c]);
      }
      Bits* dx = static_cast<Bits*>(p.dx) + offset;
      const Bits* dsum = p.dsum == nullptr ? nullptr : static_cast<const Bits*>(p.dsum) + offset;
      for (int64_t c = 0; c < p.dim; ++c) {
        const float past = dsum == nullptr ? 0.0f : Type::load(dsum[c]);
        dx[c] = Type::store(inverse * (dy[c] - x[c] * mean) + past);
      }
    }
  });
}

}  // namespace

CPU_KERNEL(rms_norm_backward, RmsNormBackward) {
  in_parts(p.rows, p.dim, p.dweight, p.weight_dtype, [&](int64_t begin, int64_t end, float* dweight) {
    const Floats scratch(3 * p.dim);
    rms_norm_backward_rows(p, begin, end, dweight, scratch.data());
  });
}

namespace {

// Makes x (x - mean) / sqrt(var + eps), and returns 1 / sqrt(var + eps).
inline float normalize(float* x, int64_t count, float eps, DType dtype) {
  // float32 rows subtract their mean twice. Where the mean is large beside what it leaves, its rounding error remains
  // after the first time.
  for (int time = 0; time < (dtype == DType::float32 ? 2 : 1); ++time) {
    const float mean = sum_of(x, count) / static_cast<float>(count);
    for (int64_t c = 0; c < count; ++c) x[c] -= mean;
  }
  const float inverse = inverse_root(dot(x, x, count) / static_cast<float>(count), eps);
  for (int64_t c = 0; c < count; ++c) x[c] *= inverse;
  return inverse;
}

// sigmoid(x) and sigmoid(-x), of one exponential.
struct Sigmoids {
  Vectors<1> open, shut;
};
IN_LOOPS Sigmoids sigmoids(const Vectors<1>& x) {
  const Vectors<1> e = exponential(-absolute(x)), near = reciprocal(1.0f + e), far = e * near;
  const Masks<1> negative = is_negative(x);
  return {.open = choose(negative, far, near), .shut = choose(negative, near, far)};
}

// Elements [c, c + vector_lanes) of a row of `count`.
template <typename Type>
IN_LOOPS Vectors<1> lanes_of(const void* row, int64_t c, int64_t count) {
  return {load_lanes<Type>(static_cast<const typename Type::Bits*>(row) + c, count - c)};
}
IN_LOOPS Vectors<1> lanes_of(const float* scratch, int64_t c) { return {load_vector(scratch + c)}; }
template <typename Type>
IN_LOOPS void store_lanes_of(void* row, int64_t c, int64_t count, const Vectors<1>& x) {
  store_lanes<Type>(static_cast<typename Type::Bits*>(row) + c, x.v[0], count - c);
}
int64_t with_room(int64_t count) { return count + vector_lanes; }

// Rows of scratch have room for a whole register at their end. The heads of a token are normalized one after the other,
// so that the chains of their sums overlap; what follows is one loop over all of them.
void gated_head_norm_rows(const GatedHeadNorm& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = p.heads * p.dim;
  float *weight = scratch, *x = weight + with_room(width);
  load_weight(weight, p.weight, p.weight_dtype, 0, width);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    for (int64_t token = begin; token < end; ++token) {
      load_row<Type>(x, p.h, token * width, width);
      for (int64_t head = 0; head < p.heads; ++head) normalize(x + head * p.dim, p.dim, p.eps, p.dtype);
      const Bits* gate = static_cast<const Bits*>(p.gate) + token * p.gate_stride;
      Bits* y = static_cast<Bits*>(p.y) + token * width;
      for (int64_t c = 0; c < width; c += vector_lanes) {
        const Vectors<1> open = sigmoids(lanes_of<Type>(gate, c, width)).open;
        store_lanes_of<Type>(y, c, width, lanes_of(x, c) * lanes_of(weight, c) * open);
      }
    }
  });
}

}  // namespace

CPU_KERNEL(gated_head_norm, GatedHeadNorm) {
  parallel(p.tokens, grain_of_rows(p.heads * p.dim), [&](int64_t begin, int64_t end) {
    const Floats scratch(2 * with_room(p.heads * p.dim));
    gated_head_norm_rows(p, begin, end, scratch.data());
  });
}

namespace {

void gated_head_norm_backward_rows(const GatedHeadNormBackward& b, int64_t begin, int64_t end, float* dweight,
                                   float* scratch) {
  const GatedHeadNorm& p = b.p;
  const int64_t width = p.heads * p.dim;
  float *weight = scratch, *x = weight + with_room(width), *dy = x + with_room(width), *inverse = dy + with_room(width);
  load_weight(weight, p.weight, p.weight_dtype, 0, width);
  const float count = static_cast<float>(p.dim);
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    for (int64_t token = begin; token < end; ++token) {
      load_row<Type>(x, p.h, token * width, width);
      for (int64_t head = 0; head < p.heads; ++head) {
        inverse[head] = normalize(x + head * p.dim, p.dim, p.eps, p.dtype);
      }
      const Bits* gate = static_cast<const Bits*>(p.gate) + token * p.gate_stride;
      const Bits* given = static_cast<const Bits*>(b.dy) + token * width;
      Bits* dgate = static_cast<Bits*>(b.dgate) + token * b.dgate_stride;
      for (int64_t c = 0; c < width; c += vector_lanes) {
        const Sigmoids s = sigmoids(lanes_of<Type>(gate, c, width));
        const Vectors<1> w = lanes_of(weight, c), opened = lanes_of<Type>(given, c, width) * s.open;
        const Vectors<1> share = opened * lanes_of(x, c);
        store_lanes_of<Type>(dgate, c, width, share * w * s.shut);
        if (dweight != nullptr) {
          store_lanes_of<Float32>(dweight, c, width, lanes_of<Float32>(dweight, c, width) + share);
        }
        store_vector(dy + c, (opened * w).v[0]);
      }
      for (int64_t head = 0; head < p.heads; ++head) {
        // dy loses its mean before the sum along x. The sum's rounding error is then that of what the mean leaves.
        float *of_head = dy + head * p.dim, *normed = x + head * p.dim;
        const float mean = sum_of(of_head, p.dim) / count;
        for (int64_t c = 0; c < p.dim; ++c) of_head[c] -= mean;
        const float along = dot(of_head, normed, p.dim) / count, factor = inverse[head];
        Bits* dh = static_cast<Bits*>(b.dh) + token * width + head * p.dim;
        for (int64_t c = 0; c < p.dim; ++c) dh[c] = Type::store(factor * (of_head[c] - normed[c] * along));
      }
    }
  });
}

}  // namespace

CPU_KERNEL(gated_head_norm_backward, GatedHeadNormBackward) {
  const int64_t columns = p.p.heads * p.p.dim;
  in_parts(p.p.tokens, columns, p.dweight, p.p.weight_dtype, [&](int64_t begin, int64_t end, float* dweight) {
    const Floats scratch(3 * with_room(columns) + p.p.heads);
    gated_head_norm_backward_rows(p, begin, end, dweight, scratch.data());
  });
}

namespace {

// Columns [begin, end) of a row, in pieces that are converted to float32 on the stack. Loops that convert and compute
// at once are not vectorised.
void swiglu_columns(const Swiglu& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t piece = 512;
  float x[piece], y[piece], dout[piece], out[piece];
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    const auto store = [](void* to, int64_t offset, const float* from, int64_t count) {
      Bits* target = static_cast<Bits*>(to) + offset;
      for (int64_t c = 0; c < count; ++c) target[c] = Type::store(from[c]);
    };
    for (int64_t column = begin; column < end; column += piece) {
      const int64_t count = end - column < piece ? end - column : piece, offset = row * p.columns + column;
      load_row<Type>(x, p.x, row * p.x_stride + column, count);
      load_row<Type>(y, p.y, row * p.y_stride + column, count);
      if (p.dout == nullptr) {
        for (int64_t c = 0; c < count; ++c) x[c] = x[c] / (1.0f + exponential(-x[c])) * y[c];
        store(p.out, offset, x, count);
      } else {
        load_row<Type>(dout, p.dout, offset, count);
        for (int64_t c = 0; c < count; ++c) {
          const float one_over_open = 1.0f + exponential(-x[c]);
          const float open = 1.0f / one_over_open, shut = 1.0f / (1.0f + exponential(x[c]));
          const float silu = x[c] * open;
          out[c] = x[c] / one_over_open * y[c];
          x[c] = dout[c] * y[c] * open * (1.0f + x[c] * shut);
          y[c] = dout[c] * silu;
        }
        store(p.dx, row * p.gradient_stride + column, x, count);
        store(p.dy, row * p.gradient_stride + column, y, count);
        if (p.out != nullptr) store(p.out, offset, out, count);
      }
    }
  });
}

}  // namespace

CPU_KERNEL(swiglu, Swiglu) {
  constexpr int64_t piece = 1 << 13, grain = 2;
  const int64_t pieces = ceil_div(p.columns, piece);
  parallel(p.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item % pieces * piece, stop = column + piece;
      swiglu_columns(p, item / pieces, column, stop < p.columns ? stop : p.columns);
    }
  });
}

namespace {

// Elements [begin, end).
void soft_cap_elements(const SoftCap& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    const Bits *x = static_cast<const Bits*>(p.x), *dy = static_cast<const Bits*>(p.dy);
    Bits* out = static_cast<Bits*>(p.out);
    const float cap = p.cap;
    // In pieces of float32 on the stack, as in swiglu_columns.
    constexpr int64_t piece = 512;
    float wide[piece];
    for (int64_t start = begin; start < end; start += piece) {
      const int64_t count = end - start < piece ? end - start : piece;
      for (int64_t e = 0; e < count; ++e) wide[e] = Type::load(x[start + e]) / cap;
      for (int64_t e = 0; e < count; ++e) wide[e] = hyperbolic_tangent(wide[e]);
      if (dy == nullptr) {
        for (int64_t e = 0; e < count; ++e) out[start + e] = Type::store(cap * wide[e]);
      } else {
        for (int64_t e = 0; e < count; ++e)
          out[start + e] = Type::store(Type::load(dy[start + e]) * (1.0f - wide[e] * wide[e]));
      }
    }
  });
}

}  // namespace

CPU_KERNEL(soft_cap, SoftCap) {
  constexpr int64_t grain = 1 << 14;
  parallel(p.count, grain, [&](int64_t begin, int64_t end) { soft_cap_elements(p, begin, end); });
}
