// What the roles of the fused kernel share: sizes, shared memory and its barriers, the walk over tasks and chunks.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/mlstm/hopper/work.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::fused {

using hopper::GateRecord;

constexpr int chunk_tokens = GateRecord::tokens;  // 64
// A cluster of two blocks makes half of a head's columns.
constexpr int dqk = 256, dv = 512, blocks = 2, dv_block = 128, halves = dv / dv_block / blocks;
// 64 columns of a chunk, 128 bytes a token. Behind k's tokens lie eight rows for n, three of them in use.
constexpr int q_panel = chunk_tokens * 128, k_panel = (chunk_tokens + 8) * 128, v_panel = chunk_tokens * 128;
constexpr int n_bytes = 3 * 128;  // of n's rows in a panel
constexpr int panels = dqk / 64, block_panels = panels / blocks, state_groups = dv_block / 64, v_stages = 2;
constexpr int kept_panel = 64 * 128, kept_panels = 2;  // of c, 64 dqk x 64 dv, on its way to memory

// Warpgroups 0 and 1 hold the state, 2 makes the weights, 3 has single warps.
constexpr int threads = 512, weights_group = 2, singles_group = 3;
constexpr int state_registers = 208, weights_registers = 64, single_registers = 32;
static_assert(2 * state_registers + weights_registers + single_registers <= 65536 / 128);
enum : int { qk_warp = 12, v_warp, n_warp };  // n's are as many as block_panels

struct Args {
  CUtensorMap q, k, v, h, gates;  // gates: records as (88, 11, half, item), 16-bit numbers
  hopper::Layout layout;          // packed: its tables; its chunks are of 128 tokens
  Strided v_rows;                 // v, where the TMA does not serve
  void* h_rows;                   // h
  float* s;                       // (batch, seq, heads); null: not wanted
  const float *c0, *n0;           // null: zeros
  float *c_last, *n_last;         // null: not wanted
  int tasks;                      // sequences times heads
  float scale, eps;
  bool normalize;
  uint16_t* kept_c;  // as Work::c and Work::n; null: not wanted
  float* kept_n;
};

// By tensor map, although a record is contiguous: racecheck reports false hazards for plain bulk loads.
constexpr int record_columns = 88, record_rows = 11;
static_assert(record_columns * record_rows * 2 == sizeof(GateRecord));
struct alignas(128) Gates : GateRecord {};

struct Shared {
  alignas(1024) unsigned char q[2][panels * q_panel];
  unsigned char k[2][panels * k_panel];
  unsigned char v[v_stages][state_groups * v_panel];  // then h of the same chunk
  unsigned char p[2][chunk_tokens * 128];             // P', 64 tokens t x 64 tokens j
  unsigned char kept[state_groups][kept_panels][kept_panel];
  Gates gates[2];
  float g[4][2][chunk_tokens];       // g', which P' comes with, and s, which v's warp stores with h
  float n_before[block_panels][64];  // of this block's n, before the chunk that is being added
  int4 h_place[v_stages];            // Place of the stage's chunk
  // A stage's barriers. full: the TMA's bytes are there; of k also the gates and the n of both blocks, of which the
  // block's own is by ordinary stores. empty: of q and k by all readers in both blocks, since each block writes
  // into all. v's are by warpgroup.
  uint64_t full_q[2], empty_q[2], full_k[2], empty_k[2];
  uint64_t full_v[state_groups][v_stages], full_h[state_groups][v_stages];
  uint64_t full_p[2], empty_p[2];
  uint64_t good_k[2];  // what is not finite in k has no weight of 0
};
constexpr int shared_bytes = sizeof(Shared);
static_assert(shared_bytes <= 232448);

// One (sequence, head).
struct Task {
  int row, head;      // row of the batch
  int first, length;  // tokens
  int chunk;          // of 128 tokens, the first

  __device__ __forceinline__ Task() {}
  __device__ __forceinline__ Task(const Args& args, int task) {
    const auto& l = args.layout;
    const int heads = static_cast<int>(l.heads), seq = task / heads;
    head = task - seq * heads;
    if (l.first_chunk == nullptr) {
      row = seq, first = 0, length = static_cast<int>(l.seq), chunk = seq * static_cast<int>(l.chunks_per_seq);
    } else {
      row = 0, first = static_cast<int>(l.first_token[seq]);
      length = static_cast<int>(l.first_token[seq + 1]) - first, chunk = static_cast<int>(l.first_chunk[seq]);
    }
  }
  __device__ __forceinline__ int chunks() const { return (length + chunk_tokens - 1) / chunk_tokens; }
  // Of a token of the sequence in (batch, seq, heads).
  __device__ __forceinline__ int64_t token(const Args& args, int at) const {
    return (row * args.layout.seq + first + at) * args.layout.heads + head;
  }
  // Of chunk j's record, which is half j % 2 of the item's.
  __device__ __forceinline__ int item(const Args& args, int j) const {
    return (chunk + j / 2) * static_cast<int>(args.layout.heads) + head;
  }
};

// A cluster's tasks, one after the other, and which half of their columns it makes: always the same, since the number of
// clusters is a multiple of the halves.
__device__ __forceinline__ int first_task() { return static_cast<int>(blockIdx.x) / (blocks * halves); }
__device__ __forceinline__ int task_step() { return static_cast<int>(gridDim.x) / (blocks * halves); }
// Of a block in dv: 0 to dv / dv_block - 1.
__device__ __forceinline__ int column_block() { return static_cast<int>(blockIdx.x) % (blocks * halves); }

// The chunks of the cluster's tasks, one after the other: chunk j of `count`. Every role walks them by itself. Tasks
// without tokens have none.
struct Walk {
  int task = first_task(), j = 0, count = 0;

  __device__ __forceinline__ explicit Walk(const Args& args) { settle(args); }
  __device__ __forceinline__ bool goes_on(const Args& args) const { return task < args.tasks; }
  // Returns whether another task begins.
  __device__ __forceinline__ bool advance(const Args& args) {
    if (++j < count) return false;
    j = 0, task += task_step();
    settle(args);
    return true;
  }

 private:
  __device__ __forceinline__ void settle(const Args& args) {
    for (; task < args.tasks; task += task_step()) {
      count = Task(args, task).chunks();
      if (count > 0) return;
    }
  }
};

// Where a chunk's tokens are, for the TMA; how many of them and of the sequence's others are left; and its record.
struct Place {
  int row, head, token, left;
  __device__ __forceinline__ Place() {}
  __device__ __forceinline__ Place(const Task& of, int j)
      : row(of.row), head(of.head), token(of.first + j * chunk_tokens), left(of.length - j * chunk_tokens) {}
};

__device__ __forceinline__ uint32_t address(const void* shared) { return ptx::shared_address(shared); }
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// For the whole warp: one arrival here, or in every block of the cluster.
__device__ __forceinline__ void release(uint64_t* barrier) {
  __syncwarp();
  if (lane() == 0) ptx::mbarrier_arrive(barrier);
}
__device__ __forceinline__ void release_everywhere(uint64_t* barrier) {
  __syncwarp();
  if (lane() < blocks) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(ptx::peer_address(barrier, lane())) : "memory");
  }
}

// Of a 16-byte piece of a panel's row.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row % 8)) * 16); }

__device__ __forceinline__ bool is_finite(float x) { return x * 0.0f == 0.0f; }

}  // namespace flash_xlstm::cuda::fused
