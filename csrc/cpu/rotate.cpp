// Half-split rotary embedding in place. Cosines and sines come through double, so that a position
// rounds the same wherever it stands, and once per token for all of its heads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/narrow.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 2048;  // elements a thread takes at least

template <typename scalar_t>
void rotate_tokens(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2, stride = x.stride(0);
  const auto* position_of = positions.const_data_ptr<int32_t>();
  const auto* frequencies = inv_freq.const_data_ptr<float>();
  auto* data = x.mutable_data_ptr<scalar_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / (2 * heads * half));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> factors(2 * half);
    acc_t *cos = factors.data(), *sin = cos + half;
    for (int64_t token = begin; token < end; ++token) {
      const auto position = static_cast<float>(position_of[token]);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * frequencies[i];
        cos[i] = static_cast<float>(std::cos(angle));
        sin[i] = static_cast<float>(std::sin(angle));
      }
      scalar_t* first = data + token * stride;
      for (int64_t head = 0; head < heads; ++head, first += 2 * half) {
        scalar_t* second = first + half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const acc_t u = static_cast<acc_t>(first[i]), v = static_cast<acc_t>(second[i]);
          first[i] = narrow<scalar_t>(u * cos[i] - v * sin[i]);
          second[i] = narrow<scalar_t>(v * cos[i] + u * sin[i]);
        }
      }
    }
  });
}

void rotate(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  check_rotate(x, positions, inv_freq);
  if (x.numel() == 0) return;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rotate", [&] {
    rotate_tokens<scalar_t>(x, positions.contiguous(), inv_freq.contiguous());
  });
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("rotate", &rotate); }

}  // namespace
}  // namespace reasoners
