// Exponentials as the special-function units have them: powers of 2.
#pragma once

namespace reasoners {

constexpr float kLog2e = 1.44269504088896f;

// 2 to the power of x to about 2 ulp; 0 instead of what is too small for a normal number.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; 0 for what is too large, and infinity for what is too small for a normal number.
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace reasoners
