// The consumers' way through a tile: T and P, the state's term, P Z, the end. dq takes another way to P.
#pragma once

#include "cuda/mlstm/hopper/output_epilogue.cuh"
#include "cuda/mlstm/hopper/output_state.cuh"

namespace flash_xlstm::cuda::hopper {

// dq: the state's terms of all column tiles, the tile's own last, then both blocks of q k^T and dh v^T. From them u, and
// from u 1 / d_t and delta. Then P of both blocks.
template <int tile_n, typename T, typename Shared>
__device__ __forceinline__ void make_dq_scores(const ThreadPlace<Output::dq, tile_n, false>& me,
                                               LoadedGates<Output::dq, tile_n>& gates,
                                               Scores<Output::dq, tile_n, T, Shared>& scores, Shared& sh,
                                               RingState<Shared::num_stages>& ring, const float (&m_of_row)[2],
                                               const float (&s_of_row)[2], float state_up, float (&tile_t)[32],
                                               float (&second)[32], float (&out)[tile_n / 2], float (&across)[2]) {
  constexpr bool reads_early = tile_n <= 128;
  const OutputArgs& args = me.args;
  const Tile& tile = me.tile;
  const Work& w = args.w;
  if constexpr (!reads_early) gates.share(me, sh);
  float all_dots[2] = {0.0f, 0.0f}, dot_out[2], dot_n[2], no_q_n[4];
  const int count = state_tile_count<Output::dq>(args);
#pragma unroll 1
  for (int x = 0; x < count; ++x) {
    state_product<Output::dq, tile_n, T>(me, sh, ring, out, no_q_n);
    if (reads_early && x == 0) gates.share(me, sh);
    dot_out[0] = dot_out[1] = dot_n[0] = dot_n[1] = 0.0f;
    for_dots<T, tile_n>(me, sh, ring, [&](int c, int r, float2 q) {
      const float2 n = pair_at(gates.n_of_out, c * 8 + me.pos * 2);
      // In place: the compiler would move the sums behind the loop, and only the last are used there.
      ptx::fma_in_place(dot_out[r], q.x, out[c * 4 + r * 2]);
      ptx::fma_in_place(dot_out[r], q.y, out[c * 4 + r * 2 + 1]);
      ptx::fma_in_place(dot_n[r], q.x, n.x);
      ptx::fma_in_place(dot_n[r], q.y, n.y);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) all_dots[r] += dot_out[r];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    all_dots[r] = quad_sum(all_dots[r]) * state_up, dot_out[r] = quad_sum(dot_out[r]) * state_up;
    dot_n[r] = quad_sum(dot_n[r]);
  }

  // D (q k^T) goes to shared memory.
  product_both<T>(me, sh, ring, tile_t, second, w.p.dqk);
  if constexpr (reads_early) gates.set_state_factor();
  gates.for_decays(me.pos, me.diagonal, [&](int c, int r, int y, float d) {
    const int x = c * 4 + r * 2 + y;
    scores.own_weights[x * 32] = d == 0.0f || !scores.reaches(c, r, y) ? 0.0f : d * tile_t[x];
  });
  if (me.reaches_both) {
    gates.for_decays(me.pos, me.full, [&](int c, int r, int y, float d) {
      const int x = c * 4 + r * 2 + y;
      scores.own_full_weights[x * 32] = d == 0.0f ? 0.0f : d * second[x];
    });
  }
  product_both<T>(me, sh, ring, tile_t, second, me.inner);
  float u_inside[2] = {0.0f, 0.0f};
  const auto add_u = [&](int x, float qk, float gv) { u_inside[x % 4 / 2] += qk == 0.0f ? 0.0f : qk * gv; };
#pragma unroll
  for (int x = 0; x < 32; ++x) {
    add_u(x, scores.own_weights[x * 32], tile_t[x]);
    if (x % 8 == 7) ptx::keep_order();
  }
  if (me.reaches_both) {
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      add_u(x, scores.own_full_weights[x * 32], second[x]);
      scores.own_full_t[x * 32] = second[x];
      if (x % 8 == 7) ptx::keep_order();
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = me.row(r);
    const float factor = gates.state_factor[r];
    const float sum = w.p.scale * (quad_sum(u_inside[r]) + (factor == 0.0f ? 0.0f : factor * all_dots[r]));
    float e = 0.0f;
    if (row < tile.length) {
      const int64_t token = me.token_index(row);
      const float s = reads_early ? s_of_row[r] : args.s == nullptr ? 0.0f : args.s[token];
      const Normalizer d(s, reads_early ? m_of_row[r] : me.m_at(token), w.p.eps, w.p.normalize);
      const float u = sum * d.inverse;
      scores.inv_d[r] = d.inverse;
      scores.delta[r] = d.sign == 0.0f ? 0.0f : -u * d.inverse * d.sign;
      e = w.p.input_gate == InputGate::exponential ? -u * w.p.eps * d.inverse : 0.0f;
    }
    if (me.pos == 0 && tile.index == 0) {
      w.inv_d[me.item + row] = scores.inv_d[r], w.delta[me.item + row] = scores.delta[r], w.e[me.item + row] = e;
    }
    const float of_c = factor * scores.inv_d[r], of_n = factor * scores.delta[r];
    across[r] = w.p.scale * ((of_c == 0.0f ? 0.0f : of_c * dot_out[r]) + (of_n == 0.0f ? 0.0f : of_n * dot_n[r]));
  }
  const auto of_diagonal = [&](int x) -> float& { return tile_t[x]; };
  const auto of_full = [&](int x) -> float& { return scores.own_full_t[x * 32]; };
  scores.weigh(of_diagonal, me.diagonal, std::true_type{});
  if (me.reaches_both) scores.weigh(of_full, me.full, std::false_type{});
}

template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void consume(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile) {
  using R = Roles<output>;
  constexpr bool is_h = output == Output::h, is_dq = output == Output::dq, is_half = std::is_same_v<T, half>;
  // Whether there are registers to load gates before the products and to use them after.
  constexpr bool reads_early = tile_n <= 128;
  const Work& w = args.w;
  const ThreadPlace<output, tile_n, false> me(args, tile);
  LoadedGates<output, tile_n> gates(me, sh);
  const float state_log = is_half ? (R::rows_are_t ? w.state_log : w.grad_log)[tile.item] : 0.0f;
  float m_of_row[2] = {0.0f, 0.0f}, s_of_row[2] = {0.0f, 0.0f};
  if constexpr (reads_early && (is_h || is_dq)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (me.row(r) < tile.length) m_of_row[r] = me.m_at(me.token_index(me.row(r)));
      if (is_dq && args.s != nullptr && me.row(r) < tile.length) s_of_row[r] = args.s[me.token_index(me.row(r))];
    }
  }
  Scores<output, tile_n, T, Shared> scores(me, gates, sh);
  float tile_t[32], second[32];  // the diagonal block and the full one
  const auto of_diagonal = [&](int x) -> float& { return tile_t[x]; };
  const auto of_full = [&](int x) -> float& { return is_dq ? scores.own_full_t[x * 32] : second[x]; };
  float out[tile_n / 2], q_n[4];
  if constexpr (!reads_early) gates.set_state_factor();
  const float state_up = is_half ? fast_exp2(state_log) : 1.0f;
  float across[2] = {0.0f, 0.0f};

  if constexpr (is_dq) {
    make_dq_scores(me, gates, scores, sh, ring, m_of_row, s_of_row, state_up, tile_t, second, out, across);
  } else {
    product_both<T>(me, sh, ring, tile_t, second, me.inner);
    gates.share(me, sh);
    if constexpr (reads_early) gates.set_state_factor();
    scores.weigh(of_diagonal, me.diagonal, std::true_type{});
    if (me.reaches_both) scores.weigh(of_full, me.full, std::false_type{});
  }
  scores.scale_rows(of_diagonal, of_full);
  // P goes to shared memory while the state's product runs: registers are too few for both. dq's came first.
  uint4* const own_p = reinterpret_cast<uint4*>(sh.own[me.warp]) + me.lane;
  uint4* const own_full_p = reinterpret_cast<uint4*>(sh.own_full[me.warp % 4]) + me.lane;
  if constexpr (!is_dq) {
    uint32_t p[4][4];
    scores.fragments(p, of_diagonal);
#pragma unroll
    for (int x = 0; x < 4; ++x) own_p[x * 32] = make_uint4(p[x][0], p[x][1], p[x][2], p[x][3]);
    if (me.reaches_both) {
      scores.fragments(p, of_full);
#pragma unroll
      for (int x = 0; x < 4; ++x) own_full_p[x * 32] = make_uint4(p[x][0], p[x][1], p[x][2], p[x][3]);
    }
    state_product<output, tile_n, T>(me, sh, ring, out, q_n);
  }

  float n_share[2] = {0.0f, 0.0f};
  scale_state_term(me, scores, true, state_up, q_n, out, n_share);
  if constexpr (output == Output::dk) {
    for_dots<T, tile_n>(me, sh, ring, k_dots(across, out));
    sum_k_dots(scores, across);
  }

  // P Z
  const int first = ring.stage, first_parity = ring.parity;
  ring.advance();
  const int last = ring.stage, last_parity = ring.parity;
  ring.advance();
  const auto add_product = [&](const uint4* from, auto&& t, bool is_first) {
    uint32_t p[4][4];
    if constexpr (is_dq) {
      scores.fragments(p, t);
    } else {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const uint4 four = from[x * 32];
        p[x][0] = four.x, p[x][1] = four.y, p[x][2] = four.z, p[x][3] = four.w;
      }
    }
    ptx::mbarrier_wait(&sh.full[is_first ? first : last], is_first ? first_parity : last_parity);
    ptx::hold(out);
    ptx::wgmma_fence();
    const uint64_t z = ptx::wgmma_descriptor(stage_address(sh, is_first ? first : last), box_bytes);
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, tile_n>::template a_registers<true>(out, p[kk], ptx::advanced(z, kk * 2048), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(out);
  };
  add_product(own_p, of_diagonal, !me.reaches_both);
  if (me.reaches_both) add_product(own_full_p, of_full, true);
  ptx::mbarrier_wait(&sh.full[last], last_parity);  // one group does not read it, but releases it in order
  release(sh, first);
  release(sh, last);

  finish(me, scores, sh, reads_early ? m_of_row : nullptr, n_share, across, out);
}

}  // namespace flash_xlstm::cuda::hopper
