// Mending of what is not finite. A product turns 0 times NaN or infinity into NaN. So what is not finite in Z, T or S
// reaches elements that do not depend on it. These are made once more. Finite results do not pay for it.
#pragma once

#include "cuda/mlstm/hopper/output_tile.cuh"

namespace flash_xlstm::cuda::hopper {

// Keeps `sum` 0 as long as all elements of `two` have been finite.
template <typename T>
__device__ __forceinline__ void note_odd(uint32_t& sum, uint32_t two) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(two), "r"(0u));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(two), "r"(0u));
  }
}

// Recomputes, one by one in float32, those elements of the warp's 16 written rows (from `first_row` on) that are not
// finite. Masked tokens and tokens of weight 0 are left out, whatever they hold. inv_d, delta: dq's, of rows quad and
// quad + 8. Slow, so rows and columns that are rightly not finite are skipped early.
template <Output output, int tile_n, typename T>
__device__ __noinline__ void mend_rows(const OutputArgs& args, const Tile& tile, int first_row, float2 inv_d,
                                       float2 delta) {
  using R = Roles<output>;
  const Work& w = args.w;
  const MlstmProblem& p = w.p;
  const int lane = threadIdx.x % 32;
  const int64_t at = static_cast<int64_t>(tile.item) * chunk_tokens;
  const int columns = static_cast<int>(R::columns(p)), inner = static_cast<int>(R::inner(p));
  const Strided &a = a_of<output>(p, args.dh), &b = b_of<output>(p, args.dh), &z = z_of<output>(p, args.dh);
  const auto row_of = [&](const Strided& t, int token) {
    return static_cast<const T*>(t.data) + tile.row * t.batch + (tile.first + token) * t.seq + tile.head * t.head;
  };
  const auto state_at = [&](int col, int k) {
    const int row = R::state_rows_are_k ? k : col, column = R::state_rows_are_k ? col : k;
    const auto* block = reinterpret_cast<const T*>(w.block(w.c, tile.item, row / box, column / box));
    return to_float(block[row % box * box + ((column % box / 8) ^ (row % 8)) * 8 + column % 8]);
  };
  const float2 m_start = w.m_start[tile.item], alpha_last = w.alpha_last[tile.item];
  const float* const log = R::rows_are_t ? w.state_log : w.grad_log;
  const float state_scale = log == nullptr ? 1.0f : fast_exp2(log[tile.item]);
  const float* const n = w.n + tile.item * w.layout.dqk;
  constexpr int groups = tile_n / 32;
  const int col0 = tile.index * tile_n + lane;

  // Columns whose state is not finite. Where a row depends on the state, these elements are rightly not finite.
  unsigned state_odd = 0;
  for (int g = 0; g < groups; ++g) {
    if (col0 + g * 32 >= columns || !tile.has_state) continue;
    float sum = R::gate_sums ? n[col0 + g * 32] * 0.0f : 0.0f;
#pragma unroll 8
    for (int k = 0; k < inner; ++k) sum += state_at(col0 + g * 32, k) * 0.0f;
    if (!(sum == 0.0f)) state_odd |= 1u << g;
  }
  for (int r = 0; r < 16; ++r) {
    const int row = first_row + r;
    const float row_inv_d = __shfl_sync(all_lanes, r < 8 ? inv_d.x : inv_d.y, r % 8 * 4);
    const float row_delta = __shfl_sync(all_lanes, r < 8 ? delta.x : delta.y, r % 8 * 4);
    if (row >= tile.length) continue;
    const int64_t token = (tile.row * p.seq + tile.first + row) * p.heads + tile.head;
    T* const out = out_row<output, T>(args, tile, tile.row * p.seq + tile.first + row, columns);
    const float2 row_log = (R::rows_are_t ? w.alpha : w.beta)[at + row];
    const float row_factor = !tile.has_state ? 0.0f
                             : R::rows_are_t ? fast_exp2(log_sum(row_log, m_start))
                                             : fast_exp2(log_difference(alpha_last, row_log));
    // P of the tokens 32 x + lane, and whether their weight is other than 0.
    float weights[chunk_tokens / 32], sum = 0.0f;
    unsigned takes_part[chunk_tokens / 32];
    bool own_is_odd = false;
    for (int x = 0; x < chunk_tokens / 32; ++x) {
      const int other = x * 32 + lane, t = R::rows_are_t ? row : other, j = R::rows_are_t ? other : row;
      const float d = j <= t && t < tile.length ? fast_exp2(log_difference(w.alpha[at + t], w.beta[at + j])) : 0.0f;
      takes_part[x] = __ballot_sync(all_lanes, d != 0.0f);
      float value = 0.0f;
      if (d != 0.0f) {
        const T *left = row_of(a, row), *right = row_of(b, other);
#pragma unroll 8
        for (int k = 0; k < inner; ++k) value += to_float(left[k]) * to_float(right[k]);
        if constexpr (output == Output::dq) value = value * row_inv_d + row_delta;
        if constexpr (output == Output::dk) value = p.scale * (value * w.inv_d[at + t] + w.delta[at + t]);
        if constexpr (output == Output::dv) value *= p.scale * w.inv_d[at + t];
        value *= d;
      }
      weights[x] = value;
      sum += value;
      own_is_odd |= other == row && !(value * 0.0f == 0.0f);
    }
    float factor = output == Output::dq ? p.scale : 1.0f;
    if constexpr (output == Output::h) {
      if (row_factor != 0.0f) {
        for (int k = lane; k < inner; k += 32) sum += row_factor * to_float(row_of(a, row)[k]) * n[k];
      }
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
      sum *= p.scale;
      factor = p.scale * Normalizer(sum, args.m == nullptr ? 0.0f : args.m[token], p.eps, p.normalize).inverse;
      if (tile.index == 0 && lane == 0 && args.s_out != nullptr) args.s_out[token] = sum;
    }
    if (__any_sync(all_lanes, own_is_odd)) continue;  // this reaches the whole row
    for (int g = 0; g < groups; ++g) {
      const int col = col0 + g * 32;
      const bool odd = col < columns && !(to_float(out[col]) * 0.0f == 0.0f) &&
                       !(row_factor != 0.0f && state_odd >> g & 1u) && to_float(row_of(z, row)[col]) * 0.0f == 0.0f;
      if (__ballot_sync(all_lanes, odd) == 0) continue;
      const int safe_col = odd ? col : 0;
      float value = 0.0f;
      for (int x = 0; x < chunk_tokens / 32; ++x) {
        for (int y = 0; y < 32; ++y) {
          const float weight = __shfl_sync(all_lanes, weights[x], y);
          if (takes_part[x] >> y & 1u) value += weight * to_float(row_of(z, x * 32 + y)[safe_col]);
        }
      }
      if (!odd) continue;
      if (row_factor != 0.0f) {
        float term = 0.0f;
#pragma unroll 8
        for (int k = 0; k < inner; ++k) term += to_float(row_of(a, row)[k]) * state_at(col, k);
        term *= state_scale;
        if constexpr (output == Output::dq) term = term * row_inv_d + row_delta * n[col];
        if constexpr (output == Output::dk) term += n[col];
        value += row_factor * term;
      }
      out[col] = from_float<T>(value * factor);
    }
  }
}

}  // namespace flash_xlstm::cuda::hopper
