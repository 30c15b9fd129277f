#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_h(const Work& w, const Maps& maps, void* h, float* s, const float* m, cudaStream_t stream) {
  return launch_one<Output::h>({w, maps, h, nullptr, nullptr, m, s, {}, 0, 0}, w.p.dv, stream);
}

}  // namespace flash_xlstm::cuda::hopper
