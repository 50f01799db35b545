// Blocks of a cluster: their barrier, and each other's shared memory.
#pragma once

#include <cstdint>

#include "async_copy.cuh"

namespace reasoners {

constexpr int kMostClusterBlocks = 8;  // more are not portable

// A barrier of the cluster's blocks, in two halves: what a thread wrote before it arrived is there
// for who has waited. Every block may write to another only after the first one, which tells that
// all run; and none may end while another reads what it has.
__device__ inline void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// The first half where nothing has been written yet.
__device__ inline void begin_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// What has the address `mine` in this block's shared memory, in that of another one.
template <typename T>
__device__ inline T* in_block(T* mine, int block) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(block));
  return there;
}

// The same of addresses in shared memory (shared_address), found where this stands.
__device__ inline uint32_t address_in_block(uint32_t mine, int block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(block));
  return there;
}
// Nobody waits for it: it tells the mbarrier there how many bytes have come.
__device__ inline void store_to_block(uint32_t there, float4 v, uint32_t barrier_there) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier_there)
      : "memory");
}
__device__ inline void store_to_block(uint32_t there, double v, uint32_t barrier_there) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(there),
      "d"(v), "r"(barrier_there)
      : "memory");
}
__device__ inline void wait_for_blocks(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace reasoners
