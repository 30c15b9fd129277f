// How the portable mLSTM kernels cut a problem into chunks, and the scratch arrays they share.
//
// A chunk is up to 64 consecutive tokens of one sequence and never spans two sequences. Chunks are numbered over all
// sequences. A sequence has one boundary more than it has chunks: boundary chunk + sequence is the chunk's start, the
// next its end. States are large, so they are kept for a range of chunks only: the forward works through the chunks
// range by range and needs the state at each chunk's start (slot = chunk - range_begin); the backward takes all chunks
// as one range and needs every boundary's (slot = boundary).
// Per-token scratch is chunk-major, [chunk][head][64], so that a chunk's gates are one contiguous read.
#pragma once

#include "cuda/numeric.cuh"
#include "mlstm_params.h"

namespace flash_xlstm::cuda::portable {

constexpr int chunk_tokens = 64;

// One chunk of one head.
struct Chunk {
  int64_t chunk, seq, row;  // row: batch index into the tensors
  int64_t boundary;         // of its start
  int64_t first;            // first token within the row
  int length;               // 1 to 64
};

struct Layout {
  int64_t batch, seq, heads, dqk, dv, num_seqs;
  int64_t max_chunks;      // chunks, or a bound on them when packed
  int64_t chunks_per_seq;  // not packed only
  int64_t range_begin, range_end;  // the chunks whose states are kept
  bool every_boundary;             // slot = boundary, else chunk - range_begin
  // Packed only, built on the device: first chunk of each sequence (num_seqs + 1), first token of each sequence
  // (num_seqs + 1), sequence of each chunk (max_chunks).
  const int64_t* first_chunk;
  const int64_t* first_token;
  const int32_t* seq_of_chunk;

  __device__ bool locate(int64_t chunk, Chunk& out) const {
    out.chunk = chunk;
    if (first_chunk == nullptr) {
      out.seq = chunk / chunks_per_seq;
      out.row = out.seq;
      const int64_t index = chunk - out.seq * chunks_per_seq;
      set_tokens(out, index * chunk_tokens, seq);
    } else {
      if (chunk >= first_chunk[num_seqs]) return false;
      out.seq = seq_of_chunk[chunk];
      out.row = 0;
      const int64_t index = chunk - first_chunk[out.seq];
      set_tokens(out, first_token[out.seq] + index * chunk_tokens, first_token[out.seq + 1]);
    }
    out.boundary = chunk + out.seq;
    return true;
  }

  // Where the state at a chunk's start is kept.
  __device__ int64_t slot(int64_t chunk, int64_t s) const { return every_boundary ? chunk + s : chunk - range_begin; }

  // Chunks of sequence s: [begin, end).
  __device__ void chunk_range(int64_t s, int64_t& begin, int64_t& end) const {
    begin = first_chunk == nullptr ? s * chunks_per_seq : first_chunk[s];
    end = first_chunk == nullptr ? begin + chunks_per_seq : first_chunk[s + 1];
  }

 private:
  __device__ static void set_tokens(Chunk& out, int64_t first, int64_t stop) {
    out.first = first;
    const int64_t left = stop - first;
    out.length = left < chunk_tokens ? static_cast<int>(left) : chunk_tokens;
  }
};

// Scratch arrays, all float32 unless said; N = max_chunks * heads.
struct Scratch {
  float2* b;          // [N][64] cumulative log forget gate within the chunk, as high and low part: its differences
                      // stay exact to float32 where b itself is large (-960 with gates at -15)
  float* i;           // [N][64] input gate, -inf past the chunk's end
  float* m;           // [N][64] stabilizer m_t
  uint8_t* reset;     // [N][64] 1 where m_t took the input gate's branch
  double* chunk_b;    // [N] b at the chunk's end
  double* chunk_max;  // [N] max_j (b_end - b_j + i_j)
  float* m_boundary;  // [boundaries * heads] stabilizer at chunk boundaries
  void* c;            // [slots * heads][dqk][dv_pitch] states; in the backward each slot is overwritten by the state's
                      // gradient once its last reader is done
  float* n;           // [slots * heads][dqk], likewise
  float* c_carry[2];  // forward: [heads][dqk][dv] and n's [heads][dqk], the state of the one sequence that a range's
  float* n_carry[2];  // end cuts; ranges alternate between the two
  // Backward only.
  float* inv_d;       // [N][64] 1 / d_t
  float* delta;       // [N][64] gradient into s_t
  float* e;           // [N][64] gradient into m_t through eps
  float* q_dq;        // [tiles + 1][N][64] shares of q . dq: one from each column tile of dq (the state's term), one
                      // from within the chunk
  float* k_dk;        // [tiles + 1][N][64]
  float* through;     // [N][tiles of c] partial sums of g (<c, dc> + <n, dn>), c at the chunk's start, dc at its end
  float* stabilizer;  // [N] gradient carried into the chunk's last m
  int64_t* first_chunk;  // packed only
  int64_t* first_token;
  int32_t* seq_of_chunk;
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flash_xlstm::cuda::portable
