// Half-split rotary embedding of the heads of one token. Cosines and sines come through double, so
// that a position rounds the same wherever it stands, and once per token for all of its heads.
#pragma once

#include <ATen/OpMathType.h>

#include <cmath>
#include <vector>

#include "cpu/narrow.h"

namespace reasoners {

template <typename scalar_t>
class Rotation {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  Rotation(const float* inv_freq, int64_t half)
      : inv_freq_(inv_freq), half_(half), factors_(2 * half) {}

  void move_to(int32_t at) {
    const auto position = static_cast<float>(at);
    acc_t *cos = factors_.data(), *sin = cos + half_;
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = position * inv_freq_[i];
      cos[i] = static_cast<float>(std::cos(angle));
      sin[i] = static_cast<float>(std::sin(angle));
    }
  }

  // from may be to. Not inlined, so that all callers round the same.
  [[gnu::noinline]] void rotate_head(const scalar_t* from, scalar_t* to) const {
    const acc_t *cos = factors_.data(), *sin = cos + half_;
    const int64_t half = half_;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const acc_t u = static_cast<acc_t>(from[i]), v = static_cast<acc_t>(from[half + i]);
      to[i] = narrow<scalar_t>(u * cos[i] - v * sin[i]);
      to[half + i] = narrow<scalar_t>(v * cos[i] + u * sin[i]);
    }
  }

 private:
  const float* inv_freq_;
  int64_t half_;
  std::vector<acc_t> factors_;
};

}  // namespace reasoners
