// For warps of one block that do different work: barriers that some of the threads pass, registers
// that some leave to others, and what the compiler shall know of a number, which saves some.
#pragma once

namespace reasoners {

// The same number, which the compiler now knows to be the same for all lanes.
__device__ inline int same_in_warp(int v) { return __shfl_sync(~0u, v, 0); }

// The same number, which the compiler does not know: what is computed from it is computed where it
// is needed, instead of early and then kept in registers.
template <typename T>
__device__ T opaque(T v) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
  return v;
}

// Barrier kId, 1 to 15, of kThreads threads: those that wait at it and those that only arrive.
// What all of them wrote before is there after the wait.
template <int kId, int kThreads>
__device__ inline void wait_at() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
// A barrier that is no constant: the kernel takes all 16 of them then.
template <int kThreads>
__device__ inline void wait_at(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kId, int kThreads>
__device__ inline void arrive_at() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// By all threads of four neighbouring warps, the first of them a multiple of four: each has kCount
// registers from here on. Who takes more waits until others left enough. What is compiled for
// other machines keeps what it began with.
template <int kCount>
__device__ inline void keep_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ inline void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace reasoners
