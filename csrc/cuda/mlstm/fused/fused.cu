// The mLSTM's forward on Hopper with the state kept in registers: dqk 256, dv 512, bfloat16. Two launches: the gate
// scan (hopper/gates.cu), then this kernel, which makes h, s and the final c and n.
//
// Two clusters of two blocks own one (sequence, head) at a time; block s of the four owns columns 128 s .. of c. Chunks
// are 64 tokens. q and k are loaded once for a cluster: each block loads half and multicasts it. The state stays on the
// chip, and nothing but the inputs, the gates and h passes through L2. A second form of the kernel also leaves c and n
// of every second chunk's start in memory, for the backward.
//
// Clusters of four would load q and k once for all columns. But on an H200 only 30 or 31 of 33 find room, because a
// GPC's SMs are no multiple of four: 32 (sequence, head) then take two rounds, 0.199 ms instead of 0.117 at 2,048
// tokens. L2 is not what limits.
//
//   copies.cuh      two warps: TMA of q, k and gates; of v, and of h on its way out
//   normalizer.cuh  two warps: n
//   weights.cuh     one warpgroup: T, s, d, P', a chunk ahead
//   states.cuh      two warpgroups: c, h
//   kept.cuh        c on its way to memory
//
// Stages (full / empty are the barriers, shared.cuh):
//   q 2   TMA -> weights, states of both blocks
//   k 2   TMA, gates, n of both blocks -> weights, states, n of both
//   v 2   TMA -> states; they leave h there -> v's warp stores it, then loads
//   P' 2  weights -> states
//
// Budget, a chunk and block         tensor clocks   shared memory clocks (128 B)
//   TMA in (q 32, k 32, v 16 KiB)                     640
//   T and q n, 64 x 72 x 256            576           544
//   c^T q^T, 2 x 64 x 64 x 256         1024           512
//   (w v)^T k, 2 x 64 x 256 x 64       1024           512 + 128 (v by ldmatrix)
//   v^T P'^T, 2 x 64 x 64 x 64          256           256
//   P' out, h out (stmatrix, TMA)                      64 + 256
//   n                                                 128
//   together                           2880           3040
//   c kept, every second chunk: stmatrix, bulk stores   512
// L2 to SM: 32 KiB of q and k (a block's half, for both) and 16 of v a chunk and block.
//
// A chunk takes 5,250 clocks in a build that traces. The warpgroup of weights works through all of them, the states' and
// n's wait for less than a tenth: instructions and their latencies hold it, not the tensor cores.
#include <algorithm>

#include "cuda/common/carver.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/device.h"
#include "cuda/common/status.h"
#include "cuda/common/tensor_map.h"
#include "cuda/mlstm/fused/copies.cuh"
#include "cuda/mlstm/fused/fused.h"
#include "cuda/mlstm/fused/normalizer.cuh"
#include "cuda/mlstm/fused/states.cuh"
#include "cuda/mlstm/fused/weights.cuh"
#include "cuda/mlstm/hopper/hopper.h"

namespace flash_xlstm::cuda::fused {
namespace {

template <bool keeps>
__global__ void __launch_bounds__(threads, 1) mlstm_fused_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& sh = *reinterpret_cast<Shared*>(raw);
  if (ptx::shared_address(raw) % 1024 != 0) asm volatile("trap;");  // so addresses are constants
  const int warp = threadIdx.x / 32, group = warp / 4, rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    constexpr int state_warps = 4 * state_groups, weights_warps = 4;
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&sh.full_q[s], 1);
      ptx::mbarrier_init(&sh.empty_q[s], blocks * (state_warps + weights_warps));
      ptx::mbarrier_init(&sh.full_k[s], 1 + 32 * block_panels);  // the warps of k and of n
      ptx::mbarrier_init(&sh.empty_k[s], blocks * (state_warps + weights_warps + block_panels));
      ptx::mbarrier_init(&sh.full_p[s], weights_warps);
      ptx::mbarrier_init(&sh.empty_p[s], state_warps);
      ptx::mbarrier_init(&sh.good_k[s], weights_warps);
    }
    for (int x = 0; x < state_groups; ++x) {
      for (int s = 0; s < v_stages; ++s) {
        ptx::mbarrier_init(&sh.full_v[x][s], 1);
        ptx::mbarrier_init(&sh.full_h[x][s], 4);
      }
    }
    ptx::fence_barrier_init();
  }
  // The rows behind n's three stay zero.
  for (int x = threadIdx.x; x < 2 * panels * 64; x += threads) {
    reinterpret_cast<uint4*>(sh.k[x / (panels * 64)] + x / 64 % panels * k_panel + chunk_tokens * 128)[x % 64] =
        make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_shared();
  __syncthreads();
  ptx::cluster_barrier();
  let_next_kernel_start();
  wait_for_earlier_kernels();

  // No block ends while others may still write into it, or arrive at its barriers.
  if (group == singles_group) {
    ptx::fewer_registers<single_registers>();
    if (warp == qk_warp) {
      if (lane() == 0) load_q_and_k(args, sh, rank);
    } else if (warp == v_warp) {
      load_v_and_store_h(args, sh);
    } else {
      sum_n<keeps>(args, sh, rank, warp - n_warp);
    }
    __syncwarp();
    ptx::cluster_barrier();
  } else if (group == weights_group) {
    ptx::fewer_registers<weights_registers>();
    make_weights(args, sh);
    __syncwarp();
    ptx::cluster_barrier();
  } else {
    ptx::more_registers<state_registers>();
    walk_states<keeps>(args, sh, group);
    __syncwarp();
    ptx::cluster_barrier();
  }
}

// Tasks that run at once on the current device; 0: none. keeps: the states.
template <bool keeps>
int tasks_at_once() {
  static PerDevice known;
  const int value = known.get(1, [](int, int& value) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(processor_count() / blocks * blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    cudaError_t status =
        cudaFuncSetAttribute(mlstm_fused_kernel<keeps>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&count, mlstm_fused_kernel<keeps>, &config);
    if (status != cudaSuccess) {
      cudaGetLastError();  // not the next launch's
      count = 0;
    }
    value = count / halves + 1;  // PerDevice keeps what is not 0
    return true;
  });
  return value - 1;
}

// Whether this path is faster. Both take a time for each chunk: this one for a round of clusters, the Hopper path for a
// (sequence, head), in the ratio below, and that of one more in any case. A round is as long as its longest sequence.
// Packed, that may be nearly all tokens, and only the heads are then sure to run side by side.
bool pays(const MlstmProblem& p, int at_once, bool keeps) {
  constexpr int64_t pairs_a_round = 17, pairs_a_keeping_round = 21;  // that the Hopper path makes in the time
  const int64_t pairs = p.heads * (p.cu_seqlens == nullptr ? p.num_seqs : 1);
  const int64_t of_round = keeps ? pairs_a_keeping_round : pairs_a_round;
  return at_once > 0 && ceil_div(pairs, int64_t{at_once}) * of_round <= pairs + 1;
}

int64_t carve(const MlstmProblem& p, void* workspace, hopper::Work& w) {
  Carver carver(workspace);
  w = hopper::Work{};
  hopper::describe(p, w);
  carver.take(w.records, w.layout.max_chunks * p.heads * 2);
  hopper::carve_table(carver, w);
  return carver.used();
}

}  // namespace

bool serves(const MlstmForward& params) {
  const MlstmProblem& p = params.p;
  const bool keeps = params.kept_states != nullptr;
  return params.h != nullptr && p.dtype == DType::bfloat16 && p.dqk == dqk && p.dv == dv && p.pool.indices == nullptr &&
         hopper::serves(p) && pays(p, keeps ? tasks_at_once<true>() : tasks_at_once<false>(), keeps);
}

int64_t forward_workspace_bytes(const MlstmForward& params) {
  hopper::Work w;
  return carve(params.p, nullptr, w);
}

cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  const MlstmProblem& p = params.p;
  hopper::Work w;
  carve(p, workspace, w);
  RETURN_IF_FAILED(hopper::scan_gates(w, params.m, params.m_last, params.log_decay, stream));
  Args args{};
  const Strided h{.data = params.h, .batch = p.seq * p.heads * dv, .seq = p.heads * dv, .head = dv};
  RETURN_IF_FAILED(hopper::encode_rows(args.q, p.q, p, dqk));
  RETURN_IF_FAILED(hopper::encode_rows(args.k, p.k, p, dqk));
  RETURN_IF_FAILED(hopper::encode_rows(args.v, p.v, p, dv));
  RETURN_IF_FAILED(hopper::encode_rows(args.h, h, p, dv));
  RETURN_IF_FAILED(encode<4>(args.gates, w.records,
                             {record_columns, record_rows, 2, static_cast<uint64_t>(w.layout.max_chunks * p.heads)},
                             {record_columns * 2, sizeof(GateRecord), 2 * sizeof(GateRecord)},
                             {record_columns, record_rows, 1, 1}, CU_TENSOR_MAP_SWIZZLE_NONE));
  args.layout = w.layout;
  args.v_rows = p.v, args.h_rows = params.h, args.s = params.s;
  args.c0 = p.c0, args.n0 = p.n0, args.c_last = params.c_last, args.n_last = params.n_last;
  args.tasks = static_cast<int>(p.num_seqs * p.heads);
  args.scale = p.scale, args.eps = p.eps, args.normalize = p.normalize;
  if (params.kept_states != nullptr) {
    const hopper::KeptStates kept = hopper::kept_states(w, params.kept_states);
    args.kept_c = kept.c, args.kept_n = kept.n;
  }
  const auto launch = [&](auto kernel, int at_once) {
    const int side_by_side = std::min(at_once, args.tasks);
    return launch_early(kernel, dim3(static_cast<unsigned>(side_by_side * halves * blocks)), dim3(threads),
                        shared_bytes, blocks, stream, args);
  };
  return args.kept_c != nullptr ? launch(mlstm_fused_kernel<true>, tasks_at_once<true>())
                                : launch(mlstm_fused_kernel<false>, tasks_at_once<false>());
}

}  // namespace flash_xlstm::cuda::fused
