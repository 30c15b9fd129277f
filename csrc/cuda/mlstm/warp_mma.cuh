// Warp-level products of shared-memory tiles for the portable kernels, one interface for three arithmetics:
//   bfloat16  bf16 tiles, mma m16n8k16
//   float16   float32 tiles holding tf32 values, mma m16n8k8: tf32 has float16's 10 bits (so loads are exact) and
//             float32's exponent range, which states, dc and 1/d need and float16 lacks
//   float32   float32 tiles, each operand split into two tf32 halves, three mma per product (the product of the two
//             low halves, 2^-22 of the whole, is left out): float32 precision, not TF32
#pragma once

#include <type_traits>

#include "cuda/numeric.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace flash_xlstm::cuda {

template <typename T>
struct Arithmetic {
  using Element = float;  // in shared memory and in the state buffer
  static constexpr int mma_k = 8;
  // Element strides between rows that keep fragment loads free of bank conflicts.
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

// A computed float32 value as a product operand.
template <typename T>
__device__ __forceinline__ typename Arithmetic<T>::Element to_operand(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return from_float<bf16>(x);
  } else if constexpr (std::is_same_v<T, half>) {
    return __uint_as_float(ptx::round_tf32(x));
  } else {
    return x;
  }
}

// acc (m_tiles * 16 rows, n_tiles * 8 columns) += A B over k in [k_begin, k_end), multiples of mma_k.
//   a_across: A lies as [k][m], else [m][k];  b_across: B lies as [k][n], else [n][k].
// a and b point at the warp's first row (column) of m (n). Thread `lane` holds, of each 16 x 8 tile, the rows
// lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
template <typename T, bool a_across, bool b_across, int m_tiles, int n_tiles>
__device__ __forceinline__ void warp_mma(float (&acc)[m_tiles][n_tiles][4],
                                         const typename Arithmetic<T>::Element* a, int a_pitch,
                                         const typename Arithmetic<T>::Element* b, int b_pitch, int k_begin,
                                         int k_end) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, bf16>) {
    static_assert(n_tiles % 2 == 0);
    const int matrix = lane / 8, row = lane % 8;
#pragma unroll 2
    for (int k = k_begin; k < k_end; k += 16) {
      uint32_t fa[m_tiles][4];
#pragma unroll
      for (int mt = 0; mt < m_tiles; ++mt) {
        if constexpr (a_across) {
          ptx::ldmatrix_x4<true>(fa[mt], a + (k + row + (matrix / 2) * 8) * a_pitch + mt * 16 + (matrix % 2) * 8);
        } else {
          ptx::ldmatrix_x4<false>(fa[mt], a + (mt * 16 + row + (matrix % 2) * 8) * a_pitch + k + (matrix / 2) * 8);
        }
      }
#pragma unroll
      for (int nt = 0; nt < n_tiles; nt += 2) {
        uint32_t fb[4];
        if constexpr (b_across) {
          ptx::ldmatrix_x4<true>(fb, b + (k + row + (matrix % 2) * 8) * b_pitch + nt * 8 + (matrix / 2) * 8);
        } else {
          ptx::ldmatrix_x4<false>(fb, b + (nt * 8 + row + (matrix / 2) * 8) * b_pitch + k + (matrix % 2) * 8);
        }
#pragma unroll
        for (int mt = 0; mt < m_tiles; ++mt) {
          ptx::mma_bf16(acc[mt][nt], fa[mt], fb[0], fb[1]);
          ptx::mma_bf16(acc[mt][nt + 1], fa[mt], fb[2], fb[3]);
        }
      }
    }
  } else {
    const int group = lane / 4, pos = lane % 4;
#pragma unroll 1
    for (int k = k_begin; k < k_end; k += 8) {
      uint32_t hi[m_tiles][4], lo[m_tiles][4];
#pragma unroll
      for (int mt = 0; mt < m_tiles; ++mt) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int m = mt * 16 + group + (r % 2) * 8, kk = k + pos + (r / 2) * 4;
          const float x = a_across ? a[kk * a_pitch + m] : a[m * a_pitch + kk];
          if constexpr (Arithmetic<T>::split) {
            hi[mt][r] = ptx::round_tf32(x);
            lo[mt][r] = ptx::round_tf32(x - __uint_as_float(hi[mt][r]));
          } else {
            hi[mt][r] = __float_as_uint(x);
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < n_tiles; ++nt) {
        uint32_t bh[2], bl[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int n = nt * 8 + group, kk = k + pos + r * 4;
          const float x = b_across ? b[kk * b_pitch + n] : b[n * b_pitch + kk];
          if constexpr (Arithmetic<T>::split) {
            bh[r] = ptx::round_tf32(x);
            bl[r] = ptx::round_tf32(x - __uint_as_float(bh[r]));
          } else {
            bh[r] = __float_as_uint(x);
          }
        }
#pragma unroll
        for (int mt = 0; mt < m_tiles; ++mt) {
          if constexpr (Arithmetic<T>::split) {
            ptx::mma_tf32(acc[mt][nt], lo[mt], bh[0], bh[1]);
            ptx::mma_tf32(acc[mt][nt], hi[mt], bl[0], bl[1]);
          }
          ptx::mma_tf32(acc[mt][nt], hi[mt], bh[0], bh[1]);
        }
      }
    }
  }
}

}  // namespace flash_xlstm::cuda
