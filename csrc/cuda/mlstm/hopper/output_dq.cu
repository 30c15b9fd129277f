#include <cstdlib>
#include <cstring>

#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

// output_dq_chunk.cu
cudaError_t output_dq_chunk(const OutputArgs& args, cudaStream_t stream);

namespace {

// Whether a tile is made in one pass (output_dq_chunk.cuh).
bool has_one_pass(const MlstmProblem& p) {
  const char* const form = std::getenv("FLASH_XLSTM_DQ");  // the experiment's: old, or all that fits
  if (form != nullptr && std::strcmp(form, "old") == 0) return false;
  return p.dtype == DType::bfloat16 && p.dqk > 128 && p.dqk <= 256;
}

}  // namespace

cudaError_t output_dq(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  const OutputArgs args{.w = w,
                        .maps = maps,
                        .out = params.dq,
                        .out_token = params.dq_token,
                        .s = params.s,
                        .m = params.m,
                        .dh = params.dh};
  if (has_one_pass(w.p)) return output_dq_chunk(args, stream);
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return launch_one<Output::dq, decltype(t)>(args, w.p.dqk, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
