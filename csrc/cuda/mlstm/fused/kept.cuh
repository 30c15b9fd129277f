// c at the start of every 128 tokens, to memory for the backward, on its way into the product c^T q^T.
//
// A warp's part there, 16 dv x 16 dqk, is transposed by stmatrix into 512 bytes of its own and read back, 16 bytes a
// lane. Two lanes then have the 32 bytes of a dqk row: whole sectors go out. The sectors of a line come from the four
// warps of a warpgroup. The loads of a part come behind its product's issue and its stores behind the next one's: no
// product waits for them.
//
// Predicated instructions, not branches: between products in flight there is no other control flow.
#pragma once

#include "cuda/mlstm/fused/shared.cuh"

namespace flash_xlstm::cuda::fused {

template <bool keeps>
class KeptParts {
 public:
  // Of the state before `item`, the warpgroup's blocks of 64 dqk x 64 dv, laid out as Work::c. wanted: else nothing is
  // written. warp: of the warpgroup.
  __device__ __forceinline__ KeptParts(const Args& args, Shared& sh, int rank, int group, int warp, int item,
                                       bool wanted)
      : wanted_(wanted) {
    if (!keeps) return;
    const uint32_t own = address(sh.part[group * 4 + warp]);
    written_ = own + place(lane() / 8, lane() % 8);
    const int row = lane() / 2, half = lane() % 2;
    read_ = own + place(row / 8 * 2 + half, row % 8);
    to_ = static_cast<uint16_t*>(args.kept_c) + (int64_t{item} * blocks_of_item + rank * state_groups + group) * block +
          swizzled(row, warp * 2 + half) / 2;
  }

  // part: as the product's operand, matrices (dqk 0, dv 0), (0, 8), (8, 0), (8, 8), dv by dqk.
  __device__ __forceinline__ void stage(const uint32_t (&part)[4]) const {
    if (!keeps) return;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(int{wanted_}),
        "r"(written_), "r"(part[0]), "r"(part[1]), "r"(part[2]), "r"(part[3])
        : "memory");
  }
  __device__ __forceinline__ void read() {
    if (!keeps) return;
    __syncwarp();
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(held_[0]), "=r"(held_[1]), "=r"(held_[2]), "=r"(held_[3])
                 : "r"(read_)
                 : "memory");
    __syncwarp();
  }
  // Streaming: the backward reads it much later.
  __device__ __forceinline__ void store(int part) const {
    if (!keeps) return;
    uint16_t* const to = to_ + part / 4 * (dv / 64) * block + part % 4 * 16 * 64;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p st.global.cs.v4.b32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(int{wanted_}),
        "l"(to), "r"(held_[0]), "r"(held_[1]), "r"(held_[2]), "r"(held_[3])
        : "memory");
  }

 private:
  static constexpr int block = 64 * 64, blocks_of_item = dqk / 64 * (dv / 64);

  // Of a matrix's row in the staging: eight lanes, on either side, meet all banks.
  static __device__ __forceinline__ uint32_t place(int matrix, int row) {
    return matrix * 128 + (row ^ (matrix % 2 * 4)) * 16;
  }

  bool wanted_;
  uint32_t written_, read_, held_[4];
  uint16_t* to_;
};

}  // namespace flash_xlstm::cuda::fused
