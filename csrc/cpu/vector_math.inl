// One register of floats and the functions of the gates on it, a part of vector_kernels.inl. For loops in which sums
// stay in registers; exponential(float) and the like are for loops that the compiler vectorises.

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int vector_lanes = vector_bytes / 4;
typedef float Vector __attribute__((vector_size(vector_bytes)));
typedef int32_t Integers __attribute__((vector_size(vector_bytes)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));

IN_LOOPS void load_vector(Vector& to, const float* from) { std::memcpy(&to, from, sizeof(to)); }
IN_LOOPS Vector load_vector(const float* from) {
  Vector to;
  load_vector(to, from);
  return to;
}
IN_LOOPS void store_vector(float* to, const Vector& from) { std::memcpy(to, &from, sizeof(from)); }

IN_LOOPS Vector all(float x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_set1_ps(x);  // of the loop GCC 12 makes 16 instructions where x is not a constant
#else
  Vector y;
  for (int lane = 0; lane < vector_lanes; ++lane) y[lane] = x;
  return y;
#endif
}

#define IN_LAMBDA __attribute__((always_inline))

// Several registers in step. A function of a gate is a chain of 60 dependent instructions: one register at a time fills
// the scheduler with what has to wait.
template <int count>
struct Vectors {
  Vector v[count];
};
template <int count>
struct Masks {
  Integers v[count];
};

template <int count, typename F>
IN_LOOPS Vectors<count> each(const F& f) {
  Vectors<count> y;
  for (int x = 0; x < count; ++x) y.v[x] = f(x);
  return y;
}
template <int count, typename F>
IN_LOOPS Masks<count> each_mask(const F& f) {
  Masks<count> y;
  for (int x = 0; x < count; ++x) y.v[x] = f(x);
  return y;
}

// f(0) ... f(count - 1), for one register each. In a loop the compiler would keep all of them in memory.
template <int count, typename F>
IN_LOOPS void in_turn(const F& f) {
  if constexpr (count > 1) in_turn<count - 1>(f);
  f(count - 1);
}

#define VECTORS_OPERATOR(op)                                                              \
  template <int count>                                                                    \
  IN_LOOPS Vectors<count> operator op(const Vectors<count>& a, const Vectors<count>& b) { \
    return each<count>([&](int x) IN_LAMBDA { return a.v[x] op b.v[x]; });                \
  }                                                                                       \
  template <int count>                                                                    \
  IN_LOOPS Vectors<count> operator op(const Vectors<count>& a, float b) {                 \
    return each<count>([&](int x) IN_LAMBDA { return a.v[x] op b; });                     \
  }                                                                                       \
  template <int count>                                                                    \
  IN_LOOPS Vectors<count> operator op(float a, const Vectors<count>& b) {                 \
    return each<count>([&](int x) IN_LAMBDA { return a op b.v[x]; });                     \
  }
#define VECTORS_COMPARISON(op)                                                         \
  template <int count>                                                                 \
  IN_LOOPS Masks<count> operator op(const Vectors<count>& a, float b) {                \
    return each_mask<count>([&](int x) IN_LAMBDA { return (Integers)(a.v[x] op b); }); \
  }
#define MASKS_OPERATOR(op)                                                          \
  template <int count>                                                              \
  IN_LOOPS Masks<count> operator op(const Masks<count>& a, const Masks<count>& b) { \
    return each_mask<count>([&](int x) IN_LAMBDA { return a.v[x] op b.v[x]; });     \
  }
VECTORS_OPERATOR(+)
VECTORS_OPERATOR(-)
VECTORS_OPERATOR(*)
VECTORS_OPERATOR(/)
VECTORS_COMPARISON(==)
VECTORS_COMPARISON(<)
VECTORS_COMPARISON(>)
VECTORS_COMPARISON(>=)
MASKS_OPERATOR(&)
MASKS_OPERATOR(|)
#undef VECTORS_OPERATOR
#undef VECTORS_COMPARISON
#undef MASKS_OPERATOR

#define VECTORS_FUNCTION \
  template <int count>   \
  IN_LOOPS Vectors<count>

VECTORS_FUNCTION operator-(const Vectors<count>& a) {
  return each<count>([&](int x) IN_LAMBDA { return -a.v[x]; });
}
// a where the mask is set, else b
VECTORS_FUNCTION choose(const Masks<count>& mask, const Vectors<count>& a, const Vectors<count>& b) {
  return each<count>([&](int x) IN_LAMBDA { return mask.v[x] ? a.v[x] : b.v[x]; });
}
VECTORS_FUNCTION choose(const Masks<count>& mask, const Vectors<count>& a, float b) {
  return each<count>([&](int x) IN_LAMBDA { return mask.v[x] ? a.v[x] : all(b); });
}
VECTORS_FUNCTION choose(const Masks<count>& mask, float a, const Vectors<count>& b) {
  return each<count>([&](int x) IN_LAMBDA { return mask.v[x] ? all(a) : b.v[x]; });
}
VECTORS_FUNCTION absolute(const Vectors<count>& a) {
  return each<count>([&](int x) IN_LAMBDA { return (Vector)((Words)a.v[x] & 0x7fffffffu); });
}
// -|a|
VECTORS_FUNCTION negative(const Vectors<count>& a) {
  return each<count>([&](int x) IN_LAMBDA { return (Vector)((Words)a.v[x] | 0x80000000u); });
}
// The sign bit, of -0 and NaN too.
template <int count>
IN_LOOPS Masks<count> is_negative(const Vectors<count>& a) {
  return each_mask<count>([&](int x) IN_LAMBDA { return (Integers)((Integers)a.v[x] < 0); });
}

// NaN for NaN, as all of these.
VECTORS_FUNCTION at_least(const Vectors<count>& a, float least) {
  return each<count>([&](int x) IN_LAMBDA {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)all(least), (__m512)a.v[x]);
#else
    return a.v[x] < least ? all(least) : a.v[x];
#endif
  });
}
VECTORS_FUNCTION at_most(const Vectors<count>& a, float most) {
  return each<count>([&](int x) IN_LAMBDA {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)all(most), (__m512)a.v[x]);
#else
    return a.v[x] > most ? all(most) : a.v[x];
#endif
  });
}

// a b + c, rounded once where the instruction set can. Of a b + c in plain operators the compiler decides for each copy of
// the code, by what stands around it.
VECTORS_FUNCTION multiply_add(const Vectors<count>& a, const Vectors<count>& b, const Vectors<count>& c) {
  return each<count>([&](int x) IN_LAMBDA {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a.v[x], (__m512)b.v[x], (__m512)c.v[x]);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a.v[x], (__m256)b.v[x], (__m256)c.v[x]);
#else
    return a.v[x] * b.v[x] + c.v[x];
#endif
  });
}

VECTORS_FUNCTION multiply_add(const Vectors<count>& a, const Vectors<count>& b, float c) {
  return multiply_add(a, b, each<count>([&](int) IN_LAMBDA { return all(c); }));
}
VECTORS_FUNCTION multiply_add(const Vectors<count>& a, float b, const Vectors<count>& c) {
  return multiply_add(a, each<count>([&](int) IN_LAMBDA { return all(b); }), c);
}

// The nearest integer, for |a| up to 2^22.
VECTORS_FUNCTION nearest(const Vectors<count>& a) {
#if defined(__AVX512F__)
  return each<count>([&](int x) IN_LAMBDA {
    return (Vector)_mm512_roundscale_ps((__m512)a.v[x], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  });
#else
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23
  return (a + to_integer) - to_integer;
#endif
}

// a 2^n for an integer n from -300 to 300, rounded once where the result is subnormal.
VECTORS_FUNCTION times_power(const Vectors<count>& a, const Vectors<count>& n) {
  return each<count>([&](int x) IN_LAMBDA {
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)a.v[x], (__m512)n.v[x]);
#else
    const Integers whole = __builtin_convertvector(n.v[x], Integers), half = whole >> 1;
    return a.v[x] * (Vector)((half + 127) << 23) * (Vector)((whole - half + 127) << 23);
#endif
  });
}

// 1 / a to about one unit in the last place, for a from 1 to 1e38.
VECTORS_FUNCTION reciprocal(const Vectors<count>& a) {
#if defined(__AVX512F__)  // a division occupies its unit for 16 cycles
  const Vectors<count> y = each<count>([&](int x) IN_LAMBDA { return (Vector)_mm512_rcp14_ps((__m512)a.v[x]); });
  return multiply_add(y, multiply_add(-a, y, 1.0f), y);
#else
  return 1.0f / a;
#endif
}

// exp(x) = 2^n (1 + tail), |tail| < 0.42. `x` from -104 to 89, or NaN.
template <int count>
IN_LOOPS void split_exponential(const Vectors<count>& x, Vectors<count>& n, Vectors<count>& tail) {
  n = nearest(x * 1.44269504f);
  const Vectors<count> r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  constexpr float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  Vectors<count> p = each<count>([](int) IN_LAMBDA { return all(1.9875691500e-4f); });
#pragma GCC unroll 5
  for (const float term : terms) p = multiply_add(p, r, term);
  tail = multiply_add(p, r * r, r);
}

// exp to about one unit in the last place. 0 below -104, inf above 88.8, NaN for NaN.
VECTORS_FUNCTION to_split(const Vectors<count>& x) { return at_most(at_least(x, -104.0f), 89.0f); }
VECTORS_FUNCTION exponential(const Vectors<count>& n, const Vectors<count>& tail) {
  return times_power(tail + 1.0f, n);
}
VECTORS_FUNCTION exponential_of_split(const Vectors<count>& x) {
  Vectors<count> n, tail;
  split_exponential(x, n, tail);
  return exponential(n, tail);
}
VECTORS_FUNCTION exponential(const Vectors<count>& x) { return exponential_of_split(to_split(x)); }
// The same of a number up to 89.
VECTORS_FUNCTION exponential_up_to_89(const Vectors<count>& x) { return exponential_of_split(at_least(x, -104.0f)); }

// tanh by e^2x - 1 over e^2x + 1. The numerator is exact near 0, where n is 0.
VECTORS_FUNCTION twice_to_split(const Vectors<count>& x) { return at_most(at_least(x + x, -20.0f), 20.0f); }
VECTORS_FUNCTION hyperbolic_tangent(const Vectors<count>& n, const Vectors<count>& tail) {
  const Vectors<count> power = times_power(each<count>([](int) IN_LAMBDA { return all(1.0f); }), n);
  const Vectors<count> minus_one = multiply_add(power, tail, power - 1.0f);
  return minus_one * reciprocal(minus_one + 2.0f);
}

// exp(a) for a up to 89, tanh(b) and exp(c). With registers for it, all chains of dependent instructions go in step.
VECTORS_FUNCTION exp_tanh_exp(const Vectors<count>& a, const Vectors<count>& b, const Vectors<count>& c,
                              Vectors<count>& tanh_b, Vectors<count>& exp_c) {
  constexpr int in_step = vector_bytes == 64 ? 3 : 1;
  const Vectors<count> x[3] = {at_least(a, -104.0f), twice_to_split(b), to_split(c)};
  Vectors<count> n[3], tail[3];
  in_turn<3 / in_step>([&](int first) IN_LAMBDA {
    Vectors<in_step * count> all_n, all_tail;
    const auto all_x = each<in_step * count>([&](int i) IN_LAMBDA { return x[first + i / count].v[i % count]; });
    split_exponential(all_x, all_n, all_tail);
    in_turn<in_step * count>([&](int i) IN_LAMBDA {
      n[first + i / count].v[i % count] = all_n.v[i], tail[first + i / count].v[i % count] = all_tail.v[i];
    });
  });
  tanh_b = hyperbolic_tangent(n[1], tail[1]), exp_c = exponential(n[2], tail[2]);
  return exponential(n[0], tail[0]);
}

// a - log(1 + y) for y from 0 to 1, the logarithm to two units in the last place.
VECTORS_FUNCTION minus_logarithm_1p(const Vectors<count>& a, const Vectors<count>& y) {
  constexpr float terms[] = {1.954252726e-2f,  -5.637361283e-2f, 1.054362380e-1f,
                             -1.526966707e-1f, 1.966327426e-1f,  -2.495161626e-1f,
                             3.332971050e-1f,  -4.999989265e-1f, 1.0f};
  Vectors<count> p = each<count>([](int) IN_LAMBDA { return all(-3.176057018e-3f); });
#pragma GCC unroll 9
  for (const float term : terms) p = multiply_add(p, y, term);
  return multiply_add(-p, y, a);
}

// --- elements ------------------------------------------------------------------------------------------------------

typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

IN_LOOPS Vector widen(Float32, Vector x) { return x; }
IN_LOOPS Vector narrow(Float32, Vector x) { return x; }
IN_LOOPS Vector widen(BFloat16, Halves x) { return (Vector)(__builtin_convertvector(x, Words) << 16); }
IN_LOOPS Halves narrow(BFloat16, Vector x) {  // as BFloat16::store
  const Words bits = (Words)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x != x ? 0x7fc0u | (bits >> 16) : rounded, Halves);
}
IN_LOOPS Vector widen(Float16, Halves x) {  // as Float16::load
  const Words bits = __builtin_convertvector(x, Words), sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const Words scaled = (Words)((Vector)(magnitude << 13) * 5.192296858534828e33f);
  return (Vector)((magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : scaled) | sign);
}
IN_LOOPS Halves narrow(Float16, Vector x) {  // as Float16::store
  const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Vector)magnitude + 0.5f) - 0x3f000000u;
  Words result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u + 0u * bits : result;
  result = magnitude > 0x7f800000u ? 0x7e00u + 0u * bits : result;
  return __builtin_convertvector(result | sign, Halves);
}

template <typename Type>
using Packed = decltype(narrow(Type{}, Vector{}));  // a register's elements in memory

// `count` elements as floats. With fewer than vector_lanes the other lanes are 0.
template <typename Type>
IN_LOOPS Vector load_lanes(const typename Type::Bits* from, int64_t count) {
  Packed<Type> bits = {};
  if (__builtin_expect(count >= vector_lanes, 1)) {
    std::memcpy(&bits, from, sizeof(bits));
  } else {
#if defined(__AVX512F__)
    const uint32_t mask = (1u << count) - 1u;
    if constexpr (sizeof(*from) == 4) {
      bits = (Packed<Type>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    } else {
      bits = (Packed<Type>)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    }
#else
    for (int64_t lane = 0; lane < count; ++lane) bits[lane] = from[lane];
#endif
  }
  return widen(Type{}, bits);
}

template <typename Type>
IN_LOOPS void store_lanes(typename Type::Bits* to, const Vector& from, int64_t count) {
  const Packed<Type> bits = narrow(Type{}, from);
  if (__builtin_expect(count >= vector_lanes, 1)) {
    std::memcpy(to, &bits, sizeof(bits));
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(*to) == 4)
      return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), (__m512)bits);
#endif
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = bits[lane];
  }
}

// For arrays larger than the caches, which are not read again soon: whole cache lines, without reading them first.
// Before another thread reads them, end_streams().
IN_LOOPS void stream_lanes(float* to, const Vector& from, int64_t count, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(to, (__m512)from);
#endif
  store_lanes<Float32>(to, from, count);
}
IN_LOOPS void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// Whether to stream an array of so many bytes, whose rows are `dim` floats. Half of an L2 cache is small.
inline bool streams(const void* data, int64_t bytes, int64_t dim) {
  return bytes > int64_t{1} << 20 && dim % vector_lanes == 0 && reinterpret_cast<uintptr_t>(data) % vector_bytes == 0;
}

// Low halves of a and b, element by element in turn; and the high halves.
IN_LOOPS void interleave(Vector& low, Vector& high, const Vector& a, const Vector& b) {
#if defined(__clang__)
  for (int x = 0; x < vector_lanes; ++x) {
    low[x] = (x % 2 == 0 ? a : b)[x / 2];
    high[x] = (x % 2 == 0 ? a : b)[(vector_lanes + x) / 2];
  }
#else
  typedef int Places __attribute__((vector_size(vector_bytes)));
  Places of_low, of_high;
  for (int x = 0; x < vector_lanes; ++x) {
    of_low[x] = x / 2 + x % 2 * vector_lanes;
    of_high[x] = (vector_lanes + x) / 2 + x % 2 * vector_lanes;
  }
  low = __builtin_shuffle(a, b, of_low), high = __builtin_shuffle(a, b, of_high);
#endif
}

// Rows become columns: each pass interleaves rows that are half a block apart, and as many passes as the size has bits
// transpose the block.
IN_LOOPS void transpose(Vector (&tile)[vector_lanes]) {
  constexpr int passes = vector_lanes == 16 ? 4 : vector_lanes == 8 ? 3 : 2;
  for (int pass = 0; pass < passes; ++pass) {
    Vector next[vector_lanes];
    for (int x = 0; x < vector_lanes / 2; ++x) {
      interleave(next[2 * x], next[2 * x + 1], tile[x], tile[x + vector_lanes / 2]);
    }
    for (int x = 0; x < vector_lanes; ++x) tile[x] = next[x];
  }
}
