// exp for loops: branch-free, so that the compiler vectorises it for whatever unit there is, and
// the same bits in every lane and in a loop's remainder.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace reasoners {

// Within 2 ulp for x <= 88; below -87.3 exactly 0 (a masked score weighs nothing); NaN stays NaN.
inline float fast_exp(float x) {
  constexpr float kLowest = -87.3f, kRound = 0x1.8p23f;
  const float y = x < kLowest ? kLowest : x;
  const float shifted = y * 0x1.715476p0f + kRound;  // y / log 2, rounded in the low bits
  const float n = shifted - kRound;
  const float r = (y - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.9875691500e-4f;  // Cephes
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < kLowest ? 0.0f : p * power;
}
inline double fast_exp(double x) { return std::exp(x); }

// 1 / (1 + exp(-x)), for any x.
template <typename T>
inline T fast_sigmoid(T x) {
  return T(1) / (T(1) + fast_exp(x < T(-88) ? T(88) : -x));
}

}  // namespace reasoners
