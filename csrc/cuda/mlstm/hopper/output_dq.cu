#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dq(const Work& w, const Maps& maps, const float* s, const float* m, const Strided& dh, void* dq,
                      cudaStream_t stream) {
  const OutputArgs args{.w = w, .maps = maps, .out = dq, .s = s, .m = m, .dh = dh};
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return launch_one<Output::dq, decltype(t)>(args, w.p.dqk, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
