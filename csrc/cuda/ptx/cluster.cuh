// Thin wrappers for thread block clusters: ranks, barriers, distributed shared memory (sm_90).
#pragma once

#include "cuda/ptx/tma.cuh"

namespace flash_xlstm::cuda::ptx {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Synchronizes all threads of the cluster. Writes before the barrier are visible after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The two halves of cluster_barrier. Between them a block may do what does not depend on the others.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address in block `rank`'s shared memory that corresponds to `shared` in this block's.
__device__ __forceinline__ uint32_t peer_address(const void* shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// Loads from peer_address(shared, rank).
__device__ __forceinline__ double2 load_peer(const double2* shared, int rank) {
  double2 value;
  asm volatile("ld.shared::cluster.v2.f64 {%0, %1}, [%2];"
               : "=d"(value.x), "=d"(value.y)
               : "r"(peer_address(shared, rank))
               : "memory");
  return value;
}

// Stores 16 bytes to a block of the cluster and completes 16 bytes on an mbarrier of that block. Both are peer
// addresses.
__device__ __forceinline__ void store_async(uint32_t address, uint32_t barrier, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
      : "memory");
}

// As mbarrier_wait, with acquire at cluster scope: for data from store_async.
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
