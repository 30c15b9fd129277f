// dk and dv for one type of q. Each type has a file of its own, so that they compile in parallel.
#pragma once

#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

// output_dk_dv_chunk.cu
cudaError_t output_dk_dv_chunk(const OutputArgs& args, cudaStream_t stream);

// Whether one tile makes dk and dv of a chunk, in bfloat16: ahead at dv 256, 512, 1024 (docs/experiments.md).
inline bool has_chunk_tiles(const MlstmProblem& p) { return p.dqk > 128 && p.dqk <= 256 && p.dv >= 256; }

template <typename T>
cudaError_t output_dk_dv_of(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  const int tile_dqk = column_tile(w.p.dqk), tile_dv = column_tile(w.p.dv);
  const int64_t tiles = w.dk_tiles + ceil_div(w.p.dv, tile_dv);
  const OutputArgs args{.w = w,
                        .maps = maps,
                        .out = params.dk,
                        .dv = params.dv,
                        .out_token = params.dk_token,
                        .dv_token = params.dv_token,
                        .dh = params.dh,
                        .tiles = w.dk_tiles};
#define CASE(k, v) \
  if (tile_dqk == k && tile_dv == v) return launch_outputs<DkAndDv<k, v, T>>(args, tiles, stream)
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_chunk_tiles(w.p)) return output_dk_dv_chunk(args, stream);
    if (has_small_tiles(w.p)) return launch_outputs<Small<1, Output::dk, Output::dv>>(args, 1, stream);
  } else {
    CASE(64, 64);
  }
  CASE(64, 128);
  CASE(64, 256);
  CASE(128, 64);
  CASE(128, 128);
  CASE(128, 256);
  CASE(256, 64);
  CASE(256, 128);
  CASE(256, 256);
#undef CASE
  return cudaErrorInvalidValue;
}

extern template cudaError_t output_dk_dv_of<bf16>(const Work&, const Maps&, const MlstmBackward&, cudaStream_t);
extern template cudaError_t output_dk_dv_of<half>(const Work&, const Maps&, const MlstmBackward&, cudaStream_t);

}  // namespace flash_xlstm::cuda::hopper
