// Blocks of a cluster: their barrier, and each other's shared memory.
#pragma once

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

}  // namespace reasoners
