// One token of each recurrent mixer between its projections, as the operators one after the other:
// convolution, recurrence, gate.

#include <torch/library.h>

#include "checks.h"
#include "cpu/mixer_parts.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

// What the rows name, before anything is mutated.
void check_rows(const char* op, const Tensor& conv_state, const Tensor& slots,
                const Tensor& lengths, const OptionalTensor& recent,
                const OptionalTensor& pending) {
  const Check check{op};
  const Tensor packed = slots.contiguous();
  check.slots(packed, conv_state.size(0));
  check.lengths(packed, lengths.contiguous());
  if (pending) check.pending(packed, *pending, recent->size(1));
}

// A padding row is zeros whatever was projected for it, infinities included.
Tensor without_padding(const Tensor& y, const Tensor& slots) {
  const auto slot_of = slots.accessor<int32_t, 1>();
  for (int64_t row = 0; row < y.size(0); ++row)
    if (slot_of[row] < 0) y[row].zero_();
  return y;
}

Tensor recurrence(const Tensor& state, const OptionalTensor& recent,
                  const OptionalTensor& recent_decay, const OptionalTensor& pending,
                  const Tensor& slots, const Tensor& x, const Tensor& log_decay, const Tensor& B,
                  const Tensor& C, const OptionalTensor& scale, const Tensor& D, int64_t period,
                  const OptionalTensor& rng_key) {
  if (recent)
    return cpu::deferred_state_update(state, *recent, *recent_decay, *pending, slots, x, log_decay,
                                      B, C, scale, cpu::widened(D), period, rng_key);
  return cpu::state_update(state, slots, x, log_decay, B, C, scale, cpu::widened(D), rng_key);
}

Tensor discrete_mamba2_update(const Tensor& conv_state, const Tensor& state,
                              const OptionalTensor& recent, const OptionalTensor& recent_decay,
                              const OptionalTensor& pending, const Tensor& slots,
                              const Tensor& lengths, const Tensor& projected,
                              const Tensor& conv_weight, const Tensor& conv_bias,
                              const Tensor& z_bias, const Tensor& D, int64_t period,
                              const OptionalTensor& rng_key) {
  check_discrete_mamba2_update(conv_state, state, recent, recent_decay, pending, slots, lengths,
                               projected, conv_weight, conv_bias, z_bias, D, period, rng_key);
  check_rows("discrete_mamba2_update", conv_state, slots, lengths, recent, pending);
  const int64_t heads = state.size(1), head_dim = state.size(2), state_dim = state.size(3);
  const int64_t inner = heads * head_dim, channels = conv_state.size(2);
  const int64_t group = (channels - inner) / 2;
  const auto parts = projected.split_with_sizes({channels, inner, heads}, 1);
  const Tensor conv = cpu::conv_update(conv_state, slots, lengths, parts[0], conv_weight, conv_bias,
                                       /*silu=*/false);
  const auto xBC = conv.split_with_sizes({inner, group, group}, 1);
  const Tensor x = xBC[0].unflatten(1, {heads, head_dim});
  const Tensor B = xBC[1].unflatten(1, {group / state_dim, state_dim});
  const Tensor C = xBC[2].unflatten(1, {group / state_dim, state_dim});
  const Tensor log_decay = cpu::softplus(parts[2], {}).neg_();
  const Tensor y = recurrence(state, recent, recent_decay, pending, slots, x, log_decay, B, C, {},
                              D, period, rng_key);
  return without_padding(cpu::gate(y.flatten(1), parts[1], z_bias), slots);
}

Tensor mamba2_update(const Tensor& conv_state, const Tensor& state, const OptionalTensor& recent,
                     const OptionalTensor& recent_decay, const OptionalTensor& pending,
                     const Tensor& slots, const Tensor& lengths, const Tensor& projected,
                     const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& dt_bias,
                     const Tensor& A_log, const Tensor& D, const Tensor& norm_weight, double eps,
                     int64_t period, const OptionalTensor& rng_key) {
  check_mamba2_update(conv_state, state, recent, recent_decay, pending, slots, lengths, projected,
                      conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, period, rng_key);
  check_rows("mamba2_update", conv_state, slots, lengths, recent, pending);
  const int64_t heads = state.size(1), head_dim = state.size(2), state_dim = state.size(3);
  const int64_t inner = heads * head_dim, channels = conv_state.size(2);
  const int64_t kv_heads = (channels - heads * state_dim) / (head_dim + state_dim);
  const auto parts = projected.split_with_sizes({inner, channels, heads}, 1);
  const Tensor conv =
      cpu::conv_update(conv_state, slots, lengths, parts[1], conv_weight, conv_bias, /*silu=*/true);
  const auto xBC =
      conv.split_with_sizes({kv_heads * head_dim, kv_heads * state_dim, heads * state_dim}, 1);
  const Tensor x = xBC[0].unflatten(1, {kv_heads, head_dim});
  const Tensor B = xBC[1].unflatten(1, {kv_heads, state_dim});
  const Tensor C = xBC[2].unflatten(1, {heads, state_dim});
  const Tensor delta = cpu::softplus(parts[2], cpu::widened(dt_bias));
  const Tensor log_decay = -delta * cpu::rates(A_log);
  const Tensor y = recurrence(state, recent, recent_decay, pending, slots, x, log_decay, B, C,
                              delta, D, period, rng_key);
  const Tensor gated = cpu::gate(y, parts[0].unflatten(1, {heads, head_dim}), {});
  return without_padding(cpu::head_norm(gated, norm_weight, eps), slots);
}

Tensor mamba1_update(const Tensor& conv_state, const Tensor& state, const Tensor& slots,
                     const Tensor& lengths, const Tensor& projected, const Tensor& dt,
                     const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& dt_bias,
                     const Tensor& A_log, const Tensor& D, int64_t kv_dim) {
  check_mamba1_update(conv_state, state, slots, lengths, projected, dt, conv_weight, conv_bias,
                      dt_bias, A_log, D, kv_dim);
  check_rows("mamba1_update", conv_state, slots, lengths, {}, {});
  const int64_t batch = projected.size(0), inner = state.size(1), state_dim = state.size(2);
  const int64_t kv_groups = kv_dim / state_dim, groups = inner / state_dim;
  const int64_t used = 2 * (inner + kv_dim);
  const auto parts =
      projected.slice(1, 0, used).split_with_sizes({inner, kv_dim, kv_dim, inner}, 1);
  const Tensor repeated = parts[1]
                              .unflatten(1, {kv_groups, 1, state_dim})
                              .expand({batch, kv_groups, groups / kv_groups, state_dim})
                              .reshape({batch, inner});
  const Tensor x = cpu::conv_update(conv_state, slots, lengths, repeated, conv_weight, conv_bias,
                                    /*silu=*/true);
  const Tensor B = parts[2].unflatten(1, {kv_groups, state_dim});
  const Tensor C = parts[3].unflatten(1, {groups, state_dim});
  const Tensor delta = cpu::softplus(dt, cpu::widened(dt_bias));
  const Tensor y = cpu::selective_update(state, slots, x, delta, cpu::rates(A_log).neg_(), B, C,
                                         cpu::widened(D));
  return without_padding(cpu::gate(y, parts[0], {}), slots);
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("discrete_mamba2_update", &discrete_mamba2_update);
  m.impl("mamba2_update", &mamba2_update);
  m.impl("mamba1_update", &mamba1_update);
}

}  // namespace
}  // namespace reasoners
