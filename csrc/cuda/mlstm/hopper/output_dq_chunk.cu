#include "cuda/mlstm/hopper/output_dq_chunk.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dq_chunk(const OutputArgs& args, cudaStream_t stream) {
  static Prepared prepared;
  return launch_chunk_tiles<DqShared>(prepared, dq_chunk_kernel<bf16>, args, stream);
}

}  // namespace flash_xlstm::cuda::hopper
