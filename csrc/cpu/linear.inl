// Products with few rows, a part of vector_kernels.inl. Weights are read once, in their own dtype and in memory order:
// several rows side by side defeat the prefetcher. Products and sums are float32.

// Loads 2 * vector_lanes weights as two vectors, in the order that `linear_rows_x` gives x.
template <typename Type>
inline void load_pair(Vector (&to)[2], const typename Type::Bits* from) {
  float values[2 * vector_lanes];
  for (int x = 0; x < 2 * vector_lanes; ++x) values[x] = Type::load(from[x]);
  std::memcpy(&to, values, sizeof(to));
}
template <>
inline void load_pair<Float32>(Vector (&to)[2], const float* from) {
  load_vector(to[0], from);
  load_vector(to[1], from + vector_lanes);
}
template <>
inline void load_pair<BFloat16>(Vector (&to)[2], const uint16_t* from) {  // even places, then odd
  Words words;
  std::memcpy(&words, from, sizeof(words));
  const Words even = words << 16, odd = words & 0xffff0000u;
  std::memcpy(&to[0], &even, sizeof(even));
  std::memcpy(&to[1], &odd, sizeof(odd));
}

inline float lanes_total(const Vector& vector) {
  float sum = 0.0f;
  for (int x = 0; x < vector_lanes; ++x) sum += vector[x];
  return sum;
}

// Two sums side by side hide an addition's latency. Two for any number of rows, so that a row's result does not depend
// on the other rows. More are faster from a cache and slower from memory.
constexpr int64_t linear_step = 2 * vector_lanes;

void linear_rows_x(const LinearRows& p, float* x) {
  pack(x, p.x, p.dtype, p.x_stride, p.rows, p.in, p.rows);
  if (p.dtype != DType::bfloat16) return;
  for (int64_t row = 0; row < p.rows; ++row, x += p.in) {
    for (int64_t k = 0; k + linear_step <= p.in; k += linear_step) {
      float values[linear_step];
      for (int64_t e = 0; e < linear_step; ++e) values[e % 2 * vector_lanes + e / 2] = x[k + e];
      std::memcpy(x + k, values, sizeof(values));
    }
  }
}

// `rows` rows of x with one row of the weight.
template <typename Type, int rows>
void linear_block(const LinearRows& p, const float* x, int64_t row, int64_t column) {
  using Bits = typename Type::Bits;
  constexpr int64_t line = 64 / sizeof(Bits), ahead = 32 * line;  // may reach into the next row
  const Bits* weight = static_cast<const Bits*>(p.weight) + column * p.in;
  x += row * p.in;
  Vector sums[rows][2] = {};
  int64_t k = 0;
  for (; k + linear_step <= p.in; k += linear_step) {
    Vector w[2];
    load_pair<Type>(w, weight + k);
    for (int r = 0; r < rows; ++r) {
      for (int u = 0; u < 2; ++u) {
        Vector value;
        load_vector(value, x + r * p.in + k + u * vector_lanes);
        sums[r][u] += value * w[u];
      }
    }
    for (int64_t next = 0; next < linear_step; next += line) __builtin_prefetch(weight + k + ahead + next);
  }
  for (int r = 0; r < rows; ++r) {
    float sum = lanes_total(sums[r][0]) + lanes_total(sums[r][1]);
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
