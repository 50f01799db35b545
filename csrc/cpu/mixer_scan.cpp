// The Mamba-2 mixers between their projections over whole sequences, as the operators one after the
// other: convolution, recurrence, gate.

#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "cpu/mixer_parts.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

std::tuple<Tensor, Tensor, Tensor> discrete_mamba2_scan(
    const Tensor& projected, const Tensor& conv_weight, const Tensor& conv_bias,
    const Tensor& z_bias, const Tensor& D, int64_t state_dim, const OptionalTensor& past,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const MixerSizes s = check_discrete_mamba2_scan(projected, conv_weight, conv_bias, z_bias, D,
                                                  state_dim, past, initial_state, cu_seqlens);
  const auto parts = projected.split_with_sizes({s.channels, s.inner, s.heads}, 2);
  const auto [conv, last_inputs] =
      cpu::causal_conv1d(parts[0], conv_weight, conv_bias, past, cu_seqlens, /*silu=*/false);
  const int64_t group = s.shared * s.state_dim;
  const auto xBC = conv.split_with_sizes({s.inner, group, group}, 2);
  const Tensor x = xBC[0].unflatten(2, {s.heads, s.head_dim});
  const Tensor B = xBC[1].unflatten(2, {s.shared, s.state_dim});
  const Tensor C = xBC[2].unflatten(2, {s.shared, s.state_dim});
  const Tensor log_decay = cpu::softplus(parts[2], {}).neg_();
  const auto [y, final_state] = cpu::ssd_scan(x, log_decay, B, C, {}, D, initial_state, cu_seqlens);
  return {cpu::gate(y.flatten(2), parts[1], z_bias), last_inputs, final_state};
}

std::tuple<Tensor, Tensor, Tensor> mamba2_scan(const Tensor& projected, const Tensor& conv_weight,
                                               const Tensor& conv_bias, const Tensor& dt_bias,
                                               const Tensor& A_log, const Tensor& D,
                                               const Tensor& norm_weight, double eps,
                                               int64_t state_dim, const OptionalTensor& past,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& cu_seqlens) {
  const MixerSizes s =
      check_mamba2_scan(projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps,
                        state_dim, past, initial_state, cu_seqlens);
  const auto parts = projected.split_with_sizes({s.inner, s.channels, s.heads}, 2);
  const auto [conv, last_inputs] =
      cpu::causal_conv1d(parts[1], conv_weight, conv_bias, past, cu_seqlens, /*silu=*/true);
  const auto xBC = conv.split_with_sizes(
      {s.shared * s.head_dim, s.shared * s.state_dim, s.heads * s.state_dim}, 2);
  const Tensor x = xBC[0].unflatten(2, {s.shared, s.head_dim});
  const Tensor B = xBC[1].unflatten(2, {s.shared, s.state_dim});
  const Tensor C = xBC[2].unflatten(2, {s.heads, s.state_dim});
  const Tensor delta = cpu::softplus(parts[2], dt_bias);
  const Tensor log_decay = -delta * cpu::rates(A_log);
  const auto [y, final_state] =
      cpu::ssd_scan(x, log_decay, B, C, delta, D, initial_state, cu_seqlens);
  const Tensor gated = cpu::gate(y, parts[0].unflatten(2, {s.heads, s.head_dim}), {});
  const Tensor out = cpu::head_norm(gated.flatten(0, 1), norm_weight, eps);
  return {out.view({projected.size(0), projected.size(1), s.inner}), last_inputs, final_state};
}

}  // namespace

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("discrete_mamba2_scan", &discrete_mamba2_scan);
  m.impl("mamba2_scan", &mamba2_scan);
}

}  // namespace reasoners
