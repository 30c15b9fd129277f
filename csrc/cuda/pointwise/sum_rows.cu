// out = the sums of the columns of float32 rows. A block takes 32 columns. Each of its 32 warps sums every 32nd row,
// and loads eight rows at a time. The warps' sums are then added in order.
#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int columns_per_block = 32, lanes = 32;
constexpr int batch = 8;  // loads that a thread has in flight

__global__ void __launch_bounds__(columns_per_block* lanes, 2)
    sum_rows_kernel(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  __shared__ float part[lanes][columns_per_block];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * columns_per_block + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
    const float* at = partial + threadIdx.y * columns + column;
#pragma unroll 1
    for (int64_t row = threadIdx.y; row < rows; row += batch * lanes) {
      float value[batch];
#pragma unroll
      for (int x = 0; x < batch; ++x, at += lanes * columns) value[x] = row + x * lanes < rows ? *at : 0.0f;
#pragma unroll
      for (int x = 0; x < batch; ++x) sum += value[x];
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int lane = 1; lane < lanes; ++lane) sum += part[lane][threadIdx.x];
    store_from_float(out, column, dtype, sum);
  }
}

}  // namespace

cudaError_t sum_rows(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(columns, columns_per_block));
  return launch_early(sum_rows_kernel, dim3(blocks), dim3(columns_per_block, lanes), 0, 1, stream, partial, rows,
                      columns, out, dtype);
}

}  // namespace flash_xlstm::cuda
