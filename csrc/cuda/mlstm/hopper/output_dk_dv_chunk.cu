#include "cuda/mlstm/hopper/output_dk_dv_chunk.cuh"

#include <limits>

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dk_dv_chunk(const OutputArgs& args, cudaStream_t stream) {
  static Prepared prepared;
  const auto kernel = dk_dv_chunk_kernel<bf16>;
  const int bytes = sizeof(ChunkShared);
  int resident = 0;
  const cudaError_t status = prepared.resident_blocks(kernel, output_threads, bytes, resident);
  if (status != cudaSuccess) return status;
  const int64_t count = args.w.layout.max_chunks * args.w.layout.heads;
  if (count > std::numeric_limits<int>::max() - resident) return cudaErrorInvalidConfiguration;  // 2^31 tiles
  return launch_early(kernel, dim3(static_cast<unsigned>(count < resident ? count : resident)), dim3(output_threads),
                      bytes, 1, stream, args);
}

}  // namespace flash_xlstm::cuda::hopper
