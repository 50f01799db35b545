// What a fused mixer does beside the operators that it is composed of.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/rms_norm.h"

namespace reasoners::cpu {

inline Tensor widened(const Tensor& t) { return t.to(wide_dtype(t.scalar_type())); }

// exp(A_log), the same bits at any number of threads.
inline Tensor rates(const Tensor& A_log) {
  Tensor y = widened(A_log).contiguous().clone();
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "rates", [&] {
    auto* data = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, y.numel(), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) data[i] = fast_exp(data[i]);
    });
  });
  return y;
}

// x (rows, H, P) normalised head by head, times weight (H * P).
inline Tensor head_norm(const Tensor& x, const Tensor& weight_in, double eps) {
  const Tensor weight = weight_in.contiguous();
  Tensor y = at::empty({x.size(0), x.size(1) * x.size(2)}, x.options());
  const int64_t heads = x.size(1), dim = x.size(2);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "head_norm", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto* data = x.const_data_ptr<scalar_t>();
    const auto* weights = weight.const_data_ptr<scalar_t>();
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * heads, 128, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = data + i * dim;
        const acc_t squares = fixed_sum<acc_t>(dim, [&](int64_t c) {
          const acc_t v = static_cast<acc_t>(row[c]);
          return v * v;
        });
        scale_row(row, squares, weights + i % heads * dim, static_cast<acc_t>(eps), dim,
                  y_data + i * dim);
      }
    });
  });
  return y;
}

}  // namespace reasoners::cpu
