// The mLSTM's forward on Hopper with the state kept in registers: an experiment. dqk 256, dv 512, bfloat16, float32
// gates, no initial state, no packing.
//
// A cluster of four blocks owns one (sequence, head) at a time; block s owns columns 128 s .. of c, kept transposed:
// state warpgroup x (0, 1) holds c^T, 64 dv x 256 dqk in float32, as a wgmma accumulator (128 registers a thread).
// Chunks of 64 tokens. For a chunk a state warpgroup makes
//   out^T = c^T q^T        64 x 64 x 256, A = c^T rounded from the accumulators themselves: an accumulator has the layout
//                          of a register operand, so the state never touches shared memory
//   c^T   = keep c^T + (w v)^T k   64 x 256 x 64, A = v^T from ldmatrix, weighted in float32 (v is half of k's size, and
//                          k can be the operand as the TMA wrote it)
//   out^T = g' out^T + v^T P'^T    64 x 64 x 64, both from shared memory; g', P': with scale / d_t in them
// in this order of issue: out's scaling and the wait for P' lie in the shadow of the state's product.
// The third warpgroup runs ahead and makes, for the next chunk, T = q k^T and q n in one product (72 columns: n is
// three 16-bit rows behind k's 64), then s, d, P' and g'. Four single warps: TMA of q, of k and gates, of v; and n.
// Each block makes 64 of n's 256, in float32, and sends them as three bfloat16 to all four (bulk copies).
// q and k: each block loads a quarter (64 columns) and multicasts it.
//
// Budget, a chunk and block         tensor clocks   shared memory clocks (128 B)
//   TMA in (q 32, k 32, v 16 KiB)                     640
//   T and q n, 64 x 72 x 256            576           544
//   c^T q^T, 2 x 64 x 64 x 256         1024           512
//   (w v)^T k, 2 x 64 x 256 x 64       1024           512 + 128 (v by ldmatrix)
//   v^T P^T, 2 x 64 x 64 x 64           256           256
//   P' out, h out (stmatrix, TMA)                      64 + 256
//   n                                                  80
//   together                           2880           2992
// 65,536 tokens x 8 heads: 8,192 chunks; 32 clusters at once: 256 chunks each, 737,000 tensor clocks: 0.42 ms at 1.75 GHz.
// DRAM: 1.61 GB, 0.38 ms. L2 to SM: 32 KiB of q and k (a block's quarter) + 16 of v a chunk and block less: 1.1 GB.
// Registers, 512 threads x 128: state 2 x 208, T 72, singles 24. Shared memory: q 2 x 32, k 2 x 36, v 3 x 16, P 2 x 8,
// gates 2 x 1.8 KiB: 205 KiB. h leaves through v's stage: each warpgroup's 64 columns of v have the shape of its h.
//
// Every wait is bounded: after `limit` clocks the code of the wait goes to host memory and the kernel traps.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cuda/common/numeric.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

using namespace flash_xlstm::cuda;

#ifndef A_STEPS
#define A_STEPS 1
#define A_BUFFERS 3
#endif

namespace {

#include "products.inc"

constexpr int L = 64, dqk = 256, dv = 512, blocks = 4, dv_block = dv / blocks;
constexpr int q_panel = 64 * 128, k_panel = 72 * 128, v_panel = 64 * 128;
constexpr int record_floats = 456, record_bytes = record_floats * 4;  // of a chunk's gates
// In a record: beta and alpha as float2 (whole, rest; base 2), g, exp(-m), w, keep.
constexpr int at_beta = 0, at_alpha = 128, at_g = 256, at_emm = 320, at_w = 384, at_keep = 448;
constexpr uint32_t limit = 400000000u;  // clocks

// Parts left out or added, to see what each costs.
enum : int {
  no_qc = 1,
  no_state = 2,
  no_pv = 4,
  no_t = 8,
  no_weigh = 16,
  no_store = 32,
  no_multicast = 64,
  tracing = 128,
  no_load = 256,
  late_pack = 512,  // the first operand of the next chunk is packed behind out, not beside its product
  wide_barrier = 1024,  // a barrier of the warpgroup before out is stored to shared memory
};

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t clock32() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(x)::"memory");
  return x;
}

// Not moved across a wait for products: their operands take the registers of earlier ones.
__device__ __forceinline__ uint32_t pack_here(float low, float high) {
  uint32_t two;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

struct Args {
  CUtensorMap q, k, v, h;
  const float* records;
  int* error;       // host memory
  uint32_t* trace;  // [trace_blocks][roles][trace_steps][8]
  int tasks, heads, chunks;
  float scale, eps;
};
constexpr int roles = 8, trace_steps = 64, trace_blocks = 8;

__device__ __forceinline__ bool try_wait(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void wait(uint32_t barrier, int parity, int* error, int code) {
  if (try_wait(barrier, parity)) return;
  const uint32_t start = clock32();
  while (!try_wait(barrier, parity)) {
    if (clock32() - start > limit) {
      *reinterpret_cast<volatile int*>(error) = code + 1000 * (blockIdx.x + 1);
      __threadfence_system();
      asm volatile("trap;\nexit;");
      __builtin_unreachable();  // else ptxas joins these paths, and c would live on them
    }
  }
}
__device__ __forceinline__ uint32_t peer(uint32_t address, int rank) {
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address), "r"(rank));
  return at;
}
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer(barrier, rank)) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
template <bool multicast>
__device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
  if constexpr (multicast) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
        "%4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w),
        "h"(static_cast<uint16_t>((1 << blocks) - 1))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
  }
}
__device__ __forceinline__ void load_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(reinterpret_cast<uint64_t>(from)), "r"(bytes), "r"(barrier)
               : "memory");
}
// To a block of the cluster, and on its barrier.
__device__ __forceinline__ void send_bulk(uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
template <bool transposed>
__device__ __forceinline__ void stmatrix(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
  }
}

struct Shared {
  alignas(1024) unsigned char q[2][4 * q_panel];
  unsigned char k[2][4 * k_panel];
  unsigned char v[4][2 * v_panel];
  unsigned char p[2][L * 128];
  float gates[2][record_floats];
  float gp[2][L];
  alignas(16) unsigned char n_parts[2][384];
  uint64_t full_q[2], empty_q[2], full_k[2], empty_k[2], full_v[2][4], empty_v[2][4], full_p[2], empty_p[2];
};
constexpr int shared_bytes = sizeof(Shared);
static_assert(shared_bytes <= 232448);

constexpr int threads = 512;
// c^T as an operand: steps of 16 dqk of a batch, batches in flight.
constexpr int a_steps = A_STEPS, a_buffers = A_BUFFERS;
constexpr int state_registers = 208, t_registers = 64, single_registers = 32;
static_assert(2 * state_registers + t_registers + single_registers <= 512);

template <int flags>
__global__ void __launch_bounds__(threads, 1) fused_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& sh = *reinterpret_cast<Shared*>(raw);
  if (ptx::shared_address(raw) % 1024 != 0) asm volatile("trap;");  // so addresses are constants
  constexpr bool multicast = !(flags & no_multicast), traces = flags & tracing;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int rank = ptx::cluster_rank();
  const auto address = [](const void* p) { return ptx::shared_address(p); };

  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&sh.full_q[s], 1);
      ptx::mbarrier_init(&sh.empty_q[s], blocks * 12);  // warps of T's and the states' warpgroups
      ptx::mbarrier_init(&sh.full_k[s], 1);
      ptx::mbarrier_init(&sh.empty_k[s], blocks * 13);  // and the warp of n
      ptx::mbarrier_init(&sh.full_p[s], 4);
      ptx::mbarrier_init(&sh.empty_p[s], 8);
    }
    for (int x = 0; x < 2; ++x) {
      for (int s = 0; s < 4; ++s) {
        ptx::mbarrier_init(&sh.full_v[x][s], 1);
        ptx::mbarrier_init(&sh.empty_v[x][s], 1);
      }
    }
    ptx::fence_barrier_init();
  }
  // The rows behind n's three stay zero.
  for (int x = threadIdx.x; x < 2 * 4 * 64; x += threads) {
    reinterpret_cast<uint4*>(sh.k[x / 256] + (x / 64 % 4) * k_panel + 64 * 128)[x % 64] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_shared();
  __syncthreads();
  ptx::cluster_barrier();

  const int first_task = blockIdx.x / blocks, task_step = gridDim.x / blocks;
  const auto trace = [&](int role, int step, int event, bool elected) {
    if constexpr (traces) {
      if (elected && blockIdx.x < trace_blocks && step < trace_steps) {
        args.trace[((blockIdx.x * roles + role) * trace_steps + step) * 8 + event] = clock32();
      }
    }
  };
  const auto release_everywhere = [&](uint32_t barrier) {
    __syncwarp();
    if (lane < blocks) arrive_at(barrier, lane);
  };
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };

  if (group == 3) {
    ptx::fewer_registers<single_registers>();
    if (warp == 12) {  // q
      if (lane == 0) {
        int it = 0;
        for (int task = first_task; task < args.tasks; task += task_step) {
          const int seq = task / args.heads, head = task % args.heads;
          for (int j = 0; j < args.chunks; ++j, ++it) {
            const int s = it & 1;
            const uint32_t full = address(&sh.full_q[s]), to = address(sh.q[s]);
            trace(4, it, 0, true);
            wait(address(&sh.empty_q[s]), ((it >> 1) & 1) ^ 1, args.error, 1);
            trace(4, it, 1, true);
            if (flags & no_load && it > 1) {
              arrive(full);
            } else {
              expect(full, 4 * q_panel);
              for (int p = multicast ? rank : 0; p < (multicast ? rank + 1 : 4); ++p) {
                load<multicast>(to + p * q_panel, &args.q, full, p * 64, head, j * L, seq);
              }
            }
          }
        }
      }
    } else if (warp == 13) {  // k and gates
      if (lane == 0) {
        int it = 0;
        for (int task = first_task; task < args.tasks; task += task_step) {
          const int seq = task / args.heads, head = task % args.heads;
          for (int j = 0; j < args.chunks; ++j, ++it) {
            const int s = it & 1;
            const uint32_t full = address(&sh.full_k[s]), to = address(sh.k[s]);
            trace(5, it, 0, true);
            wait(address(&sh.empty_k[s]), ((it >> 1) & 1) ^ 1, args.error, 2);
            trace(5, it, 1, true);
            if (flags & no_load && it > 1) {
              expect(full, 4 * 384);
            } else {
              expect(full, 4 * 64 * 128 + record_bytes + 4 * 384);
              for (int p = multicast ? rank : 0; p < (multicast ? rank + 1 : 4); ++p) {
                load<multicast>(to + p * k_panel, &args.k, full, p * 64, head, j * L, seq);
              }
              const int64_t item = (static_cast<int64_t>(seq) * args.chunks + j) * args.heads + head;
              load_bulk(address(sh.gates[s]), args.records + item * record_floats, record_bytes, full);
            }
          }
        }
      }
    } else if (warp == 14) {  // v
      if (lane == 0) {
        int it = 0;
        for (int task = first_task; task < args.tasks; task += task_step) {
          const int seq = task / args.heads, head = task % args.heads;
          for (int j = 0; j < args.chunks; ++j, ++it) {
            const int s = it & 3;
            for (int x = 0; x < 2; ++x) {
              const uint32_t full = address(&sh.full_v[x][s]);
              trace(6, it, x * 2, true);
              wait(address(&sh.empty_v[x][s]), ((it >> 2) & 1) ^ 1, args.error, 3);
              trace(6, it, x * 2 + 1, true);
              if (flags & no_load && it > 3) {
                arrive(full);
              } else {
                expect(full, v_panel);
                load<false>(address(sh.v[s]) + x * v_panel, &args.v, full, rank * dv_block + x * 64, head, j * L, seq);
              }
            }
          }
        }
      }
    } else {  // n
      const uint32_t own = address(sh.k[0]) + rank * k_panel + (lane % 4) * 4;
      int it = 0;
      for (int task = first_task; task < args.tasks; task += task_step) {
        float n0 = 0.0f, n1 = 0.0f;
        for (int j = 0; j < args.chunks; ++j, ++it) {
          const int s = it & 1, parity = (it >> 1) & 1;
          trace(7, it, 0, lane == 0);
          wait(address(&sh.empty_k[s]), parity ^ 1, args.error, 4);
          trace(7, it, 1, lane == 0);
          {
            float left0 = n0, left1 = n1;
            unsigned char* const to = sh.n_parts[s] + (lane % 4) * 4;
#pragma unroll
            for (int part = 0; part < 3; ++part) {
              const uint32_t two = pack<bf16>(left0, left1);
              const float2 high = unpack<bf16>(two);
              left0 -= high.x, left1 -= high.y;
              *reinterpret_cast<uint32_t*>(to + part * 128 + ((lane / 4) ^ part) * 16) = two;
            }
          }
          ptx::fence_async_shared();
          __syncwarp();
          if (lane < blocks) {
            send_bulk(peer(address(sh.k[s]) + rank * k_panel + 64 * 128, lane), address(sh.n_parts[s]), 384,
                      peer(address(&sh.full_k[s]), lane));
          }
          wait(address(&sh.full_k[s]), parity, args.error, 5);
          trace(7, it, 2, lane == 0);
          const float* const gates = sh.gates[s];
          const float keep = gates[at_keep];
          n0 *= keep, n1 *= keep;
          const uint32_t from = own + s * (4 * k_panel);
#pragma unroll 2
          for (int row = 0; row < L; row += 4) {
            const float4 w = *reinterpret_cast<const float4*>(gates + at_w + row);
            const float ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int x = 0; x < 4; ++x) {
              uint32_t two;
              asm volatile("ld.shared.u32 %0, [%1];"
                           : "=r"(two)
                           : "r"(from + (row + x) * 128 + (((lane / 4) ^ ((row + x) % 8)) * 16)));
              const float2 k = unpack<bf16>(two);
              n0 = fmaf(ws[x], k.x, n0), n1 = fmaf(ws[x], k.y, n1);
            }
          }
          trace(7, it, 3, lane == 0);
          release_everywhere(address(&sh.empty_k[s]));
        }
      }
    }
    __syncwarp();
    ptx::cluster_barrier();
  } else if (group == 2) {
    const int pos = lane % 4, quad = lane / 4, warp_in_group = warp % 4;
    ptx::fewer_registers<t_registers>();
    const bool elected = threadIdx.x % 128 == 0;
    const int row0 = warp_in_group * 16 + quad;
    int it = 0;
    for (int task = first_task; task < args.tasks; task += task_step) {
      for (int j = 0; j < args.chunks; ++j, ++it) {
        const int s = it & 1, parity = (it >> 1) & 1;
        trace(2, it, 0, elected);
        wait(address(&sh.full_q[s]), parity, args.error, 11);
        wait(address(&sh.full_k[s]), parity, args.error, 12);
        trace(2, it, 1, elected);
        float t[36];
#pragma unroll
        for (int x = 0; x < 36; ++x) t[x] = 0.0f;
        if constexpr (!(flags & no_t)) {
          const uint32_t q = address(sh.q[s]), k = address(sh.k[s]);
          ptx::hold(t);
          ptx::wgmma_fence();
#pragma unroll
          for (int x = 0; x < 16; ++x) {
            product_72_ss(t, ptx::wgmma_descriptor(q + x / 4 * q_panel + x % 4 * 32),
                          ptx::wgmma_descriptor(k + x / 4 * k_panel + x % 4 * 32), x > 0);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::hold(t);
        }
        release_everywhere(address(&sh.empty_q[s]));
        trace(2, it, 2, elected);
        const float* const gates = sh.gates[s];
        float sum[2] = {0.0f, 0.0f};
        if constexpr (!(flags & no_weigh)) {
          const float2* const alphas = reinterpret_cast<const float2*>(gates + at_alpha);
          const float2 alpha[2] = {alphas[row0], alphas[row0 + 8]};
          const int ahead = row0 - pos * 2;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const float4 beta = *reinterpret_cast<const float4*>(gates + at_beta + (c * 8 + pos * 2) * 2);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
              for (int y = 0; y < 2; ++y) {
                float& x = t[c * 4 + r * 2 + y];
                const float log = y ? (alpha[r].x - beta.z) + (alpha[r].y - beta.w)
                                    : (alpha[r].x - beta.x) + (alpha[r].y - beta.y);
                const float weighted = x * fast_exp2(log);
                x = ahead + r * 8 - c * 8 - y >= 0 ? weighted : 0.0f;
                sum[r] += x;
              }
            ptx::keep_order();
          }
        }
        float inv[2], gp[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float both = t[32 + r * 2] + t[33 + r * 2];
          const float g = gates[at_g + row0 + r * 8];
          both = fmaf(both, g, sum[r]);
          both += __shfl_xor_sync(all_lanes, both, 1);
          both += __shfl_xor_sync(all_lanes, both, 2);
          const float size = fmaxf(fabsf(args.scale * both), gates[at_emm + row0 + r * 8]) + args.eps;
          inv[r] = __fdividef(args.scale, size);
          gp[r] = g * inv[r];
        }
        trace(2, it, 3, elected);
        wait(address(&sh.empty_p[s]), parity ^ 1, args.error, 13);
        trace(2, it, 4, elected);
        const uint32_t p = address(sh.p[s]) + (warp_in_group * 16 + lane % 16) * 128;
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          uint32_t two[4];
#pragma unroll
          for (int z = 0; z < 4; ++z) {
            two[z] = pack<bf16>(t[x * 8 + z * 2] * inv[z % 2], t[x * 8 + z * 2 + 1] * inv[z % 2]);
          }
          stmatrix<false>(p + (((x * 2 + lane / 16) ^ (lane % 8)) * 16), two[0], two[1], two[2], two[3]);
        }
        if (pos == 0) sh.gp[s][row0] = gp[0], sh.gp[s][row0 + 8] = gp[1];
        ptx::fence_async_shared();
        release(address(&sh.full_p[s]));
        release_everywhere(address(&sh.empty_k[s]));
        trace(2, it, 5, elected);
      }
    }
    __syncwarp();
    ptx::cluster_barrier();
  } else {
  const int pos = lane % 4, warp_in_group = warp % 4;
  ptx::more_registers<state_registers>();
  const bool elected = threadIdx.x % 128 == 0;
  float c[2][64], out[32];  // two accumulators: ptxas refuses one of 256 columns where a launch has 128 registers
  uint32_t a[a_buffers][a_steps][4];
  const auto pack_part = [&](uint32_t(&to)[a_steps][4], int part) {
#pragma unroll
    for (int kk = 0; kk < a_steps; ++kk)
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        const int x = (part * a_steps + kk) * 8 + z * 2;
        to[kk][z] = pack_here(c[x / 64][x % 64], c[x / 64][x % 64 + 1]);
      }
  };
  // This lane's place in v's panel, for ldmatrix: rows are tokens; for the store of out: likewise.
  const uint32_t lane_load = ((lane / 16) * 8 + lane % 8) * 128 + (((warp_in_group * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
  int it = 0;
  // Of the chunk before `it`: whose out lies in v's stage, to be stored.
  const auto store_last = [&](int task, int j) {
    const int stage = (it - 1) & 3;
    if constexpr (flags & no_store) {
      if (elected) arrive(address(&sh.empty_v[group][stage]));
    } else {
      ptx::fence_async_shared();
      ptx::named_barrier(1 + group, 128);
      if (elected) {
        const int before = j > 0 ? j - 1 : args.chunks - 1, of = j > 0 ? task : task - task_step;
        store(&args.h, address(sh.v[stage]) + group * v_panel, ptx::cluster_rank() * dv_block + group * 64,
              of % args.heads, before * L, of / args.heads);
        ptx::bulk_store_commit();
      }
    }
  };
  // One loop over the chunks of all tasks. Nothing is set to zero: the first chunk's products overwrite what is there.
  // Zeros written ahead take registers of their own, and ptxas serializes the products.
  int task = first_task, j = 0;
#pragma unroll 1
  for (; task < args.tasks; ++it) {
    {
      const bool adds = j > 0;
      const int s = it & 1, parity = (it >> 1) & 1;
      const uint32_t q = address(sh.q[s]), k = address(sh.k[s]), p = address(sh.p[s]);
      const uint32_t v = address(sh.v[it & 3]) + group * v_panel;
      const float* const gates = sh.gates[s];
      wait(address(&sh.full_q[s]), parity, args.error, 21);
      wait(address(&sh.full_k[s]), parity, args.error, 22);
      trace(group, it, 0, elected);
      const float keep = gates[at_keep];
      ptx::wgmma_wait<0>();
      ptx::hold(c[0]);
      ptx::hold(c[1]);
#pragma unroll
      for (int b = 0; b < 16 / a_steps; ++b) {
        if constexpr (!(flags & no_qc)) {
          if (b >= a_buffers) ptx::wgmma_wait<a_buffers - 1>();
          if (b > 0 || (flags & late_pack)) pack_part(a[b % a_buffers], b);
          ptx::wgmma_fence();
#pragma unroll
          for (int kk = 0; kk < a_steps; ++kk) {
            const int x = b * a_steps + kk;
            product_64_rs(out, a[b % a_buffers][kk], ptx::wgmma_descriptor(q + x / 4 * q_panel + x % 4 * 32), x > 0);
          }
          ptx::wgmma_commit();
        }
        if (b == 0 && it > 0) store_last(task, j);
      }
      trace(group, it, 1, elected);
#pragma unroll
      for (int x = 0; x < 128; ++x) ptx::mul_in_place(c[x / 64][x % 64], keep);

      // (w v)^T
      wait(address(&sh.full_v[group][it & 3]), (it >> 2) & 1, args.error, 23);
      ptx::hold(c[0]);
      ptx::hold(c[1]);
#pragma unroll
      for (int b = 0; b < 4 / a_steps; ++b) {
        uint32_t(&wv)[a_steps][4] = a[(16 / a_steps + b) % a_buffers];
        ptx::wgmma_wait<a_buffers - 1>();
#pragma unroll
        for (int x = 0; x < a_steps; ++x) {
          const int kk = b * a_steps + x;
          uint32_t two[4];
          ldmatrix_trans(two, v + lane_load + kk * 2048);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 w = *reinterpret_cast<const float2*>(gates + at_w + kk * 16 + half * 8 + pos * 2);
#pragma unroll
            for (int z = 0; z < 2; ++z) {
              const float2 y = unpack<bf16>(two[half * 2 + z]);
              wv[x][half * 2 + z] = pack_here(y.x * w.x, y.y * w.y);
            }
          }
        }
        ptx::wgmma_fence();
        if constexpr (!(flags & no_state)) {
#pragma unroll
          for (int x = 0; x < a_steps; ++x) {
            const int kk = b * a_steps + x;
            product_128_rs_tb(c[0], wv[x], ptx::wgmma_descriptor(k + kk * 2048, k_panel), adds || kk > 0);
            product_128_rs_tb(c[1], wv[x], ptx::wgmma_descriptor(k + 2 * k_panel + kk * 2048, k_panel),
                              adds || kk > 0);
          }
        }
        if (b + 1 < 4 / a_steps) ptx::wgmma_commit();
      }
      ptx::wgmma_commit();
      trace(group, it, 2, elected);
      if (!(flags & no_store) && elected && it > 0) {
        ptx::bulk_store_wait_read<0>();
        arrive(address(&sh.empty_v[group][(it - 1) & 3]));
      }

      // g' out + v^T P^T
      ptx::wgmma_wait<4 / a_steps>();
      ptx::hold(out);
      release_everywhere(address(&sh.empty_q[s]));
      trace(group, it, 3, elected);
      wait(address(&sh.full_p[s]), parity, args.error, 24);
      trace(group, it, 4, elected);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const float2 g = *reinterpret_cast<const float2*>(sh.gp[s] + x * 8 + pos * 2);
        ptx::mul_in_place(out[x * 4], g.x), ptx::mul_in_place(out[x * 4 + 1], g.y);
        ptx::mul_in_place(out[x * 4 + 2], g.x), ptx::mul_in_place(out[x * 4 + 3], g.y);
      }
      ptx::hold(out);
      ptx::wgmma_fence();
      if constexpr (!(flags & no_pv)) {
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          product_64_ss_ta(out, ptx::wgmma_descriptor(v + kk * 2048, v_panel), ptx::wgmma_descriptor(p + kk * 32),
                           adds || kk > 0);
        }
      }
      ptx::wgmma_commit();
      trace(group, it, 5, elected);
      ptx::wgmma_wait<1>();  // the state's
      ptx::hold(c[0]);
      ptx::hold(c[1]);
      release_everywhere(address(&sh.empty_k[s]));
      trace(group, it, 6, elected);
      if (!(flags & late_pack)) pack_part(a[0], 0);
      ptx::wgmma_wait<0>();
      ptx::hold(out);
      ptx::hold(c[0]);
      ptx::hold(c[1]);
      release(address(&sh.empty_p[s]));
      if (flags & wide_barrier) ptx::named_barrier(1 + group, 128);
      // out^T by columns into v's panel: matrices (tokens 16 x .. + 0, dv 0), (0, dv 8), (8, dv 0), (8, dv 8).
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        stmatrix<true>(v + lane_load + x * 2048, pack<bf16>(out[x * 8], out[x * 8 + 1]),
                       pack<bf16>(out[x * 8 + 2], out[x * 8 + 3]), pack<bf16>(out[x * 8 + 4], out[x * 8 + 5]),
                       pack<bf16>(out[x * 8 + 6], out[x * 8 + 7]));
      }
      trace(group, it, 7, elected);
      if (++j == args.chunks) j = 0, task += task_step;
    }
  }
  if (it > 0) store_last(task, 0);
  if (elected) ptx::bulk_store_wait<0>();
  __syncwarp();
  ptx::cluster_barrier();
  }
}

// What a run of tokens does to m: m -> max(m + sum, top).
struct Transform {
  double sum, top;
  __device__ Transform then(const Transform& next) const {
    return {sum + next.sum, fmax(top + next.sum, next.top)};
  }
  __device__ double from(double m) const { return fmax(m + sum, top); }
};

struct GateArgs {
  const float *i, *f;
  float* records;
  double2* totals;
  int batch, seq, heads, chunks;
};

// A warp has a chunk of a head, a lane two tokens. Pass 0 writes what each chunk does to m, pass 1 the records.
template <int pass>
__global__ void __launch_bounds__(256) gates_kernel(const GateArgs args) {
  const int64_t item = (int64_t{blockIdx.x} * 256 + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (item >= int64_t{args.batch} * args.chunks * args.heads) return;
  const int head = static_cast<int>(item % args.heads), chunk = static_cast<int>(item / args.heads % args.chunks);
  const int64_t seq = item / args.heads / args.chunks;
  float i[2], lf[2];
  for (int x = 0; x < 2; ++x) {
    const int token = chunk * L + lane * 2 + x;
    const bool inside = token < args.seq;
    const int64_t at = (seq * args.seq + token) * args.heads + head;
    i[x] = inside ? args.i[at] : -INFINITY;
    lf[x] = inside ? log_sigmoid(args.f[at]) : 0.0f;
  }
  double b[2] = {static_cast<double>(lf[0]), static_cast<double>(lf[0]) + lf[1]};
  double sum = b[1];
  for (int d = 1; d < 32; d *= 2) {
    const double before = __shfl_up_sync(all_lanes, sum, d);
    if (lane >= d) sum += before;
  }
  const double before = __shfl_up_sync(all_lanes, sum, 1);
  if (lane > 0) b[0] += before, b[1] += before;
  const double beta[2] = {b[0] - i[0], b[1] - i[1]};
  double through = fmin(beta[0], beta[1]);
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_up_sync(all_lanes, through, d);
    if (lane >= d) through = fmin(through, other);
  }
  const double all_sum = __shfl_sync(all_lanes, b[1], 31), all_least = __shfl_sync(all_lanes, through, 31);
  if constexpr (pass == 0) {
    if (lane == 0) args.totals[item] = make_double2(all_sum, all_sum - all_least);
    return;
  }
  Transform past{0.0, -INFINITY};
  for (int first = 0; first < chunk; first += 32) {
    Transform own{0.0, -INFINITY};
    if (first + lane < chunk) {
      const double2 t = args.totals[(seq * args.chunks + first + lane) * args.heads + head];
      own = {t.x, t.y};
    }
    for (int d = 1; d < 32; d *= 2) {
      const Transform next{__shfl_down_sync(all_lanes, own.sum, d), __shfl_down_sync(all_lanes, own.top, d)};
      if (lane + d < 32) own = own.then(next);
    }
    past = past.then({__shfl_sync(all_lanes, own.sum, 0), __shfl_sync(all_lanes, own.top, 0)});
  }
  const double m_start = past.from(0.0);
  double least_before = __shfl_up_sync(all_lanes, through, 1);
  if (lane == 0) least_before = INFINITY;
  double alpha[2];
  alpha[0] = fmin(-m_start, fmin(least_before, beta[0]));
  alpha[1] = fmin(alpha[0], beta[1]);
  const double alpha_last = __shfl_sync(all_lanes, alpha[1], 31);
  float* const record = args.records + item * record_floats;
  constexpr double log2_e = 1.4426950408889634;
  const auto split = [](double x) {
    x *= log2_e;
    const double whole = rint(x);
    const float high = static_cast<float>(whole);
    return make_float2(high, isinf(high) ? 0.0f : static_cast<float>(x - whole));
  };
  const auto power = [](double x) { return exp2f(static_cast<float>(x * log2_e)); };
  for (int x = 0; x < 2; ++x) {
    const int t = lane * 2 + x;
    const bool inside = chunk * L + t < args.seq;
    reinterpret_cast<float2*>(record + at_beta)[t] = split(beta[x]);
    reinterpret_cast<float2*>(record + at_alpha)[t] = inside ? split(alpha[x]) : make_float2(-INFINITY, 0.0f);
    record[at_g + t] = inside ? power(alpha[x] + m_start) : 0.0f;
    record[at_emm + t] = inside ? power(alpha[x] - b[x]) : 1.0f;
    record[at_w + t] = power(alpha_last - beta[x]);
  }
  if (lane == 0) record[at_keep] = power(alpha_last + m_start);
}

cudaError_t rows(CUtensorMap& map, const void* data, int batch, int seq, int heads, int dim) {
  const uint64_t row = static_cast<uint64_t>(dim) * 2, token = row * heads;
  return encode<4>(map, data,
                   {static_cast<uint64_t>(dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(seq),
                    static_cast<uint64_t>(batch)},
                   {row, token, token * seq}, {64, 1, 64, 1});
}

int* error_word = nullptr;

template <int flags>
cudaError_t launch(const Args& args, int clusters, cudaStream_t stream, int* most) {
  const auto kernel = fused_kernel<flags>;
  static bool prepared = false;
  static int at_once = 0;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  config.gridDim = dim3(blocks);
  if (!prepared) {
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
    config.gridDim = dim3(132);
    status = cudaOccupancyMaxActiveClusters(&at_once, kernel, &config);
    if (status != cudaSuccess) return status;
    prepared = true;
  }
  if (most != nullptr) *most = at_once;
  if (at_once == 0) return cudaErrorInvalidConfiguration;
  int count = clusters > 0 ? clusters : at_once;
  if (count > args.tasks) count = args.tasks;
  config.gridDim = dim3(static_cast<unsigned>(count * blocks));
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

// Floats of scratch: records, then totals.
extern "C" long long fused_workspace_bytes(int batch, int seq, int heads) {
  const long long items = static_cast<long long>(batch) * ((seq + L - 1) / L) * heads;
  return items * (record_bytes + 16);
}

extern "C" int fused_error() { return error_word == nullptr ? 0 : *error_word; }

// q, k (batch, seq, heads, 256), v, h (batch, seq, heads, 512) bfloat16; i, f (batch, seq, heads) float32; contiguous.
// parts: 1 the gates, 2 the rest. most: clusters that run at once. Returns 0, or a cudaError, or -1: no such variant.
extern "C" int fused_forward(const void* q, const void* k, const void* v, const float* i, const float* f, void* h,
                             void* workspace, int batch, int seq, int heads, float scale, float eps, int variant,
                             int parts, int clusters, void* trace, int* most, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int chunks = (seq + L - 1) / L;
  const long long items = static_cast<long long>(batch) * chunks * heads;
  float* const records = static_cast<float*>(workspace);
  if (error_word == nullptr) {
    const cudaError_t status = cudaHostAlloc(reinterpret_cast<void**>(&error_word), 64, cudaHostAllocMapped);
    if (status != cudaSuccess) return status;
    *error_word = 0;
  }
  if (parts & 1) {
    const GateArgs gates{i, f, records, reinterpret_cast<double2*>(records + items * record_floats), batch, seq, heads,
                         chunks};
    const unsigned grid = static_cast<unsigned>((items * 32 + 255) / 256);
    gates_kernel<0><<<grid, 256, 0, stream>>>(gates);
    gates_kernel<1><<<grid, 256, 0, stream>>>(gates);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  if (!(parts & 2)) return 0;
  Args args{};
  cudaError_t status = rows(args.q, q, batch, seq, heads, dqk);
  if (status == cudaSuccess) status = rows(args.k, k, batch, seq, heads, dqk);
  if (status == cudaSuccess) status = rows(args.v, v, batch, seq, heads, dv);
  if (status == cudaSuccess) status = rows(args.h, h, batch, seq, heads, dv);
  if (status != cudaSuccess) return status;
  args.records = records;
  void* device_word = nullptr;
  status = cudaHostGetDevicePointer(&device_word, error_word, 0);
  if (status != cudaSuccess) return status;
  args.error = static_cast<int*>(device_word);
  args.trace = static_cast<uint32_t*>(trace);
  args.tasks = batch * heads, args.heads = heads, args.chunks = chunks;
  args.scale = scale, args.eps = eps;
  switch (variant) {
#define VARIANT(x) \
  case x: return launch<x>(args, clusters, stream, most);
    VARIANT(0)
#ifndef ONLY_BASE
    VARIANT(no_qc)
    VARIANT(no_state)
    VARIANT(no_pv)
    VARIANT(no_t)
    VARIANT(no_weigh)
    VARIANT(no_t | no_weigh)
    VARIANT(no_store)
    VARIANT(no_multicast)
    VARIANT(tracing)
    VARIANT(no_load)
    VARIANT(no_load | no_store)
    VARIANT(late_pack)
    VARIANT(wide_barrier)
    VARIANT(no_qc | no_state | no_pv | no_t | no_weigh)
#endif
    default: return -1;
  }
}
