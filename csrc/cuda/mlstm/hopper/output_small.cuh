// Heads up to 64 x 64 in bfloat16, which are bound by the latency of a tile's chain of waits:
//   a stage of the ring holds one operand; the stage of S also holds the gates and the Tile;
//   an operand that serves twice is loaded once: A for T and S, dk's operands for dv;
//   P stays in registers, and T's blocks and out are made in the same registers;
//   two blocks that make h share an SM.
// h's kernel also starts beside the states' kernel, as far as SMs have room, and takes tiles in the order in which the
// states are written. k and v, which both kernels read, are then still in the L2 cache, and the tail of one kernel
// overlaps the start of the other.
#pragma once

#include "cuda/mlstm/hopper/output_epilogue.cuh"
#include "cuda/mlstm/hopper/output_state.cuh"

namespace flash_xlstm::cuda::hopper {

// `blocks` blocks share an SM. dk and dv of a chunk are made one after the other from operands that are loaded once.
template <int blocks>
struct SmallShared {
  static constexpr bool is_small = true;
  static constexpr int blocks_per_processor = blocks, consumer_registers = blocks == 2 ? 104 : 240;
  static constexpr int stage_bytes = ab_bytes, num_stages = blocks == 2 ? 6 : 12;
  // In the stage of S.
  static constexpr int n_bytes = 8 * box * 2, log_bytes = chunk_tokens * sizeof(float2);
  static constexpr int float_bytes = chunk_tokens * sizeof(float);
  static constexpr int n_at = box_bytes, alpha_at = n_at + n_bytes, beta_at = alpha_at + log_bytes;
  static constexpr int inv_d_at = beta_at + log_bytes, delta_at = inv_d_at + float_bytes;
  static constexpr int tile_at = delta_at + float_bytes;
  alignas(1024) unsigned char stage[num_stages][stage_bytes];
  alignas(16) unsigned char own[consumer_warps][1024];  // of each warp: output rows in the epilogue
  uint64_t full[num_stages], empty[num_stages];
};

// The stages of a small tile's operands, from its first one on. h: q, k, c, v; dk and dv: v, dh, dc, k, q.
template <Output output>
struct SmallStages {
  static constexpr int a = output == Output::dv ? 3 : 0, b = output == Output::dv ? 4 : 1, s = 2;
  static constexpr int z = output == Output::dv ? 1 : output == Output::dk ? 4 : 3;
  static constexpr int gate_rows = 3;                    // dk: k
  static constexpr bool is_last = output != Output::dk;  // dv comes after dk and still needs the stages
  static constexpr int count = output == Output::h ? 4 : 5;
};

// Waits for the stage that is `ahead` stages after the ring's place, and gives its index.
template <typename Shared>
__device__ __forceinline__ int wait_for_stage(Shared& sh, RingState<Shared::num_stages> ring, int ahead) {
#pragma unroll
  for (int x = 0; x < ahead; ++x) ring.advance();
  ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
  return ring.stage;
}

// For a tile of h, or of dk and dv. Also sends the Tile, so that consumers need not compute it.
template <Output output, typename Shared>
__device__ __forceinline__ void produce_small(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                              const Tile& tile) {
  constexpr bool is_h = output == Output::h;
  const Maps& maps = args.maps;
  const auto wait_for_stage = [&] { ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1); };
  const auto load_rows = [&](const CUtensorMap& map) {  // 128 tokens x 64
    unsigned char* const to = sh.stage[ring.stage];
    uint64_t* full = &sh.full[ring.stage];
    ptx::mbarrier_arrive_expect(full, ab_bytes);
    ptx::tma_load(to, &map, full, 0, tile.head, tile.first, tile.row);
    ptx::tma_load(to + box_bytes, &map, full, 0, tile.head, tile.first + box, tile.row);
    ring.advance();
  };
  if constexpr (is_h) {  // the flag also means that q, k, v are written: the states' kernel has waited for them
    const int* const flag = args.w.state_flags + tile.item;
    while (ptx::load_acquire(flag) == 0) __nanosleep(50);
    ptx::fence_async();  // orders the states' stores before this thread's TMA loads
  }
  wait_for_stage();
  load_rows(is_h ? maps.q : maps.v);
  wait_for_stage();
  load_rows(is_h ? maps.k : maps.dh);

  wait_for_stage();
  unsigned char* const to = sh.stage[ring.stage];
  uint64_t* full = &sh.full[ring.stage];
  *reinterpret_cast<Tile*>(to + Shared::tile_at) = tile;
  ptx::fence_async_shared();  // orders this store before the TMA's next write to the stage
  const auto load_item = [&](int offset, const CUtensorMap& map) {
    ptx::tma_load(to + offset, &map, full, 0, 0, tile.item);
  };
  constexpr int gate_bytes = 2 * Shared::log_bytes + (is_h ? 0 : 2 * Shared::float_bytes);
  constexpr int state_bytes = box_bytes + (is_h ? Shared::n_bytes : box * static_cast<int>(sizeof(float)));
  ptx::mbarrier_arrive_expect(full, gate_bytes + (tile.has_state ? state_bytes : 0));
  load_item(Shared::alpha_at, maps.alpha);
  load_item(Shared::beta_at, maps.beta);
  if constexpr (!is_h) {
    load_item(Shared::inv_d_at, maps.inv_d);
    load_item(Shared::delta_at, maps.delta);
  }
  if (tile.has_state) {
    load_item(0, maps.c);
    load_item(Shared::n_at, is_h ? maps.n_parts : maps.n);
  }
  ring.advance();

  wait_for_stage();
  load_rows(is_h ? maps.v : maps.k);
  if constexpr (!is_h) {
    wait_for_stage();
    load_rows(maps.q);
  }
}

template <Output output, typename Shared>
__device__ __forceinline__ void consume_small(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                              const Tile& tile) {
  using R = Roles<output>;
  using At = SmallStages<output>;
  using T = bf16;
  constexpr int tile_n = box;
  constexpr bool is_h = output == Output::h;
  const ThreadPlace<output, tile_n, true> me(args, tile);
  Gates<output> gates;
  gates.load_boundaries(args.w, tile);
  float m_of_row[2] = {0.0f, 0.0f};
  if constexpr (is_h) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (me.row(r) < tile.length) m_of_row[r] = me.m_at(me.token_index(me.row(r)));
    }
  }
  Scores<output, tile_n, T, Shared> scores(me, gates, sh);
  float out[32], q_n[4];  // first T, block by block
  const auto element = [&](int x) -> float& { return out[x]; };
  uint32_t p_diagonal[4][4], p_full[4][4];
  const auto stage_of = [&](int index) { return wait_for_stage(sh, ring, index); };

  const int stage_a = stage_of(At::a), stage_b = stage_of(At::b);
  // False, but the compiler does not know it. So T's second block and `out` reuse the registers of the first block.
  // Zeros written ahead would take registers of their own, and spill.
  const bool adds = args.tiles_of_both < 0;
  const auto make_t = [&](int begin, bool is_first) {
    if (is_first) {
#pragma unroll
      for (int x = 0; x < 32; ++x) out[x] = 0.0f;
    }
    ptx::wgmma_fence();
    block_product<T>(out, me.group, begin, stage_address(sh, stage_a), stage_address(sh, stage_b), is_first || adds);
    ptx::wgmma_commit();
  };
  make_t(me.diagonal, true);
  const int stage_s = stage_of(At::s);
  const auto logs_at = [&](int offset) { return reinterpret_cast<const float2*>(sh.stage[stage_s] + offset); };
  const float2* const row_logs = logs_at(R::rows_are_t ? Shared::alpha_at : Shared::beta_at);
  gates.col_logs = logs_at(R::rows_are_t ? Shared::beta_at : Shared::alpha_at);
  gates.col_inv_d = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::inv_d_at);
  gates.col_delta = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::delta_at);
  gates.n_of_out = reinterpret_cast<const float*>(sh.stage[stage_s] + Shared::n_at);
  gates.row_log[0] = row_logs[me.row(0)], gates.row_log[1] = row_logs[me.row(1)];
  gates.set_state_factor();
  ptx::wgmma_wait<0>();
  ptx::hold(out);
  scores.weigh(element, me.diagonal, std::true_type{});
  scores.fragments(p_diagonal, element);
  // Both groups make the full block's products, though only one needs them: see product_both.
  make_t(me.full, false);
#pragma unroll
  for (int x = 0; x < 16; ++x) p_full[x / 4][x % 4] = 0u;
  ptx::wgmma_wait<0>();
  ptx::hold(out);
  if constexpr (At::is_last) release(sh, stage_b);
  if (me.reaches_both) {
    scores.weigh(element, me.full, std::false_type{});
    scores.fragments(p_full, element);
  }

  if (!me.has_state) {
#pragma unroll
    for (int x = 0; x < tile_n / 2; ++x) out[x] = 0.0f;
  }
  if constexpr (is_h) q_n[0] = q_n[1] = q_n[2] = q_n[3] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < (me.has_state ? 1 : 0); ++k) {
    constexpr bool rows_are_k = R::state_rows_are_k;
    const uint64_t rows = ptx::wgmma_descriptor(stage_address(sh, stage_a) + me.group * box_bytes);
    const uint64_t s = ptx::wgmma_descriptor(stage_address(sh, stage_s), rows_are_k ? box_bytes : 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      const uint64_t a = ptx::advanced(rows, kk * 32);
      ptx::Wgmma<T, tile_n>::template a_shared<rows_are_k>(out, a, ptx::advanced(s, kk * (rows_are_k ? 2048 : 32)),
                                                           adds || kk > 0);
      if constexpr (is_h) {
        const uint64_t n = ptx::wgmma_descriptor(stage_address(sh, stage_s) + Shared::n_at);
        ptx::Wgmma<T, 8>::template a_shared<false>(q_n, a, ptx::advanced(n, kk * 32), true);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  ptx::hold(out);
  if constexpr (is_h) ptx::hold(q_n);
  release(sh, stage_a);

  float n_share[2] = {0.0f, 0.0f}, across[2] = {0.0f, 0.0f};
  scale_state_term(me, scores, me.has_state, 1.0f, q_n, out, n_share);
  if constexpr (output == Output::dk) {
    if (tile.has_state) for_dots_of_stage<T, 1>(me, sh.stage[stage_of(At::gate_rows)], 0, k_dots(across, out));
    sum_k_dots(scores, across);
  }

  const int stage_z = stage_of(At::z);
  const auto add_product = [&](const uint32_t (&p)[4][4], int begin) {
    const uint64_t z = ptx::wgmma_descriptor(stage_address(sh, stage_z) + begin / box * box_bytes, box_bytes);
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, tile_n>::template a_registers<true>(out, p[kk], ptx::advanced(z, kk * 2048), true);
    }
  };
  ptx::hold(out);
  ptx::wgmma_fence();
  add_product(p_diagonal, me.diagonal);
  add_product(p_full, me.reaches_both ? me.full : me.diagonal);  // else zeros times rows that count anyway
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::hold(out);
  if constexpr (At::is_last) release(sh, stage_z);

  finish(me, scores, sh, is_h ? m_of_row : nullptr, n_share, across, out);
  if constexpr (At::is_last) {
    release(sh, stage_of(At::s));  // it also holds the Tile, which was in use
#pragma unroll
    for (int x = 0; x < At::count; ++x) ring.advance();
  }
}

}  // namespace flash_xlstm::cuda::hopper
