#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dq(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  const OutputArgs args{.w = w,
                        .maps = maps,
                        .out = params.dq,
                        .out_token = params.dq_token,
                        .s = params.s,
                        .m = params.m,
                        .dh = params.dh};
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return launch_one<Output::dq, decltype(t)>(args, w.p.dqk, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
