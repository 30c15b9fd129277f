// A tile's last steps: out's factors, the shares of the gates' gradients, and rows to memory.
#pragma once

#include "cuda/mlstm/hopper/output_mend.cuh"
#include "cuda/mlstm/hopper/output_scores.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace flash_xlstm::cuda::hopper {

// m: of the rows; null: read here. n_share: h's, q . n with its weight. across: dq's and dk's shares of the gates' sums
// across the chunk's boundary.
template <Output output, int tile_n, typename T, typename Shared>
__device__ __forceinline__ void finish(const ThreadPlace<output, tile_n, Shared::is_small>& me,
                                       const Scores<output, tile_n, T, Shared>& scores, Shared& sh,
                                       const float* m_of_row, const float (&n_share)[2], const float (&across)[2],
                                       float (&out)[tile_n / 2]) {
  constexpr bool is_h = output == Output::h, is_dq = output == Output::dq, is_small = Shared::is_small;
  const OutputArgs& args = me.args;
  const Tile& tile = me.tile;
  const Work& w = args.w;
  const Layout& l = w.layout;
  const int64_t shares_stride = l.max_chunks * l.heads * chunk_tokens;
  const int lane = me.lane;
  float factor[2] = {scores.up[0], scores.up[1]};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = me.row(r);
    if constexpr (is_h) {
      const float s = w.p.scale * (quad_sum(scores.row_sum[r]) + n_share[r]);
      factor[r] *= w.p.scale;
      if (row < tile.length) {
        const int64_t token = me.token_index(row);
        const float m = m_of_row != nullptr ? m_of_row[r] : me.m_at(token);
        factor[r] *= Normalizer(s, m, w.p.eps, w.p.normalize).inverse;
        if (tile.index == 0 && me.pos == 0 && args.s_out != nullptr) args.s_out[token] = s;
      }
    }
    if constexpr (is_dq) factor[r] *= w.p.scale;
    if constexpr (Roles<output>::gate_sums) {
      float* const shares = (is_dq ? w.q_dq : w.k_dk) + me.item + row;
      if (me.pos == 0) shares[tile.index * shares_stride] = across[r];
    }
    if constexpr (is_dq) {
      const float inside = w.p.scale * quad_sum(scores.row_inside[r]);
      if (me.pos == 0 && tile.index == 0) w.q_dq[w.dq_tiles * shares_stride + me.item + row] = inside;
    }
  }
  if constexpr (is_dq) {
    // Column sums: of the diagonal block for the group's own tokens, of the full block for the other group's.
    ptx::named_barrier(1 + me.group, 128);
    const int block = me.thread % 128 / box, token = (block == 0 ? me.diagonal : me.full) + me.thread % box;
    float sum = 0.0f;
    if (block == 0 || me.reaches_both) {
      for (int x = 0; x < 4; ++x) sum += sh.column_sum[block][me.group * 4 + x][me.thread % box];
    }
    if (tile.index == 0) w.k_dk[(w.dk_tiles + block) * shares_stride + me.item + token] = w.p.scale * sum;
  }

  unsigned char* const part = sh.own[me.warp];
  // Rows go through shared memory, 16 rows x 64 columns (small tiles: 32) a warp at a time, then 16 bytes a lane to
  // memory.
  constexpr int part_cols = is_small ? box / 2 : box, lanes_a_row = part_cols / 8, rows_a_store = 32 / lanes_a_row;
  constexpr int stores = 16 / rows_a_store;
  T* to[stores];  // of the rows that this lane writes to; null where there is none
#pragma unroll
  for (int y = 0; y < stores; ++y) {
    const int row = me.first_row + y * rows_a_store + lane / lanes_a_row;
    to[y] = is_h ? static_cast<T*>(args.out) + me.token_index(row) * me.columns
                 : out_row<output, T>(args, tile, tile.row * l.seq + tile.first + row, me.columns);
    to[y] += me.col0 + lane % lanes_a_row * 8;
    if (row >= tile.length) to[y] = nullptr;
  }
  // The 16-byte pieces of neighbouring rows lie in different banks.
  const auto part_at = [&](int row, int chunk16) {
    return part + row * part_cols * 2 + (chunk16 ^ (is_small ? row / 2 % 4 : row % 8)) * 16;
  };
  uint32_t odd = 0;
#pragma unroll
  for (int x = 0; x < tile_n / part_cols; ++x) {
    __syncwarp();
#pragma unroll
    for (int y = 0; y < part_cols / 16; ++y) {
      const int i = (x * (part_cols / 16) + y) * 8;
      const int row = lane % 16, chunk16 = y * 2 + lane / 16;
      uint32_t two[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        two[z] = pack<T>(out[i + z * 2] * factor[z % 2], out[i + z * 2 + 1] * factor[z % 2]);
        note_odd<T>(odd, two[z]);
      }
      ptx::stmatrix_x4(part_at(row, chunk16), two[0], two[1], two[2], two[3]);
    }
    __syncwarp();
#pragma unroll
    for (int y = 0; y < stores; ++y) {
      const int row = y * rows_a_store + lane / lanes_a_row, chunk16 = lane % lanes_a_row;
      if (to[y] != nullptr && me.col0 + x * part_cols + chunk16 * 8 < me.columns) {
        __stcs(reinterpret_cast<uint4*>(to[y] + x * part_cols), *reinterpret_cast<const uint4*>(part_at(row, chunk16)));
      }
    }
  }
  if (__any_sync(all_lanes, (odd & 0x7fff7fffu) != 0)) {
    __syncwarp();
    mend_rows<output, tile_n, T>(args, tile, me.first_row, make_float2(scores.inv_d[0], scores.inv_d[1]),
                                 make_float2(scores.delta[0], scores.delta[1]));
  }
}

}  // namespace flash_xlstm::cuda::hopper
