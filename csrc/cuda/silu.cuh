// v / (1 + exp(-v)).
#pragma once

namespace reasoners {

// The sum is not left to be fused with the exponential's last product, so that every caller rounds
// alike.
__device__ inline float silu(float v) { return __fdiv_rn(v, __fadd_rn(1.f, expf(-v))); }

}  // namespace reasoners
