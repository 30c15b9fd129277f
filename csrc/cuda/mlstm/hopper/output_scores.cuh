// The scores of a tile: T = A B^T in blocks of 64 x 64, and P, which is T times the gates' weights, rounded to the
// fragments of an A operand.
#pragma once

#include "cuda/mlstm/hopper/output_gates.cuh"

namespace flash_xlstm::cuda::hopper {

// Eight sums over the lanes of equal lane % 4; lane 4 x + p gets the x-th.
__device__ __forceinline__ float column_sums(const float (&x)[8], int quad) {
  float four[4], two[2];
#pragma unroll
  for (int y = 0; y < 4; ++y) {
    const float kept = quad & 4 ? x[y + 4] : x[y], given = quad & 4 ? x[y] : x[y + 4];
    four[y] = kept + __shfl_xor_sync(all_lanes, given, 16);
  }
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const float kept = quad & 2 ? four[y + 2] : four[y], given = quad & 2 ? four[y] : four[y + 2];
    two[y] = kept + __shfl_xor_sync(all_lanes, given, 8);
  }
  const float kept = quad & 1 ? two[1] : two[0], given = quad & 1 ? two[0] : two[1];
  return kept + __shfl_xor_sync(all_lanes, given, 4);
}

// T, or q k^T, over the 64 columns from `begin` on, of one panel. a, b: the operands' addresses.
template <typename T>
__device__ __forceinline__ void block_product(float (&to)[32], int group, int begin, uint32_t a, uint32_t b,
                                              bool adds) {
  const uint64_t left = ptx::wgmma_descriptor(a + group * box_bytes);
  const uint64_t right = ptx::wgmma_descriptor(b + begin / box * box_bytes);
#pragma unroll
  for (int kk = 0; kk < box / 16; ++kk) {
    ptx::Wgmma<T, 64>::template a_shared<false>(to, ptx::advanced(left, kk * 32), ptx::advanced(right, kk * 32),
                                                adds || kk > 0);
  }
}

// Both groups make both blocks, though one of them needs only the diagonal one. Behind a branch the compiler would
// serialize the products, because registers are too few.
template <typename T, typename Place, typename Shared>
__device__ __forceinline__ void product_both(const Place& me, Shared& sh, RingState<Shared::num_stages>& ring,
                                             float (&to0)[32], float (&to1)[32], int64_t width) {
#pragma unroll
  for (int x = 0; x < 32; ++x) to0[x] = to1[x] = 0.0f;
  for_panels(sh, ring, static_cast<int>(width), [&](uint32_t stage) {
    block_product<T>(to0, me.group, me.diagonal, stage, stage + ab_bytes, true);
    block_product<T>(to1, me.group, me.full, stage, stage + ab_bytes, true);
  });
  ptx::hold(to0);
  ptx::hold(to1);
}

// What turns T into P, and what comes of it beside P.
template <Output output, int tile_n, typename T, typename Shared>
struct Scores {
  using R = Roles<output>;
  static constexpr bool is_h = output == Output::h, is_dq = output == Output::dq;
  static constexpr bool is_dk = output == Output::dk, is_dv = output == Output::dv;
  static constexpr bool is_small = Shared::is_small, is_half = std::is_same_v<T, half>;
  const ThreadPlace<output, tile_n, is_small>& me;
  const Gates<output>& gates;
  Shared& sh;
  // Row minus column of this thread's first element of the diagonal block. The columns of pair c are c * 8 further on.
  const int to_diagonal = (me.warp % 4) * 16 + me.quad - me.pos * 2;
  float row_sum[2] = {0.0f, 0.0f};                         // h: of P
  float inv_d[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};  // dq: the rows'
  float row_inside[2] = {0.0f, 0.0f};                      // dq: sums of Y over the rows
  float down[2] = {1.0f, 1.0f}, up[2] = {1.0f, 1.0f};      // float16: rows of P below 1
  // dq, a place of each thread's own: D (q k^T) of both blocks, and dh v^T of the full one.
  float *own_weights = nullptr, *own_full_weights = nullptr, *own_full_t = nullptr;

  __device__ __forceinline__ Scores(const ThreadPlace<output, tile_n, is_small>& place, const Gates<output>& of,
                                    Shared& shared)
      : me(place), gates(of), sh(shared) {
    if constexpr (is_dq) {
      own_weights = reinterpret_cast<float*>(sh.own[me.warp]) + me.lane;
      own_full_weights = reinterpret_cast<float*>(sh.own_full[me.warp % 4]) + me.lane;
      own_full_t = own_full_weights + 1024;
    }
  }

  __device__ __forceinline__ bool reaches(int c, int r, int y) const {
    const int ahead = to_diagonal + r * 8 - c * 8 - y;
    return R::rows_are_t ? ahead >= 0 : ahead <= 0;
  }
  __device__ __forceinline__ float2 scaled_pair_at(const float* from, int col) const {  // larger tiles scale before
    float2 two = pair_at(from, col);
    if constexpr (is_small) two.x *= me.args.w.p.scale, two.y *= me.args.w.p.scale;
    return two;
  }

  // T, of which t(x) is an element, becomes P in place.
  template <typename Element, typename Masked>
  __device__ __forceinline__ void weigh(Element&& t, int begin, Masked masked) {
    [[maybe_unused]] float2 cols_inv_d{}, cols_delta{};
    [[maybe_unused]] float inside[16] = {};
    gates.for_decays(me.pos, begin, [&](int c, int r, int y, float d) {
      float& x = t(c * 4 + r * 2 + y);
      if constexpr (is_dk || is_dv) {
        if (r == 0 && y == 0) cols_inv_d = scaled_pair_at(gates.col_inv_d, begin + c * 8 + me.pos * 2);
      }
      if constexpr (is_dk) {
        if (r == 0 && y == 0) cols_delta = scaled_pair_at(gates.col_delta, begin + c * 8 + me.pos * 2);
      }
      float value = x;
      if constexpr (is_dq) value = value * inv_d[r] + delta[r];
      if constexpr (is_dk) value = value * (y ? cols_inv_d.y : cols_inv_d.x) + (y ? cols_delta.y : cols_delta.x);
      if constexpr (is_dv) value *= y ? cols_inv_d.y : cols_inv_d.x;
      if constexpr (is_dq) {
        const float weight = (masked ? own_weights : own_full_weights)[(c * 4 + r * 2 + y) * 32];
        const float within = weight == 0.0f ? 0.0f : weight * value;
        row_inside[r] += within;
        inside[c * 2 + y] += within;
      }
      value *= d;
      if (masked && !reaches(c, r, y)) value = 0.0f;
      if constexpr (is_h) row_sum[r] += value;
      x = value;
    });
    if constexpr (is_dq) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float of_column[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) of_column[c] = inside[c * 2 + y];
        sh.column_sum[masked ? 0 : 1][me.warp][me.quad * 8 + me.pos * 2 + y] = column_sums(of_column, me.quad);
      }
    }
  }

  template <typename Element>
  __device__ __forceinline__ void fragments(uint32_t (&p)[4][4], Element&& t) const {
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = t(c * 4 + r * 2), b = t(c * 4 + r * 2 + 1);
        p[c / 2][c % 2 * 2 + r] = is_half ? pack<T>(a * down[r], b * down[r]) : pack<T>(a, b);
      }
  }

  // float16: chooses the scales of P's rows.
  template <typename Diagonal, typename Full>
  __device__ __forceinline__ void scale_rows(Diagonal&& t0, Full&& t1) {
    if constexpr (is_half) {
      float most[2] = {0.0f, 0.0f};
#pragma unroll
      for (int x = 0; x < 32; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], fabsf(t0(x)));
      if (me.reaches_both) {
#pragma unroll
        for (int x = 0; x < 32; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], fabsf(t1(x)));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(all_lanes, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(all_lanes, most[r], 2));
        const int exponent = min(max((__float_as_int(most[r]) >> 23) - 126, -60), 126);
        down[r] = __int_as_float((127 - exponent) << 23), up[r] = __int_as_float((127 + exponent) << 23);
      }
    }
  }
};

}  // namespace flash_xlstm::cuda::hopper
