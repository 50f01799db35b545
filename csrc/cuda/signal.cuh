// What a block of a launch tells another one, through global memory.
#pragma once

#include <cstdint>

namespace reasoners {

// One thread tells how far it is, and with that of what it, and those it met, wrote to global
// memory; others wait until it is as far.
__device__ inline void tell(uint32_t* progress, uint32_t step) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(progress), "r"(step) : "memory");
}
__device__ inline void wait_until(const uint32_t* progress, uint32_t step) {
  uint32_t there;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(progress) : "memory");
  while (there < step);
}

// Whether this thread is the last of `count` that call this: it, and those it meets then, see what
// all of them, and those they met before, wrote to global memory. The ticket is zero again after
// it.
__device__ inline bool comes_last(uint32_t* ticket, uint32_t count) {
  __threadfence();
  const bool last = atomicInc(ticket, count - 1) == count - 1;
  __threadfence();
  return last;
}

}  // namespace reasoners
