// y = x W^T whose rows do not depend on how many there are; with a norm in front, a gate or a sum
// behind it, which here are operators of their own.
//
// BLAS libraries sum in another order for a few rows, or a few left over, which would make a
// sample's tokens depend on its batch. Up to kFewRows rows are padded to a multiple of 4: with MKL
// and oneDNN those are the same bits as any larger number of rows. On Intel's processors MKL has
// kernels of its own, which for 32-bit data need all of kFewRows for that. There some long sums are
// also cut among threads for up to 300 rows (2048 x 512 on 2 threads, and not on 1); MKL's strict
// reproducibility would mend it, and take 1.2 to 1.5 times as long for many rows.

#include <torch/library.h>

#include "checks.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

constexpr int64_t kFewRows = 16;

// Few rows are padded to a multiple of it.
int64_t full_rows(at::ScalarType type) {
#if defined(__x86_64__)
  static const bool is_intel = __builtin_cpu_is("intel");
  if (is_intel && at::elementSize(type) > 2) return kFewRows;
#endif
  return 4;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_linear(x, weight, bias);
  const int64_t depth = x.size(-1), rows = depth ? x.numel() / depth : 0;
  const int64_t full = full_rows(x.scalar_type());
  if (rows > kFewRows || rows % full == 0) return at::linear(x.contiguous(), weight, bias);
  const Tensor flat = x.reshape({rows, depth});
  const Tensor y =
      at::linear(at::constant_pad_nd(flat, {0, 0, 0, full - rows % full}), weight, bias);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return y.narrow(0, 0, rows).reshape(shape);
}

Tensor rms_norm_linear(const Tensor& h, const Tensor& norm_weight, double eps, const Tensor& weight,
                       const OptionalTensor& bias, bool gated) {
  check_rms_norm_linear(h, norm_weight, eps, weight, bias, gated);
  const Tensor y = reasoners::linear(cpu::add_rms_norm(h, {}, norm_weight, eps), weight, bias);
  return gated ? cpu::swiglu(y) : y;
}

void add_linear(const Tensor& h, const Tensor& x, const Tensor& weight) {
  check_add_linear(h, x, weight);
  h.add_(reasoners::linear(x, weight, {}));
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("linear", &linear);
  m.impl("rms_norm_linear", &rms_norm_linear);
  m.impl("add_linear", &add_linear);
}

}  // namespace
}  // namespace reasoners
