#include "cuda/mlstm/hopper/output_dk_dv.cuh"

namespace flash_xlstm::cuda::hopper {

template cudaError_t output_dk_dv_of<half>(const Work&, const Maps&, const MlstmBackward&, cudaStream_t);

}  // namespace flash_xlstm::cuda::hopper
