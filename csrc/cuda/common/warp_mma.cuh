// Warp-level products of shared-memory tiles for the portable kernels: one interface for three arithmetics.
//   bfloat16  bf16 tiles, mma m16n8k16.
//   float16   float32 tiles, mma m16n8k8. tf32 has float16's 10 bits, so inputs are exact, and float32's exponent
//             range, which states, dc and 1/d need. A computed operand is cut to tf32. A second mma, in bfloat16,
//             multiplies what is cut off, so that 2^-18 of a product is lost at most. Rounded to tf32 the operand would
//             lose as much as the result loses in float16. Two such losses in one term are beyond the tests' bound.
//   float32   float32 tiles, mma m16n8k8. Each operand is split into two tf32 halves; three mma make a product, without
//             the one of the two low halves, which is 2^-22 of it. Sums are float32: float32 precision, not TF32.
#pragma once

#include <type_traits>

#include "cuda/common/numeric.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace flash_xlstm::cuda {

template <typename T>
struct Arithmetic {
  using Element = float;  // in shared memory and in the state buffer
  static constexpr int mma_k = 8;
  // Row pitches, in elements, without bank conflicts in fragment loads.
  static constexpr int pitch_k(int columns) { return columns + 4; }   // the product's k runs along the row
  static constexpr int pitch_mn(int columns) { return columns + 8; }  // k runs across the rows
  static constexpr bool split = std::is_same_v<T, float>;
};
template <>
struct Arithmetic<bf16> {
  using Element = bf16;
  static constexpr int mma_k = 16;
  static constexpr int pitch_k(int columns) { return columns + 8; }
  static constexpr int pitch_mn(int columns) { return columns + 8; }
  static constexpr bool split = false;
};

// Which operand of a product is computed. The other one, or both, are inputs.
enum class Computed { none, a, b };

// A computed float32 value as a product operand.
template <typename T>
__device__ __forceinline__ typename Arithmetic<T>::Element to_operand(float x) {
  return from_float<typename Arithmetic<T>::Element>(x);
}

// Two neighbouring elements, as a thread of an accumulator holds them; 8 bytes (float32) or 4.
template <typename E>
struct alignas(2 * sizeof(E)) Pair {
  E x, y;
};

// float16: what the tf32 mma takes of an operand, and the bfloat16 mma: the rest of a computed one, all of an input.
template <bool computed>
__device__ __forceinline__ void split_float16(float x, uint32_t& high, float& rest) {
  high = computed ? ptx::cut_tf32(x) : __float_as_uint(x);
  rest = computed ? x - __uint_as_float(high) : x;
}

// The rows of A that a warp holds for one k step: m_tiles * 16 rows, mma_k columns.
template <typename T, int m_tiles>
struct FragmentA {
  uint32_t high[m_tiles][4];
  uint32_t low[Arithmetic<T>::split ? m_tiles : 1][4];
  uint32_t rest[std::is_same_v<T, half> ? m_tiles : 1][2];  // of a computed A
};

// across: A lies in shared memory as [k][m], else as [m][k]. `a` points at the warp's first row.
template <typename T, bool across, bool computed = false, int m_tiles>
__device__ __forceinline__ void load_a(FragmentA<T, m_tiles>& f, const typename Arithmetic<T>::Element* a, int pitch,
                                       int k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int mt = 0; mt < m_tiles; ++mt) {
    if constexpr (std::is_same_v<T, bf16>) {
      const int matrix = lane / 8, row = lane % 8;
      const bf16* at = across ? a + (k + row + (matrix / 2) * 8) * pitch + mt * 16 + (matrix % 2) * 8
                              : a + (mt * 16 + row + (matrix % 2) * 8) * pitch + k + (matrix / 2) * 8;
      ptx::ldmatrix_x4<across>(f.high[mt], at);
    } else {
      const int group = lane / 4, pos = lane % 4;
      float rest[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = mt * 16 + group + (r % 2) * 8, kk = k + pos + (r / 2) * 4;
        const float x = across ? a[kk * pitch + m] : a[m * pitch + kk];
        if constexpr (Arithmetic<T>::split) {
          f.high[mt][r] = ptx::round_tf32(x);
          f.low[mt][r] = ptx::round_tf32(x - __uint_as_float(f.high[mt][r]));
        } else {
          split_float16<computed>(x, f.high[mt][r], rest[r]);
        }
      }
      if constexpr (computed && !Arithmetic<T>::split) {
#pragma unroll
        for (int x = 0; x < 2; ++x) f.rest[mt][x] = pack<bf16>(rest[x], rest[x + 2]);
      }
    }
  }
}

// acc (m_tiles * 16 rows, n_tiles * 8 columns) += A B for one k step.
// across: B lies in shared memory as [k][n], else as [n][k]. `b` points at the warp's first column.
// Thread `lane` holds, of each 16 x 8 tile, rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
template <typename T, bool across, Computed computed = Computed::none, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply(float (&acc)[m_tiles][n_tiles][4], const FragmentA<T, m_tiles>& f,
                                         const typename Arithmetic<T>::Element* b, int pitch, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, bf16>) {
    static_assert(n_tiles % 2 == 0);
    const int matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int nt = 0; nt < n_tiles; nt += 2) {
      uint32_t fb[4];
      const bf16* at = across ? b + (k + row + (matrix % 2) * 8) * pitch + nt * 8 + (matrix / 2) * 8
                              : b + (nt * 8 + row + (matrix / 2) * 8) * pitch + k + (matrix % 2) * 8;
      ptx::ldmatrix_x4<across>(fb, at);
#pragma unroll
      for (int mt = 0; mt < m_tiles; ++mt) {
        ptx::mma_bf16(acc[mt][nt], f.high[mt], fb[0], fb[1]);
        ptx::mma_bf16(acc[mt][nt + 1], f.high[mt], fb[2], fb[3]);
      }
    }
  } else {
    const int group = lane / 4, pos = lane % 4;
#pragma unroll
    for (int nt = 0; nt < n_tiles; ++nt) {
      uint32_t high[2], low[2];
      float rest[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = nt * 8 + group, kk = k + pos + r * 4;
        const float x = across ? b[kk * pitch + n] : b[n * pitch + kk];
        if constexpr (Arithmetic<T>::split) {
          high[r] = ptx::round_tf32(x);
          low[r] = ptx::round_tf32(x - __uint_as_float(high[r]));
        } else {
          split_float16<computed == Computed::b>(x, high[r], rest[r]);
        }
      }
#pragma unroll
      for (int mt = 0; mt < m_tiles; ++mt) {
        if constexpr (Arithmetic<T>::split) {
          // Summed outside the tensor core, which truncates as it accumulates: a bias that grows with k.
          float step[4] = {};
          ptx::mma_tf32(step, f.low[mt], high[0], high[1]);
          ptx::mma_tf32(step, f.high[mt], low[0], low[1]);
          ptx::mma_tf32(step, f.high[mt], high[0], high[1]);
#pragma unroll
          for (int r = 0; r < 4; ++r) acc[mt][nt][r] += step[r];
        } else {
          ptx::mma_tf32(acc[mt][nt], f.high[mt], high[0], high[1]);
        }
      }
      if constexpr (!Arithmetic<T>::split && computed != Computed::none) {
        // The bfloat16 mma's k of 2 pos and 2 pos + 1 are pos and pos + 4 here, in A and in B.
#pragma unroll
        for (int mt = 0; mt < m_tiles; ++mt) {
          uint32_t rest_a[2];
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const float first = __uint_as_float(f.high[mt][x]), second = __uint_as_float(f.high[mt][x + 2]);
            rest_a[x] = computed == Computed::a ? f.rest[mt][x] : pack<bf16>(first, second);
          }
          ptx::mma_bf16(acc[mt][nt], rest_a, pack<bf16>(rest[0], rest[1]));
        }
      }
    }
  }
}

// acc += A B over k in [k_begin, k_end), multiples of mma_k; layouts as in load_a and multiply.
template <typename T, bool a_across, bool b_across, Computed computed = Computed::none, int m_tiles, int n_tiles>
__device__ __forceinline__ void warp_mma(float (&acc)[m_tiles][n_tiles][4], const typename Arithmetic<T>::Element* a,
                                         int a_pitch, const typename Arithmetic<T>::Element* b, int b_pitch,
                                         int k_begin, int k_end) {
#pragma unroll 1
  for (int k = k_begin; k < k_end; k += Arithmetic<T>::mma_k) {
    FragmentA<T, m_tiles> f;
    load_a<T, a_across, computed == Computed::a>(f, a, a_pitch, k);
    multiply<T, b_across, computed>(acc, f, b, b_pitch, k);
  }
}

}  // namespace flash_xlstm::cuda
