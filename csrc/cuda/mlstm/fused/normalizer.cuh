// n, in float32: a block has half of the 256 columns, a warp 64 of them.
//
// n at a chunk's start goes to both blocks as a sum of three bfloat16, three rows behind the 64 of k's panel of the
// same columns: the product of T then makes q n too. The own block's rows are the source of the copy to the other,
// which has read them once the stage is empty. No chunk can begin before, so these warps' time for a chunk bounds
// that of all. A lane reads 16 bytes of a row of k at a time: eight columns of every fourth row.
#pragma once

#include "cuda/mlstm/fused/shared.cuh"

namespace flash_xlstm::cuda::fused {

constexpr int n_lanes = 8, n_columns = 64 / n_lanes, n_row_groups = 32 / n_lanes;

__device__ __forceinline__ uint4 load_16(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
  return x;
}

// sum += w_j k_j over the lane's rows, then over all rows. masked: what has weight 0 is left out.
template <bool masked>
__device__ __forceinline__ void add_rows(float (&sum)[n_columns], const float* w, const unsigned char* panel) {
  const uint32_t piece = lane() % n_lanes * 16, group = lane() / n_lanes;
  constexpr int rows = chunk_tokens / n_row_groups, in_flight = 2;  // rows of a lane, side by side
#pragma unroll 1
  for (int x = 0; x < rows; x += in_flight) {
    const int row = group * rows + x;
    uint4 raw[in_flight];
#pragma unroll
    for (int y = 0; y < in_flight; ++y) {
      raw[y] = load_16(address(panel) + (row + y) * 128 + (piece ^ ((x % 8 + y) * 16)));  // swizzled
    }
    const float2 weights = *reinterpret_cast<const float2*>(w + row);
    __syncwarp();  // ptxas sinks no load past it
    const float of_row[in_flight] = {weights.x, weights.y};
#pragma unroll
    for (int y = 0; y < in_flight; ++y) {
      uint32_t four[4] = {raw[y].x, raw[y].y, raw[y].z, raw[y].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (masked && of_row[y] == 0.0f) four[c] = 0;
        const float2 k = unpack<bf16>(four[c]);
        sum[c * 2] = fmaf(of_row[y], k.x, sum[c * 2]), sum[c * 2 + 1] = fmaf(of_row[y], k.y, sum[c * 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < n_columns; ++c) {
    sum[c] += __shfl_xor_sync(all_lanes, sum[c], n_lanes);
    sum[c] += __shfl_xor_sync(all_lanes, sum[c], 2 * n_lanes);
  }
}

// One warp, the `nth` of the block's. keeps: n at every 128 tokens' start goes to memory. The first one also copies the
// states of sequences without tokens.
template <bool keeps>
__device__ __forceinline__ void sum_n(const Args& args, Shared& sh, int rank, int nth) {
  const int piece = lane() % n_lanes, group = lane() / n_lanes, own_panel = rank * block_panels + nth;
  const bool writes = column_block() < blocks;  // the other half of the columns has the same n
  float n[n_columns];                           // the same in all row groups
  const auto at = [&](int task) { return int64_t{task} * dqk + own_panel * 64 + piece * n_columns; };
  int it = 0;
  for (int task = first_task(); task < args.tasks; task += task_step()) {
#pragma unroll
    for (int c = 0; c < n_columns; ++c) n[c] = args.n0 != nullptr ? args.n0[at(task) + c] : 0.0f;
    const Task of(args, task);
    const int chunks = of.chunks(), first_item = of.item(args, 0);
    for (int j = 0; j < chunks; ++j, ++it) {
      const int s = it & 1, parity = (it >> 1) & 1;
      ptx::mbarrier_wait(&sh.empty_k[s], parity ^ 1);
      unsigned char* const panel = sh.k[s] + own_panel * k_panel;
      unsigned char* const n_rows = panel + chunk_tokens * 128;
      float left[n_columns];
#pragma unroll
      for (int c = 0; c < n_columns; ++c) left[c] = n[c];
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        uint32_t two[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          two[c] = pack<bf16>(left[c * 2], left[c * 2 + 1]);
          const float2 high = unpack<bf16>(two[c]);
          left[c * 2] -= high.x, left[c * 2 + 1] -= high.y;
        }
        if (group == part) {  // row 64 + part of the panel
          *reinterpret_cast<uint4*>(n_rows + swizzled(part, piece)) = make_uint4(two[0], two[1], two[2], two[3]);
        }
      }
      if (group == 3) {
        float4* const to = reinterpret_cast<float4*>(sh.n_before[nth] + piece * n_columns);
        to[0] = make_float4(n[0], n[1], n[2], n[3]), to[1] = make_float4(n[4], n[5], n[6], n[7]);
      }
      ptx::fence_async_shared();
      __syncwarp();
      if (lane() < blocks && lane() != rank) {
        asm volatile(
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                ptx::peer_address(n_rows, lane())),
            "r"(address(n_rows)), "r"(n_bytes), "r"(ptx::peer_address(&sh.full_k[s], lane()))
            : "memory");
      }
      ptx::mbarrier_arrive(&sh.full_k[s]);  // every lane for its own stores
      if (keeps && writes && group == 3 && j % 2 == 0) {
        const int item = first_item + j / 2 * static_cast<int>(args.layout.heads);
        float4* const to =
            reinterpret_cast<float4*>(args.kept_n + int64_t{item} * dqk + own_panel * 64 + piece * n_columns);
        __stcs(to, make_float4(n[0], n[1], n[2], n[3])), __stcs(to + 1, make_float4(n[4], n[5], n[6], n[7]));
      }
      ptx::mbarrier_wait(&sh.full_k[s], parity);
      const GateRecord& gates = sh.gates[s];
      const float keep = gates.keep;
#pragma unroll
      for (int c = 0; c < n_columns; ++c) n[c] = group == 0 ? n[c] * keep : 0.0f;
      add_rows<false>(n, gates.w, panel);
      float odd = 0.0f;
#pragma unroll
      for (int c = 0; c < n_columns; ++c) odd += n[c] * 0.0f;
      if (__any_sync(all_lanes, odd != 0.0f)) {  // once more, without what has weight 0
#pragma unroll
        for (int c = 0; c < n_columns; ++c) n[c] = group == 0 ? sh.n_before[nth][piece * n_columns + c] * keep : 0.0f;
        add_rows<true>(n, gates.w, panel);
      }
      release_everywhere(&sh.empty_k[s]);
    }
    if (args.n_last != nullptr && writes && group == 0) {
#pragma unroll
      for (int c = 0; c < n_columns; ++c) args.n_last[at(task) + c] = n[c];
    }
    if (chunks == 0 && args.c_last != nullptr && nth == 0) {
      for (int k = 0; k < dqk; ++k) {
        const int64_t from = (int64_t{task} * dqk + k) * dv + column_block() * dv_block;
        const float4* const c0 = reinterpret_cast<const float4*>(args.c0 + from);
        reinterpret_cast<float4*>(args.c_last + from)[lane()] =
            args.c0 != nullptr ? c0[lane()] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }
}

}  // namespace flash_xlstm::cuda::fused
