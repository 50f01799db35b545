// x silu(z + bias) with its derivative, and softplus(x + bias), each element by itself.
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

// v = z + bias
template <bool kBias, typename scalar_t>
auto gate_input(const scalar_t* z, const scalar_t* bias, int64_t c) {
  using acc_t = at::opmath_type<scalar_t>;
  if constexpr (kBias) return acc_t(z[c]) + acc_t(bias[c]);
  return acc_t(z[c]);
}

// y = x silu(v), of one row. The loops of a row are functions of their own, called by address:
// inlined and side by side the compiler does not always make them vectors.
template <bool kBias, typename scalar_t>
void gate_row(int64_t channels, const scalar_t* x, const scalar_t* z, const scalar_t* bias,
              scalar_t* y) {
  using acc_t = at::opmath_type<scalar_t>;
  for (int64_t c = 0; c < channels; ++c) {
    const acc_t v = gate_input<kBias>(z, bias, c);
    y[c] = static_cast<scalar_t>(acc_t(x[c]) * v * fast_sigmoid(v));
  }
}

// dx = dy silu(v) and dz = dy x silu'(v), silu'(v) = s + v s (1 - s), s = sigmoid(v), of one row.
template <bool kBias, typename scalar_t>
void gate_backward_row(int64_t channels, const scalar_t* dy, const scalar_t* x, const scalar_t* z,
                       const scalar_t* bias, scalar_t* __restrict__ dx, scalar_t* __restrict__ dz) {
  using acc_t = at::opmath_type<scalar_t>;
  for (int64_t c = 0; c < channels; ++c) {
    const acc_t v = gate_input<kBias>(z, bias, c), s = fast_sigmoid(v), vs = v * s, g = dy[c];
    dx[c] = static_cast<scalar_t>(g * vs);
    dz[c] = static_cast<scalar_t>(g * acc_t(x[c]) * (s + vs * (1 - s)));
  }
}

// Of all rows; those of dx and dz at one stride, as rows_of gives them.
void differentiate(const Tensor& dy_in, const Tensor& x_in, const Tensor& z_in,
                   const OptionalTensor& bias_in, const Tensor& dx, const Tensor& dz) {
  const Tensor dy = rows_of(dy_in), x = rows_of(x_in), z = rows_of(z_in);
  const OptionalTensor bias = cpu::contiguous(bias_in);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "gate_backward", [&] {
    const auto* dy_data = dy.const_data_ptr<scalar_t>();
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* z_data = z.const_data_ptr<scalar_t>();
    const auto* bias_data = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    auto* dx_data = dx.mutable_data_ptr<scalar_t>();
    auto* dz_data = dz.mutable_data_ptr<scalar_t>();
    const auto of_row =
        bias ? &gate_backward_row<true, scalar_t> : &gate_backward_row<false, scalar_t>;
    for_rows(dy, [&](int64_t row, int64_t channels) {
      of_row(channels, dy_data + row * row_stride(dy), x_data + row * row_stride(x),
             z_data + row * row_stride(z), bias_data, dx_data + row * row_stride(dx),
             dz_data + row * row_stride(dz));
    });
  });
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& x, const Tensor& z,
                                         const OptionalTensor& bias) {
  check_gate_backward(dy, x, z, bias);
  auto dx = at::empty(x.sizes(), x.options()), dz = at::empty(x.sizes(), x.options());
  differentiate(dy, x, z, bias, dx, dz);
  return {dx, dz};
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  check_swiglu_backward(dy, gate_up);
  auto dgate_up = at::empty(gate_up.sizes(), gate_up.options());
  const auto halves = gate_up.chunk(2, -1), gradients = dgate_up.chunk(2, -1);
  differentiate(dy, halves[1], halves[0], {}, gradients[1], gradients[0]);
  return dgate_up;
}

}  // namespace

Tensor cpu::gate(const Tensor& x_in, const Tensor& z_in, const OptionalTensor& bias_in) {
  check_gate("gate", x_in, z_in, bias_in);
  const Tensor x = rows_of(x_in), z = rows_of(z_in);
  const OptionalTensor bias = cpu::contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "gate", [&] {
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* z_data = z.const_data_ptr<scalar_t>();
    const auto* bias_data = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    const auto of_row = bias ? &gate_row<true, scalar_t> : &gate_row<false, scalar_t>;
    for_rows(y, [&](int64_t row, int64_t channels) {
      of_row(channels, x_data + row * row_stride(x), z_data + row * row_stride(z), bias_data,
             y_data + row * channels);
    });
  });
  return y;
}

Tensor cpu::swiglu(const Tensor& gate_up) {
  check_swiglu("swiglu", gate_up);
  const auto halves = gate_up.chunk(2, -1);
  return cpu::gate(halves[1], halves[0], {});
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
  m.impl("gate_backward", &gate_backward);
  m.impl("swiglu", &cpu::swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("softplus", &cpu::softplus);
}

}  // namespace reasoners
