#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dq(const Work& w, const Maps& maps, const float* s, const float* m, void* dq, cudaStream_t stream) {
  return launch_one<Output::dq>({w, maps, dq, nullptr, s, m, nullptr, {}, 0, 0}, w.p.dqk, stream);
}

}  // namespace flash_xlstm::cuda::hopper
