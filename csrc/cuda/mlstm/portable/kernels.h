// The portable path's steps: host functions that launch one kernel each, or a few small ones.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mlstm/portable/layout.cuh"

namespace flash_xlstm::cuda::portable {

// What every kernel gets.
struct Work {
  MlstmProblem p;
  Layout layout;
  Scratch scratch;
  int64_t dv_pitch;  // row pitch of scratch.c, a multiple of 16 bytes

  // Without a stabilizer m is 0 throughout.
  __host__ __device__ bool stabilized() const { return p.input_gate == InputGate::exponential; }
};

#ifdef __CUDACC__
// A log as the sum of two floats.
__device__ __forceinline__ float2 split_log(double x) {
  const float high = static_cast<float>(x);
  return make_float2(high, isinf(high) ? 0.0f : static_cast<float>(x - high));
}

// exp(x + y)
__device__ __forceinline__ float exp_sum(const float2& x, const float2& y) { return expf((x.x + y.x) + (x.y + y.y)); }
__device__ __forceinline__ float exp_sum(const float2& x, float y) { return expf((x.x + y) + x.y); }

// The weight of a token in the state at the chunk's end.
__device__ __forceinline__ float end_weight(const float2& column, double chunk_b, float m_end) {
  return expf(static_cast<float>((chunk_b - m_end + column.x) + column.y));
}

// u = dh_t . h_t
__device__ __forceinline__ void store_token_gradients(const Work& w, int64_t at, const Normalizer& d, float u) {
  w.scratch.inv_d[at] = d.inverse;
  w.scratch.delta[at] = d.sign == 0.0f ? 0.0f : -u * d.inverse * d.sign;
  w.scratch.e[at] = -u * w.p.eps * d.inverse;
}
__device__ __forceinline__ void store_no_gradients(const Work& w, int64_t at) {
  w.scratch.inv_d[at] = w.scratch.delta[at] = w.scratch.e[at] = 0.0f;
}
#endif

// gates.cu
cudaError_t build_chunk_table(const Work& w, cudaStream_t stream);  // packed only
// Fills row, column, m, reset, chunk_b, m_boundary; m_out (batch, seq, heads), m_last and log_decay where they are not
// null.
cudaError_t scan_gates(const Work& w, float* m_out, float* m_last, float* log_decay, cudaStream_t stream);
// Fills inv_d, delta, e from the forward's h, s, m and dh. With the normalizer for float32 only, where h is not
// rounded. Without it for every dtype: inv_d is 1 and delta 0.
cudaError_t token_gradients_from_h(const Work& w, const MlstmBackward& params, cudaStream_t stream);
// di, df, dm0 from q_dq, k_dk, through, e.
cudaError_t gate_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream);

// open_e and is_open from e, reset.
cudaError_t sum_open_tokens(const Work& w, const MlstmBackward& params, cudaStream_t stream);

// states.cu
// Writes the states of the layout's range to c and n, and the final state, where not null, of sequences that end in the
// range. range_index: the number of the range, which tells the two carried states apart.
cudaError_t forward_states(const Work& w, float* c_last, float* n_last, int64_t range_index, cudaStream_t stream);
// Overwrites every slot's state, from the last to the first, with its gradient. Fills through; dc0, dn0 where not null.
cudaError_t backward_states(const Work& w, const MlstmBackward& params, cudaStream_t stream);
int state_tiles(const MlstmProblem& p);

// chunk_sums.cu
// Fills inv_d, delta, e.
cudaError_t token_gradients(const Work& w, const MlstmBackward& params, cudaStream_t stream);
// The shares of q . dq and k . dk that come from within the chunks, into the last tile of q_dq and k_dk.
cudaError_t chunk_gate_sums(const Work& w, const Strided& dh, cudaStream_t stream);

// outputs.cuh, one translation unit per output and dtype
enum class Output { h, dq, dk, dv };
struct OutputArgs {
  Work w;
  Strided dh;
  void* out;      // contiguous (batch, seq, heads, columns)
  float* s_out;   // Output::h only; null: not wanted
  float* partial; // q_dq or k_dk
};
template <Output output, typename T>
cudaError_t chunk_outputs(const OutputArgs& args, cudaStream_t stream);
// Width of a block's column tile, and tiles of a row. Narrow rows take the narrow tile, which has less padding.
__host__ __device__ inline int column_tile(int64_t columns) { return columns <= 64 ? 64 : 128; }
__host__ __device__ inline int column_tiles(int64_t columns) {
  return static_cast<int>(ceil_div(columns, column_tile(columns)));
}

}  // namespace flash_xlstm::cuda::portable
