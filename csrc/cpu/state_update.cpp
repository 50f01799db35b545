// One token of S = exp(log_decay) S + scale x B^T, y = S C + D x, in place on each row's slot.
//
// Work is one (row, head): its (P, N) state is streamed once, and the product with C is taken from
// the registers that hold the new state. B and C are widened to the accumulation type once per
// head.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/head_state.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

template <typename scalar_t, typename state_t>
void update(const Tensor& state, const Tensor& slots, const Tensor& x, const Tensor& log_decay,
            const Tensor& B, const Tensor& C, const OptionalTensor& scale, const OptionalTensor& D,
            const OptionalTensor& rng_key, Tensor& y) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t batch = y.size(0), heads = y.size(1), head_dim = y.size(2), state_dim = B.size(2);
  const int64_t x_share = heads / x.size(1), b_share = heads / B.size(1),
                c_share = heads / C.size(1);
  const auto* slot_of = slots.const_data_ptr<int32_t>();
  const auto* x_data = x.const_data_ptr<scalar_t>();
  const auto* decay_data = log_decay.const_data_ptr<acc_t>();
  const auto* b_data = B.const_data_ptr<scalar_t>();
  const auto* c_data = C.const_data_ptr<scalar_t>();
  const auto* scale_data = scale ? scale->const_data_ptr<acc_t>() : nullptr;
  const auto* d_data = D ? D->const_data_ptr<acc_t>() : nullptr;
  const auto* key_data = rng_key ? rng_key->const_data_ptr<int64_t>() : nullptr;
  auto* state_data = state.mutable_data_ptr<state_t>();
  auto* y_data = y.mutable_data_ptr<scalar_t>();

  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> wide(2 * state_dim);
    acc_t *b = wide.data(), *c = wide.data() + state_dim;
    RoundingNoise noise;
    const int64_t size = head_dim * state_dim;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads, head = i % heads;
      scalar_t* out = y_data + i * head_dim;
      if (slot_of[row] < 0) {
        std::fill(out, out + head_dim, scalar_t(0));
        continue;
      }
      const auto* b_in = b_data + (row * B.size(1) + head / b_share) * state_dim;
      const auto* c_in = c_data + (row * C.size(1) + head / c_share) * state_dim;
      for (int64_t n = 0; n < state_dim; ++n) {
        b[n] = static_cast<acc_t>(b_in[n]);
        c[n] = static_cast<acc_t>(c_in[n]);
      }
      const auto* x_in = x_data + (row * x.size(1) + head / x_share) * head_dim;
      const acc_t decay = std::exp(decay_data[i]);
      const acc_t weight = scale_data ? scale_data[i] : acc_t(1);
      const acc_t skip = d_data ? d_data[head] : acc_t(0);
      token_onto_head(state_data + (slot_of[row] * heads + head) * size, x_in, b, c, decay, weight,
                      skip, key_data ? noise(key_data + 4 * row, head * size, size) : nullptr,
                      head_dim, state_dim, out);
    }
  });
}

}  // namespace

Tensor cpu::state_update(const Tensor& state, const Tensor& slots_in, const Tensor& x,
                         const Tensor& log_decay, const Tensor& B, const Tensor& C,
                         const OptionalTensor& scale, const OptionalTensor& D,
                         const OptionalTensor& rng_key) {
  check_state_update(state, slots_in, x, log_decay, B, C, scale, D, rng_key);
  const Tensor slots = slots_in.contiguous();
  Check{"state_update"}.slots(slots, state.size(0));
  auto y = at::empty({x.size(0), log_decay.size(1), x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "state_update", [&] {
    using data_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, state.scalar_type(), "state_update", [&] {
      if constexpr (std::is_same_v<data_t, double> == std::is_same_v<scalar_t, double>)
        update<data_t, scalar_t>(state, slots, x.contiguous(), log_decay.contiguous(),
                                 B.contiguous(), C.contiguous(), cpu::contiguous(scale),
                                 cpu::contiguous(D), cpu::contiguous(rng_key), y);
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("state_update", &cpu::state_update); }

}  // namespace reasoners
