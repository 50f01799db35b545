// x silu(z + bias) and softplus(x + bias), each element by itself.
//
// ATen's own loops give the elements left over by the vector width, and those where its threads
// split the tensor, to the scalar exponential, which rounds otherwise: the same row would get other
// bits in another batch. Here the exponential is arithmetic that vector and scalar code round
// alike.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/operators.h"
#include "rows.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

template <typename Function>
void for_rows(const Tensor& x, const Function& function) {
  const int64_t channels = x.size(-1), rows = channels ? x.numel() / channels : 0;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(channels, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) function(row, channels);
                   });
}

}  // namespace

Tensor cpu::gate(const Tensor& x_in, const Tensor& z_in, const OptionalTensor& bias_in) {
  check_gate(x_in, z_in, bias_in);
  const Tensor x = rows_of(x_in), z = rows_of(z_in);
  const OptionalTensor bias = cpu::contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "gate", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* z_data = z.const_data_ptr<scalar_t>();
    const auto* b = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    for_rows(y, [&](int64_t row, int64_t channels) {
      const scalar_t *xs = x_data + row * row_stride(x), *zs = z_data + row * row_stride(z);
      scalar_t* ys = y_data + row * channels;
      const auto one = [&](acc_t u, acc_t v) { return u * v * fast_sigmoid(v); };
      if (b)
        for (int64_t c = 0; c < channels; ++c)
          ys[c] = static_cast<scalar_t>(one(xs[c], acc_t(zs[c]) + acc_t(b[c])));
      else
        for (int64_t c = 0; c < channels; ++c) ys[c] = static_cast<scalar_t>(one(xs[c], zs[c]));
    });
  });
  return y;
}

Tensor cpu::softplus(const Tensor& x_in, const OptionalTensor& bias_in) {
  check_softplus(x_in, bias_in);
  const Tensor x = rows_of(x_in);
  const OptionalTensor bias = cpu::contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options().dtype(wide_dtype(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "softplus", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* b = bias ? bias->const_data_ptr<acc_t>() : nullptr;
    auto* y_data = y.mutable_data_ptr<acc_t>();
    for_rows(y, [&](int64_t row, int64_t channels) {
      const scalar_t* xs = x_data + row * row_stride(x);
      acc_t* ys = y_data + row * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const acc_t v = static_cast<acc_t>(xs[c]) + (b ? b[c] : acc_t(0));
        ys[c] = std::max(v, acc_t(0)) + std::log1p(std::exp(-std::abs(v)));
      }
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("gate", &cpu::gate);
  m.impl("softplus", &cpu::softplus);
}

}  // namespace reasoners
