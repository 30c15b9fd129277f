// The scratch arrays that the portable mLSTM kernels share.
//
// The forward works through the chunks range by range and keeps the states of one range only: the state at each chunk's
// start, slot = chunk - range_begin. The backward takes all chunks as one range and keeps the state at every boundary,
// slot = boundary. Arrays per token are chunk-major, [chunk][head][64], so that a chunk's gates are one contiguous
// read.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/mlstm/chunked/layout.cuh"
#include "params/mlstm.h"

namespace flash_xlstm::cuda::portable {

constexpr int chunk_tokens = 64;

using Layout = ChunkLayout<chunk_tokens>;

// Scratch arrays, all float32 unless said; N = max_chunks * heads.
struct Scratch {
  // With b_t the cumulative log forget gate within the chunk, the weight of token j in row t is
  // exp((row_t.x + column_j.x) + (row_t.y + column_j.y)). The sum is exact to float32 though its terms may be large
  // (-960 with gates at -15).
  float2* row;        // [N][64] b_t - m_t, as high and low part
  float2* column;     // [N][64] i_t - b_t, i the log of the input gate; -inf past the chunk's end
  float* m;           // [N][64] stabilizer m_t
  uint8_t* reset;     // [N][64] 1 where m_t took the input gate's branch
  double* chunk_b;    // [N] b at the chunk's end
  double* chunk_max;  // [N] max_j (b_end - b_j + i_j)
  float* m_boundary;  // [boundaries * heads] stabilizer at chunk boundaries
  void* c;            // [slots * heads][dqk][dv_pitch] states; the backward overwrites a slot with the state's gradient
                      // after its last read
  float* n;           // [slots * heads][dqk], likewise
  // Forward: the state, [heads][dqk][dv] and [heads][dqk], of the one sequence that a range's end cuts. Ranges
  // alternate between the two.
  float* c_carry[2];
  float* n_carry[2];
  // Backward only.
  float* inv_d;       // [N][64] 1 / d_t
  float* delta;       // [N][64] gradient into s_t
  float* e;           // [N][64] gradient into m_t through eps
  float* q_dq;        // [tiles + 1][N][64] shares of q . dq: one from each column tile of dq (the state's term), one
                      // from within the chunk
  float* k_dk;        // [tiles + 1][N][64]
  float* through;     // [N][tiles of c] partial sums of g (<c, dc> + <n, dn>), c at the chunk's start, dc at its end
  float* stabilizer;  // [N] what carry_stabilizer_kernel carries into the chunk's end
  uint8_t* open;      // [N] 1 where no later chunk of the sequence has a reset
  int64_t* first_chunk;  // packed only
  int64_t* first_token;
  int32_t* seq_of_chunk;
};

}  // namespace flash_xlstm::cuda::portable
