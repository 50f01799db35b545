// The normalisation of one row.
#pragma once

#include <ATen/OpMathType.h>

#include <cmath>
#include <cstdint>

#include "cpu/narrow.h"

namespace reasoners {

// The sum of term(i), i < size, in an order that depends on `size` only: not on where in memory the
// row stands, as a vectorised reduction's might.
template <typename acc_t, typename Term>
inline acc_t fixed_sum(int64_t size, const Term& term) {
  constexpr int kLanes = 32;
  acc_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  for (int k = 0; i + k < size; ++k) lanes[k] += term(i + k);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) lanes[k] += lanes[k + step];
  return lanes[0];
}

// out = round(h / sqrt(squares / size + eps)) * weight
template <typename scalar_t, typename acc_t>
inline void scale_row(const scalar_t* h, acc_t squares, const scalar_t* weight, acc_t eps,
                      int64_t size, scalar_t* out) {
  const acc_t factor = acc_t(1) / std::sqrt(squares / static_cast<acc_t>(size) + eps);
  for (int64_t i = 0; i < size; ++i) {
    const auto normal = narrow<scalar_t>(static_cast<acc_t>(h[i]) * factor);
    out[i] = narrow<scalar_t>(static_cast<acc_t>(normal) * static_cast<acc_t>(weight[i]));
  }
}

}  // namespace reasoners
