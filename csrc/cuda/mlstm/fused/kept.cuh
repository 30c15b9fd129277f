// c at the start of every 128 tokens goes to memory, for the backward, beside the product c^T q^T.
//
// A warp's part of it, 16 dv x 16 dqk, is an operand of that product. stmatrix transposes the operand into the
// warpgroup's panel, which four parts of four warps fill: 64 dqk x 64 dv, laid out as memory has it. One bulk store
// takes the panel out while the next one fills.
//
// Stores by the warps themselves would keep a product of 64 clocks waiting for 192: 16 lines of 32 bytes each for a
// warp's part, and its way back from shared memory.
//
// stmatrix is predicated. The branch of pass_on keeps the products in flight: ptxas serializes none.
#pragma once

#include "cuda/mlstm/fused/shared.cuh"

namespace flash_xlstm::cuda::fused {

// keeps: else it does nothing.
template <bool keeps>
class KeptParts {
 public:
  // Of the state at the item's start, laid out as Work::c. warp: of the warpgroup. wanted: else nothing is written.
  __device__ __forceinline__ KeptParts(const Args& args, Shared& sh, int group, int warp, int item, bool wanted)
      : args_(args), sh_(sh), group_(group), warp_(warp), item_(item), wanted_(wanted) {
    if (!keeps) return;
    written_ = address(sh.kept[group][0]) + swizzled(lane() / 16 * 8 + lane() % 8, warp * 2 + lane() / 8 % 2);
  }

  // part: the operand of dqk 16 x .., matrices of 8 dv x 8 dqk: (dqk 0, dv 0), (0, 8), (8, 0), (8, 8).
  __device__ __forceinline__ void stage(const uint32_t (&part)[4], int x) const {
    if (!keeps) return;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(int{wanted_}),
        "r"(written_ + x / 4 % kept_panels * kept_panel + x % 4 * 16 * 128), "r"(part[0]), "r"(part[1]), "r"(part[2]),
        "r"(part[3])
        : "memory");
  }
  // Behind the barrier the panel is full, and the other one, whose store was the last before, has been read.
  __device__ __forceinline__ void pass_on(int x) const {
    if (!keeps || x % 4 != 3 || !wanted_) return;
    static_assert(kept_panels == 2);
    ptx::fence_async_shared();
    const bool stores = warp_ == 0 && lane() == 0;
    if (stores) ptx::bulk_store_wait_read<0>();
    ptx::named_barrier(first_barrier + group_, 128);
    if (stores) {
      const int64_t at = int64_t{item_} * blocks_of_item + x / 4 * (dv / 64) + column_block() * state_groups + group_;
      ptx::bulk_store(args_.kept_c + at * block, sh_.kept[group_][x / 4 % kept_panels], kept_panel);
      ptx::bulk_store_commit();
    }
  }
  // Before the kernel ends.
  static __device__ __forceinline__ void wait() {
    if (keeps) ptx::bulk_store_wait<0>();
  }

 private:
  static constexpr int block = 64 * 64, blocks_of_item = dqk / 64 * (dv / 64), first_barrier = 2;

  const Args& args_;
  Shared& sh_;
  int group_, warp_, item_;
  bool wanted_;
  uint32_t written_;
};

}  // namespace flash_xlstm::cuda::fused
