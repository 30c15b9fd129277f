// dq of a chunk in one pass: bfloat16, dqk 129 to 256. outputs.cuh has the formulas.
//
// Each panel of dh is loaded once: after T1 = q k^T come, for every 64 columns x of dv,
//   T2 += dh_x v_x^T,  out += dh_x c_x^T,
// and behind them q . out, u, delta, P of both blocks, and dq = (out, weighed, + delta n + P k) scale. Only k is loaded
// twice.
//
// A tile's stages, 16 KiB each, six in the ring:
//   k, 64 columns each
//   for each x: v_x; c_x of columns 0-127, c_x of columns 128-255 (not where it is zero); dh_x
//   k, tokens 0-63: columns 0-127, 128-255; tokens 64-127: the same
// q has a place of its own, which is free once q . out is made.
//
// Two warpgroups of 64 rows each. A thread's accumulators are 128 of out and 64 of T (T1, then T2), over all 128
// columns. Group 0 makes columns 64-127 too, where its rows have no weight, and leaves them out from there on: a product
// of 128 columns reads less of shared memory than two of 64. D T1 is kept in shared memory in float32: u and the gates'
// sums need exact products. P is in registers. Three more warps bring the gates, n, 1 / d and q . n, of a tile while
// the last one is made.
//
// Shared memory: ring 96 KiB, q 64, D T1 48 (then rows on their way out), column sums 4, the gates of two tiles 9.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/hopper/output_chunk.cuh"

namespace flash_xlstm::cuda::hopper {

// What the consumers need beside the ring.
struct DqGates {
  Tile tile;  // item < 0: there are no more
  float2 m_start;
  void* out;  // of the tile's first token
  alignas(16) float2 alpha[chunk_tokens];
  float2 beta[chunk_tokens];
  // Brought later.
  float2 normalizer[chunk_tokens];  // 1 / d, sign
  float n[256], q_n[chunk_tokens];
};

struct DqShared {
  static constexpr int num_stages = 6, panels_q = 4;
  alignas(1024) unsigned char stage[num_stages][ab_bytes];
  unsigned char q[panels_q][ab_bytes];
  // Of a warp of group 0 4 KiB, of group 1 8: D T1, 16 bytes a lane for every 8 columns. Then 16 rows x 64 columns to
  // memory. No warp touches another's.
  unsigned char own[12][4096];
  float column_sum[2][consumer_warps][box];  // of columns 0-63, 64-127
  DqGates gates[2];
  uint64_t full[num_stages], empty[num_stages];
  uint64_t full_q, empty_q, full_gates[2], empty_gates[2], full_late[2], empty_late[2];
};
static_assert(sizeof(DqShared) <= 232448);

// The place in the ring, in one register.
struct DqRing {
  int place = 0;
  __device__ int stage() const { return place < DqShared::num_stages ? place : place - DqShared::num_stages; }
  __device__ int parity() const { return place < DqShared::num_stages ? 0 : 1; }
  __device__ void advance() { place = place == 2 * DqShared::num_stages - 1 ? 0 : place + 1; }
};

__device__ __forceinline__ void produce_dq(const OutputArgs& args, DqShared& sh, DqRing& ring, const Tile& tile,
                                           int parity) {
  const Work& w = args.w;
  const Maps& maps = args.maps;
  const int token = tile.first;
  const auto begin_stage = [&] {
    ptx::mbarrier_wait(&sh.empty[ring.stage()], ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect(&sh.full[ring.stage()], ab_bytes);
    return sh.stage[ring.stage()];
  };
  const auto load_box = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col, int from,
                            uint64_t hint) { ptx::tma_load(to, &map, full, col, tile.head, from, tile.row, hint); };
  const auto load_rows = [&](unsigned char* to, const CUtensorMap& map, uint64_t* full, int col,
                             uint64_t hint = ptx::evict_first) {  // 128 tokens x 64
    load_box(to, map, full, col, token, hint);
    load_box(to + box_bytes, map, full, col, token + box, hint);
  };
  const auto load_stage = [&](const CUtensorMap& map, int col, uint64_t hint = ptx::evict_first) {
    unsigned char* const to = begin_stage();
    load_rows(to, map, &sh.full[ring.stage()], col, hint);
    ring.advance();
  };
  for (int y = 0; y < DqShared::panels_q; ++y) {
    if (y == 2) {  // two stages of k come before the last tile's q is done with
      ptx::mbarrier_wait(&sh.empty_q, parity ^ 1);
      ptx::mbarrier_arrive_expect(&sh.full_q, DqShared::panels_q * ab_bytes);
      for (int x = 0; x < DqShared::panels_q; ++x) load_rows(sh.q[x], maps.q, &sh.full_q, x * box);
    }
    load_stage(maps.k, y * box, ptx::evict_last);  // read twice
  }
  const int dv = static_cast<int>(w.p.dv);
  for (int x = 0; x * box < dv; ++x) {
    load_stage(maps.v, x * box);
    if (tile.has_state) {
      for (int half = 0; half < 2; ++half) {
        unsigned char* const to = begin_stage();
        for (int y = 0; y < 2; ++y) {
          ptx::tma_load(to + y * box_bytes, &maps.c, &sh.full[ring.stage()], 0, w.block_index(half * 2 + y, x) * box,
                        tile.item);
        }
        ring.advance();
      }
    }
    load_stage(maps.dh, x * box);
  }
  for (int x = 0; x < 4; ++x) {
    unsigned char* const to = begin_stage();
    for (int y = 0; y < 2; ++y) {
      load_box(to + y * box_bytes, maps.k, &sh.full[ring.stage()], (x % 2 * 2 + y) * box, token + x / 2 * box,
               ptx::evict_first);
    }
    ring.advance();
  }
}

// Three warps bring what the consumers need beside the ring. `parity`: which of the two places; `phase`: of its barriers.
// alpha, beta, and where the tile lies.
template <typename T>
__device__ __forceinline__ void load_dq_gates(const OutputArgs& args, DqShared& sh, const Tile& tile, int parity,
                                              int phase) {
  const Work& w = args.w;
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(tile.item) * chunk_tokens;
  ptx::mbarrier_wait(&sh.empty_gates[parity], phase ^ 1);
  DqGates& to = sh.gates[parity];
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    to.alpha[x * 32 + lane] = w.alpha[item + x * 32 + lane];
    to.beta[x * 32 + lane] = w.beta[item + x * 32 + lane];
  }
  if (lane == 0) {
    to.tile = tile, to.m_start = w.m_start[tile.item];
    to.out = out_row<Output::dq, T>(args, tile, tile.row * w.layout.seq + tile.first, static_cast<int>(w.p.dqk));
  }
  arrive_once(&sh.full_gates[parity]);
}

// 1 / d and q . n of half a chunk's tokens; the second warp: n too.
template <bool second, typename T>
__device__ __forceinline__ void load_dq_late(const OutputArgs& args, DqShared& sh, const Tile& tile, int parity,
                                             int phase) {
  const Work& w = args.w;
  const int lane = threadIdx.x % 32, first = second ? box : 0;
  ptx::mbarrier_wait(&sh.empty_late[parity], phase ^ 1);
  DqGates& to = sh.gates[parity];
#pragma unroll 1
  for (int row = first + lane; row < first + box; row += 32) {
    float2 of_row{};
    if (row < tile.length) {
      const int64_t token = (tile.row * w.layout.seq + tile.first + row) * w.layout.heads + tile.head;
      const Normalizer d(args.s == nullptr ? 0.0f : args.s[token], args.m == nullptr ? 0.0f : args.m[token], w.p.eps,
                         w.p.normalize);
      of_row = make_float2(d.inverse, d.sign);
    }
    to.normalizer[row] = of_row;
  }
  float n[8], sums[2] = {0.0f, 0.0f};  // a lane has eight columns
  const int columns = static_cast<int>(w.p.dqk);
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    n[x] = tile.has_state && lane * 8 + x < columns ? w.n[tile.item * w.layout.dqk + lane * 8 + x] : 0.0f;
  }
  if constexpr (second) {
    *reinterpret_cast<float4*>(to.n + lane * 8) = make_float4(n[0], n[1], n[2], n[3]);
    *reinterpret_cast<float4*>(to.n + lane * 8 + 4) = make_float4(n[4], n[5], n[6], n[7]);
  }
  ptx::mbarrier_wait(&sh.full_q, parity);
  if (tile.has_state) add_row_dots<T>(sh.q[lane / 8] + (second ? box_bytes : 0), n, sums);
  arrive_once(&sh.empty_q);
#pragma unroll
  for (int x = 0; x < 2; ++x) to.q_n[first + (x * 8 + lane % 8) * 4 + lane / 8] = sums[x];
  arrive_once(&sh.full_late[parity]);
}

// Writes the warp's 16 rows, 64 columns at a time through shared memory, 16 bytes a lane. `to`: of the row lane / 8, at
// column lane % 8 * 8. rows, columns: how many there are. token: elements from a row to the next.
template <typename T>
__device__ __forceinline__ void store_dq_rows(uint32_t part, const float (&out)[2][64], T* to, int64_t token, int rows,
                                              int columns, uint32_t& odd) {
  const int lane = lane_again();
  // The 16-byte pieces of neighbouring rows lie in different banks.
  const uint32_t in = part + (lane % 16) * 128 + ((lane / 16) ^ (lane % 8)) * 16;
  const uint32_t from = part + (lane / 8) * 128 + ((lane % 8) ^ (lane / 8)) * 16;
  columns -= lane % 8 * 8;
  token *= 4;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    __syncwarp();
    asm volatile("" : "+l"(token));  // or four addresses would be kept
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      uint32_t two[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        const int i = x % 2 * 32 + y * 8 + z * 2;
        two[z] = pack<T>(out[x / 2][i], out[x / 2][i + 1]);
        note_odd<T>(odd, two[z]);
      }
      ptx::stmatrix_x4(in ^ (y * 32), two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
#pragma unroll
    for (int z = 0; z < 4; ++z) {  // rows 4 z + lane / 8
      store_if(lane / 8 + z * 4 < rows && x * 64 < columns, to + z * token + x * 64,
               load_shared_16((from ^ (z % 2 * 64)) + z * 512));
    }
  }
}

// The consumers' way. Both groups run the same instructions, which should fit the instruction caches.
template <typename T>
__device__ __forceinline__ void consume_dq(const OutputArgs& args, DqShared& sh, const int warp) {
  const int group = warp / 4, lane = threadIdx.x % 32, quad = lane / 4, pos = lane % 4;
  const int row = warp * 16 + quad, to_diagonal = row - pos * 2;
  const int dv = static_cast<int>(args.w.p.dv), dqk = static_cast<int>(args.w.p.dqk);
  // Places in shared memory are in units of 16 bytes.
  constexpr int ab = ab_bytes / 16, box_place = box_bytes / 16;
  const int group_rows = group * box_place;  // to the group's rows
  const uint32_t q_place = ptx::shared_address(sh.q[0]) >> 4;
  unsigned char* const own = sh.own[group == 0 ? warp : 4 + (warp - 4) * 2];
  float4* const weights = reinterpret_cast<float4*>(own) + lane;  // D T1; 32 further on for every 8 columns
  DqRing ring;
  float out[2][64], t[64];  // out: of columns 0-127, 128-255
  const auto take = [&] {   // the next stage, once it is full
    ptx::mbarrier_wait(&sh.full[ring.stage()], ring.parity());
    const int stage = ring.stage();
    ring.advance();
    return stage;
  };
  const auto clear = [](float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = 0.0f;
    ptx::hold(x);
  };
  const auto take_late_half = [&] {  // T of columns 64-127 in the place of columns 0-63
#pragma unroll
    for (int i = 0; i < 32; ++i) t[i] = t[i + 32];
  };
  const auto hold_out = [&] {
    ptx::hold(out[0]);
    ptx::hold(out[1]);
  };
  const auto add_t = [&](uint32_t a, uint32_t b) {  // of a panel
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, 128>::template a_shared<false>(t, rows_at(a + group_rows + kk * 2), rows_at(b + kk * 2), true);
    }
  };
  const auto add_state = [&](float (&half)[64], uint32_t dh, uint32_t c) {
#pragma unroll
    for (int kk = 0; kk < box / 16; ++kk) {
      ptx::Wgmma<T, 128>::template a_shared<false>(half, rows_at(dh + group_rows + kk * 2), rows_at(c + kk * 2), true);
    }
  };

  clear(out[0]);
  clear(out[1]);
#pragma unroll 1
  for (int tiles = 0;; ++tiles) {
    const int parity = tiles % 2, phase = tiles / 2 % 2;
    const bool has_last = tiles > 0;
    ptx::mbarrier_wait(&sh.full_gates[parity], phase);
    const DqGates &gates = sh.gates[parity], &last = sh.gates[parity ^ 1];
    const bool has_tile = __shfl_sync(all_lanes, gates.tile.item, 0) >= 0;
    // T1, while the last tile's rows are written. Not behind branches, where the compiler would serialize products:
    // behind the last tile T1 is made of what there is, before the first one no rows are written.
    clear(t);
    if (has_tile) ptx::mbarrier_wait(&sh.full_q, parity);
    const int first_stage = ring.stage();
    uint32_t k[DqShared::panels_q];
#pragma unroll
    for (int y = 0; y < DqShared::panels_q; ++y) {
      if (has_tile) ptx::mbarrier_wait(&sh.full[ring.stage()], ring.parity());
      k[y] = uniform_place(sh, ring.stage());
      ring.advance();
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int y = 0; y < DqShared::panels_q; ++y) add_t(q_place + y * ab, k[y]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // or the compiler would wait for T1 before out is read
    hold_out();
    uint32_t odd = 0;
    store_dq_rows<T>(ptx::shared_address(own), out,
                     static_cast<T*>(last.out) + (warp * 16 + lane / 8) * args.out_token + lane % 8 * 8, args.out_token,
                     has_last ? last.tile.length - warp * 16 : 0, dqk, odd);
    ptx::wgmma_wait<0>();
    ptx::hold(t);
    if (__any_sync(all_lanes, (odd & 0x7fff7fffu) != 0) && has_last) {
      __syncwarp();
      // Written by these lanes.
      const int64_t at = static_cast<int64_t>(last.tile.item) * chunk_tokens + row;
      const float *const inv_d = args.w.inv_d + at, *const delta = args.w.delta + at;
      mend_rows<Output::dq, 256, T>(args, last.tile, warp * 16, make_float2(inv_d[0], inv_d[8]),
                                    make_float2(delta[0], delta[8]));
    }
    if (!has_tile) break;
    if (has_last) arrive_once(&sh.empty_gates[parity ^ 1]);
    for (int y = 0, stage = first_stage; y < DqShared::panels_q; ++y) {
      release(sh, stage);
      stage = stage == DqShared::num_stages - 1 ? 0 : stage + 1;
    }

    // D T1
    const bool has_state = __shfl_sync(all_lanes, gates.tile.has_state ? 1 : 0, 0) != 0;
    const auto decay = [&](float2 row_log, float4 logs, int y) {
      return fast_exp2(log_difference(row_log, y ? make_float2(logs.z, logs.w) : make_float2(logs.x, logs.y)));
    };
    __syncwarp();  // all lanes have read their parts of the rows
    float2 row_log[2] = {gates.alpha[row], gates.alpha[row + 8]};
#pragma unroll 1
    for (int half = 0; half <= group; ++half) {
      const float2* const betas = gates.beta + half * box + pos * 2;
      const int ahead = to_diagonal - half * box;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float4 logs = *reinterpret_cast<const float4*>(betas + c * 8);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const float d = decay(row_log[r], logs, y);
            float& x = t[c * 4 + r * 2 + y];
            const bool counts = d != 0.0f && ahead >= c * 8 + y - r * 8;
            ptx::mul_in_place(x, d);
            x = counts ? x : 0.0f;
          }
        weights[(half * 8 + c) * 32] = make_float4(t[c * 4], t[c * 4 + 1], t[c * 4 + 2], t[c * 4 + 3]);
        if (c % 2 == 1) ptx::keep_order();
      }
      take_late_half();
    }

    // The panels.
    clear(t);
    clear(out[0]);
    clear(out[1]);
    if (has_state) {
#pragma unroll 1
      for (int left = dv; left > 0; left -= box) {
        const int of_v = take(), of_c = take(), of_late_c = take(), of_dh = take();
        const uint32_t v = uniform_place(sh, of_v), c = uniform_place(sh, of_c), late_c = uniform_place(sh, of_late_c),
                       dh = uniform_place(sh, of_dh);
        ptx::wgmma_fence();
        add_t(dh, v);
        ptx::wgmma_commit();
        add_state(out[0], dh, c);
        ptx::wgmma_commit();
        add_state(out[1], dh, late_c);
        ptx::wgmma_commit();
        ptx::wgmma_wait<2>();
        release(sh, of_v);
        ptx::wgmma_wait<1>();
        release(sh, of_c);
        ptx::wgmma_wait<0>();
        release(sh, of_late_c);
        release(sh, of_dh);
      }
    } else {
      arrive_once(&sh.empty_q);
#pragma unroll 1
      for (int left = dv; left > 0; left -= box) {
        const int of_v = take(), of_dh = take();
        const uint32_t v = uniform_place(sh, of_v), dh = uniform_place(sh, of_dh);
        ptx::wgmma_fence();
        add_t(dh, v);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        release(sh, of_v);
        release(sh, of_dh);
      }
    }
    ptx::hold(t);
    hold_out();

    // q . out
    float dots[2] = {0.0f, 0.0f}, u[2] = {0.0f, 0.0f};
    if (has_state) {
      const uint32_t q_row = q_place * 16 + (warp * 16 + lane % 16) * 128;
#pragma unroll
      for (int y = 0; y < 16; ++y) {
        uint32_t two[4];
        ptx::ldmatrix_x4<false>(two, q_row + y / 4 * ab_bytes + (((y % 4 * 2 + lane / 16) ^ (lane % 8)) * 16));
#pragma unroll
        for (int z = 0; z < 4; ++z) {
          const float2 pair = unpack<T>(two[z]);
          ptx::fma_in_place(dots[z % 2], pair.x, out[y / 8][y % 8 * 8 + z * 2]);
          ptx::fma_in_place(dots[z % 2], pair.y, out[y / 8][y % 8 * 8 + z * 2 + 1]);
        }
      }
      arrive_once(&sh.empty_q);
    }

    // u: D T1 . T2. Where D T1 is 0, T2 does not count, whatever it is.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > group) continue;
#pragma unroll
      for (int c = half * 8; c < half * 8 + 8; ++c) {
        const float4 four = weights[c * 32];
        const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          asm volatile("{\n.reg .pred p;\nsetp.neu.f32 p, %1, 0f00000000;\n@p fma.rn.f32 %0, %1, %2, %0;\n}\n"
                       : "+f"(u[x / 2])
                       : "f"(weight[x]), "f"(t[c * 4 + x]));
        }
        if (c % 2 == 1) ptx::keep_order();
      }
    }
    ptx::mbarrier_wait(&sh.full_late[parity], phase);
    const auto at_item = [&] { return static_cast<int64_t>(gates.tile.item) * chunk_tokens; };
    const int64_t at = at_item() + row;
    float inv_d[2], delta[2], of_c[2], of_n[2];  // all with scale
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Work& w = args.w;
      const float factor = has_state ? fast_exp2(log_sum(gates.alpha[row + r * 8], gates.m_start)) : 0.0f;
      const float dot = quad_sum(dots[r]);
      const float sum = w.p.scale * (quad_sum(u[r]) + (factor == 0.0f ? 0.0f : factor * dot));
      const float2 normalizer = gates.normalizer[row + r * 8];
      const float of_u = row + r * 8 < gates.tile.length ? sum * normalizer.x : 0.0f;
      const float of_s = normalizer.y == 0.0f ? 0.0f : -of_u * normalizer.x * normalizer.y;
      inv_d[r] = w.p.scale * normalizer.x, delta[r] = w.p.scale * of_s;
      of_c[r] = factor * inv_d[r], of_n[r] = factor * delta[r];
      if (pos == 0) {
        w.inv_d[at + r * 8] = normalizer.x, w.delta[at + r * 8] = of_s;
        w.e[at + r * 8] = w.p.input_gate == InputGate::exponential ? -of_u * w.p.eps * normalizer.x : 0.0f;
        w.q_dq[at + r * 8] =
            (of_c[r] == 0.0f ? 0.0f : of_c[r] * dot) + (of_n[r] == 0.0f ? 0.0f : of_n[r] * gates.q_n[row + r * 8]);
      }
    }
    if (has_state) {
#pragma unroll
      for (int c = 0; c < 32; ++c) {
        const float2 n = pair_at(gates.n, c * 8 + pos * 2);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            float& x = out[c / 16][c % 16 * 4 + r * 2 + y];
            ptx::mul_in_place(x, of_c[r]);
            ptx::fma_in_place(x, of_n[r], y ? n.y : n.x);
          }
        if (c % 4 == 3) ptx::keep_order();
      }
    }

    // P, rounded, in D T1's place, and the sums of Y.
    const auto of_pair = [&](int x) { return __uint_as_float(pack<T>(t[x], t[x + 1])); };
    float of_row[2] = {0.0f, 0.0f};
    row_log[0] = gates.alpha[row], row_log[1] = gates.alpha[row + 8];
#pragma unroll 1
    for (int half = 0; half <= group; ++half) {
      const float2* const betas = gates.beta + half * box + pos * 2;
      const int ahead = to_diagonal - half * box;
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        float of_column[8] = {};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int c = four * 4 + x;
          const float4 logs = *reinterpret_cast<const float4*>(betas + c * 8);
          const float4 weight = weights[(half * 8 + c) * 32];
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int y = 0; y < 2; ++y) {
              float& value = t[c * 4 + r * 2 + y];
              const float d = decay(row_log[r], logs, y);
              const float of_t1 = r == 0 ? (y == 0 ? weight.x : weight.y) : y == 0 ? weight.z : weight.w;
              asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(value) : "f"(inv_d[r]), "f"(delta[r]));
              asm volatile(
                  "{\n.reg .pred p;\nsetp.neu.f32 p, %2, 0f00000000;\n@p fma.rn.f32 %0, %2, %3, %0;\n"
                  "@p fma.rn.f32 %1, %2, %3, %1;\n}\n"
                  : "+f"(of_row[r]), "+f"(of_column[x * 2 + y])
                  : "f"(of_t1), "f"(value));
              ptx::mul_in_place(value, d);
              asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %1, %2;\n@p mov.b32 %0, 0;\n}\n"
                           : "+f"(value)
                           : "r"(ahead), "r"(c * 8 + y - r * 8));
            }
          if (c % 2 == 1) {
            weights[(half * 8 + c) * 32] =
                make_float4(of_pair(c * 4 - 4), of_pair(c * 4 - 2), of_pair(c * 4), of_pair(c * 4 + 2));
          }
          ptx::keep_order();
        }
        sh.column_sum[half][warp][(four * 4 + quad / 2) * 8 + pos * 2 + quad % 2] = column_sums(of_column, quad);
      }
      take_late_half();
    }
    arrive_once(&sh.empty_late[parity]);

    // P k
    int stage[4];
    uint32_t place[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      stage[x] = take();
      place[x] = uniform_place(sh, stage[x]);
    }
    uint32_t p[8][4];
    const auto load_p = [&](int half) {
#pragma unroll
      for (int kk = half * 4; kk < half * 4 + 4; ++kk) {
        const float4 four = weights[(kk * 2 + 1) * 32];
        p[kk][0] = __float_as_uint(four.x), p[kk][1] = __float_as_uint(four.y);
        p[kk][2] = __float_as_uint(four.z), p[kk][3] = __float_as_uint(four.w);
      }
    };
    const auto add_inside = [&](int half) {
#pragma unroll
      for (int x = 0; x < 2; ++x)
#pragma unroll
        for (int kk = 0; kk < box / 16; ++kk) {
          ptx::Wgmma<T, 128>::template a_registers<true>(out[x], p[half * 4 + kk],
                                                         transposed_at(place[half * 2 + x] + kk * 128), true);
        }
    };
    load_p(0);
    if (group == 1) load_p(1);
    hold_out();
    ptx::wgmma_fence();
    add_inside(0);
    if (group == 1) add_inside(1);
    ptx::wgmma_commit();

    // The sums over columns: of the block on the diagonal for the group's own tokens, of the full one for the others.
    // The next tile's are written when all warps have given these stages of k back, and so have read these.
    ptx::named_barrier(1 + group, 128);
    const int token = threadIdx.x % 128, half = token / box;
    float sum = 0.0f;
    if (half <= group) {
#pragma unroll
      for (int x = 0; x < 4; ++x) sum += sh.column_sum[half][group * 4 + x][token % box];
    }
    const int64_t shares_stride = args.w.layout.max_chunks * args.w.layout.heads * chunk_tokens;
    const int64_t part = half == group ? 1 : 2;  // behind dk's one column tile
    args.w.k_dk[part * shares_stride + at_item() + token] = sum;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inside = quad_sum(of_row[r]);
      if (pos == 0) args.w.q_dq[shares_stride + at_item() + row + r * 8] = inside;
    }
    ptx::wgmma_wait<0>();
    hold_out();
#pragma unroll
    for (int x = 0; x < 4; ++x) release(sh, stage[x]);
  }
}

template <typename T>
__global__ void __launch_bounds__(output_threads, 1) dq_chunk_kernel(const __grid_constant__ OutputArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  DqShared& sh = *reinterpret_cast<DqShared*>(shared_bytes);
  if (ptx::shared_address(shared_bytes) % 1024 != 0) asm volatile("trap;");  // so addresses are constants
  if (threadIdx.x == 0) {
    for (int s = 0; s < DqShared::num_stages; ++s) {
      ptx::mbarrier_init(&sh.full[s], 1);
      ptx::mbarrier_init(&sh.empty[s], consumer_warps);
    }
    ptx::mbarrier_init(&sh.full_q, 1);
    ptx::mbarrier_init(&sh.empty_q, consumer_warps + 2);
    for (int x = 0; x < 2; ++x) {
      ptx::mbarrier_init(&sh.full_gates[x], 1);
      ptx::mbarrier_init(&sh.empty_gates[x], consumer_warps);
      ptx::mbarrier_init(&sh.full_late[x], 2);
      ptx::mbarrier_init(&sh.empty_late[x], consumer_warps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_earlier_kernels();

  const int warp = __shfl_sync(all_lanes, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < consumer_warps) {
    ptx::more_registers<240>();
    consume_dq<T>(args, sh, warp);
    return;
  }
  ptx::fewer_registers<24>();
  if (warp == consumer_warps) {
    if (threadIdx.x % 32 != 0) return;
    DqRing ring;
    for_chunk_tiles<true>(args.w, [&](const Tile& tile, int parity) { produce_dq(args, sh, ring, tile, parity); });
    return;
  }
  int phase = 0;  // turns with every second tile
  const auto for_tiles = [&](auto&& f) {
    return for_chunk_tiles<true>(args.w, [&](const Tile& tile, int parity) {
      f(tile, parity);
      phase ^= parity;
    });
  };
  if (warp == consumer_warps + 1) {
    const int end = for_tiles([&](const Tile& tile, int parity) { load_dq_gates<T>(args, sh, tile, parity, phase); });
    ptx::mbarrier_wait(&sh.empty_gates[end], phase ^ 1);
    if (threadIdx.x % 32 == 0) sh.gates[end].tile.item = -1;
    arrive_once(&sh.full_gates[end]);
  } else if (warp == consumer_warps + 2) {
    for_tiles([&](const Tile& tile, int parity) { load_dq_late<false, T>(args, sh, tile, parity, phase); });
  } else {
    for_tiles([&](const Tile& tile, int parity) { load_dq_late<true, T>(args, sh, tile, parity, phase); });
  }
}

}  // namespace flash_xlstm::cuda::hopper
