// Thin wrappers of thread-block clusters: ranks, barriers, another block's shared memory (sm_90).
#pragma once

#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::ptx {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster; what was written before is visible behind.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Its two halves. Between them a block goes on with what does not concern the others.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, for loads and store_async, of block `rank`'s counterpart of an address in this block's shared memory.
__device__ __forceinline__ uint32_t peer_address(const void* shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// From block `rank`'s counterpart of an address in this block's shared memory.
__device__ __forceinline__ double2 load_peer(const double2* shared, int rank) {
  double2 value;
  asm volatile("ld.shared::cluster.v2.f64 {%0, %1}, [%2];"
               : "=d"(value.x), "=d"(value.y)
               : "r"(peer_address(shared, rank))
               : "memory");
  return value;
}

// 16 bytes to a block of the cluster; then the barrier there, in the same block, is told of 16 bytes.
__device__ __forceinline__ void store_async(uint32_t address, uint32_t barrier, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
      : "memory");
}

// As mbarrier_wait, for what blocks of the cluster have stored.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace flash_xlstm::cuda::ptx
