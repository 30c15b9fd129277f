// A tile of an output, a thread's place in it, and which tensors play which part (outputs.cuh has the table).
#pragma once

#include <type_traits>

#include "cuda/mlstm/hopper/work.h"

namespace flash_xlstm::cuda::hopper {

enum class Output { h, dq, dk, dv };

struct OutputArgs {
  Work w;
  Maps maps;
  void* out;  // (batch, seq, heads, columns); dv beside dk has its own
  void* dv;
  int64_t out_token, dv_token;  // dq, dk, dv: elements from a token to the next; h is contiguous
  const float* s;               // dq: the forward's; null: not normalized
  const float* m;               // h, dq: (batch, seq, heads); null: 0
  float* s_out;                 // h; null: not wanted
  Strided dh;                   // dq, dk, dv
  int tiles;                    // column tiles of a row; dk and dv: of dk, and of both
  int tiles_of_both;
};

constexpr int consumer_warps = 8;
constexpr int output_threads = (consumer_warps + 4) * 32;

// One tile of an output: a chunk of one head by tile_n columns.
struct Tile {
  int row, first, length;  // the chunk's row of the batch, first token, tokens
  int item, head, index;   // index: of the column tile
  bool has_state;          // else it is all zeros: nothing of it is read
};

// Where an output's row of a token begins. `token`: of all rows of the batch.
template <Output output, typename T>
__device__ __forceinline__ T* out_row(const OutputArgs& args, const Tile& tile, int64_t token, int64_t columns) {
  if constexpr (output == Output::h)
    return static_cast<T*>(args.out) + (token * args.w.layout.heads + tile.head) * columns;
  else if constexpr (output == Output::dv)
    return static_cast<T*>(args.dv) + token * args.dv_token + tile.head * columns;
  else
    return static_cast<T*>(args.out) + token * args.out_token + tile.head * columns;
}

template <Output output>
struct Roles {
  static constexpr bool rows_are_t = output == Output::h || output == Output::dq;
  static constexpr bool inner_is_dqk = output == Output::h || output == Output::dv;
  static constexpr bool gate_sums = output == Output::dq || output == Output::dk;
  static constexpr bool state_rows_are_k = inner_is_dqk;  // S lies as [k][n]
  // First token of Z's first and second half. The half that all rows reach comes first: j's first or t's last tokens.
  __device__ static constexpr int half_begin(int half) { return (half == 0) == rows_are_t ? 0 : box; }
  // Whether the group's rows reach both halves.
  __device__ static bool reaches_both(int group) { return group == (rows_are_t ? 1 : 0); }
  __device__ static int64_t inner(const MlstmProblem& p) { return inner_is_dqk ? p.dqk : p.dv; }
  __device__ static int64_t columns(const MlstmProblem& p) { return inner_is_dqk ? p.dv : p.dqk; }
};

// The operands, as tensor maps or as tensors. `of` has q, k, v and `dh` dh.
template <Output output, typename Tensors, typename Tensor>
__device__ __forceinline__ const Tensor& a_of(const Tensors& of, const Tensor& dh) {
  return output == Output::h ? of.q : output == Output::dq ? dh : output == Output::dk ? of.v : of.k;
}
template <Output output, typename Tensors, typename Tensor>
__device__ __forceinline__ const Tensor& b_of(const Tensors& of, const Tensor& dh) {
  return output == Output::h ? of.k : output == Output::dq ? of.v : output == Output::dk ? dh : of.q;
}
template <Output output, typename Tensors, typename Tensor>
__device__ __forceinline__ const Tensor& z_of(const Tensors& of, const Tensor& dh) {
  return output == Output::h ? of.v : output == Output::dq ? of.k : output == Output::dk ? of.q : dh;
}

// How many column tiles' A S a tile makes, and which one comes x-th: its own is the last.
template <Output output>
__device__ __forceinline__ int state_tile_count(const OutputArgs& args) {
  return output == Output::dq ? args.tiles : 1;
}
__device__ __forceinline__ int state_tile(const OutputArgs& args, const Tile& tile, int count, int x) {
  const int index = tile.index + 1 + x;
  return x == count - 1 ? tile.index : index < args.tiles ? index : index - args.tiles;
}

// What a thread of the consumers works on: the rows row(0) and row(1) of wgmma's accumulators and, of every eight
// columns, the two from 2 pos on.
template <Output output, int tile_n, bool is_small>
struct ThreadPlace {
  using R = Roles<output>;
  const OutputArgs& args;
  const Tile& tile;
  const int thread = threadIdx.x, group = thread / 128, warp = thread / 32, lane = thread % 32;
  const int quad = lane / 4, pos = lane % 4;
  const int first_row = group * 64 + (warp % 4) * 16;       // of the warp
  const int diagonal = group * box, full = box - diagonal;  // first columns of the blocks of T
  const int64_t item;                                       // first of the item's in arrays of a number for each token
  const int col0, columns;                                  // the tile's first column; how many there are
  const int64_t inner;
  // Small tiles: by shuffles, so that the compiler knows them to be warp-uniform. It serializes wgmma behind a branch
  // that may not be.
  const bool reaches_both, has_state;
  const int64_t first_token;

  __device__ __forceinline__ ThreadPlace(const OutputArgs& of, const Tile& in)
      : args(of),
        tile(in),
        item(static_cast<int64_t>(in.item) * chunk_tokens),
        col0(in.index * tile_n),
        columns(static_cast<int>(R::columns(of.w.p))),
        inner(R::inner(of.w.p)),
        reaches_both(R::reaches_both(is_small ? __shfl_sync(all_lanes, group, 0) : group)),
        has_state(is_small ? __shfl_sync(all_lanes, in.has_state ? 1 : 0, 0) != 0 : in.has_state),
        first_token((in.row * of.w.layout.seq + in.first) * of.w.layout.heads + in.head) {}

  __device__ __forceinline__ int row(int r) const { return first_row + quad + r * 8; }
  // Of a row in (batch, seq, heads).
  __device__ __forceinline__ int64_t token_index(int row) const {
    if constexpr (is_small) return first_token + row * static_cast<int>(args.w.layout.heads);  // fewer registers
    return (tile.row * args.w.layout.seq + tile.first + row) * args.w.layout.heads + tile.head;
  }
  __device__ __forceinline__ float m_at(int64_t token) const { return args.m == nullptr ? 0.0f : args.m[token]; }
};

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(all_lanes, x, 1);
  return x + __shfl_xor_sync(all_lanes, x, 2);
}

}  // namespace flash_xlstm::cuda::hopper
