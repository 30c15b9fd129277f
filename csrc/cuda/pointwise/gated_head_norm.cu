// y = sigmoid(gate) * LayerNorm(h) * weight for each head, and its gradients. A row is one head of one token. Each row
// is read from memory once (rows.cuh). The variance is the mean of (h - mean)^2, so a large mean costs no precision.
//
// A block of the gradient stays with one head. Memory serves some SMs faster than others. With one block an SM, some
// SMs are done long before the rest, and the rest alone cannot use all of memory's bandwidth. So with enough tokens
// there are several rounds of blocks, and an SM that is done takes a block of the next round.
//
// The warps of a row meet at one barrier. Each warp has the moments of its share of the row about the share's own mean.
// From these follow the moments of the row about the row's mean.
#include <type_traits>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/pointwise/rows.cuh"

namespace flash_xlstm::cuda {
namespace {

constexpr int tensors = 3;  // the gradient reads h, gate and dy

template <typename L>
__global__ void __launch_bounds__(L::block_threads, resident_blocks<L>(768))
    gated_head_norm_kernel(const __grid_constant__ GatedHeadNorm p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  using T = typename L::T;
  constexpr int width = L::width;
  __shared__ float buffer[2][L::groups][L::row_warps];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::groups + group;
  if (row >= p.tokens * p.heads) return;
  const int64_t token = row / p.heads, column = (row - token * p.heads) * p.dim;
  const int count = static_cast<int>(p.dim);
  Pack<T, width> packs[L::packs], gate[L::packs];
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    packs[k] = load_once<T, width>(p.h, row * p.dim + at);
    gate[k] = load_once<T, width>(p.gate, token * p.gate_stride + column + at);
  }
  RowWeight<L> weights(p.weight, column, count, p.weight_dtype == DType::float32);
  float sum[1] = {}, square[1] = {};
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
    float h[width];
    unpack(h, packs[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) sum[0] += h[e];
  }
  row_sums<L>(sum, buffer[0][group]);
  const float mean = sum[0] / static_cast<float>(count);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    if ((thread + k * L::row_threads) * width >= count) continue;
    float h[width];
    keep_packed(packs[k]);
    unpack(h, packs[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) square[0] += (h[e] - mean) * (h[e] - mean);
  }
  row_sums<L>(square, buffer[1][group]);
  const float inverse = rsqrtf(square[0] / static_cast<float>(count) + p.eps);
#pragma unroll
  for (int k = 0; k < L::packs; ++k) {
    const int at = (thread + k * L::row_threads) * width;
    if (at >= count) continue;
    float weight[width], h[width], pre[width];
    weights.read(weight, k);
    keep_packed(packs[k]);
    unpack(h, packs[k]);
    keep_packed(gate[k]);
    unpack(pre, gate[k]);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float normed = (h[e] - mean) * inverse;
      h[e] = sigmoids(pre[e]).open * (normed * weight[e]);
    }
    store_pack(p.y, row * p.dim + at, round_pack<T>(h));
  }
}

// Sums over a warp's share of a row.
struct Moments {
  float sum;      // of h
  float square;   // of (h - the share's mean)^2
  float through;  // of the normed row's gradient, dy sigmoid(gate) weight
  float along;    // of that gradient times (h - the share's mean)
};

// How the gradient's blocks share the tokens of a head.
struct Walk {
  int64_t rounds;
  int64_t blocks;  // of a round
  int turns;       // of a block: in each turn every group of the block takes one token
};

// full: every row fills the layout.
template <typename L, bool full>
__global__ void __launch_bounds__(walk_threads, 1)
    gated_head_norm_backward_kernel(const __grid_constant__ GatedHeadNormBackward b, float* partial, const Walk walk,
                                    const int stages) {
  let_next_kernel_start();
  using T = typename L::T;
  using S = Slots<L, tensors>;
  constexpr int width = L::width;
  // float32 rows that one warp holds. A few values may nearly agree. What their mean leaves is then hardly larger than
  // the mean's rounding error. And `along` has the rounding error of `through`, not the smaller one of `through`
  // without its mean. So these rows subtract the rest of the mean, and the mean of `through`, in a second pass.
  constexpr bool is_precise = std::is_same_v<T, float> && L::row_warps == 1;
  const GatedHeadNorm& p = b.p;
  __shared__ __align__(16) Moments buffer[2][L::walk_groups][L::row_warps];
  extern __shared__ uint4 slots[];
  const int group = threadIdx.x / L::row_threads, thread = threadIdx.x % L::row_threads;
  const int warp = thread / 32, lane = thread % 32;
  const int heads = static_cast<int>(p.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int64_t block = blockIdx.x / heads, round = block / walk.blocks;  // block: of the head
  const int64_t step = walk.blocks * L::walk_groups, column = head * p.dim;
  const int64_t token = round * walk.turns * step + (block - round * walk.blocks) * L::walk_groups + group;
  const int own_turns = static_cast<int>(  // 0 where token is beyond the last one; ceil_div takes no negative count
      max(int64_t{0}, min(static_cast<int64_t>(walk.turns), (p.tokens - token + step - 1) / step)));
  const int count = full ? L::capacity : static_cast<int>(p.dim);
  const int64_t row_elements = p.heads * p.dim;  // of a token
  const int64_t step_elements = step * row_elements, gate_step = step * p.gate_stride;
  int64_t start = token * row_elements + column + thread * width, next_start = start;
  int64_t gate_start = token * p.gate_stride + column + thread * width, next_gate_start = gate_start;
  const bool weight_is_float = p.weight_dtype == DType::float32;
  if (round == 0) {  // the blocks of later rounds start when the kernels before have ended
    prefetch_row_weight<L>(p.weight, column + thread * width, count, weight_is_float);
#pragma unroll 1
    for (int turn = 0; turn < min(stages, own_turns); ++turn) {
      prefetch_row<L>(p.h, start + turn * step_elements, count);
      prefetch_row<L>(p.gate, gate_start + turn * gate_step, count);
      prefetch_row<L>(b.dy, start + turn * step_elements, count);
    }
  }
  wait_for_earlier_kernels();
  float weight[L::packs][width], dweight[L::packs][width] = {};
  fetch_row_weight<L>(weight, p.weight, column, count, weight_is_float);
  const S ring(slots, stages);
  uint32_t slot = ring.first;
  const auto copy_next = [&](int turn) {
    if (turn < own_turns) {
      copy_row<L>(slot, p.h, next_start, count);
      copy_row<L>(slot + S::tensor_bytes, p.gate, next_gate_start, count);
      copy_row<L>(slot + 2 * S::tensor_bytes, b.dy, next_start, count);
    }
    ptx::cp_async_commit();  // also without a copy: wait_for_copies counts the groups
    next_start += step_elements, next_gate_start += gate_step, slot = ring.after(slot);
  };
#pragma unroll 1
  for (int turn = 0; turn < stages; ++turn) copy_next(turn);
  widen_row_weight<L>(weight, weight_is_float);
  const auto within = [&](int k) { return full || (thread + k * L::row_threads) * width < count; };
  // How many elements a warp's share has.
  const auto share_of = [&](int of_warp) {
    int elements = 0;
#pragma unroll
    for (int k = 0; k < L::packs; ++k)
      elements += max(0, min(32 * width, count - (of_warp * 32 + k * L::row_threads) * width));
    return static_cast<float>(elements);
  };
  const float part = 1.0f / static_cast<float>(count);  // weight of an element in a row's mean
  const float own_part = full ? 1.0f / (32 * L::packs * width) : 1.0f / fmaxf(share_of(warp), 1.0f);
  // Groups without a row take all turns too: racecheck does not follow groups that leave at different times.
#pragma unroll 1
  for (int turn = 0; turn < walk.turns; ++turn) {
    wait_for_copies(stages - 1);  // for this turn's
    const bool has_row = turn < own_turns;
    float h[L::kept_packs][width], opened[L::kept_packs][width], shut[L::kept_packs][width];
    const auto read_h = [&](int k) { unpack(h[k % L::kept_packs], read_pack<L>(slot, p.h, start, k, count)); };
    const auto open_gate = [&](int k) {
      float gate[width], dy[width];
      unpack(gate, read_pack<L>(slot + S::tensor_bytes, p.gate, gate_start, k, count));
      unpack(dy, read_pack<L>(slot + 2 * S::tensor_bytes, b.dy, start, k, count));
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const Sigmoids s = sigmoids(gate[e]);
        // __fmul_rn rounds alike for the sums and the gradients. So with one column dh is exactly 0.
        opened[k % L::kept_packs][e] = __fmul_rn(dy[e], s.open);
        shut[k % L::kept_packs][e] = s.shut;
      }
    };
    float sum[1] = {};
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row) break;
      read_h(k);
#pragma unroll
      for (int e = 0; e < width; ++e) sum[0] += h[k % L::kept_packs][e];
    }
    lane_sums<32>(sum);
    float own_mean = sum[0] * own_part;
    float sums[4] = {};  // square, through, along; and the sum of h - own_mean, which rounding leaves
#pragma unroll
    for (int k = 0; k < L::packs; ++k) {
      if (!has_row || !within(k)) continue;
      if (!L::kept) read_h(k);
      open_gate(k);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        float& centred = h[k % L::kept_packs][e];
        centred -= own_mean;
        const float through = __fmul_rn(opened[k % L::kept_packs][e], weight[k][e]);
        sums[0] += centred * centred;
        sums[1] += through;
        sums[2] += through * centred;
        sums[3] += centred;
      }
    }
    if (L::kept) copy_next(turn + stages);  // into the slots just read
    if constexpr (is_precise) {
      lane_sums<32>(sums);
      own_mean += sums[3] * own_part;
      const float through_mean = sums[1] * part;
      float again[2] = {};
#pragma unroll
      for (int k = 0; k < L::packs; ++k) {
        if (!has_row || !within(k)) continue;
        if (!L::kept) read_h(k), open_gate(k);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          float& centred = h[k % L::kept_packs][e];
          centred -= L::kept ? sums[3] * own_part : own_mean;
          again[0] += centred * centred;
          again[1] += (__fmul_rn(opened[k % L::kept_packs][e], weight[k][e]) - through_mean) * centred;
        }
      }
      lane_sums<32>(again);
      sums[0] = again[0], sums[2] = again[1];
    } else {
      float three[3] = {sums[0], sums[1], sums[2]};
      lane_sums<32>(three);
      sums[0] = three[0], sums[1] = three[1], sums[2] = three[2];
    }
    // The row's moments about its mean, from those of the shares.
    float mean = own_mean;
    if constexpr (L::row_warps > 1) {
      Moments(&moments)[L::row_warps] = buffer[turn % 2][group];
      if (lane == 0) moments[warp] = {.sum = sum[0], .square = sums[0], .through = sums[1], .along = sums[2]};
      group_barrier<L>(group);
      const int of_warp = lane % L::row_warps;
      const Moments m = moments[of_warp];
      float sum_of[1] = {m.sum};
      lane_sums<L::row_warps>(sum_of);
      mean = sum_of[0] * part;
      const float elements = full ? 32 * L::packs * width : share_of(of_warp);
      const float aside = m.sum / fmaxf(elements, 1.0f) - mean;
      sums[0] = m.square + elements * aside * aside;
      sums[1] = m.through;
      sums[2] = m.along + m.through * aside;
      float three[3] = {sums[0], sums[1], sums[2]};
      lane_sums<L::row_warps>(three);
      sums[0] = three[0], sums[1] = three[1], sums[2] = three[2];
    }
    if (has_row) {
      const float inverse = rsqrtf(sums[0] * part + p.eps), aside = (own_mean - mean) * inverse;
      const float through_mean = sums[1] * part, along = sums[2] * inverse * part;
      // A row's number has 32 bits: a 64-bit one would spill.
      const uint32_t row = static_cast<uint32_t>(token) + turn * static_cast<uint32_t>(step);
      const int64_t dgate_start = start + row * (b.dgate_stride - row_elements);
#pragma unroll
      for (int k = 0; k < L::packs; ++k) {
        if (!within(k)) continue;
        if (!L::kept) read_h(k), open_gate(k);
        float dh[width], dgate[width];
#pragma unroll
        for (int e = 0; e < width; ++e) {
          float centred = h[k % L::kept_packs][e];
          if (!L::kept) centred -= own_mean;
          const float normed = L::row_warps > 1 ? centred * inverse + aside : centred * inverse;
          const float incoming = opened[k % L::kept_packs][e], through = __fmul_rn(incoming, weight[k][e]);
          dweight[k][e] += incoming * normed;
          dgate[e] = through * normed * shut[k % L::kept_packs][e];
          dh[e] = inverse * (through - through_mean - normed * along);
        }
        store_pack(b.dgate, dgate_start + k * L::row_threads * width, round_pack<T>(dgate));
        store_pack(b.dh, start + k * L::row_threads * width, round_pack<T>(dh));
      }
    }
    if (!L::kept) copy_next(turn + stages);
    start += step_elements, gate_start += gate_step;
  }
  if (partial != nullptr)
    write_partial<L>(dweight, reinterpret_cast<float*>(slots), partial + block * row_elements + column, count);
}

bool vectors(const GatedHeadNorm& p) {
  // With the gate's first row and its row stride, all its rows begin at a multiple of 16 bytes.
  return aligned_16(p.h) && aligned_16(p.gate) && aligned_16(p.weight) && aligned_16(p.y) &&
         p.gate_stride * element_bytes(p.dtype) % 16 == 0;
}

bool vectors(const GatedHeadNormBackward& b) {
  return vectors(b.p) && aligned_16(b.dy) && aligned_16(b.dh) && aligned_16(b.dgate) &&
         b.dgate_stride * element_bytes(b.p.dtype) % 16 == 0;
}

// A round has at most one block an SM, but at least one a head. A block takes at least 8 turns, and at least 32 rows,
// where there are that many: its sums of dweight, which are written and read again, then cost little.
Walk walk_of(const GatedHeadNorm& p, int64_t groups) {
  constexpr int64_t most_rounds = 32;
  const int64_t processors = processor_count(), least_turns = std::max<int64_t>(8, 32 / groups);
  const int64_t turns = ceil_div(p.tokens, groups);  // of a head
  const int64_t rounds = std::clamp<int64_t>(turns * p.heads / (least_turns * processors), 1, most_rounds);
  const int64_t most_blocks = rounds * std::max<int64_t>(1, processors / p.heads);
  const int64_t each = std::max<int64_t>(1, ceil_div(turns, most_blocks));
  return {.rounds = rounds, .blocks = ceil_div(turns, rounds * each), .turns = static_cast<int>(each)};
}

// The number of rows of sums of dweight, one a block of a head.
int64_t partial_rows(const Walk& walk) { return walk.rounds * walk.blocks; }

}  // namespace

cudaError_t gated_head_norm(const GatedHeadNorm& p, cudaStream_t stream) {
  return dispatch_layout(p.dtype, p.dim, vectors(p), [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.tokens * p.heads, L::groups));
    return launch_early(gated_head_norm_kernel<L>, dim3(blocks), dim3(L::block_threads), 0, 1, stream, p);
  });
}

int64_t gated_head_norm_backward_workspace_bytes(const GatedHeadNormBackward& b) {
  if (b.dweight == nullptr) return 0;
  const Walk walk = walk_of(b.p, walking_rows(b.p.dtype, b.p.dim, vectors(b)));
  return partial_rows(walk) * b.p.heads * b.p.dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t gated_head_norm_backward(const GatedHeadNormBackward& b, void* workspace, cudaStream_t stream) {
  const GatedHeadNorm& p = b.p;
  return dispatch_walking_layout(p.dtype, p.dim, vectors(b), [&](auto layout) {
    using L = decltype(layout);
    const Walk walk = walk_of(p, L::walk_groups);
    const dim3 grid(static_cast<unsigned>(partial_rows(walk) * p.heads));
    const int stages = walking_stages<L>(tensors), bytes = walking_bytes<L>(tensors, stages);
    float* partial = b.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
    const auto kernel = p.dim == L::capacity ? gated_head_norm_backward_kernel<L, true>
                                             : gated_head_norm_backward_kernel<L, false>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    status = launch_early(kernel, grid, dim3(walk_threads), bytes, 1, stream, b, partial, walk, stages);
    if (status != cudaSuccess || partial == nullptr) return status;
    return sum_rows(partial, partial_rows(walk), p.heads * p.dim, b.dweight, p.weight_dtype, stream);
  });
}

}  // namespace flash_xlstm::cuda
