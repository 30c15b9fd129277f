// c and h, by two warpgroups, 64 of the block's 128 columns each.
//
// A warpgroup holds c^T, 64 dv x 256 dqk in float32, as accumulators (128 registers a thread). For a chunk it makes
//   out^T = c^T q^T               64 x 64 x 256, A = c^T rounded from the accumulators themselves: an accumulator has
//                                 the layout of a register operand, so the state never touches shared memory
//   c^T   = keep c^T + (w v)^T k  64 x 256 x 64, A = v^T by ldmatrix, weighted in float32 (v is half of k's size, and
//                                 k can be the operand as the TMA wrote it)
//   out^T = g' out^T + v^T P'^T   64 x 64 x 64, both from shared memory; g' and P' hold scale / d_t
// in this order of issue: c's multiplication by keep lies in the shadow of the first product, out's scaling and the wait
// for P' in that of the state's. out goes to shared memory in v's place.
//
// A first chunk without an initial state overwrites c and out: nothing is set to zero. Zeros written ahead take
// registers of their own, and ptxas serializes the products.
//
// Not finite: a product takes 0 times NaN or infinity as NaN. A weighted v of weight 0 is masked to 0. v also meets the
// zeros of P', where it would reach tokens before its own. So a warp that has seen a v that is not finite (all of v
// passes through its registers) replaces it by 0 before the last product and adds its share to out by itself.
#pragma once

#include "cuda/mlstm/fused/kept.cuh"
#include "cuda/mlstm/fused/products.cuh"
#include "cuda/mlstm/fused/shared.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_xlstm::cuda::fused {

// Not moved across a wait for products: their operands take the registers of earlier ones.
__device__ __forceinline__ uint32_t pack_here(float low, float high) {
  uint32_t two;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// The warp's 16 columns of v's panel.
__device__ __forceinline__ void clear_odd_values(unsigned char* v, int column) {
  const int token = lane() * 2;
  for (int x = 0; x < 2; ++x) {
    for (int half = 0; half < 2; ++half) {
      uint16_t* const at = reinterpret_cast<uint16_t*>(v + swizzled(token + x, column / 8 + half));
      for (int y = 0; y < 8; ++y) {
        if ((at[y] & 0x7f80) == 0x7f80) at[y] = 0;
      }
    }
  }
}

// out += the shares of the values that clear_odd_values has replaced. column: of v, the lane's first of two.
__device__ __forceinline__ void add_odd_values(float (&out)[32], const Args& args, const unsigned char* p, int task,
                                               int j, int column) {
  const Task of(args, task);
  const int pos = lane() % 4, count = min(chunk_tokens, of.length - j * chunk_tokens);
  const Strided& v = args.v_rows;
#pragma unroll 1
  for (int token = 0; token < count; ++token) {
    const bf16* const row = static_cast<const bf16*>(v.data) + of.row * v.batch +
                            (of.first + j * chunk_tokens + token) * v.seq + of.head * v.head + column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float value = to_float(row[r * 8]);
      if (is_finite(value)) continue;
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const int t = x * 8 + pos * 2 + y;
          const float weight = to_float(*reinterpret_cast<const bf16*>(p + swizzled(t, token / 8) + token % 8 * 2));
          if (weight != 0.0f) out[x * 4 + r * 2 + y] += weight * value;
        }
    }
  }
}

// Element x of the two accumulators is that of c0 or c_last at this offset from the lane's first.
__device__ __forceinline__ constexpr int state_offset(int x) {
  return (x / 64 * 128 + x % 64 / 4 * 8 + x % 2) * dv + x % 4 / 2 * 8;
}

// group: 0 or 1, the block's half of columns. keeps: c at every 128 tokens' start goes to memory.
template <bool keeps>
__device__ __forceinline__ void walk_states(const Args& args, Shared& sh, int group) {
  const int pos = lane() % 4, warp = threadIdx.x / 32 % 4;
  float c[2][64], out[32];  // two accumulators: ptxas refuses one of 256 columns where a launch has 128 registers
  constexpr int a_buffers = 3;
  uint32_t a[a_buffers][4];
  const auto pack_part = [&](uint32_t (&to)[4], int part) {
#pragma unroll
    for (int z = 0; z < 4; ++z) {
      const int x = part * 8 + z * 2;
      to[z] = pack_here(c[x / 64][x % 64], c[x / 64][x % 64 + 1]);
    }
  };
  const auto hold_c = [&] {
    ptx::hold(c[0]);
    ptx::hold(c[1]);
  };
  // This lane's place in v's panel, for ldmatrix: rows are tokens; for the store of out likewise.
  const uint32_t lane_place = swizzled((lane() / 16) * 8 + lane() % 8, warp * 2 + lane() / 8 % 2);

  Walk walk(args);
  const int first_column = column_block() * dv_block + group * 64 + warp * 16 + lane() / 4;  // of v, the lane's
  const int64_t first_state = int64_t{pos} * 2 * dv + first_column;
  const auto begin_task = [&] {
    if (args.c0 == nullptr || !walk.goes_on(args)) return;
    const float* const from = args.c0 + int64_t{walk.task} * dqk * dv + first_state;
#pragma unroll
    for (int x = 0; x < 128; ++x) {
      asm volatile("ld.global.f32 %0, [%1];" : "=f"(c[x / 64][x % 64]) : "l"(from + state_offset(x)));
    }
    hold_c();
    pack_part(a[0], 0);
  };
  int item = 0;
  const auto begin_task_and_item = [&] {
    begin_task();
    if (keeps && walk.goes_on(args)) item = Task(args, walk.task).item(args, 0);
  };
  begin_task_and_item();
  // Chunk `it`'s, to v's warp: behind the next chunk's first product, so that nothing waits for the fence.
  const auto hand_over_h = [&](int it) {
    ptx::fence_async_shared();
    release(&sh.full_h[group][it % v_stages]);
  };
  int it = 0;
#pragma unroll 1
  for (; walk.goes_on(args); ++it) {
    const bool adds = walk.j > 0 || args.c0 != nullptr;
    KeptParts<keeps> kept(args, sh, group, warp, item, walk.j % 2 == 0 && adds);
    kept.stage(a[0], 0);
    const int s = it & 1, parity = (it >> 1) & 1, v_stage = it % v_stages;
    const uint64_t q = ptx::wgmma_descriptor(address(sh.q[s])), k = ptx::wgmma_descriptor(address(sh.k[s]), k_panel);
    unsigned char* const v_panel_at = sh.v[v_stage] + group * v_panel;
    const uint32_t v = address(v_panel_at);
    const GateRecord& gates = sh.gates[s];
    ptx::mbarrier_wait(&sh.full_q[s], parity);
    ptx::mbarrier_wait(&sh.full_k[s], parity);
    const float keep = gates.keep;

    // c^T q^T
    ptx::wgmma_wait<0>();
    hold_c();
#pragma unroll
    for (int x = 0; x < dqk / 16; ++x) {
      if (x >= a_buffers) ptx::wgmma_wait<a_buffers - 1>();
      if (x > 0) pack_part(a[x % a_buffers], x);
      ptx::wgmma_fence();
      ptx::Wgmma<bf16, 64>::a_registers<false>(out, a[x % a_buffers], ptx::advanced(q, x / 4 * q_panel + x % 4 * 32),
                                               x > 0);
      ptx::wgmma_commit();
      if (x > 0) kept.stage(a[x % a_buffers], x);
      kept.pass_on(x);
      if (x == 0 && it > 0) hand_over_h(it - 1);
      // Behind a branch: else ptxas puts all multiplications behind the last product, which then hides none.
      if (x % 4 == 3 && adds) {
#pragma unroll
        for (int z = x * 8 - 24; z < x * 8 + 8; ++z) ptx::mul_in_place(c[z / 64][z % 64], keep);
      }
    }

    // (w v)^T k
    ptx::mbarrier_wait(&sh.full_v[group][v_stage], it / v_stages & 1);
    ptx::mbarrier_wait(&sh.good_k[s], parity);
    hold_c();
    uint32_t odd = 0;
#pragma unroll
    for (int x = 0; x < chunk_tokens / 16; ++x) {
      uint32_t (&wv)[4] = a[(dqk / 16 + x) % a_buffers];
      ptx::wgmma_wait<a_buffers - 1>();
      uint32_t two[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(two[0]), "=r"(two[1]), "=r"(two[2]), "=r"(two[3])
                   : "r"(v + lane_place + x * 2048)
                   : "memory");
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = x * 16 + half * 8 + pos * 2;
        const float2 w = *reinterpret_cast<const float2*>(gates.w + token);
        const uint32_t counts = gates.counts[token / 2];
#pragma unroll
        for (int z = 0; z < 2; ++z) {
          const uint32_t raw = two[half * 2 + z];
          const float2 y = unpack<bf16>(raw);
          asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(odd) : "r"(raw), "r"(0u));  // stays 0 while all are finite
          wv[half * 2 + z] = pack_here(y.x * w.x, y.y * w.y) & counts;
        }
      }
      ptx::wgmma_fence();
      ptx::Wgmma<bf16, 128>::a_registers<true>(c[0], wv, ptx::advanced(k, x * 2048), adds || x > 0);
      ptx::Wgmma<bf16, 128>::a_registers<true>(c[1], wv, ptx::advanced(k, 2 * k_panel + x * 2048), adds || x > 0);
      if (x + 1 < chunk_tokens / 16) ptx::wgmma_commit();
    }
    ptx::wgmma_commit();
    const bool has_odd = __any_sync(all_lanes, (odd & 0x7fff7fffu) != 0);
    if (has_odd) {
      clear_odd_values(v_panel_at, warp * 16);
      ptx::fence_async_shared();
      __syncwarp();
    }

    // g' out + v^T P'^T
    ptx::wgmma_wait<chunk_tokens / 16>();
    ptx::hold(out);
    release_everywhere(&sh.empty_q[s]);
    ptx::mbarrier_wait(&sh.full_p[s], parity);
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const float2 g = *reinterpret_cast<const float2*>(sh.g[it & 3][0] + x * 8 + pos * 2);
      ptx::mul_in_place(out[x * 4], g.x), ptx::mul_in_place(out[x * 4 + 1], g.y);
      ptx::mul_in_place(out[x * 4 + 2], g.x), ptx::mul_in_place(out[x * 4 + 3], g.y);
    }
    ptx::hold(out);
    ptx::wgmma_fence();
    const uint64_t v_rows = ptx::wgmma_descriptor(v, v_panel), p = ptx::wgmma_descriptor(address(sh.p[s]));
#pragma unroll
    for (int x = 0; x < chunk_tokens / 16; ++x) {
      product_64_transposed(out, ptx::advanced(v_rows, x * 2048), ptx::advanced(p, x * 32), adds || x > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the state's
    hold_c();
    release_everywhere(&sh.empty_k[s]);
    pack_part(a[0], 0);  // of the next chunk, beside the last product
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    hold_c();
    if (has_odd) {
      add_odd_values(out, args, sh.p[s], walk.task, walk.j, first_column);
    }
    release(&sh.empty_p[s]);
    // out^T by columns: matrices (tokens 16 x .. + 0, dv 0), (0, dv 8), (8, dv 0), (8, dv 8).
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const auto two = [&](int y) { return pack<bf16>(out[x * 8 + y], out[x * 8 + y + 1]); };
      ptx::stmatrix_x4_transposed(v_panel_at + lane_place + x * 2048, two(0), two(2), two(4), two(6));
    }
    if (walk.j + 1 == walk.count && args.c_last != nullptr) {
      float* const to = args.c_last + int64_t{walk.task} * dqk * dv + first_state;
#pragma unroll
      for (int x = 0; x < 128; ++x) to[state_offset(x)] = c[x / 64][x % 64];
    }
    if (walk.advance(args)) {
      begin_task_and_item();
    } else if (keeps && walk.j % 2 == 0) {
      item += static_cast<int>(args.layout.heads);
    }
  }
  if (it > 0) hand_over_h(it - 1);
  KeptParts<keeps>::wait();
}

}  // namespace flash_xlstm::cuda::fused
