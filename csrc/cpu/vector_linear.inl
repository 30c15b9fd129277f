// Products with few rows; part of vector_kernels.inl. Weights are read once, in their own dtype and the order in
// which they lie (several rows side by side defeat the prefetcher), and multiplied in float32.

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int vector_lanes = vector_bytes / 4;
typedef float Vector __attribute__((vector_size(vector_bytes)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

template <typename Type>
inline void load_vector(Vector& to, const typename Type::Bits* from) {
  float values[vector_lanes];
  for (int x = 0; x < vector_lanes; ++x) values[x] = Type::load(from[x]);
  std::memcpy(&to, values, sizeof(to));
}
template <>
inline void load_vector<Float32>(Vector& to, const float* from) {
  std::memcpy(&to, from, sizeof(to));
}
template <>
inline void load_vector<BFloat16>(Vector& to, const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  std::memcpy(&to, &words, sizeof(to));
}

inline float lanes_total(const Vector& vector) {
  float sum = 0.0f;
  for (int x = 0; x < vector_lanes; ++x) sum += vector[x];
  return sum;
}

// `rows` rows of x with one row of the weight.
template <typename Type, int rows>
void linear_block(const LinearRows& p, const float* x, int64_t row, int64_t column) {
  using Bits = typename Type::Bits;
  // Sums side by side, to hide an addition's latency; as many for every `rows`, so that a row's result is the same
  // whatever it is multiplied together with.
  constexpr int unrolled = 2;
  constexpr int64_t step = unrolled * vector_lanes;
  constexpr int64_t ahead = 2048 / sizeof(Bits);  // bytes: rows follow each other, so it may reach into the next
  const Bits* weight = static_cast<const Bits*>(p.weight) + column * p.in;
  x += row * p.in;
  Vector sums[rows][unrolled] = {};
  int64_t k = 0;
  for (; k + step <= p.in; k += step) {
    for (int u = 0; u < unrolled; ++u) {
      Vector w;
      load_vector<Type>(w, weight + k + u * vector_lanes);
      for (int r = 0; r < rows; ++r) {
        Vector value;
        load_vector<Float32>(value, x + r * p.in + k + u * vector_lanes);
        sums[r][u] += value * w;
      }
    }
    __builtin_prefetch(weight + k + ahead);
    if (step * static_cast<int64_t>(sizeof(Bits)) > 64) __builtin_prefetch(weight + k + ahead + 64 / sizeof(Bits));
  }
  for (int r = 0; r < rows; ++r) {
    float sum = 0.0f;
    for (int u = 0; u < unrolled; ++u) sum += lanes_total(sums[r][u]);
    for (int64_t tail = k; tail < p.in; ++tail) sum += x[r * p.in + tail] * Type::load(weight[tail]);
    if (p.bias != nullptr) sum += Type::load(static_cast<const Bits*>(p.bias)[column]);
    static_cast<Bits*>(p.y)[(row + r) * p.out + column] = Type::store(sum);
  }
}

void linear_rows(const LinearRows& p, const float* x, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t column = begin; column < end; ++column) {
      int64_t row = 0;
      for (; row + 4 <= p.rows; row += 4) linear_block<Type, 4>(p, x, row, column);
      for (; row + 2 <= p.rows; row += 2) linear_block<Type, 2>(p, x, row, column);
      for (; row < p.rows; ++row) linear_block<Type, 1>(p, x, row, column);
    }
  });
}
