// y = x W^T whose rows do not depend on how many there are.
//
// BLAS libraries sum in another order for a few rows, or a few left over, which would make a
// sample's tokens depend on its batch. Up to kFewRows rows are padded to a multiple of 4: with MKL
// and oneDNN those are the same bits as any larger number of rows.

#include <torch/library.h>

#include "checks.h"

namespace reasoners {
namespace {

constexpr int64_t kFewRows = 16;

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_linear(x, weight, bias);
  const int64_t depth = x.size(-1), rows = depth ? x.numel() / depth : 0;
  if (rows > kFewRows || rows % 4 == 0) return at::linear(x.contiguous(), weight, bias);
  const Tensor flat = x.reshape({rows, depth});
  const Tensor y = at::linear(at::constant_pad_nd(flat, {0, 0, 0, 4 - rows % 4}), weight, bias);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return y.narrow(0, 0, rows).reshape(shape);
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("linear", &linear); }

}  // namespace
}  // namespace reasoners
