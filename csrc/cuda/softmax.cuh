// Softmax in powers of 2: what the kernels of attention agree on.
#pragma once

#include <cmath>

#include "exponential.cuh"

namespace reasoners {

constexpr unsigned kAll = ~0u;
constexpr float kMinusInfinity = -INFINITY;

// 2^(score - max); what has seen nothing yet has max = -inf and weighs 0. Scores carry the factor
// log2(e), so that this is the weight of softmax.
__device__ inline float weight(float score, float max) {
  return exp2_fast(__fsub_rn(score, max == kMinusInfinity ? 0.f : max));
}

// The factor of scores that are compared before it is applied: what a negative scale changes is the
// queries' sign, and with 0 a score of -inf would be NaN.
__device__ inline float positive_scale(float scale) { return fmaxf(fabsf(scale) * kLog2e, 1e-37f); }

// The logarithm of the sum of the exponentials of scores that carried log2(e), as nobody outside
// knows of it: natural.
__device__ inline float log_sum_exp(float max, float sum) {
  constexpr float kLn2 = 0.693147180559945f;
  return (max + log2f(sum)) * kLn2;
}

}  // namespace reasoners
