#include <cstdlib>
#include <cstring>

#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

// output_dq_chunk.cu
cudaError_t output_dq_chunk(const OutputArgs& args, cudaStream_t stream);

cudaError_t output_dq(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  const OutputArgs args{.w = w,
                        .maps = maps,
                        .out = params.dq,
                        .out_token = params.dq_token,
                        .s = params.s,
                        .m = params.m,
                        .dh = params.dh};
  const char* const form = std::getenv("FLASH_XLSTM_DQ");
  if (has_chunk_tiles(w.p) && (form == nullptr || std::strcmp(form, "old") != 0)) return output_dq_chunk(args, stream);
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return launch_one<Output::dq, decltype(t)>(args, w.p.dqk, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
