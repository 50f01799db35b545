// The activations of the mixers.
#pragma once

namespace reasoners {

// v / (1 + exp(-v)). The sum is not left to be fused with the exponential's last product, so that
// every caller rounds alike.
__device__ inline float silu(float v) { return __fdiv_rn(v, __fadd_rn(1.f, expf(-v))); }

// log(1 + exp(v))
__device__ inline float softplus(float v) {
  return __fadd_rn(fmaxf(v, 0.f), log1pf(expf(-fabsf(v))));
}

}  // namespace reasoners
