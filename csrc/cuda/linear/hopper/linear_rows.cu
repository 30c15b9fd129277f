// y = x W^T + bias for up to 16 rows of x, bfloat16, float32 sums, on Hopper: what decoding does with every weight. A
// multiprocessor has one block, and the block an equal share of W's rows, to the row; so all end together, and each
// reads its share as one stream, from the first stage to the last, that never waits for a sum.
//
// A stage holds 256 (or 512) bytes of k of up to 96 rows of W and of every row of x, which bulk copies bring; x comes
// from the second-level cache, once for each tile of W. Eight warps consume it: four share its k, two its rows. The
// products are mma.m16n8k16 with x as the 16 rows and W as the 8 columns. Each thread reads 16 neighbouring bytes of a
// row and takes them as the k that the fragment's layout gives it: a sum does not mind the order, as long as x and W
// are taken in the same. At a tile's end the four sums over k are added through shared memory, in a fixed order.
//
// Decoding is a chain of such products, each over in some ten microseconds, so what lies between them counts:
//   - Several products of one x are one launch: the columns of all are dealt out.
//   - A residual is added where y is written. For silu(x A^T) * (x B^T) a tile has rows of A and the same of B.
//   - The launch may overlap the kernel before (dependent_launch.cuh): a block takes less than half of the shared
//     memory, so that it can wait beside the last one's, and fetches the beginning of its share into the second-level
//     cache meanwhile.
// An RMS norm in front is a launch of its own: each block would have to make the normed x for itself, which for several
// rows is more work than the products.
#include <algorithm>

#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/linear/hopper/linear_rows.h"
#include "cuda/numeric.cuh"
#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::linear_hopper {
namespace {

constexpr int consumers = 8, consumer_threads = consumers * 32, threads = consumer_threads + 32;
constexpr int k_groups = 4, column_groups = consumers / k_groups;
constexpr int warp_k = 32;  // of a warp in a unit of a stage
constexpr int most_stages = 8, largest_tile = 96;
// Two blocks on a multiprocessor: this one, and the next kernel's that waits.
constexpr int shared_limit = 113 * 1024;
constexpr int prefetched_bytes = 96 * 1024;  // of a block's share of W

template <int row_tiles, int column_tiles, int units>
struct Shape {
  static constexpr int x_rows = row_tiles * 8;
  static constexpr int tile = column_groups * column_tiles * 8;  // rows of W
  static constexpr int stage_k = k_groups * warp_k * units;
  static constexpr int row_bytes = stage_k * 2;
  static constexpr int stage_bytes = (tile + x_rows) * row_bytes;
  static constexpr int sums_stride = tile + 8;  // bank 8 on from row to row
  static constexpr int sums_bytes = k_groups * x_rows * sums_stride * 4;
  static constexpr int stages = std::min<int>(most_stages, (shared_limit - sums_bytes - 512) / stage_bytes);
  static constexpr int shared_bytes = stages * stage_bytes + sums_bytes + 256;
  static_assert(stages >= 2);
};

// Of W, which is read once, and of x, which every block reads.
__device__ __forceinline__ void load_row(void* shared, const void* global, int bytes, uint64_t* barrier, bool once) {
  constexpr uint64_t evict_first = 0x12f0000000000000ull, evict_last = 0x14f0000000000000ull;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          ptx::shared_address(shared)),
      "l"(global), "r"(bytes), "r"(ptx::shared_address(barrier)), "l"(once ? evict_first : evict_last)
      : "memory");
}
__device__ __forceinline__ void prefetch_row(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// A block's share of the columns of y (rows of W), and its tiles.
struct Share {
  int64_t first;
  int columns, tiles;

  __device__ Share(int64_t total, int largest) {
    const int64_t block = blockIdx.x, blocks = gridDim.x;
    first = block * total / blocks;
    columns = static_cast<int>((block + 1) * total / blocks - first);
    tiles = (columns + largest - 1) / largest;
  }
  __device__ int begin(int tile) const { return static_cast<int>(static_cast<int64_t>(columns) * tile / tiles); }
};

// The part that a column lies in; the column becomes the part's.
__device__ __forceinline__ int part_of(const FusedLinearRows& p, int64_t& column) {
  int part = 0;
  if (p.swiglu) return 0;
  while (column >= p.part[part].out) column -= p.part[part++].out;
  return part;
}

template <int row_tiles, int column_tiles, int units>
__global__ void __launch_bounds__(threads, 2)
    linear_rows_kernel(const __grid_constant__ FusedLinearRows p, const int64_t total) {
  using S = Shape<row_tiles, column_tiles, units>;
  extern __shared__ __align__(128) uint8_t shared[];
  uint8_t* const ring = shared;
  float* const sums = reinterpret_cast<float*>(shared + S::stages * S::stage_bytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + S::stages * S::stage_bytes + S::sums_bytes);
  uint64_t* const empty = full + most_stages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int in = static_cast<int>(p.in), rows = static_cast<int>(p.rows);
  const int row_weights = p.swiglu ? 2 : 1;  // rows of W for a column of y
  const Share share(total, S::tile / row_weights);

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::stages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, consumers);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (warp == consumers) {
    constexpr int held = (S::tile + 31) / 32;  // rows of W of a lane
    const bf16* w[held];
    bool has[held];
    int count;
    const auto take_tile = [&](int tile) {
      const int begin = share.begin(tile), columns = share.begin(tile + 1) - begin;
      count = columns * row_weights;
#pragma unroll
      for (int h = 0; h < held; ++h) {
        const int row = lane + h * 32;
        has[h] = row < count;
        const bool second = row >= columns;
        int64_t column = share.first + begin + (second ? row - columns : row);
        if (!has[h]) column = share.first;
        const int part = part_of(p, column);
        w[h] = static_cast<const bf16*>(p.part[p.swiglu && second ? 1 : part].weight) + column * p.in;
      }
    };
    take_tile(0);
    const int early = min(in * 2, prefetched_bytes / max(count, 1) / 128 * 128);
#pragma unroll
    for (int h = 0; h < held; ++h) {
      if (has[h] && early > 0) prefetch_row(w[h], early);
    }
    wait_for_earlier_kernels();
    const bf16* const x = static_cast<const bf16*>(p.x) + (lane < rows ? lane : 0) * p.x_stride;
    int stage = 0, parity = 1;
    for (int tile = 0; tile < share.tiles; ++tile) {
      if (tile > 0) take_tile(tile);
      for (int k = 0; k < in; k += S::stage_k) {
        ptx::mbarrier_wait(empty + stage, parity);
        const int bytes = min(S::stage_k, in - k) * 2;
        if (lane == 0) ptx::mbarrier_arrive_expect(full + stage, bytes * (count + rows));
        __syncwarp();
        uint8_t* const to = ring + stage * S::stage_bytes;
#pragma unroll
        for (int h = 0; h < held; ++h) {
          if (has[h]) load_row(to + (lane + h * 32) * S::row_bytes, w[h] + k, bytes, full + stage, true);
        }
        if (lane < rows) load_row(to + (S::tile + lane) * S::row_bytes, x + k, bytes, full + stage, false);
        if (++stage == S::stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  const int k_group = warp % k_groups, column_group = warp / k_groups;
  const int fragment_row = lane / 4, fragment_k = k_group * warp_k * units + lane % 4 * 8;
  const bool has_low = fragment_row < rows, has_high = row_tiles == 2 && fragment_row + 8 < rows;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  wait_for_earlier_kernels();
  int stage = 0, parity = 0;
  for (int tile = 0; tile < share.tiles; ++tile) {
    float acc[column_tiles][4] = {};
    for (int k = 0; k < in; k += S::stage_k) {
      ptx::mbarrier_wait(full + stage, parity);
      const uint8_t* const from = ring + stage * S::stage_bytes + fragment_row * S::row_bytes;
      const auto take = [&](auto whole) {
#pragma unroll
        for (int unit = 0; unit < units; ++unit) {
          const int at = fragment_k + unit * warp_k;
          const bool inside = whole || k + at < in;
          const auto row = [&](int first) {
            const uint4 bits = *reinterpret_cast<const uint4*>(from + first * S::row_bytes + at * 2);
            return inside ? bits : zero;
          };
          const uint4 low = has_low ? row(S::tile) : zero;
          const uint4 high = has_high ? row(S::tile + 8) : zero;
          const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
          for (int t = 0; t < column_tiles; ++t) {
            const uint4 b = row((column_group * column_tiles + t) * 8);
            ptx::mma_bf16(acc[t], a[0], b.x, b.y);
            ptx::mma_bf16(acc[t], a[1], b.z, b.w);
          }
        }
      };
      if (k + S::stage_k <= in) {
        take(std::true_type{});
      } else {
        take(std::false_type{});
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty + stage);
      if (++stage == S::stages) stage = 0, parity ^= 1;
    }

    ptx::named_barrier(1, consumer_threads);  // the last tile's sums have been read
    // A thread holds columns 2 (lane % 4) and the next of each 8, for rows fragment_row and fragment_row + 8 of x.
    const auto sum_at = [&](int group, int row, int column) -> float& {
      return sums[(group * S::x_rows + row) * S::sums_stride + column];
    };
#pragma unroll
    for (int t = 0; t < column_tiles; ++t) {
#pragma unroll
      for (int half = 0; half < row_tiles; ++half) {
        const int column = (column_group * column_tiles + t) * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(&sum_at(k_group, fragment_row + half * 8, column)) =
            make_float2(acc[t][half * 2], acc[t][half * 2 + 1]);
      }
    }
    ptx::named_barrier(1, consumer_threads);
    const int begin = share.begin(tile), columns = share.begin(tile + 1) - begin;
    for (int item = threadIdx.x; item < rows * columns; item += consumer_threads) {
      const int row = item / columns, tile_column = item - row * columns;
      int64_t column = share.first + begin + tile_column;
      const int part = part_of(p, column);
      const auto sum_of = [&](int which, int tile_row) {
        float sum = 0.0f;
#pragma unroll
        for (int group = 0; group < k_groups; ++group) sum += sum_at(group, row, tile_row);
        const void* const bias = p.part[which].bias;
        return sum + (bias != nullptr ? to_float(static_cast<const bf16*>(bias)[column]) : 0.0f);
      };
      float y = sum_of(part, tile_column);
      if (p.swiglu) y = y / (1.0f + expf(-y)) * sum_of(1, tile_column + columns);
      if (p.residual != nullptr) y += to_float(static_cast<const bf16*>(p.residual)[row * p.residual_stride + column]);
      static_cast<bf16*>(p.part[part].y)[row * p.part[part].out + column] = from_float<bf16>(y);
    }
  }
}

template <int row_tiles, int column_tiles, int units>
cudaError_t launch(const FusedLinearRows& p, int64_t total, int blocks, cudaStream_t stream) {
  using S = Shape<row_tiles, column_tiles, units>;
  const auto kernel = linear_rows_kernel<row_tiles, column_tiles, units>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), S::shared_bytes, 1, stream, p, total);
}

template <int row_tiles>
cudaError_t launch_for(const FusedLinearRows& p, int64_t total, int blocks, int tile, cudaStream_t stream) {
  if (tile <= 16) return launch<row_tiles, 1, 2>(p, total, blocks, stream);
  if (tile <= 32) return launch<row_tiles, 2, 2>(p, total, blocks, stream);
  if (tile <= 48) return launch<row_tiles, 3, 2>(p, total, blocks, stream);
  if (tile <= 64) return launch<row_tiles, 4, 1>(p, total, blocks, stream);
  return launch<row_tiles, 6, 1>(p, total, blocks, stream);
}

}  // namespace

cudaError_t fused_linear_rows(const FusedLinearRows& p, cudaStream_t stream) {
  int64_t total = 0;
  for (int part = 0; part < (p.swiglu ? 1 : p.count); ++part) total += p.part[part].out;
  const int blocks = static_cast<int>(std::min<int64_t>(processor_count(), total));
  const int64_t share = (total + blocks - 1) / blocks * (p.swiglu ? 2 : 1);
  const int64_t tiles = (share + largest_tile - 1) / largest_tile;
  int tile = static_cast<int>((share + tiles - 1) / tiles);
  if (p.swiglu) tile += tile % 2;
  return p.rows <= 8 ? launch_for<1>(p, total, blocks, tile, stream) : launch_for<2>(p, total, blocks, tile, stream);
}

}  // namespace flash_xlstm::cuda::linear_hopper
