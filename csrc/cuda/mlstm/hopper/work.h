// What the Hopper mLSTM kernels share: the chunk size, scratch arrays, and the host functions, which launch one kernel
// each.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/common/carver.h"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/mlstm/chunked/layout.cuh"
#include "params/mlstm.h"

namespace flash_xlstm::cuda::hopper {

constexpr int chunk_tokens = 128;
constexpr int box = 64;  // rows and columns of the TMA's boxes; 128 bytes a row
constexpr int box_bytes = box * box * 2;

using Layout = ChunkLayout<chunk_tokens>;

// What the fused path (mlstm/fused) needs of the gates of half a chunk. Logs as in Work, with b_t from the whole chunk's
// start. g and keep are relative to the state at the half's start, w and keep to that at its end. Past the sequence's
// end alpha is -inf, beta +inf, g and w are 0.
struct alignas(16) GateRecord {
  static constexpr int tokens = 64;
  float2 beta[tokens], alpha[tokens];
  float g[tokens], exp_neg_m[tokens], w[tokens];
  uint32_t counts[tokens / 2];  // of two tokens, 16 bits each: all ones where w is not 0
  float keep;                   // what multiplies the state
};

// How gates.cu cuts sequences into tiles.
struct Tiles {
  int heads, chunks;  // at most, of a tile
  int64_t per_seq;    // packed: of the longest sequence there can be
  int64_t count;      // of all sequences, packed: at most
};

// N = max_chunks * heads; an item is chunk * heads + head. All logs are to base 2. Within a chunk, with b_t the
// cumulative log forget gate from the chunk's start on:
//   D_tj = 2^(alpha_t - beta_j), g_t = 2^(alpha_t + m_start), w_j = 2^(alpha_last - beta_j).
// Each log is a float2: a whole number and the rest. So differences are exact to float32 where the logs are large
// (-2800 with gates at -15). They have to be: s_t may be the small difference of terms a thousand times its size.
struct Work {
  MlstmProblem p;
  Layout layout;
  int64_t dqk_pitch;       // of n_parts: a multiple of 16 bytes
  int blocks_k, blocks_v;  // of c
  int dq_tiles, dk_tiles;  // column tiles
  float2* alpha;           // [N][128] b_t - m_t; -inf past the chunk's end, so that nothing there counts
  float2* beta;            // [N][128] b_j - i_j; +inf for padding and past the chunk's end
  float2* alpha_last;      // [N] alpha of the chunk's last token
  float2* m_start;         // [N] m before the chunk
  GateRecord* records;     // [N][2] the fused path: in the place of all of these; else null
  // State at the chunk's start: [N][blocks_k][blocks_v] blocks of 64 dqk x 64 dv. A block has the layout of shared
  // memory (swizzled) and is zero past dqk and dv, so every access is a whole block. The backward reads a state, then
  // overwrites it with the gradient of the state at the chunk's end. A sequence's first state or last gradient that is
  // all zeros is neither written nor read: with 16 chunks this saves a sixteenth of the traffic.
  uint16_t* c;        // of q's type; null: neither c nor n is kept, the forward makes the final state alone
  uint16_t* dc;       // backward: where the gradient goes, c itself or, where the forward has kept c, other memory
  bool starts_empty;  // no initial state and no pool
  bool ends_empty;    // backward: no gradient of the final c and n
  float* n;           // [N][dqk], likewise, zeros too
  float* dn;
  uint16_t* n_parts;  // forward: [N][3][dqk_pitch] n as a sum of three numbers of q's type, scaled as c
  // float16: [N] c is kept as 2^-state_log c and its gradient, in the backward, as 2^-grad_log dc. bfloat16: null.
  float *state_log, *grad_log;
  // Backward only.
  uint8_t* reset;  // [N][128] 1 where m_t took the input gate's branch
  float* inv_d;    // [N][128] 1 / d_t
  float* delta;    // [N][128] gradient into s_t
  float* e;        // [N][128] gradient into m_t through eps
  float* q_dq;  // [dq tiles + 1][N][128] shares of q . dq: one from each column tile across the chunk's start, then one
                // from within the chunk
  float* k_dk;  // [dk tiles + 2][N][128] shares of k . dk: across the chunk's end, then within its halves of 64 tokens,
                // then between them
  float* through;  // [N][state tiles] partial sums of g (<c, dc> + <n, dn>), c at the chunk's start, dc at its end
  // Few heads: sequences are cut into segments that run at once (states.cu).
  int segments;
  float* segment_ends;  // the blocks' shares of the state at the ends of runs
  // [0]: how many blocks have started. Then flags: a share is written; the pool's state is read. Zeroed by scan_gates;
  // the backward has three sets: the states', those of their gradients' end alone, their gradients'.
  int* segment_flags;
  int num_flags;
  // Forward of small tiles, whose outputs run beside the states: [N] flags that an item's c and n_parts are written,
  // then how many tiles have been taken. Zeroed by scan_gates. Else null.
  int* state_flags;
  int64_t num_state_flags;
  Tiles tiles;  // the gradients'; the scan makes its own
  // Backward. tile_totals: [tiles.count][heads], what a tile does to what gate_gradients carries. tile_flags:
  // [tiles.count][heads], a total is written, then [heads], how many blocks have started. Zeroed by scan_gates.
  double2* tile_totals;
  int* tile_flags;
  int64_t num_tile_flags;
  int64_t* first_chunk;  // packed only: see ChunkLayout
  int64_t* first_token;
  int32_t* seq_of_chunk;

  // Index of block (k, v) of an item's state, clamped to the last: what is read beyond it meets zeros or is not stored.
  __device__ int block_index(int k, int v) const { return min(k, blocks_k - 1) * blocks_v + min(v, blocks_v - 1); }
  __device__ uint16_t* block(uint16_t* of, int64_t item, int k, int v) const {
    return of + (item * blocks_k * blocks_v + block_index(k, v)) * (box * box);
  }
};

// hopper.cu, also for the fused path: what every pass knows of the problem, the scratch of packed sequences, and the
// TMA's view of q, k, v, dh in boxes of 64 tokens x 64 columns.
void describe(const MlstmProblem& p, Work& w);
void carve_table(Carver& carver, Work& w);
cudaError_t encode_rows(CUtensorMap& map, const Strided& t, const MlstmProblem& p, int64_t dim);

// Where a described Work's c, n and state_log lie in memory of its N * kept_floats.
struct KeptStates {
  uint16_t* c;
  float* n;
  float* log;  // float16 only
};
KeptStates kept_states(const Work& w, float* memory);

// Calls f with a value of the problem's 16-bit type.
template <typename F>
cudaError_t dispatch_16_bit(DType dtype, F&& f) {
  return dtype == DType::bfloat16 ? f(bf16{}) : f(half{});
}

#ifdef __CUDACC__
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  // volatile: computed again at a second use. Kept, the weights of a tile would take 64 registers.
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log_sum(float2 a, float2 b) { return (a.x + b.x) + (a.y + b.y); }
__device__ __forceinline__ float log_difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }
#endif

// The TMA's view of a tensor: q, k, v, dh as (column, head, token, row of the batch); n_parts as (dqk, part, item); c
// as (64, row of a block, item), without swizzle: its blocks are swizzled already. A block of c is contiguous, but it
// is loaded by tensor map, since racecheck reports false hazards for plain bulk loads.
struct Maps {
  CUtensorMap q, k, v, dh, n_parts, c;
  // Small tiles only, as 16-bit numbers: alpha, beta as (256, 2, item); inv_d, delta as (256, 1, item), n as (2 dqk, 1,
  // item).
  CUtensorMap alpha, beta, inv_d, delta, n;
};

// Sets a kernel's shared memory limit on a device once, and gives how many of its blocks run at once there.
class Prepared {
 public:
  template <typename Kernel>
  cudaError_t resident_blocks(Kernel kernel, int threads, int bytes, int& blocks) {
    cudaError_t status = cudaSuccess;
    blocks = known_.get(0, [&](int, int& value) {
      int per_processor = 0;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (status == cudaSuccess) {
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, bytes);
      }
      value = processor_count() * per_processor;
      return status == cudaSuccess;
    });
    return status;
  }

 private:
  PerDevice known_;
};

// gates.cu
Tiles choose_tiles(const MlstmProblem& p);
// Fills alpha, beta, m_start, the packed table, in the backward reset; m_out (batch, seq, heads), m_last and log_decay
// if not null.
cudaError_t scan_gates(const Work& w, float* m_out, float* m_last, float* log_decay, cudaStream_t stream);
// di, df, dm0 from q_dq, k_dk, through, e.
cudaError_t gate_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream);

// open_e and is_open from e, reset.
cudaError_t sum_open_tokens(const Work& w, const MlstmBackward& params, cudaStream_t stream);

// states.cu
// c, n (and n_parts if not null) at every chunk's start; the final state where not null. `h` of sequences that have no
// slot of the pool.
cudaError_t forward_states(const Work& w, const Maps& maps, float* c_last, float* n_last, void* h, cudaStream_t stream);
// Replaces every c, n by the gradient of the state at the chunk's end; fills through; dc0, dn0 where not null. Without
// dk: dc0 and dn0 alone, and c, n and through stay as they are.
cudaError_t backward_states(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream);
int state_tiles(const MlstmProblem& p);
// How many segments to cut sequences into, the floats of segment_ends, and the ints of a set of segment_flags.
struct Segments {
  int count;
  int64_t floats, flags;
};
Segments choose_segments(const MlstmProblem& p, int processors);

// outputs.cuh. These of the states read c and n: output_dk_dv their gradients.
cudaError_t output_h(const Work& w, const Maps& maps, void* h, float* s, const float* m, cudaStream_t stream);
// Also fills inv_d, delta, e, q_dq and the last two parts of k_dk.
cudaError_t output_dq(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream);
// Also fills k_dk except its last two parts.
cudaError_t output_dk_dv(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream);

// Whether the outputs' tiles are small (output_small.cuh). Not in float16: a row's scale needs the largest weight of
// both blocks of T, so both would stay in registers.
inline bool has_small_tiles(const MlstmProblem& p) { return p.dtype == DType::bfloat16 && p.dqk <= box && p.dv <= box; }

// Width of an output's column tile.
inline int column_tile(int64_t columns) { return columns <= 64 ? 64 : columns <= 128 ? 128 : 256; }

}  // namespace flash_xlstm::cuda::hopper
