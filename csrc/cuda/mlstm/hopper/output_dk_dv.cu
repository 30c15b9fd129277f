#include "cuda/mlstm/hopper/output_dk_dv.cuh"

namespace flash_xlstm::cuda::hopper {

template cudaError_t output_dk_dv_of<bf16>(const Work&, const Maps&, const MlstmBackward&, cudaStream_t);

cudaError_t output_dk_dv(const Work& w, const Maps& maps, const MlstmBackward& params, cudaStream_t stream) {
  return dispatch_16_bit(w.p.dtype, [&](auto t) { return output_dk_dv_of<decltype(t)>(w, maps, params, stream); });
}

}  // namespace flash_xlstm::cuda::hopper
