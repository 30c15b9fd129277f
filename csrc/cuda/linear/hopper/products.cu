// Products of many rows with what follows them, on Hopper: 16-bit operands, float32 sums. A training step's SwiGLU and
// residuals then take no pass of their own over memory.
//
//   then             product
//   nothing          rows [weights]^T, side by side     -
//   residual         rows weight^T                      + a residual, rounded once
//   swiglu           rows [gate up]^T, side by side     stores it, and silu(left) * right
//   swiglu_backward  dout down, SwiGLU's gradient       stores the gradients of left and right, and silu(left) * right
//
// Weights are read where they are, not joined first.
//
// Two blocks of a cluster make 256 rows x 256 columns. Each has 128 rows, 64 for each of two warpgroups, whose
// accumulators are 64 x 256. Of the columns' operand each block loads one half and sends it to both. A stage has 64 of
// k, 48 KiB; three stages form a ring, filled by one thread. Clusters walk over tiles, some rows of tiles at a time, so
// that what runs at once shares rows and columns in the L2 cache.
//
// The rest is hidden behind the next tile's products. A warpgroup rounds its sums and leaves them in shared memory (32
// KiB), in boxes that the TMA stores. Then it goes on. One of the producer's other warps, or with SwiGLU all three, work
// on what lies there: they start its stores, make SwiGLU or its gradient with 16-byte accesses to global memory, and hand
// the space back. A residual comes by TMA into the same space during the products, and its sum takes its place.
//
// SwiGLU reads the rounded product, as it does where it is a kernel of its own. So the results have the same bits.
#include <algorithm>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/numeric.cuh"
#include "cuda/common/status.h"
#include "cuda/common/tensor_map.h"
#include "cuda/pointwise/swiglu.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "params/linear.h"

namespace flash_xlstm::cuda {
namespace {

using Then = Product::Then;

constexpr int cluster = 2, warpgroups = 2, threads = 128 * (warpgroups + 1);
constexpr int part_rows = 64, block_rows = warpgroups * part_rows, tile_rows = cluster * block_rows;
constexpr int tile_columns = 256, half_columns = tile_columns / 2;
// A box of the TMA: rows of 64 elements, 128 bytes, with 128-byte swizzle.
constexpr int box = 64, row_bytes = box * 2, box_elements = box * box, box_bytes = box_elements * 2;
constexpr int stages = 3, stage_bytes = (block_rows + tile_columns) * row_bytes;
constexpr int boxes = tile_columns / box;  // of a warpgroup's sums
constexpr int others = 3;                  // warps beside the producer's
constexpr int width = 8;                   // elements of 16 bytes
// How many of the others work on the sums. A warp that waits for `written` must also hold `free` back: two phases later
// it could not tell what it has missed. So only one warp takes part where only one has something to do.
constexpr int workers_of(Then then) { return then == Then::swiglu || then == Then::swiglu_backward ? others : 1; }
// Rows of tiles that are walked over together, the fastest of those measured (docs/experiments.md).
constexpr int group_of(Then then) { return then == Then::residual ? 4 : 12; }
static_assert(half_columns == product_part);

template <typename T>
struct Shared {
  T rows[stages][block_rows * box];
  T columns[stages][tile_columns * box];
  T sums[warpgroups][boxes][box_elements];
  // Of stages: loaded; read by both blocks. Of a warpgroup's sums: written; worked off; the residual is there.
  uint64_t full[stages], empty[stages], written[warpgroups], free[warpgroups], given[warpgroups];
};

struct Maps {
  CUtensorMap rows, columns[Product::max_parts];
  CUtensorMap out, second_out, residual;
};

__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          ptx::shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(ptx::shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
// To the same place in both blocks, whose barriers count it.
__device__ __forceinline__ void load_box_for_both(void* shared, const CUtensorMap* map, uint64_t* barrier, int x,
                                                  int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(ptx::shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(ptx::shared_address(barrier)), "r"(x), "r"(y),
      "h"(static_cast<uint16_t>((1 << cluster) - 1))
      : "memory");
}
// Other lines of the L2 cache stay: what is stored is not read soon.
__device__ __forceinline__ void store_box_once(const CUtensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(ptx::shared_address(shared)), "r"(x), "r"(y), "l"(ptx::evict_first)
               : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(ptx::shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
// No release: what was read came by TMA and went to wgmma. A release at cluster scope is a fence of the whole GPU's
// memory. With it the products take a seventh longer.
__device__ __forceinline__ void arrive_in(int rank, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(ptx::peer_address(barrier, rank)) : "memory");
}

// The byte of 16 bytes, the `unit`th of a row of sums, in a warpgroup's boxes.
__device__ __forceinline__ uint32_t place(int row, int unit) {
  return unit / width * box_bytes + row * row_bytes + ((unit % width ^ row % 8) << 4);
}

struct Tile {
  int row, column;  // in tiles
};
template <int group>
__device__ __forceinline__ Tile tile_at(int index, int down, int across) {
  const int first = index / (group * across) * group, rest = index % (group * across);
  const int rows = min(group, down - first);
  return {first + rest % rows, rest / rows};
}

// Of swiglu_backward: a warp works on two rows at once, so that one's exponentials hide the other's. It copies so many
// twos of rows of SwiGLU's inputs ahead to shared memory, 512 bytes of each half of a row. In registers they came no
// sooner with four rows ahead than with one, and the products waited for them.
constexpr int two = 2, ahead = 2, slot_bytes = two * 1024;
template <typename T>
constexpr int ahead_offset = sizeof(Shared<T>) + 1024;  // to align

template <typename T, Then then>
__global__ void __launch_bounds__(threads, 1)
    products_kernel(const __grid_constant__ Product p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) uint8_t unaligned[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(unaligned + ptx::bytes_to_align<1024>(unaligned));
  const int rank = ptx::cluster_rank(), warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  constexpr bool transposed = then == Then::swiglu_backward;  // k is not contiguous in the columns' operand

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      ptx::mbarrier_init(&shared.full[s], 1);
      ptx::mbarrier_init(&shared.empty[s], cluster * warpgroups);
    }
    for (int w = 0; w < warpgroups; ++w) {
      ptx::mbarrier_init(&shared.written[w], 128);
      ptx::mbarrier_init(&shared.free[w], workers_of(then));
      ptx::mbarrier_init(&shared.given[w], 1);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_barrier();
  wait_for_earlier_kernels();

  constexpr int group = group_of(then);
  // A tile of swiglu has as many columns of the left half as of the right.
  constexpr int step = then == Then::swiglu ? half_columns : tile_columns;
  const int down = static_cast<int>(ceil_div(p.rows, int64_t{tile_rows}));
  const int across = static_cast<int>(ceil_div(p.columns, int64_t{step}));
  const int tiles = down * across, pieces = static_cast<int>(ceil_div(p.depth, int64_t{box}));
  const int begin = static_cast<int>(blockIdx.x) / cluster, by = static_cast<int>(gridDim.x) / cluster;

  if (warpgroup == warpgroups && warp == 0) {
    if (lane == 0) {
      int stage = 0, parity = 1;
#pragma unroll 1
      for (int t = begin; t < tiles; t += by) {
        const Tile tile = tile_at<group>(t, down, across);
        const int row = tile.row * tile_rows + rank * block_rows;
        // A block loads half of a tile's columns, which lie within one part: of swiglu, one of each.
        int column = tile.column * step + (then == Then::swiglu ? 0 : rank * half_columns);
        int part = then == Then::swiglu ? rank : 0;
        if constexpr (then == Then::nothing) {
          while (part < p.parts - 1 && column >= p.part_columns[part]) column -= p.part_columns[part++];
        }
        const CUtensorMap* const map = &maps.columns[part];
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece) {
          const int k = piece * box;
          T* const half = shared.columns[stage] + rank * half_columns * box;
          uint64_t* const full = &shared.full[stage];
          ptx::mbarrier_wait(&shared.empty[stage], parity);
          ptx::mbarrier_arrive_expect(full, stage_bytes);
          load_box(shared.rows[stage], &maps.rows, full, k, row);
          if constexpr (transposed) {
            load_box_for_both(half, map, full, column, k);
            load_box_for_both(half + box_elements, map, full, column + box, k);
          } else {
            load_box_for_both(half, map, full, k, column);
          }
          if (++stage == stages) stage = 0, parity ^= 1;
        }
      }
    }
  } else if (warpgroup == warpgroups && warp <= workers_of(then)) {
    const int worker = static_cast<int>(threadIdx.x) - 128 * warpgroups - 32;  // the first one talks to the TMA
    const auto row_of = [&](const Tile& tile, int w) {
      return tile.row * tile_rows + rank * block_rows + w * part_rows;
    };
    const auto load_residual = [&](int t, int w) {
      if (t >= tiles) return;
      const Tile tile = tile_at<group>(t, down, across);
      ptx::mbarrier_arrive_expect(&shared.given[w], boxes * box_bytes);
      for (int b = 0; b < boxes; ++b) {
        load_box(shared.sums[w][b], &maps.residual, &shared.given[w], tile.column * step + b * box, row_of(tile, w));
      }
    };
    if (then == Then::residual && worker == 0) {
      for (int w = 0; w < warpgroups; ++w) load_residual(begin, w);
    }
    int parity = 0;
#pragma unroll 1
    for (int t = begin; t < tiles; t += by, parity ^= 1) {
      const Tile tile = tile_at<group>(t, down, across);
#pragma unroll 1
      for (int w = 0; w < warpgroups; ++w) {
        const int row = row_of(tile, w), column = tile.column * step;
        const uint32_t sums = ptx::shared_address(shared.sums[w]);
        if constexpr (then == Then::swiglu_backward) {
          // A warp takes every third two of rows, 32 x 16 bytes each. A thread reads only what it copied itself.
          const int64_t at = column + lane * width, stride = 2 * p.columns;
          const int begin_row = two * (warp - 1), step_rows = two * others;
          const int end = at < p.columns ? static_cast<int>(min(int64_t{part_rows}, p.rows - row)) : 0;
          const uint32_t first =
              ptx::shared_address(unaligned) + ahead_offset<T> + (warp - 1) * ahead * slot_bytes + lane * 16;
          const T* z = static_cast<const T*>(p.z) + (row + begin_row) * stride + at;
          T* dz = static_cast<T*>(p.out) + (row + begin_row) * stride + at;
          T* out = static_cast<T*>(p.second_out) + (row + begin_row) * p.columns + at;
          int next = begin_row;  // the rows that are copied next, from z
          const auto copy = [&](uint32_t to) {
#pragma unroll
            for (int x = 0; x < two; ++x) {
              if (next + x < end) {
                ptx::cp_async_16(to + (2 * x) * 512, z + x * stride, 16);
                ptx::cp_async_16(to + (2 * x + 1) * 512, z + x * stride + p.columns, 16);
              }
            }
            ptx::cp_async_commit();
            next += step_rows, z += step_rows * stride;
          };
#pragma unroll
          for (int x = 0; x < ahead; ++x) copy(first + x * slot_bytes);
          ptx::mbarrier_wait(&shared.written[w], parity);
          uint32_t slot = first;
#pragma unroll 1
          for (int r = begin_row; r < part_rows; r += step_rows) {
            ptx::cp_async_wait<ahead - 1>();
            uint4 left[two], right[two], incoming[two];
#pragma unroll
            for (int x = 0; x < two; ++x) {
              left[x] = ptx::load_shared_16(slot + (2 * x) * 512);
              right[x] = ptx::load_shared_16(slot + (2 * x + 1) * 512);
              incoming[x] = ptx::load_shared_16(sums + place(r + x, lane));
            }
            copy(slot);
            slot = slot == first + (ahead - 1) * slot_bytes ? first : slot + slot_bytes;
            uint4 dleft[two], dright[two], made[two];
#pragma unroll
            for (int x = 0; x < two; ++x) {
              swiglu_gradients<T>(left[x], right[x], incoming[x], dleft[x], dright[x], made[x]);
            }
#pragma unroll
            for (int x = 0; x < two; ++x) {
              if (r + x >= end) continue;
              store_16(dz + x * stride, dleft[x]);
              store_16(dz + x * stride + p.columns, dright[x]);
              if (p.second_out != nullptr) store_16(out + x * p.columns, made[x]);
            }
            dz += step_rows * stride, out += step_rows * p.columns;
          }
        } else {
          ptx::mbarrier_wait(&shared.written[w], parity);
          if (worker == 0) {
#pragma unroll
            for (int b = 0; b < boxes; ++b) {
              if constexpr (then == Then::swiglu) {  // for the backward
                const bool left = b < boxes / 2;
                store_box_once(left ? &maps.out : &maps.second_out, shared.sums[w][b],
                               column + (left ? b : b - boxes / 2) * box, row);
              } else {
                store_box(&maps.out, shared.sums[w][b], column + b * box, row);
              }
            }
            ptx::bulk_store_commit();
          }
          if constexpr (then == Then::swiglu) {
            constexpr int units = half_columns / width;  // of a row
#pragma unroll 2
            for (int u = worker; u < part_rows * units; u += others * 32) {
              const int r = u / units, unit = u % units;
              const uint32_t from = sums + place(r, unit);
              const uint4 out =
                  swiglu_of<T>(ptx::load_shared_16(from), ptx::load_shared_16(from + boxes / 2 * box_bytes));
              const int64_t at = column + unit * width;
              if (row + r < p.rows && at < p.columns) {
                store_16(static_cast<T*>(p.second_out) + (row + r) * p.columns + at, out);
              }
            }
          }
        }
        __syncwarp();
        if (lane == 0) {
          if (then != Then::swiglu_backward && worker == 0) ptx::bulk_store_wait_read<0>();
          if (then == Then::residual && worker == 0) load_residual(t + by, w);
          if (then != Then::residual) ptx::mbarrier_arrive(&shared.free[w]);
        }
      }
    }
    if (then != Then::swiglu_backward && worker == 0) ptx::bulk_store_wait<0>();
  } else if (warpgroup < warpgroups) {
    float d[tile_columns / 2];
    int stage = 0, parity = 0, turn = 0;
    const uint64_t rows = ptx::wgmma_descriptor(ptx::shared_address(shared.rows[0] + warpgroup * part_rows * box));
    const uint64_t columns = ptx::wgmma_descriptor(ptx::shared_address(shared.columns[0]), transposed ? box_bytes : 16);
    // k16 steps, as in wgmma.cuh.
    constexpr int rows_step = 32, columns_step = transposed ? 2048 : 32;
    const int releases = static_cast<int>(threadIdx.x) % 128;  // the block whose stage this thread hands back
    // Of 16 x 16 sums that stmatrix stores, a lane gives the address of one row of eight.
    const int row = 16 * warp + lane % 16;
    const uint32_t sums = ptx::shared_address(shared.sums[warpgroup]);
#pragma unroll 1
    for (int t = begin; t < tiles; t += by, turn ^= 1) {
      int last = 0;
      ptx::hold(d);
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        ptx::mbarrier_wait(&shared.full[stage], parity);
        ptx::wgmma_fence();
        const uint64_t a = ptx::advanced(rows, stage * block_rows * row_bytes);
        const uint64_t b = ptx::advanced(columns, stage * tile_columns * row_bytes);
        const auto multiply = [&](int x) {
          ptx::Wgmma<T, tile_columns>::template a_shared<transposed>(
              d, ptx::advanced(a, x * rows_step), ptx::advanced(b, x * columns_step), (piece | x) != 0);
        };
        multiply(0);
        multiply(1);
        ptx::wgmma_commit();
        // The last stage is handed back behind the first half of this one: three stages do not suffice otherwise.
        ptx::wgmma_wait<1>();
        if (piece > 0 && releases < cluster) arrive_in(releases, &shared.empty[last]);
        multiply(2);
        multiply(3);
        ptx::wgmma_commit();
        last = stage;
        if (++stage == stages) stage = 0, parity ^= 1;
      }
      ptx::mbarrier_wait(then == Then::residual ? &shared.given[warpgroup] : &shared.free[warpgroup],
                         then == Then::residual ? turn : turn ^ 1);
      ptx::wgmma_wait<0>();
      ptx::hold(d);
      if (releases < cluster) arrive_in(releases, &shared.empty[last]);
#pragma unroll
      for (int g = 0; g < tile_columns / 8; g += 2) {
        const uint32_t at = sums + place(row, g + lane / 16);
        uint32_t two[4];
        if constexpr (then == Then::residual) ptx::ldmatrix_x4<false>(two, at);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          float2 sum = {d[4 * g + 2 * x], d[4 * g + 2 * x + 1]};
          if constexpr (then == Then::residual) {
            const float2 more = unpack<T>(two[x]);
            sum.x += more.x, sum.y += more.y;
          }
          two[x] = pack<T>(sum.x, sum.y);
        }
        ptx::stmatrix_x4(at, two[0], two[1], two[2], two[3]);
      }
      ptx::fence_async_shared();
      ptx::mbarrier_arrive(&shared.written[warpgroup]);
    }
  }
  __syncwarp();            // one lane may come later than its warp
  ptx::cluster_barrier();  // a block's barriers and stages are the other's to write until here
}

template <typename T, Then then>
cudaError_t launch(const Product& p, cudaStream_t stream) {
  const auto kernel = products_kernel<T, then>;
  constexpr int copies = then == Then::swiglu_backward ? others * ahead * slot_bytes : 0;
  constexpr int bytes = ahead_offset<T> + copies;
  RETURN_IF_FAILED(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  Maps maps{};
  // A matrix of contiguous rows `row` elements apart; a box has 64 columns.
  const auto map = [](CUtensorMap& to, const void* data, int64_t rows, int64_t columns, int64_t row, int box_rows) {
    return encode<2>(to, data, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                     {static_cast<uint64_t>(row) * sizeof(T)}, {box, static_cast<uint32_t>(box_rows)});
  };
  RETURN_IF_FAILED(map(maps.rows, p.a, p.rows, p.depth, p.depth, block_rows));
  if constexpr (then == Then::swiglu_backward) {
    RETURN_IF_FAILED(map(maps.columns[0], p.b[0], p.depth, p.columns, p.columns, box));
  } else {
    for (int part = 0; part < p.parts; ++part) {
      RETURN_IF_FAILED(map(maps.columns[part], p.b[part], p.part_columns[part], p.depth, p.depth, half_columns));
    }
    const int64_t row = then == Then::swiglu ? 2 * p.columns : p.columns;
    RETURN_IF_FAILED(map(maps.out, p.out, p.rows, p.columns, row, part_rows));
    if constexpr (then == Then::swiglu) {
      RETURN_IF_FAILED(map(maps.second_out, static_cast<T*>(p.out) + p.columns, p.rows, p.columns, row, part_rows));
    }
    if constexpr (then == Then::residual) {
      RETURN_IF_FAILED(map(maps.residual, p.residual, p.rows, p.columns, p.columns, part_rows));
    }
  }
  const int64_t step = then == Then::swiglu ? half_columns : tile_columns;
  const int64_t tiles = ceil_div(p.rows, int64_t{tile_rows}) * ceil_div(p.columns, step);
  const int64_t clusters = std::min<int64_t>(tiles, processor_count() / cluster);
  return launch_early(kernel, dim3(static_cast<unsigned>(clusters * cluster)), dim3(threads), bytes, cluster, stream, p,
                      maps);
}

template <typename T>
cudaError_t launch_for(const Product& p, cudaStream_t stream) {
  switch (p.then) {
    case Then::nothing: return launch<T, Then::nothing>(p, stream);
    case Then::residual: return launch<T, Then::residual>(p, stream);
    case Then::swiglu: return launch<T, Then::swiglu>(p, stream);
    default: return launch<T, Then::swiglu_backward>(p, stream);
  }
}

}  // namespace

cudaError_t product(const Product& p, cudaStream_t stream) {
  if (!device_is_hopper() || encode_function() == nullptr) return cudaErrorNotSupported;
  return p.dtype == DType::bfloat16 ? launch_for<bf16>(p, stream) : launch_for<half>(p, stream);
}

}  // namespace flash_xlstm::cuda
