// What the kernels with one tile a chunk and head share: dk and dv (output_dk_dv_chunk.cuh), dq (output_dq_chunk.cuh).
#pragma once

#include <limits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/mlstm/hopper/output_epilogue.cuh"
#include "cuda/mlstm/hopper/output_state.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace flash_xlstm::cuda::hopper {

// Of this thread, not to be kept in a register.
__device__ __forceinline__ int lane_again() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Of a stage, in units of 16 bytes, for descriptors. By a shuffle, so that the compiler knows it to be warp-uniform.
template <typename Shared>
__device__ __forceinline__ uint32_t uniform_place(const Shared& sh, int stage) {
  return __shfl_sync(all_lanes, stage_address(sh, stage) >> 4, 0);
}
// wgmma_descriptor of a place in units of 16 bytes, in 32 bits: it never reaches bit 16.
__device__ __forceinline__ uint64_t rows_at(uint32_t place) {
  return uint64_t{0x40000040} << 32 | (place + (1u << 16));
}
__device__ __forceinline__ uint64_t transposed_at(uint32_t place) {
  return uint64_t{0x40000040} << 32 | (place + (static_cast<uint32_t>(box_bytes / 16) << 16));
}

__device__ __forceinline__ void arrive_once(uint64_t* barrier) {  // of a warp
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// By an address within shared memory.
__device__ __forceinline__ uint4 load_shared_16(uint32_t shared) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_if(bool wanted, void* to, const uint4& x) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(wanted))
      : "memory");
}

// Adds the dot products of 64 rows of 256 columns with n. rows: of the lane's panel; a lane has the eight columns from
// lane * 8 on. Of row 4 x + lane / 8 the lane x % 8 of eight gets the sum: sums[x / 8].
template <typename T>
__device__ __forceinline__ void add_row_dots(const unsigned char* rows, const float (&n)[8], float (&sums)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int x = 0; x < 16; ++x) {
    float four[4];
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int row = x * 4 + y;
      const uint4 eight = *reinterpret_cast<const uint4*>(rows + row * 128 + ((lane ^ row) % 8) * 16);
      const float2 a = unpack<T>(eight.x), b = unpack<T>(eight.y), c = unpack<T>(eight.z), d = unpack<T>(eight.w);
      four[y] = fmaf(a.y, n[1], a.x * n[0]);
      four[y] = fmaf(b.y, n[3], fmaf(b.x, n[2], four[y]));
      four[y] = fmaf(c.y, n[5], fmaf(c.x, n[4], four[y]));
      four[y] = fmaf(d.y, n[7], fmaf(d.x, n[6], four[y]));
    }
    float two[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const float kept = lane & 16 ? four[y + 2] : four[y], given = lane & 16 ? four[y] : four[y + 2];
      two[y] = kept + __shfl_xor_sync(all_lanes, given, 16);
    }
    const float kept = lane & 8 ? two[1] : two[0], given = lane & 8 ? two[0] : two[1];
    float sum = kept + __shfl_xor_sync(all_lanes, given, 8);
    sum += __shfl_xor_sync(all_lanes, sum, 4);
    sum += __shfl_xor_sync(all_lanes, sum, 2);
    sum += __shfl_xor_sync(all_lanes, sum, 1);
    if (x == lane % 8) sums[0] = sum;
    if (x == lane % 8 + 8) sums[1] = sum;
  }
}

// Calls f(tile, parity) for this block's tiles, one a chunk and head. Tiles of one chunk's heads go to neighbouring
// blocks. Returns the parity behind the last.
template <bool rows_are_t, typename F>
__device__ __forceinline__ int for_chunk_tiles(const Work& w, F&& f) {
  const Layout& l = w.layout;
  const int heads = static_cast<int>(l.heads), count = static_cast<int>(l.max_chunks) * heads;
  int parity = 0;
  for (int index = blockIdx.x; index < count; index += gridDim.x, parity ^= 1) {
    const int chunk_index = index / heads;
    Chunk chunk;
    if (!l.locate(chunk_index, chunk)) break;
    const bool is_empty = rows_are_t ? chunk.is_first && w.starts_empty : chunk.is_last && w.ends_empty;
    const Tile tile{.row = static_cast<int>(chunk.row),
                    .first = static_cast<int>(chunk.first),
                    .length = chunk.length,
                    .item = index,
                    .head = index - chunk_index * heads,
                    .index = 0,
                    .has_state = !is_empty};
    f(tile, parity);
  }
  return parity;
}

template <typename Shared>
cudaError_t launch_chunk_tiles(Prepared& prepared, void (*kernel)(OutputArgs), const OutputArgs& args,
                               cudaStream_t stream) {
  int resident = 0;
  const cudaError_t status = prepared.resident_blocks(kernel, output_threads, sizeof(Shared), resident);
  if (status != cudaSuccess) return status;
  const int64_t count = args.w.layout.max_chunks * args.w.layout.heads;
  if (count > std::numeric_limits<int>::max() - resident) return cudaErrorInvalidConfiguration;  // 2^31 tiles
  return launch_early(kernel, dim3(static_cast<unsigned>(count < resident ? count : resident)), dim3(output_threads),
                      sizeof(Shared), 1, stream, args);
}

}  // namespace flash_xlstm::cuda::hopper
