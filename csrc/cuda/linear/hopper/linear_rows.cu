// y = x W^T + bias for up to 16 rows of x, bfloat16, float32 sums, on Hopper. Decoding does this with every weight.
// Each SM has one block, and all blocks have nearly the same number of W's rows, so they end together. A producer warp
// streams a block's share of W through a ring of stages by TMA, across tiles, and never waits for the epilogue.
//
// The rows of W are cut into tiles of equal height, up to 48, such that the blocks have equally many. A stage holds 128
// of k: of the tile's rows of W and of every row of x, as TMA boxes. x comes from the L2 cache, once for each tile.
// Eight consumer warps share a stage: four along k, two along the rows. The products are mma.m16n8k16 with x as the 16
// rows and W as the 8 columns; ldmatrix loads both. A warp releases a stage when its operands are in registers. In the
// epilogue the four sums over k are added through shared memory, in a fixed order.
//
// Decoding is a chain of such products of some ten microseconds each, so the time between them counts:
//   - Several products of one x are one launch, whose tiles are dealt out together.
//   - A residual is added in the epilogue. For silu(x A^T) * (x B^T) a tile has rows of A and the same rows of B.
//   - By programmatic dependent launch (dependent_launch.cuh) a block may start while earlier kernels run. It then
//     loads W, if the caller has promised that no running kernel writes it (`constant_weights`). It loads x after its
//     wait, and without the promise W too.
// An RMS norm of x is a launch of its own. Here each block would have to make the normed x, which for several rows is
// more work than the products.
#include <algorithm>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/linear/hopper/linear_rows.h"
#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::linear_hopper {
namespace {

constexpr int consumers = 8, consumer_threads = consumers * 32, threads = consumer_threads + 32;
constexpr int k_groups = 4, column_groups = consumers / k_groups;
constexpr int warp_k = 32, stage_k = k_groups * warp_k;  // k of a warp, of a stage
// A TMA box has 64 of k, 128 bytes of a row, with 128-byte swizzle.
constexpr int box_k = 64, boxes = stage_k / box_k, row_bytes = box_k * 2;
constexpr int most_stages = 16, largest_tile = 48;
// exclusive_bytes is more than half of an SM's shared memory, so that an SM has one block. With room for two, the next
// launch would put two blocks on an SM where this one ends early, and none on others. shared_limit leaves 24 KiB of the
// 227 of a block unused.
constexpr int exclusive_bytes = 116 * 1024, shared_limit = 203 * 1024;
// Stages of W that are loaded before the wait for earlier kernels. More would take bandwidth from those kernels. A
// small product, whose blocks have one tile of at most small_rings times the ring, loads the whole ring: there memory
// is idle between launches.
constexpr int early_stages = 6, small_rings = 3;

// column_tiles: 8 rows of W each, of a warp.
template <int row_tiles, int column_tiles>
struct Shape {
  static constexpr int x_rows = row_tiles * 8;
  static constexpr int tile = column_groups * column_tiles * 8;  // rows of W, at most
  static constexpr int box_bytes = (x_rows + tile) * row_bytes;  // x's rows, then W's
  static constexpr int stage_bytes = boxes * box_bytes;
  static constexpr int sums_stride = tile + 8;  // 8 banks on from row to row
  static constexpr int sums_bytes = k_groups * x_rows * sums_stride * 4;
  static constexpr int stages = std::min<int>(most_stages, (shared_limit - sums_bytes - 1024) / stage_bytes);
  // one_tile: no block has a second tile, so the sums may overwrite the stages.
  static constexpr int shared_bytes(bool one_tile) {
    return std::max(exclusive_bytes, stages * stage_bytes + (one_tile ? 0 : sums_bytes) + 1024);  // to align
  }
};

struct Maps {
  CUtensorMap x, weight[FusedLinearRows::max_parts];
};

// once: W, which is read once. Else x, which every block reads.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int k, int row,
                                         bool once) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(ptx::shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(ptx::shared_address(barrier)), "r"(k), "r"(row),
      "l"(once ? ptx::evict_first : ptx::evict_last)
      : "memory");
}

// A tile of `columns` columns of y, rows of W: its part (product), and its first column there.
struct Tile {
  int part = 0, first;

  __device__ Tile(const FusedLinearRows& p, int tile, int columns) {
    const int parts = p.swiglu ? 1 : p.count;
    for (; part < parts - 1; ++part) {
      const int tiles = static_cast<int>(ceil_div(p.part[part].out, columns));
      if (tile < tiles) break;
      tile -= tiles;
    }
    first = tile * columns;
  }
};

template <int row_tiles, int column_tiles>
__global__ void __launch_bounds__(threads, 1)
    linear_rows_kernel(const __grid_constant__ FusedLinearRows p, const __grid_constant__ Maps maps, const int tiles,
                       const int columns) {
  using S = Shape<row_tiles, column_tiles>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const ring = unaligned + ptx::bytes_to_align<1024>(unaligned);
  __shared__ uint64_t full[S::stages], empty[S::stages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int in = static_cast<int>(p.in), rows = static_cast<int>(p.rows), blocks = static_cast<int>(gridDim.x);
  const bool one_tile = tiles <= blocks;
  float* const sums = reinterpret_cast<float*>(ring + (one_tile ? 0 : S::stages * S::stage_bytes));

  if (!p.holds_next) let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::stages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, consumers);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (warp == consumers) {
    if (lane != 0) return;
    const int pieces = ceil_div(in, stage_k);
    // Blocks begin at different places of k. Else all would load the same piece of x from a few L2 slices at once.
    const int begin = static_cast<int>(blockIdx.x) * pieces / blocks;
    const auto place_of = [&](int piece) {
      const int at = begin + piece;
      return (at < pieces ? at : at - pieces) * stage_k;
    };
    const auto load_weights = [&](const Tile& tile, int piece, int stage) {
      ptx::mbarrier_arrive_expect(full + stage, boxes * (S::x_rows + columns * (p.swiglu ? 2 : 1)) * row_bytes);
#pragma unroll
      for (int box = 0; box < boxes; ++box) {
        uint8_t* const to = ring + stage * S::stage_bytes + box * S::box_bytes + S::x_rows * row_bytes;
        const int k = place_of(piece) + box * box_k;
        load_box(to, &maps.weight[tile.part], full + stage, k, tile.first, true);
        if (p.swiglu) load_box(to + S::tile / 2 * row_bytes, &maps.weight[1], full + stage, k, tile.first, true);
      }
    };
    const auto load_x = [&](int piece, int stage) {
#pragma unroll
      for (int box = 0; box < boxes; ++box) {
        uint8_t* const to = ring + stage * S::stage_bytes + box * S::box_bytes;
        load_box(to, &maps.x, full + stage, place_of(piece) + box * box_k, 0, false);
      }
    };
    if (!p.constant_weights) wait_for_earlier_kernels();
    const Tile first(p, blockIdx.x, columns);
    const int ahead = min(S::stages, pieces);
    const bool small = one_tile && pieces <= small_rings * S::stages;
    const int early = small ? ahead : min(ahead, early_stages);
    for (int piece = 0; piece < early; ++piece) load_weights(first, piece, piece);
    if (p.constant_weights) wait_for_earlier_kernels();
    for (int piece = early; piece < ahead; ++piece) load_weights(first, piece, piece);
    for (int piece = 0; piece < ahead; ++piece) load_x(piece, piece);
    int stage = ahead % S::stages, parity = ahead == S::stages ? 0 : 1, piece = ahead;
    for (int t = blockIdx.x; t < tiles; t += blocks, piece = 0) {
      const Tile tile(p, t, columns);
      for (; piece < pieces; ++piece) {
        ptx::mbarrier_wait(empty + stage, parity);
        load_weights(tile, piece, stage);
        load_x(piece, stage);
        if (++stage == S::stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  const int k_group = warp % k_groups, column_group = warp / k_groups;
  // The lane's ldmatrix addresses in the first stage: of x, for each 16 of k, and of W.
  const int matrix = lane / 8, matrix_row = lane % 8;
  const auto place = [&](int row, int piece) {
    return ring + k_group / 2 * S::box_bytes + row * row_bytes + ((k_group % 2 * 4 + piece) ^ matrix_row) * 16;
  };
  const int x_row = matrix_row + (row_tiles == 2 ? matrix % 2 * 8 : 0);  // of 8 rows, both halves: one is not used
  const uint8_t* const x_at[2] = {place(x_row, matrix / 2), place(x_row, 2 + matrix / 2)};
  const uint8_t* const weight_at = place(S::x_rows + column_group * column_tiles * 8 + matrix_row, matrix);
  wait_for_earlier_kernels();
  if (p.holds_next) let_next_kernel_start();
  // The most results that a thread writes.
  constexpr int items = ceil_div(S::x_rows * S::tile, consumer_threads);
  int stage = 0, parity = 0;
  for (int t = blockIdx.x; t < tiles; t += blocks) {
    const Tile tile(p, t, columns);
    const int64_t out = p.part[tile.part].out;
    const int valid = static_cast<int>(min(static_cast<int64_t>(columns), out - tile.first));
    // Bias and residual are loaded before the products.
    float biases[items][2], residuals[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      biases[i][0] = biases[i][1] = residuals[i] = 0.0f;
      const int item = threadIdx.x + i * consumer_threads, row = item / valid;
      if (row >= rows) continue;
      const int64_t column = tile.first + item - row * valid;
      const auto bias_of = [&](int which) {
        const void* const bias = p.part[which].bias;
        return bias != nullptr ? to_float(static_cast<const bf16*>(bias)[column]) : 0.0f;
      };
      biases[i][0] = bias_of(tile.part);
      if (p.swiglu) biases[i][1] = bias_of(1);
      if (p.residual != nullptr)
        residuals[i] = to_float(static_cast<const bf16*>(p.residual)[row * p.residual_stride + column]);
    }
    float acc[column_tiles][4] = {};
    for (int k = 0; k < in; k += stage_k) {
      ptx::mbarrier_wait(full + stage, parity);
      const int from = stage * S::stage_bytes;
      uint32_t a[2][4];
#pragma unroll
      for (int part = 0; part < 2; ++part) ptx::ldmatrix_x4<false>(a[part], x_at[part] + from);
#pragma unroll
      for (int c = 0; c < column_tiles; ++c) {
        uint32_t b[4];
        ptx::ldmatrix_x4<false>(b, weight_at + from + c * 8 * row_bytes);
        ptx::mma_bf16(acc[c], a[0], b[0], b[1]);
        ptx::mma_bf16(acc[c], a[1], b[2], b[3]);
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty + stage);
      if (++stage == S::stages) stage = 0, parity ^= 1;
    }

    // All have read the stages, or the last tile's sums.
    if (one_tile || t != blockIdx.x) ptx::named_barrier(1, consumer_threads);
    const auto sum_at = [&](int group, int row, int column) -> float& {
      return sums[(group * S::x_rows + row) * S::sums_stride + column];
    };
    // A thread holds two columns of each 8, for rows lane / 4 and lane / 4 + 8 of x.
#pragma unroll
    for (int c = 0; c < column_tiles; ++c) {
#pragma unroll
      for (int half = 0; half < row_tiles; ++half) {
        const int column = (column_group * column_tiles + c) * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(&sum_at(k_group, lane / 4 + half * 8, column)) =
            make_float2(acc[c][half * 2], acc[c][half * 2 + 1]);
      }
    }
    ptx::named_barrier(1, consumer_threads);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int item = threadIdx.x + i * consumer_threads, row = item / valid, tile_column = item - row * valid;
      if (row >= rows) continue;
      const auto sum_of = [&](int tile_row) {
        float sum = 0.0f;
#pragma unroll
        for (int group = 0; group < k_groups; ++group) sum += sum_at(group, row, tile_row);
        return sum;
      };
      float y = sum_of(tile_column) + biases[i][0];
      if (p.swiglu) y = y / (1.0f + expf(-y)) * (sum_of(tile_column + S::tile / 2) + biases[i][1]);
      if (p.residual != nullptr) y += residuals[i];
      static_cast<bf16*>(p.part[tile.part].y)[row * out + tile.first + tile_column] = from_float<bf16>(y);
    }
  }
}

// How the columns of y are dealt out: in tiles of `columns` columns.
struct Plan {
  int tiles, columns, blocks;
};

int tiles_of(const FusedLinearRows& p, int64_t columns) {
  int64_t tiles = 0;
  for (int part = 0; part < (p.swiglu ? 1 : p.count); ++part) tiles += ceil_div(p.part[part].out, columns);
  return static_cast<int>(tiles);
}

// As few tiles a block as possible, and of the least height that allows it.
Plan plan(const FusedLinearRows& p, int most_rows) {
  int64_t total = 0;
  for (int part = 0; part < (p.swiglu ? 1 : p.count); ++part) total += p.part[part].out;
  const int blocks = processor_count(), most = most_rows / (p.swiglu ? 2 : 1);
  for (int64_t each = 1;; ++each) {
    for (int64_t columns = ceil_div(total, each * blocks); columns <= most; ++columns) {
      const int tiles = tiles_of(p, columns);
      if (tiles <= each * blocks) {
        return {.tiles = tiles, .columns = static_cast<int>(columns), .blocks = std::min(tiles, blocks)};
      }
    }
  }
}

template <int row_tiles, int column_tiles>
cudaError_t launch(const FusedLinearRows& p, const Plan& plan, cudaStream_t stream) {
  using S = Shape<row_tiles, column_tiles>;
  const auto kernel = linear_rows_kernel<row_tiles, column_tiles>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes(false));
  if (status != cudaSuccess) return status;
  Maps maps;
  const auto map = [&](CUtensorMap& to, const void* data, int64_t count, int64_t stride, int box) {
    return encode<2>(to, data, {static_cast<uint64_t>(p.in), static_cast<uint64_t>(count)},
                     {static_cast<uint64_t>(stride) * 2}, {box_k, static_cast<uint32_t>(box)});
  };
  status = map(maps.x, p.x, p.rows, p.rows > 1 ? p.x_stride : p.in, S::x_rows);
  for (int part = 0; part < p.count && status == cudaSuccess; ++part) {
    if (p.part[part].out > 0)
      status = map(maps.weight[part], p.part[part].weight, p.part[part].out, p.in, plan.columns);
  }
  if (status != cudaSuccess) return status;
  return launch_early(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                      S::shared_bytes(plan.tiles <= plan.blocks), 1, stream, p, maps, plan.tiles, plan.columns);
}

template <int row_tiles>
cudaError_t launch_for(const FusedLinearRows& p, cudaStream_t stream) {
  const Plan chosen = plan(p, largest_tile);
  const int tile = chosen.columns * (p.swiglu ? 2 : 1);
  if (tile <= 16) return launch<row_tiles, 1>(p, chosen, stream);
  if (tile <= 32) return launch<row_tiles, 2>(p, chosen, stream);
  return launch<row_tiles, 3>(p, chosen, stream);
}

}  // namespace

// Not an expanded x: a tensor map needs rows that do not overlap.
bool serves(const FusedLinearRows& p) {
  return device_is_hopper() && encode_function() != nullptr && (p.rows == 1 || p.x_stride >= p.in);
}

cudaError_t fused_linear_rows(const FusedLinearRows& p, cudaStream_t stream) {
  return p.rows <= 8 ? launch_for<1>(p, stream) : launch_for<2>(p, stream);
}

}  // namespace flash_xlstm::cuda::linear_hopper
