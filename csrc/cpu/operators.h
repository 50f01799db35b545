// The CPU operators that others are composed of.
#pragma once

#include <tuple>

#include "checks.h"

namespace reasoners::cpu {

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const OptionalTensor& bias,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& cu_seqlens, bool silu);
std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& log_decay, const Tensor& B,
                                    const Tensor& C, const OptionalTensor& scale,
                                    const OptionalTensor& D, const OptionalTensor& initial_state,
                                    const OptionalTensor& cu_seqlens);
Tensor conv_update(const Tensor& state, const Tensor& slots, const Tensor& lengths, const Tensor& x,
                   const Tensor& weight, const OptionalTensor& bias, bool silu);
Tensor state_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                    const Tensor& log_decay, const Tensor& B, const Tensor& C,
                    const OptionalTensor& scale, const OptionalTensor& D,
                    const OptionalTensor& rng_key);
Tensor deferred_state_update(const Tensor& state, const Tensor& recent, const Tensor& recent_decay,
                             const Tensor& pending, const Tensor& slots, const Tensor& x,
                             const Tensor& log_decay, const Tensor& B, const Tensor& C,
                             const OptionalTensor& scale, const OptionalTensor& D, int64_t period,
                             const OptionalTensor& rng_key);
Tensor selective_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                        const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D);
Tensor add_rms_norm(const Tensor& h, const OptionalTensor& delta, const Tensor& weight, double eps);
Tensor gate(const Tensor& x, const Tensor& z, const OptionalTensor& bias);
Tensor swiglu(const Tensor& gate_up);
Tensor softplus(const Tensor& x, const OptionalTensor& bias);

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : t;
}

}  // namespace reasoners::cpu
