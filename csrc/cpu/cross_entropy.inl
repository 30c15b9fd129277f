// The rows of a cross entropy, in parallel, and the scaling of its gradients. Part of vector_kernels.inl.

namespace {

inline int64_t label_of(const CrossEntropy& p, int64_t row) {
  return p.labels_are_int32 ? static_cast<const int32_t*>(p.labels)[row] : static_cast<const int64_t*>(p.labels)[row];
}

// c: scratch for one row.
void cross_entropy_row(const CrossEntropy& p, int64_t row, float* c) {
  const int64_t label = label_of(p, row), count = p.columns;
  const bool is_ignored = label == p.ignore_index;
  const float* logits = p.logits + row * p.logits_stride;
  float factor = 0.0f, lse = 0.0f;
  if (is_ignored) {
    p.loss[row] = 0.0f;
  } else {
    if (p.cap == 0.0f) {
      for (int64_t x = 0; x < count; ++x) c[x] = logits[x];
    } else {
      for (int64_t x = 0; x < count; ++x) c[x] = p.cap * hyperbolic_tangent(logits[x] / p.cap);
    }
    float top = -infinity;
    for (int64_t x = 0; x < count; ++x) top = c[x] > top ? c[x] : top;
    LaneSum sum;
    int64_t x = 0;
    for (; x + lanes <= count; x += lanes) {
      for (int y = 0; y < lanes; ++y) sum.lane[y] += exponential(c[x + y] - top);
    }
    float tail = 0.0f;
    for (; x < count; ++x) tail += exponential(c[x] - top);
    // float64: the differences below lose no digits.
    const double wide = static_cast<double>(top) + __builtin_log(static_cast<double>(sum.total() + tail));
    lse = static_cast<float>(wide);
    double loss = __builtin_nan("");
    if (label >= 0 && label < count) {
      loss = p.label_smoothing == 1.0f ? 0.0 : (1.0 - p.label_smoothing) * (wide - c[label]);
      if (p.label_smoothing > 0.0f) loss += p.label_smoothing * (wide - sum_of(c, count) / static_cast<double>(count));
      if (p.z_loss > 0.0f) loss += p.z_loss * wide * wide;
    }
    p.loss[row] = static_cast<float>(loss);
    factor = p.scale == nullptr ? 1.0f : p.scale[row];
  }
  if (p.dlogits == nullptr) return;
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    auto* out = static_cast<typename Type::Bits*>(p.dlogits) + row * p.dlogits_stride;
    if (is_ignored) {
      for (int64_t x = 0; x < count; ++x) out[x] = Type::store(0.0f);
      return;
    }
    const float of_p = factor * (1.0f + 2.0f * p.z_loss * lse);
    const float everywhere = factor * p.label_smoothing / static_cast<float>(count);
    const float at_label = factor * (1.0f - p.label_smoothing);
    for (int64_t x = 0; x < count; ++x) c[x] = exponential(c[x] - lse) * of_p - everywhere;
    if (label >= 0 && label < count) c[label] -= at_label;
    if (p.cap != 0.0f) {
      for (int64_t x = 0; x < count; ++x) {  // 1 - tanh^2, without a difference of near values
        const float e = exponential(-2.0f * absolute(logits[x] / p.cap)), sum = 1.0f + e;
        c[x] *= 4.0f * e / (sum * sum);
      }
    }
    for (int64_t x = 0; x < count; ++x) out[x] = Type::store(c[x]);
  });
}

}  // namespace

CPU_KERNEL(cross_entropy, CrossEntropy) {
  parallel(p.rows, grain_of_rows(p.columns), [&](int64_t begin, int64_t end) {
    const Floats scratch(p.columns);
    for (int64_t row = begin; row < end; ++row) cross_entropy_row(p, row, scratch.data());
  });
}

CPU_KERNEL(scaling, Scaling) {
  constexpr int64_t grain = 1 << 14;
  parallel(p.count, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t piece = 512;  // floats on the stack, as in swiglu_columns
    float wide[piece];
    for (int64_t start = begin; start < end; start += piece) {
      const int64_t count = end - start < piece ? end - start : piece;
      load_weight(wide, p.x, p.x_dtype, start, count);
      for (int64_t e = 0; e < count; ++e) wide[e] *= *p.factor;
      with_dtype(p.out_dtype, [&](auto type) {
        using Type = decltype(type);
        auto* out = static_cast<typename Type::Bits*>(p.out) + start;
        for (int64_t e = 0; e < count; ++e) out[e] = Type::store(wide[e]);
      });
    }
  });
}
