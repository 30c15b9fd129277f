// The warps that move chunks between memory and shared memory.
//   q, k: each block of the cluster loads half of the columns for both (multicast). k comes with the gates.
//   v: a block loads its own 128 columns. h of the same chunk, in v's place, goes out before the stage is loaded again,
//   and s with it.
#pragma once

#include "cuda/mlstm/fused/shared.cuh"

namespace flash_xlstm::cuda::fused {

__device__ __forceinline__ void load_for_all(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int head,
                                             int token, int row) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(address(barrier)), "r"(x), "r"(head), "r"(token), "r"(row),
      "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}
__device__ __forceinline__ void store_tile(const CUtensorMap* map, const void* from, int x, int head, int token,
                                           int row) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(address(from)), "r"(x), "r"(head), "r"(token), "r"(row)
               : "memory");
}

// One thread. A stage of q is empty half a chunk before k's.
__device__ __forceinline__ void load_q_and_k(const Args& args, Shared& sh, int rank) {
  Walk walk(args);
  for (int it = 0; walk.goes_on(args); ++it, walk.advance(args)) {
    const int s = it & 1, parity = ((it >> 1) & 1) ^ 1;
    const Task task(args, walk.task);
    const Place at(task, walk.j);
    const auto load = [&](unsigned char* stage, int panel_bytes, const CUtensorMap* map, uint64_t* full) {
      for (int x = rank * block_panels; x < (rank + 1) * block_panels; ++x) {
        load_for_all(stage + x * panel_bytes, map, full, x * 64, at.head, at.token, at.row);
      }
    };
    ptx::mbarrier_wait(&sh.empty_q[s], parity);
    ptx::mbarrier_arrive_expect(&sh.full_q[s], panels * q_panel);
    load(sh.q[s], q_panel, &args.q, &sh.full_q[s]);
    ptx::mbarrier_wait(&sh.empty_k[s], parity);
    ptx::mbarrier_arrive_expect(&sh.full_k[s], panels * chunk_tokens * 128 + static_cast<int>(sizeof(GateRecord)) +
                                                   (panels - block_panels) * n_bytes);
    load(sh.k[s], k_panel, &args.k, &sh.full_k[s]);
    ptx::tma_load(&sh.gates[s], &args.gates, &sh.full_k[s], 0, 0, walk.j % 2, task.item(args, walk.j));
  }
}

// A panel of h. The TMA leaves out what lies past the tensor's end, but not what lies past a packed sequence's.
__device__ __forceinline__ void store_h(const Args& args, const unsigned char* from, int4 place, int column) {
  const int row = place.x, head = place.y, token = place.z, left = place.w;
  if (args.layout.first_chunk == nullptr || left >= chunk_tokens) {
    if (lane() == 0) {
      store_tile(&args.h, from, column, head, token, row);
      ptx::bulk_store_commit();
    }
    return;
  }
  const int piece = lane() % 8;
#pragma unroll 1
  for (int x = lane() / 8; x < left; x += 4) {  // packed: there is one row
    bf16* const to = static_cast<bf16*>(args.h_rows) + ((token + x) * args.layout.heads + head) * dv + column;
    reinterpret_cast<uint4*>(to)[piece] = *reinterpret_cast<const uint4*>(from + swizzled(x, piece));
  }
  ptx::fence_async_shared();  // before the TMA's next write to the stage
}

// Of the chunk whose h is done. Its place in shared memory is written again four chunks on: not before v of the second
// chunk from it is there, which this warp loads.
__device__ __forceinline__ void store_s(const Args& args, const float* from, int4 place) {
  const int row = place.x, head = place.y, token = place.z, left = place.w;
  float* const to = args.s + (row * args.layout.seq + token) * args.layout.heads + head;
#pragma unroll
  for (int x = lane(); x < chunk_tokens; x += 32) {
    if (x < left) to[x * args.layout.heads] = from[x];
  }
}

// One warp.
__device__ __forceinline__ void load_v_and_store_h(const Args& args, Shared& sh) {
  Walk walk(args);
  const int first_column = column_block() * dv_block;
  int loaded = 0;
#pragma unroll 1
  for (int it = 0; it < loaded + v_stages; ++it) {
    const int s = it % v_stages, parity = it / v_stages & 1;
    if (it >= v_stages) {
      const int4 place = sh.h_place[s];
#pragma unroll 1
      for (int x = 0; x < state_groups; ++x) {
        ptx::mbarrier_wait(&sh.full_h[x][s], parity ^ 1);
        store_h(args, sh.v[s] + x * v_panel, place, first_column + x * 64);
      }
      if (args.s != nullptr && column_block() == 0) store_s(args, sh.g[(it - v_stages) & 3][1], place);
    }
    __syncwarp();
    if (!walk.goes_on(args)) continue;
    if (lane() == 0) {
      const Place at(Task(args, walk.task), walk.j);
      sh.h_place[s] = make_int4(at.row, at.head, at.token, at.left);
      const auto load = [&](int x) {
        ptx::mbarrier_arrive_expect(&sh.full_v[x][s], v_panel);
        ptx::tma_load(sh.v[s] + x * v_panel, &args.v, &sh.full_v[x][s], first_column + x * 64, at.head, at.token,
                      at.row);
      };
      ptx::bulk_store_wait_read<1>();
      load(0);
      ptx::bulk_store_wait_read<0>();
      load(1);
    }
    loaded = it + 1;
    walk.advance(args);
  }
  if (lane() == 0) ptx::bulk_store_wait<0>();
}

}  // namespace flash_xlstm::cuda::fused
