// The gates of a tile's tokens: D, the state's weight in the rows, and the columns' 1 / d_t and delta. The rows' lie in
// registers, the columns' in shared memory.
#pragma once

#include "cuda/mlstm/hopper/output_ring.cuh"

namespace flash_xlstm::cuda::hopper {

template <Output output>
struct Gates {
  using R = Roles<output>;
  float2 row_log[2] = {};
  float2 m_start, alpha_last;
  float state_factor[2];  // the state's weight in the rows
  // In shared memory: of the columns' tokens, and n of the output's columns.
  const float2* col_logs = nullptr;
  const float *col_inv_d = nullptr, *col_delta = nullptr, *n_of_out = nullptr;

  __device__ __forceinline__ void load_boundaries(const Work& w, const Tile& tile) {
    m_start = w.m_start[tile.item], alpha_last = w.alpha_last[tile.item];
  }

  __device__ __forceinline__ void set_state_factor() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state_factor[r] =
          R::rows_are_t ? fast_exp2(log_sum(row_log[r], m_start)) : fast_exp2(log_difference(alpha_last, row_log[r]));
    }
  }

  // Calls f(pair of columns c, row r, y of the pair, D) for the 64 (8 `groups`) columns from `begin` on.
  template <int groups = 8, typename F>
  __device__ __forceinline__ void for_decays(int pos, int begin, F&& f) const {
#pragma unroll
    for (int c = 0; c < groups; ++c) {
      const float4 logs = *reinterpret_cast<const float4*>(col_logs + begin + c * 8 + pos * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const float2 col = y ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y);
          f(c, r, y, fast_exp2(R::rows_are_t ? log_difference(row_log[r], col) : log_difference(col, row_log[r])));
        }
      ptx::keep_order();
    }
  }
};

__device__ __forceinline__ float2 pair_at(const float* from, int col) {
  return *reinterpret_cast<const float2*>(from + col);
}

// Gates that are loaded from memory before the first products and shared with the warpgroup after them.
template <Output output, int tile_n>
struct LoadedGates : Gates<output> {
  using R = Roles<output>;
  static constexpr bool is_dk = output == Output::dk, is_dv = output == Output::dv;
  float2 col_log;
  float inv_d_of_col = 0.0f, delta_of_col = 0.0f, n_of_col[2] = {0.0f, 0.0f};

  template <typename Place, typename Shared>
  __device__ __forceinline__ LoadedGates(const Place& me, const Shared& sh) {
    const Work& w = me.args.w;
    this->row_log[0] = (R::rows_are_t ? w.alpha : w.beta)[me.item + me.row(0)];
    this->row_log[1] = (R::rows_are_t ? w.alpha : w.beta)[me.item + me.row(1)];
    this->load_boundaries(w, me.tile);
    col_log = (R::rows_are_t ? w.beta : w.alpha)[me.item + me.thread % 128];
    if constexpr (is_dk || is_dv) inv_d_of_col = w.p.scale * w.inv_d[me.item + me.thread % 128];
    if constexpr (is_dk) delta_of_col = w.p.scale * w.delta[me.item + me.thread % 128];
    if constexpr (R::gate_sums) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int c = me.thread % 128 + x * 128;
        if (c < tile_n && me.col0 + c < me.columns) n_of_col[x] = w.n[me.tile.item * w.layout.dqk + me.col0 + c];
      }
    }
    this->col_logs = sh.col_log[me.group], this->col_inv_d = sh.col_inv_d[me.group];
    this->col_delta = sh.col_delta[me.group], this->n_of_out = sh.n[me.group];
  }

  template <typename Place, typename Shared>
  __device__ __forceinline__ void share(const Place& me, Shared& sh) const {
    ptx::named_barrier(1 + me.group, 128);  // all have read the last tile's
    sh.col_log[me.group][me.thread % 128] = col_log;
    if constexpr (is_dk || is_dv) sh.col_inv_d[me.group][me.thread % 128] = inv_d_of_col;
    if constexpr (is_dk) sh.col_delta[me.group][me.thread % 128] = delta_of_col;
    if constexpr (R::gate_sums) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (me.thread % 128 + x * 128 < tile_n) sh.n[me.group][me.thread % 128 + x * 128] = n_of_col[x];
      }
    }
    ptx::named_barrier(1 + me.group, 128);
  }
};

}  // namespace flash_xlstm::cuda::hopper
