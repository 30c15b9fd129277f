#include "cuda/mlstm/hopper/output_dk_dv_chunk.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dk_dv_chunk(const OutputArgs& args, cudaStream_t stream) {
  static Prepared prepared;
  return launch_chunk_tiles<ChunkShared>(prepared, dk_dv_chunk_kernel<bf16>, args, stream);
}

}  // namespace flash_xlstm::cuda::hopper
