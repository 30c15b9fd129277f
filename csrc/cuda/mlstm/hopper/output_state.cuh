// The state's term of a tile: A S, its dot products with rows of q or k, and its scaling.
#pragma once

#include "cuda/mlstm/hopper/output_scores.cuh"

namespace flash_xlstm::cuda::hopper {

// q_n: h's q n, in the first column of the accumulator.
template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void state_product(const ThreadPlace<output, tile_n, false>& me, Shared& sh,
                                              RingState<Shared::num_stages>& ring, float (&out)[tile_n / 2],
                                              float (&q_n)[4]) {
  constexpr bool is_h = output == Output::h;
#pragma unroll
  for (int x = 0; x < tile_n / 2; ++x) out[x] = 0.0f;
  if constexpr (is_h) q_n[0] = q_n[1] = q_n[2] = q_n[3] = 0.0f;
  for_panels(sh, ring, me.tile.has_state ? static_cast<int>(me.inner) : 0, [&](uint32_t stage) {
    constexpr bool rows_are_k = Roles<output>::state_rows_are_k;
    const uint64_t rows = ptx::wgmma_descriptor(stage + me.group * box_bytes);
    const uint64_t s = ptx::wgmma_descriptor(stage + ab_bytes, rows_are_k ? box_bytes : 16);
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      const uint64_t a = ptx::advanced(rows, kk * 32);
      ptx::Wgmma<T, tile_n>::template a_shared<rows_are_k>(out, a, ptx::advanced(s, kk * (rows_are_k ? 2048 : 32)),
                                                           true);
      if constexpr (is_h) {
        const uint64_t n = ptx::wgmma_descriptor(ptx::shared_address(sh.n_parts[ring.stage]));
        ptx::Wgmma<T, 8>::template a_shared<false>(q_n, a, ptx::advanced(n, kk * 32), true);
      }
    }
  });
  ptx::hold(out);
  if constexpr (is_h) ptx::hold(q_n);
}

// Calls f(column group, row 0 or 1, two neighbours of q's or k's row) for this thread's part of a stage, which has
// `panels` panels and begins with column group `first`.
template <typename T, int panels, typename Place, typename F>
__device__ __forceinline__ void for_dots_of_stage(const Place& me, const unsigned char* stage, int first, F&& f) {
  const unsigned char* const from = stage + me.row(0) * 128 + me.pos * 4;
#pragma unroll
  for (int c = 0; c < 8; ++c) {  // both rows have quad in their address's low bits
    const unsigned char* const at_c = from + (c ^ me.quad) * 16;
#pragma unroll
    for (int y = 0; y < panels; ++y)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        f(first + y * 8 + c, r, unpack<T>(*reinterpret_cast<const uint32_t*>(at_c + y * ab_bytes + r * 8 * 128)));
      }
    ptx::keep_order();
  }
}

// The same for all of the tile's columns.
template <typename T, int tile_n, typename Place, typename Shared, typename F>
__device__ __forceinline__ void for_dots(const Place& me, Shared& sh, RingState<Shared::num_stages>& ring, F&& f) {
  if (!me.tile.has_state) return;
#pragma unroll
  for (int x = 0; x < tile_n / box; x += 2) {
    ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
    for_dots_of_stage<T, tile_n == box ? 1 : 2>(me, sh.stage[ring.stage], x * 8, f);
    release(sh, ring.stage);
    ring.advance();
  }
}

// dk: adds k . (the state's term) of the rows to `across`, column group after column group.
template <int count>
__device__ __forceinline__ auto k_dots(float (&across)[2], const float (&out)[count]) {
  return [&across, &out](int c, int r, float2 k) {
    across[r] = fmaf(k.y, out[c * 4 + r * 2 + 1], fmaf(k.x, out[c * 4 + r * 2], across[r]));
  };
}
// Their sum over the row.
template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void sum_k_dots(const Scores<output, tile_n, T, Shared>& scores, float (&across)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(across[r]) * scores.up[r];
    across[r] = scores.gates.state_factor[r] == 0.0f ? 0.0f : sum;
  }
}

// Scales the state's term by its rows' weights, and adds those of dn and n. has_n: whether there is an n to add.
// n_share: h's q . n with its weight.
template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void scale_state_term(const ThreadPlace<output, tile_n, Shared::is_small>& me,
                                                 const Scores<output, tile_n, T, Shared>& scores, bool has_n,
                                                 float state_up, const float (&q_n)[4], float (&out)[tile_n / 2],
                                                 float (&n_share)[2]) {
  constexpr bool gate_sums = Roles<output>::gate_sums, is_dq = output == Output::dq;
  const Gates<output>& gates = scores.gates;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = gates.state_factor[r];
    if constexpr (output == Output::h) n_share[r] = factor * state_up * quad_sum(q_n[r * 2] + q_n[r * 2 + 1]);
    const float of_c = (is_dq ? factor * scores.inv_d[r] : factor) * state_up * scores.down[r];
    const float of_n = (is_dq ? factor * scores.delta[r] : factor) * scores.down[r];
#pragma unroll
    for (int c = 0; c < tile_n / 8; ++c) {
      float2 n{};
      if constexpr (gate_sums) {
        if (has_n) n = pair_at(gates.n_of_out, c * 8 + me.pos * 2);
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float& x = out[c * 4 + r * 2 + y];
        ptx::mul_in_place(x, of_c);
        if constexpr (gate_sums) ptx::fma_in_place(x, of_n, y ? n.y : n.x);
      }
      if (c % 8 == 7) ptx::keep_order();
    }
  }
}

}  // namespace flash_xlstm::cuda::hopper
