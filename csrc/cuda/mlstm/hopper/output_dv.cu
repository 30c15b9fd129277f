#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dv(const Work& w, const Maps& maps, const Strided& dh, void* dv, cudaStream_t stream) {
  return launch_tiled<Output::dv>({w, maps, dv, nullptr, nullptr, nullptr, dh, 0}, w.p.dv, stream);
}

}  // namespace flash_xlstm::cuda::hopper
