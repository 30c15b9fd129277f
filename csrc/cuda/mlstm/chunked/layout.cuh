// How mLSTM kernels cut a problem into chunks.
//
// A chunk is up to `tokens` consecutive tokens of one sequence and never spans two sequences. Chunks are numbered over
// all sequences. A sequence has one boundary more than it has chunks: the boundary at a chunk's start has the number
// chunk + sequence, the one at its end the next. States are kept for a range of chunks, or for every boundary.
#pragma once

#include <cstdint>

#include "params/types.h"

namespace flash_xlstm::cuda {

// One chunk of one head.
struct Chunk {
  int64_t chunk, seq, row;  // row: batch index into the tensors
  int64_t boundary;         // of its start
  int64_t first;            // first token within the row
  int length;               // 1 to `tokens`
  bool is_first, is_last;   // of its sequence
};

template <int tokens>
struct ChunkLayout {
  int64_t batch, seq, heads, dqk, dv, num_seqs;
  int64_t max_chunks;              // chunks, or a bound on them when packed
  int64_t chunks_per_seq;          // not packed only
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
      out.seq = static_cast<uint32_t>(chunk) / static_cast<uint32_t>(chunks_per_seq);  // 64 bits divide slowly
      out.row = out.seq;
      const int64_t index = chunk - out.seq * chunks_per_seq;
      out.is_first = index == 0, out.is_last = index == chunks_per_seq - 1;
      set_tokens(out, index * tokens, seq);
    } else {
      if (chunk >= first_chunk[num_seqs]) return false;
      out.seq = seq_of_chunk[chunk];
      out.row = 0;
      const int64_t index = chunk - first_chunk[out.seq];
      out.is_first = index == 0, out.is_last = chunk == first_chunk[out.seq + 1] - 1;
      set_tokens(out, first_token[out.seq] + index * tokens, first_token[out.seq + 1]);
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
    out.length = left < tokens ? static_cast<int>(left) : tokens;
  }
};

#ifdef __CUDACC__
// 1 / d_t, d_t = max(|s_t|, exp(-m_t)) + eps. A NaN in s_t stays NaN; fmaxf would drop it.
struct Normalizer {
  float inverse = 1.0f, sign = 0.0f;  // sign: of s_t where it decides d_t, else 0
  __device__ Normalizer(float s, float m, float eps, bool normalize = true) {
    if (!normalize) return;
    const float floor = expf(-m);
    const bool decides = !(fabsf(s) < floor);
    inverse = 1.0f / ((decides ? fabsf(s) : floor) + eps);
    sign = decides ? copysignf(1.0f, s) : 0.0f;
  }
};
#endif

}  // namespace flash_xlstm::cuda
