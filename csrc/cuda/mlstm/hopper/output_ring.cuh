// The ring between the producer, which loads operands by TMA, and the consumers: its stages in shared memory, what the
// producer puts into them for a tile, and how consumers take panel after panel out of them.
//
// Shared memory at tile_n 256: 4 stages of 48 KiB (A 16, B 16 or S 32; or Z 32; h: 1 more for n), and 24 KiB for P and
// for output rows in the epilogue. dq: 3 stages, and 64 KiB for D (q k^T) and dh v^T.
#pragma once

#include "cuda/mlstm/hopper/output_tile.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::hopper {

constexpr int ab_bytes = 2 * box_bytes;

template <Output output, int tile_n>
struct OutputShared {
  static constexpr bool is_small = false;
  static constexpr int blocks_per_processor = 1, consumer_registers = 240;
  static constexpr bool is_h = output == Output::h, is_dq = output == Output::dq;
  static constexpr int stage_bytes = ab_bytes + (tile_n == 64 ? 2 : tile_n / box) * box_bytes;
  static constexpr int n_bytes = 8 * box * 2;
  static constexpr int num_stages = is_dq ? 3 : 4;
  alignas(1024) unsigned char stage[num_stages][stage_bytes];
  alignas(1024) unsigned char n_parts[is_h ? num_stages : 1][n_bytes];
  // Of each warp. First P of the diagonal block (dq: D (q k^T) of it), then output rows in the epilogue.
  alignas(16) unsigned char own[consumer_warps][is_dq ? 4096 : 2048];
  // Of each warp of the group that has a full block: the same of that block (dq: and its dh v^T).
  alignas(16) unsigned char own_full[consumer_warps / 2][is_dq ? 8192 : 2048];
  float column_sum[is_dq ? 2 : 1][is_dq ? consumer_warps : 1][box];
  // Of the columns' tokens, a copy for each group.
  float2 col_log[2][chunk_tokens];  // beta, or alpha
  float col_inv_d[2][is_h || is_dq ? 1 : chunk_tokens], col_delta[2][is_h || is_dq ? 1 : chunk_tokens];
  float n[2][is_h ? 2 : tile_n];
  uint64_t full[num_stages], empty[num_stages];
};

// The place in the ring. Producer and consumers advance theirs alike.
template <int num_stages>
struct RingState {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

template <Output output, int tile_n, typename Shared>
__device__ __forceinline__ void produce(const OutputArgs& args, Shared& sh, RingState<Shared::num_stages>& ring,
                                        const Tile& tile) {
  using R = Roles<output>;
  const Work& w = args.w;
  const Maps& maps = args.maps;
  const int token = tile.first, row = tile.row, head = tile.head, item = tile.item;
  const auto begin_stage = [&](int bytes) {
    ptx::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
    ptx::mbarrier_arrive_expect(&sh.full[ring.stage], bytes);
    return sh.stage[ring.stage];
  };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& map, int col) {  // 128 tokens x 64
    uint64_t* full = &sh.full[ring.stage];
    ptx::tma_load(to, &map, full, col, head, token, row);
    ptx::tma_load(to + box_bytes, &map, full, col, head, token + box, row);
  };
  const CUtensorMap &a = a_of<output>(maps, maps.dh), &b = b_of<output>(maps, maps.dh),
                    &z = z_of<output>(maps, maps.dh);
  constexpr int boxes_n = tile_n / box;
  const int64_t inner = R::inner(w.p);
  const auto load_ab = [&](const CUtensorMap& left, const CUtensorMap& right, int64_t width) {
    for (int k = 0; k < width; k += box) {
      unsigned char* to = begin_stage(2 * ab_bytes);
      load_rows(to, left, k);
      load_rows(to + ab_bytes, right, k);
      ring.advance();
    }
  };
  const auto load_state = [&](int index) {
    if (!tile.has_state) return;
    const int col0 = index * tile_n;
    // From the last panel of A to the first: the last ones, just read for T, are still in the L2 cache.
    for (int k = (static_cast<int>(inner) - 1) / box * box; k >= 0; k -= box) {
      unsigned char* to = begin_stage(ab_bytes + boxes_n * box_bytes + (output == Output::h ? Shared::n_bytes : 0));
      uint64_t* full = &sh.full[ring.stage];
      load_rows(to, a, k);
      for (int x = 0; x < boxes_n; ++x) {
        unsigned char* s = to + ab_bytes + x * box_bytes;
        if constexpr (R::state_rows_are_k) {
          ptx::tma_load(s, &maps.c, full, 0, w.block_index(k / box, col0 / box + x) * box, item);
        } else {
          ptx::tma_load(s, &maps.c, full, 0, w.block_index(col0 / box + x, k / box) * box, item);
        }
      }
      if constexpr (output == Output::h) ptx::tma_load(sh.n_parts[ring.stage], &maps.n_parts, full, k, 0, item);
      ring.advance();
    }
    if constexpr (R::gate_sums) {  // q for q . dq, k for k . dk
      for (int x = 0; x < boxes_n; x += 2) {
        unsigned char* to = begin_stage((boxes_n == 1 ? 1 : 2) * ab_bytes);
        for (int y = 0; y < (boxes_n == 1 ? 1 : 2); ++y) {
          load_rows(to + y * ab_bytes, output == Output::dq ? maps.q : maps.k, col0 + (x + y) * box);
        }
        ring.advance();
      }
    }
  };
  if constexpr (output == Output::dq) {
    const int count = state_tile_count<output>(args);
    for (int x = 0; x < count; ++x) load_state(state_tile(args, tile, count, x));
    load_ab(maps.q, maps.k, w.p.dqk);
    load_ab(a, b, inner);
  } else {
    load_ab(a, b, inner);
    load_state(tile.index);
  }
  for (int half = 0; half < 2; ++half) {
    unsigned char* to = begin_stage(boxes_n * box_bytes);
    for (int x = 0; x < boxes_n; ++x) {
      ptx::tma_load(to + x * box_bytes, &z, &sh.full[ring.stage], tile.index * tile_n + x * box, head,
                    token + R::half_begin(half), row);
    }
    ring.advance();
  }
}

template <typename Shared>
__device__ __forceinline__ uint32_t stage_address(const Shared& sh, int stage) {
  return ptx::shared_address(sh.stage[stage]);
}

// A warp of the consumers is done with a stage.
template <typename Shared>
__device__ __forceinline__ void release(Shared& sh, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&sh.empty[stage]);
}

// Issues the products of one panel after another. A stage is released once the next panel's products are issued.
// Accumulators start from zeros that are written: an accumulator that a product reads only on a condition would keep
// its registers from tile to tile.
template <typename Shared, typename Issue>
__device__ __forceinline__ void for_panels(Shared& sh, RingState<Shared::num_stages>& ring, int width, Issue&& issue) {
  int last = 0;
  for (int k = 0; k < width; k += box) {
    ptx::mbarrier_wait(&sh.full[ring.stage], ring.parity);
    ptx::wgmma_fence();
    issue(stage_address(sh, ring.stage));
    ptx::wgmma_commit();
    if (k > 0) {
      ptx::wgmma_wait<1>();
      release(sh, last);
    }
    last = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (width > 0) release(sh, last);
}

}  // namespace flash_xlstm::cuda::hopper
