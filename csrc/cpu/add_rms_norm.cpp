// h += delta, then RMSNorm of h: a row at a time, so that its norm finds it in the cache.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/rms_norm.h"
#include "rows.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

}  // namespace

Tensor cpu::add_rms_norm(const Tensor& h, const OptionalTensor& delta_in, const Tensor& weight_in,
                         double eps) {
  check_add_rms_norm(h, delta_in, weight_in, eps);
  const OptionalTensor delta = delta_in ? OptionalTensor(rows_of(*delta_in)) : delta_in;
  const Tensor weight = weight_in.contiguous();
  auto y = at::empty(h.sizes(), h.options());
  const int64_t dim = h.size(-1), rows = dim ? h.numel() / dim : 0;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, h.scalar_type(), "add_rms_norm", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto* h_data = h.mutable_data_ptr<scalar_t>();
    const auto* delta_data = delta ? delta->const_data_ptr<scalar_t>() : nullptr;
    const int64_t delta_stride = delta ? row_stride(*delta) : 0;
    const auto* weights = weight.const_data_ptr<scalar_t>();
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(dim, 1));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scalar_t* hs = h_data + row * dim;
        if (delta_data) {
          const scalar_t* ds = delta_data + row * delta_stride;
          for (int64_t i = 0; i < dim; ++i)
            hs[i] = narrow<scalar_t>(static_cast<acc_t>(hs[i]) + static_cast<acc_t>(ds[i]));
        }
        const acc_t squares = fixed_sum<acc_t>(dim, [&](int64_t i) {
          const acc_t v = static_cast<acc_t>(hs[i]);
          return v * v;
        });
        scale_row(hs, squares, weights, static_cast<acc_t>(eps), dim, y_data + row * dim);
      }
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("add_rms_norm", &cpu::add_rms_norm); }

}  // namespace reasoners
