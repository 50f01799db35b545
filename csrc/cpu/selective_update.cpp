// One token of the Mamba-1 recurrence S = exp(delta A) S + delta x B, y = S . C + D x, in place on
// each row's slot. A unit is (row, block of channels); the loop over the N state entries of a
// channel vectorises as it stands, its exponential included.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/operators.h"
#include "cpu/widened.h"

namespace reasoners {
namespace {

constexpr int64_t kBlock = 256;

template <typename scalar_t, typename state_t>
void update(const Tensor& state, const Tensor& slots, const Tensor& x, const Tensor& delta,
            const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
            const Tensor& y) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t batch = x.size(0), channels = x.size(1), state_dim = A.size(1);
  const int64_t b_share = channels / B.size(1), c_share = channels / C.size(1);
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  const auto* slot_of = slots.const_data_ptr<int32_t>();
  const auto* x_data = x.const_data_ptr<scalar_t>();
  const auto* delta_data = delta.const_data_ptr<acc_t>();
  const auto* a_data = A.const_data_ptr<acc_t>();
  const auto* b_data = B.const_data_ptr<scalar_t>();
  const auto* c_data = C.const_data_ptr<scalar_t>();
  const auto* d_data = D ? D->const_data_ptr<acc_t>() : nullptr;
  auto* state_data = state.mutable_data_ptr<state_t>();
  auto* y_data = y.mutable_data_ptr<scalar_t>();

  at::parallel_for(0, batch * blocks, 1, [&](int64_t from, int64_t to) {
    Widened<scalar_t, acc_t> wide_b(state_dim), wide_c(state_dim);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t row = unit / blocks, first = unit % blocks * kBlock;
      const int64_t last = std::min(first + kBlock, channels);
      scalar_t* out = y_data + row * channels;
      if (slot_of[row] < 0) {
        std::fill(out + first, out + last, scalar_t(0));
        continue;
      }
      for (int64_t c = first; c < last; ++c) {
        state_t* s = state_data + (slot_of[row] * channels + c) * state_dim;
        const acc_t* a = a_data + c * state_dim;
        const acc_t* b = wide_b(b_data + (row * B.size(1) + c / b_share) * state_dim);
        const acc_t* read = wide_c(c_data + (row * C.size(1) + c / c_share) * state_dim);
        const acc_t step = delta_data[row * channels + c];
        const acc_t input = static_cast<acc_t>(x_data[row * channels + c]);
        acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < state_dim; ++n) {
          const acc_t next = fast_exp(step * a[n]) * static_cast<acc_t>(s[n]) + step * input * b[n];
          s[n] = static_cast<state_t>(next);
          sum += next * read[n];
        }
        out[c] = static_cast<scalar_t>(sum + (d_data ? d_data[c] * input : acc_t(0)));
      }
    }
  });
}

}  // namespace

Tensor cpu::selective_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                             const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                             const OptionalTensor& D) {
  check_selective_update(state, slots, x, delta, A, B, C, D);
  Check{"selective_update"}.slots(slots.contiguous(), state.size(0));
  auto y = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "selective_update", [&] {
    using data_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, state.scalar_type(), "selective_update", [&] {
      if constexpr (std::is_same_v<data_t, double> == std::is_same_v<scalar_t, double>)
        update<data_t, scalar_t>(state, slots.contiguous(), x.contiguous(), delta.contiguous(),
                                 A.contiguous(), B.contiguous(), C.contiguous(), cpu::contiguous(D),
                                 y);
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("selective_update", &cpu::selective_update); }

}  // namespace reasoners
