#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_h(const Work& w, const Maps& maps, void* h, float* s, const float* m, cudaStream_t stream) {
  const OutputArgs args{.w = w, .maps = maps, .out = h, .m = m, .s_out = s};
  if (has_small_tiles(w.p)) return launch_outputs<Small<2, Output::h>>(args, 1, stream);
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return launch_one<Output::h, decltype(t)>(args, w.p.dv, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
