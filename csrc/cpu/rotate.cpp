// Half-split rotary embedding in place.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/rotation.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 2048;  // elements a thread takes at least

template <typename scalar_t>
void rotate_tokens(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2), stride = x.stride(0);
  const auto* position_of = positions.const_data_ptr<int32_t>();
  const auto* frequencies = inv_freq.const_data_ptr<float>();
  auto* data = x.mutable_data_ptr<scalar_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / (heads * head_dim));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    Rotation<scalar_t> rotation(frequencies, head_dim / 2);
    for (int64_t token = begin; token < end; ++token) {
      rotation.move_to(position_of[token]);
      scalar_t* first = data + token * stride;
      for (int64_t head = 0; head < heads; ++head, first += head_dim)
        rotation.rotate_head(first, first);
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
