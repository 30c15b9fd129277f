// y = x W^T + bias for up to 16 rows of x, bfloat16, float32 sums: what decoding does with every weight. The weights
// are read once and straight into registers; everything else stays behind that stream.
//
// A block makes 16 columns of y from 16 rows of W. Its 8 warps share the products' length k: a warp takes 64 of it (128
// bytes of each row), then the 64 that are 512 further on, so that a block reads whole kilobytes of each row. The
// products are mma.m16n8k16 with W as the 16 rows and x as the 8 columns (two mma for more than 8 rows of x). Each
// thread loads 16 neighbouring bytes of a row, and takes them as the k that the fragment's layout gives it: a sum does
// not mind the order, as long as x is taken in the same.
//
//   thread of a warp   rows of W                k of a group of 32
//   lane               lane / 4, and 8 further  8 (lane % 4) to 8 (lane % 4) + 7: two mma's worth
//
// Two groups of 64 are loaded before the first is used: 8 loads of 16 bytes a thread, 32 KiB a block in flight. At the
// end the warps' sums are added up through shared memory, in a fixed order.
#include "cuda/linear/launch.h"
#include "cuda/numeric.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int warps = 8, threads = warps * 32;
constexpr int tile_columns = 16;
constexpr int warp_k = 64;               // of a warp at once
constexpr int block_k = warps * warp_k;  // of a block at once
constexpr int batch = 2;                 // of warp_k, loaded together

// Zeros where not `inside`. One predicated instruction: with a branch around each, loads would not go out together.
__device__ __forceinline__ uint4 load_weight(const bf16* at, bool inside) {
  uint4 bits;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(bits.x), "=&r"(bits.y), "=&r"(bits.z), "=&r"(bits.w)
      : "l"(at), "r"(static_cast<int>(inside)));
  return bits;
}

// 8 columns of y for each of `row_tiles` tiles of 8 rows of x.
template <int row_tiles>
__global__ void __launch_bounds__(threads, row_tiles == 1 ? 3 : 2)
    linear_rows_kernel(const __grid_constant__ LinearRows p) {
  __shared__ float sums[warps][row_tiles * 8][tile_columns + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int fragment_row = lane / 4, fragment_k = lane % 4 * 8;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * tile_columns;
  const int in = static_cast<int>(p.in);
  const uint4 zero = make_uint4(0, 0, 0, 0);

  // Rows of W behind its end are read as its last one; their sums are thrown away.
  const bf16* w[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t column = first_column + fragment_row + half * 8;
    w[half] = static_cast<const bf16*>(p.weight) + (column < p.out ? column : p.out - 1) * p.in + fragment_k;
  }
  const bf16* x[row_tiles];
  bool has_row[row_tiles];
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
    const int row = tile * 8 + fragment_row;
    has_row[tile] = row < p.rows;
    x[tile] = static_cast<const bf16*>(p.x) + (has_row[tile] ? row : 0) * p.x_stride + fragment_k;
  }

  float acc[row_tiles][4] = {};
  for (int k = warp * warp_k; k < in; k += batch * block_k) {
    uint4 a[batch][2][2];  // group, its 32, half of the rows
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = k + b * block_k + part * 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) a[b][part][half] = load_weight(w[half] + at, at + fragment_k < in);
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = k + b * block_k + part * 32;
        const uint4(&rows)[2] = a[b][part];
        const uint32_t first[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
        const uint32_t second[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
          uint4 value = zero;
          if (has_row[tile] && at + fragment_k < in) value = __ldg(reinterpret_cast<const uint4*>(x[tile] + at));
          ptx::mma_bf16(acc[tile], first, value.x, value.y);
          ptx::mma_bf16(acc[tile], second, value.z, value.w);
        }
      }
    }
  }

  // A thread holds columns fragment_row and fragment_row + 8 of y, for two neighbouring rows.
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[warp][tile * 8 + lane % 4 * 2 + e % 2][fragment_row + e / 2 * 8] = acc[tile][e];
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < static_cast<int>(p.rows) * tile_columns; item += threads) {
    const int row = item / tile_columns;
    const int64_t column = first_column + item % tile_columns;
    if (column >= p.out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < warps; ++from) sum += sums[from][row][item % tile_columns];
    if (p.bias != nullptr) sum += to_float(static_cast<const bf16*>(p.bias)[column]);
    static_cast<bf16*>(p.y)[row * p.out + column] = from_float<bf16>(sum);
  }
}

}  // namespace

cudaError_t linear_rows(const LinearRows& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((p.out + tile_columns - 1) / tile_columns);
  if (p.rows <= 8)
    linear_rows_kernel<1><<<blocks, threads, 0, stream>>>(p);
  else
    linear_rows_kernel<2><<<blocks, threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flash_xlstm::cuda
