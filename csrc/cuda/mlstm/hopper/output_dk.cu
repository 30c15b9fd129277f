#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dk(const Work& w, const Maps& maps, void* dk, cudaStream_t stream) {
  return launch_tiled<Output::dk>({w, maps, dk, nullptr, nullptr, nullptr, {}, 0}, w.p.dqk, stream);
}

}  // namespace flash_xlstm::cuda::hopper
