// y = x W^T + bias for up to 16 rows of x, bfloat16, float32 sums. Decoding does this with every weight. The weights
// are read once, straight into registers.
//
// A block makes 16 columns of y from 16 rows of W. Its 8 warps share k: a warp takes 64 of k (128 bytes of each row),
// then the 64 that are 512 further on, so that a block reads whole kilobytes of each row. The products are mma.m16n8k16
// with W as the 16 rows and x as the 8 columns; more than 8 rows of x take two mma. Each thread loads 16 neighbouring
// bytes of a row and uses them as the k that the fragment's layout gives to it. x is used in the same order, so the
// sums are right.
//
//   thread of a warp   rows of W                k of a group of 32
//   lane               lane / 4, and 8 further  8 (lane % 4) to 8 (lane % 4) + 7: for two mma
//
// Two groups of 64 are loaded before the first is used: 8 loads of 16 bytes a thread, 32 KiB a block in flight. In the
// epilogue the warps' sums are added through shared memory, in a fixed order.
//
// Decoding is a chain of such products of some ten microseconds each, so the time between them counts:
//   - Several products of one x are one launch. A block finds the product that its columns belong to.
//   - A residual is added in the epilogue. For silu(x A^T) * (x B^T) a block takes 8 rows of each of A and B.
//   - By programmatic dependent launch (dependent_launch.cuh) blocks may start while the kernel before runs. The first
//     wave prefetches the beginning of its rows of W into the L2 cache before it waits for x.
// An RMS norm of x is a launch of its own. Here each block would have to make the normed x, which for several rows is
// more work than the products.
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/ptx/mma_sync.cuh"
#include "params/linear.h"
#ifdef FLASH_XLSTM_WITH_HOPPER
#include "cuda/linear/hopper/linear_rows.h"
#endif

namespace flash_xlstm::cuda {
namespace {

constexpr int warps = 8, threads = warps * 32;
constexpr int tile_rows = 16;            // of W, a block
constexpr int warp_k = 64;               // k that a warp loads at once
constexpr int block_k = warps * warp_k;  // k that a block loads at once
constexpr int batch = 2;                 // warp_k's loaded before the first is used
constexpr int prefetch_k = batch * block_k;
constexpr int resident_blocks(int row_tiles) { return row_tiles == 1 ? 3 : 2; }  // of an SM

// Zeros where not `inside`. One predicated instruction: branches would keep the loads from being issued together.
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

// Up to 8 * row_tiles rows of x. early_blocks: blocks of the first wave, which prefetch.
template <int row_tiles>
__global__ void __launch_bounds__(threads, resident_blocks(row_tiles))
    linear_rows_kernel(const __grid_constant__ FusedLinearRows p, const unsigned early_blocks) {
  __shared__ float sums[warps][row_tiles * 8][tile_rows + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int fragment_row = lane / 4, fragment_k = lane % 4 * 8;
  const int in = static_cast<int>(p.in);
  const int tile_columns = p.swiglu ? tile_rows / 2 : tile_rows;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  int part = 0;
  int64_t tile = blockIdx.x;
  if (!p.swiglu) {
    for (; part < p.count - 1; ++part) {
      const int64_t tiles = ceil_div(p.part[part].out, tile_rows);
      if (tile < tiles) break;
      tile -= tiles;
    }
  }
  const int64_t first_column = tile * tile_columns, out = p.part[part].out;
  // Row `row` of the tile's 16. Past the end of W its last row: those sums are not written.
  const auto weight_row = [&](int row) {
    const bool second = p.swiglu && row >= tile_columns;
    const int64_t column = first_column + (second ? row - tile_columns : row);
    return static_cast<const bf16*>(p.part[second ? 1 : part].weight) + (column < out ? column : out - 1) * p.in;
  };
  if (blockIdx.x < early_blocks) {
    constexpr int row_lines = prefetch_k / 64;  // 128 bytes each
    for (int line = threadIdx.x; line < tile_rows * row_lines; line += threads) {
      const int k = line % row_lines * 64;
      if (k < in) prefetch_to_l2(weight_row(line / row_lines) + k);
    }
  }
  if (!p.holds_next) let_next_kernel_start();
  wait_for_earlier_kernels();
  if (p.holds_next) let_next_kernel_start();

  const bf16* const w[2] = {weight_row(fragment_row) + fragment_k, weight_row(fragment_row + 8) + fragment_k};
  const bf16* x[row_tiles];
  bool has_row[row_tiles];
#pragma unroll
  for (int t = 0; t < row_tiles; ++t) {
    const int row = t * 8 + fragment_row;
    has_row[t] = row < p.rows;
    x[t] = static_cast<const bf16*>(p.x) + (has_row[t] ? row : 0) * p.x_stride + fragment_k;
  }

  float acc[row_tiles][4] = {};
  for (int k = warp * warp_k; k < in; k += batch * block_k) {
    uint4 a[batch][2][2];  // group, its 32, half of the rows
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = k + b * block_k + half * 32;
#pragma unroll
        for (int row = 0; row < 2; ++row) a[b][half][row] = load_weight(w[row] + at, at + fragment_k < in);
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = k + b * block_k + half * 32;
        const uint4(&rows)[2] = a[b][half];
        const uint32_t first[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
        const uint32_t second[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) {
          uint4 value = zero;
          // A plain load: the read-only cache may be stale for what an earlier kernel has just written.
          if (has_row[t] && at + fragment_k < in) value = *reinterpret_cast<const uint4*>(x[t] + at);
          ptx::mma_bf16(acc[t], first, value.x, value.y);
          ptx::mma_bf16(acc[t], second, value.z, value.w);
        }
      }
    }
  }

  // A thread holds rows fragment_row and fragment_row + 8 of the tile, for two neighbouring rows of x.
#pragma unroll
  for (int t = 0; t < row_tiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[warp][t * 8 + lane % 4 * 2 + e % 2][fragment_row + e / 2 * 8] = acc[t][e];
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < static_cast<int>(p.rows) * tile_columns; item += threads) {
    const int row = item / tile_columns, tile_column = item % tile_columns;
    const int64_t column = first_column + tile_column;
    if (column >= out) continue;
    const auto sum_of = [&](int which, int tile_row) {
      float sum = 0.0f;
#pragma unroll
      for (int from = 0; from < warps; ++from) sum += sums[from][row][tile_row];
      const void* const bias = p.part[which].bias;
      return sum + (bias != nullptr ? to_float(static_cast<const bf16*>(bias)[column]) : 0.0f);
    };
    float y = sum_of(part, tile_column);
    if (p.swiglu) y = y / (1.0f + expf(-y)) * sum_of(1, tile_column + tile_columns);
    if (p.residual != nullptr) y += to_float(static_cast<const bf16*>(p.residual)[row * p.residual_stride + column]);
    static_cast<bf16*>(p.part[part].y)[row * out + column] = from_float<bf16>(y);
  }
}

}  // namespace

cudaError_t fused_linear_rows(const FusedLinearRows& p, cudaStream_t stream) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (linear_hopper::serves(p)) return linear_hopper::fused_linear_rows(p, stream);
#endif
  int64_t blocks = 0;
  const int tile_columns = p.swiglu ? tile_rows / 2 : tile_rows;
  for (int part = 0; part < (p.swiglu ? 1 : p.count); ++part) {
    blocks += ceil_div(p.part[part].out, tile_columns);
  }
  const int row_tiles = p.rows <= 8 ? 1 : 2;
  const auto kernel = row_tiles == 1 ? linear_rows_kernel<1> : linear_rows_kernel<2>;
  const unsigned early_blocks = static_cast<unsigned>(processor_count() * resident_blocks(row_tiles));
  return launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, 1, stream, p, early_blocks);
}

std::string linear_words([[maybe_unused]] int major, [[maybe_unused]] int minor) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (major == 9 && minor == 0) return "Hopper (a stream of the TMA, mma.sync), for bfloat16";
#endif
  return "portable (mma.sync tensor cores), for bfloat16";
}

}  // namespace flash_xlstm::cuda
