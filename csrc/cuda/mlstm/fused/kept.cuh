// c at the start of every 128 tokens goes to memory, for the backward, beside the product c^T q^T.
//
// A warp's part of it, 16 dv x 16 dqk, is an operand of that product. stmatrix transposes the operand into 512 bytes of
// the warp's own, from where it is read back, 16 bytes a lane. Two lanes then have 32 bytes of a dqk row, a whole
// sector; the four warps of a warpgroup fill the line. A part is read back once its product is issued and stored once
// the next one is, so no product waits for it. The first part goes before the wait for q and k.
//
// The instructions are predicated: no branch comes between products in flight.
#pragma once

#include "cuda/mlstm/fused/shared.cuh"

namespace flash_xlstm::cuda::fused {

// keeps: else it does nothing.
template <bool keeps>
class KeptParts {
 public:
  // Of the state at the item's start, laid out as Work::c. warp: of the warpgroup. wanted: else nothing is written.
  __device__ __forceinline__ KeptParts(const Args& args, Shared& sh, int rank, int group, int warp, int item,
                                       bool wanted)
      : wanted_(wanted) {
    if (!keeps) return;
    const uint32_t own = address(sh.part[group * 4 + warp]);
    written_ = own + place(lane() / 8, lane() % 8);
    const int row = lane() / 2, half = lane() % 2;
    read_ = own + place(row / 8 * 2 + half, row % 8);
    to_ = args.kept_c + (int64_t{item} * blocks_of_item + rank * state_groups + group) * block +
          swizzled(row, warp * 2 + half) / 2;
  }

  // part: the operand, matrices of 8 dv x 8 dqk: (dqk 0, dv 0), (0, 8), (8, 0), (8, 8).
  __device__ __forceinline__ void stage(const uint32_t (&part)[4]) const {
    if (!keeps) return;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(int{wanted_}),
        "r"(written_), "r"(part[0]), "r"(part[1]), "r"(part[2]), "r"(part[3])
        : "memory");
  }
  // ptxas moves no load or store past __syncwarp.
  __device__ __forceinline__ void pass_on(int part) {
    if (!keeps) return;
    __syncwarp();
    if (part > 0) store(part - 1);
    uint32_t (&to)[4] = held_[part % 2];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(read_)
                 : "memory");
    __syncwarp();
  }
  // Evicted first: the backward reads it much later.
  __device__ __forceinline__ void store(int part) const {
    if (!keeps) return;
    uint16_t* const to = to_ + part / 4 * (dv / 64) * block + part % 4 * 16 * 64;
    const uint32_t (&from)[4] = held_[part % 2];
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p st.global.cs.v4.b32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(int{wanted_}),
        "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
        : "memory");
  }

 private:
  static constexpr int block = 64 * 64, blocks_of_item = dqk / 64 * (dv / 64);

  // Of a matrix's row among the 512 bytes. The eight lanes that go together meet all banks on either way.
  static __device__ __forceinline__ uint32_t place(int matrix, int row) {
    return matrix * 128 + (row ^ (matrix % 2 * 4)) * 16;
  }

  bool wanted_;
  uint32_t written_, read_, held_[2][4];
  uint16_t* to_;
};

}  // namespace flash_xlstm::cuda::fused
