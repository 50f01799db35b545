// Tensors to params to a launch on the current stream; registers the CUDA operators. Only this file
// and its own two, tickets.h and unsplit_product.h, include both torch and CUDA headers.

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "checks.h"
#include "kernels.h"
#include "rows.h"
#include "tickets.h"
#include "unsplit_product.h"

namespace reasoners {
namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;  // checks.h lets nothing else through
  }
}

// The same tensor with everything but the first `free` dimensions packed; in_proj's slices are that
// already.
Tensor packed_rows(const Tensor& t, int64_t free = 1) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= free; --i) {
    if (t.size(i) != 1 && t.stride(i) != expected) return t.contiguous();
    expected *= t.size(i);
  }
  return t;
}

OptionalTensor packed_rows(const OptionalTensor& t, int64_t free = 1) {
  return t ? OptionalTensor(packed_rows(*t, free)) : t;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : t;
}

// A gradient of the argument, packed, in the dtype of `model`; empty when the argument is absent.
Tensor empty_like(const OptionalTensor& argument, const Tensor& model) {
  return at::empty(argument ? argument->sizes() : at::IntArrayRef{0}, model.options());
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

bool is_aligned_to_16(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

TokenStrides token_strides(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

// What a slot's state does not contain yet; nothing when recent is null.
RecentTokens recent_tokens(const OptionalTensor& recent, const OptionalTensor& recent_decay,
                           const OptionalTensor& pending, int64_t period) {
  if (!recent) return {};
  return {recent->mutable_data_ptr(), recent_decay->mutable_data_ptr<float>(),
          pending->const_data_ptr<int32_t>(), static_cast<int>(recent->size(1)),
          static_cast<int>(period)};
}

Tensor update_states(const Tensor& state, const RecentTokens& recent, const Tensor& slots_in,
                     const Tensor& x_in, const Tensor& log_decay_in, const Tensor& B_in,
                     const Tensor& C_in, const OptionalTensor& scale_in, const OptionalTensor& D_in,
                     const OptionalTensor& rng_key_in) {
  const Tensor slots = slots_in.contiguous(), x = packed_rows(x_in),
               log_decay = packed_rows(log_decay_in), B = packed_rows(B_in), C = packed_rows(C_in);
  const OptionalTensor scale = packed_rows(scale_in), D = contiguous(D_in),
                       rng_key = contiguous(rng_key_in);
  auto y = at::empty({x.size(0), log_decay.size(1), x.size(2)}, x.options());
  StateUpdateParams p{};
  p.state = state.mutable_data_ptr();
  p.recent = recent;
  p.slots = slots.const_data_ptr<int32_t>();
  p.x = x.const_data_ptr();
  p.log_decay = log_decay.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  p.D = D ? D->const_data_ptr<float>() : nullptr;
  p.rng_key = data_or_null<int64_t>(rng_key);
  p.y = y.mutable_data_ptr();
  p.tickets = tickets_for(at::cuda::getCurrentCUDAStream(), log_decay.size(1));
  p.num_slots = state.size(0);
  p.x_stride = x.stride(0);
  p.log_decay_stride = log_decay.stride(0);
  p.b_stride = B.stride(0);
  p.c_stride = C.stride(0);
  p.scale_stride = scale ? scale->stride(0) : 0;
  p.batch = x.size(0);
  p.heads = log_decay.size(1);
  p.x_heads = x.size(1);
  p.b_groups = B.size(1);
  p.c_groups = C.size(1);
  p.head_dim = x.size(2);
  p.state_dim = B.size(2);
  p.dtype = dtype_of(x);
  p.state_dtype = dtype_of(state);
  launch_state_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor state_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                    const Tensor& log_decay, const Tensor& B, const Tensor& C,
                    const OptionalTensor& scale, const OptionalTensor& D,
                    const OptionalTensor& rng_key) {
  check_state_update(state, slots, x, log_decay, B, C, scale, D, rng_key);
  const c10::cuda::CUDAGuard guard(x.device());
  return update_states(state, {}, slots, x, log_decay, B, C, scale, D, rng_key);
}

Tensor deferred_state_update(const Tensor& state, const Tensor& recent, const Tensor& recent_decay,
                             const Tensor& pending, const Tensor& slots, const Tensor& x,
                             const Tensor& log_decay, const Tensor& B, const Tensor& C,
                             const OptionalTensor& scale, const OptionalTensor& D, int64_t period,
                             const OptionalTensor& rng_key) {
  check_deferred_state_update(state, recent, recent_decay, pending, slots, x, log_decay, B, C,
                              scale, D, period, rng_key);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto tokens = recent_tokens(recent, recent_decay, pending, period);
  return update_states(state, tokens, slots, x, log_decay, B, C, scale, D, rng_key);
}

// What the two fused mixers have in common.
struct MixerTensors {
  Tensor slots, lengths, projected, conv_weight, conv_bias, D, y;
  OptionalTensor rng_key;
  MixerUpdateParams p{};

  MixerTensors(const char* op, const Tensor& conv_state, const Tensor& state,
               const OptionalTensor& recent, const OptionalTensor& recent_decay,
               const OptionalTensor& pending, const Tensor& slots_in, const Tensor& lengths_in,
               const Tensor& projected_in, const Tensor& conv_weight_in, const Tensor& conv_bias_in,
               const Tensor& D_in, int64_t period, const OptionalTensor& rng_key_in)
      : slots(slots_in.contiguous()),
        lengths(lengths_in.contiguous()),
        projected(packed_rows(projected_in)),
        conv_weight(conv_weight_in.contiguous()),
        conv_bias(conv_bias_in.contiguous()),
        D(D_in.contiguous()),
        rng_key(contiguous(rng_key_in)) {
    p.batch = projected.size(0);
    p.heads = state.size(1);
    p.head_dim = state.size(2);
    p.state_dim = state.size(3);
    p.width = conv_weight.size(1);
    const int values = recent ? 16 / recent->element_size() : 2;
    TORCH_CHECK_NOT_IMPLEMENTED(
        p.state_dim == 16 || p.state_dim == 32 || p.state_dim == 64 || p.state_dim == 128, op,
        ": N expected 16, 32, 64 or 128 on CUDA, got ", p.state_dim);
    TORCH_CHECK_NOT_IMPLEMENTED(p.head_dim % values == 0 && p.head_dim <= 128, op,
                                ": P expected a multiple of ", values,
                                " and at most 128 on CUDA, got ", p.head_dim);
    y = at::empty({p.batch, p.heads * p.head_dim}, projected.options());
    p.recent = recent_tokens(recent, recent_decay, pending, period);
    p.conv_state = conv_state.mutable_data_ptr();
    p.state = state.mutable_data_ptr();
    p.slots = slots.const_data_ptr<int32_t>();
    p.lengths = lengths.const_data_ptr<int32_t>();
    p.projected = projected.const_data_ptr();
    p.projected_stride = projected.stride(0);
    p.conv_weight = conv_weight.const_data_ptr();
    p.conv_bias = conv_bias.const_data_ptr();
    p.D = D.const_data_ptr<float>();
    p.rng_key = data_or_null<int64_t>(rng_key);
    p.y = y.mutable_data_ptr();
    p.tickets = tickets_for(at::cuda::getCurrentCUDAStream(), p.heads);
    p.num_slots = state.size(0);
    p.dtype = dtype_of(projected);
    p.state_dtype = dtype_of(state);
  }
};

Tensor discrete_mamba2_update(const Tensor& conv_state, const Tensor& state,
                              const OptionalTensor& recent, const OptionalTensor& recent_decay,
                              const OptionalTensor& pending, const Tensor& slots,
                              const Tensor& lengths, const Tensor& projected,
                              const Tensor& conv_weight, const Tensor& conv_bias,
                              const Tensor& z_bias_in, const Tensor& D, int64_t period,
                              const OptionalTensor& rng_key) {
  check_discrete_mamba2_update(conv_state, state, recent, recent_decay, pending, slots, lengths,
                               projected, conv_weight, conv_bias, z_bias_in, D, period, rng_key);
  const c10::cuda::CUDAGuard guard(projected.device());
  MixerTensors t("discrete_mamba2_update", conv_state, state, recent, recent_decay, pending, slots,
                 lengths, projected, conv_weight, conv_bias, D, period, rng_key);
  auto& p = t.p;
  const Tensor z_bias = z_bias_in.contiguous();
  const int inner = p.heads * p.head_dim, channels = conv_state.size(2);
  p.z_bias = z_bias.const_data_ptr();
  p.x_heads = p.heads;
  p.b_groups = p.c_groups = (channels - inner) / (2 * p.state_dim);
  p.conv_offset = 0;
  p.z_offset = channels;
  p.a_offset = channels + inner;
  launch_discrete_mamba2_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return t.y;
}

Tensor mamba2_update(const Tensor& conv_state, const Tensor& state, const OptionalTensor& recent,
                     const OptionalTensor& recent_decay, const OptionalTensor& pending,
                     const Tensor& slots, const Tensor& lengths, const Tensor& projected,
                     const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& dt_bias_in,
                     const Tensor& A_log_in, const Tensor& D, const Tensor& norm_weight_in,
                     double eps, int64_t period, const OptionalTensor& rng_key) {
  check_mamba2_update(conv_state, state, recent, recent_decay, pending, slots, lengths, projected,
                      conv_weight, conv_bias, dt_bias_in, A_log_in, D, norm_weight_in, eps, period,
                      rng_key);
  const c10::cuda::CUDAGuard guard(projected.device());
  MixerTensors t("mamba2_update", conv_state, state, recent, recent_decay, pending, slots, lengths,
                 projected, conv_weight, conv_bias, D, period, rng_key);
  auto& p = t.p;
  const Tensor dt_bias = dt_bias_in.contiguous(), A_log = A_log_in.contiguous(),
               norm_weight = norm_weight_in.contiguous();
  const int inner = p.heads * p.head_dim, channels = conv_state.size(2);
  p.dt_bias = dt_bias.const_data_ptr<float>();
  p.A_log = A_log.const_data_ptr<float>();
  p.norm_weight = norm_weight.const_data_ptr();
  p.eps = eps;
  p.c_groups = p.heads;
  p.x_heads = p.b_groups = (channels - p.heads * p.state_dim) / (p.head_dim + p.state_dim);
  p.z_offset = 0;
  p.conv_offset = inner;
  p.a_offset = inner + channels;
  launch_mamba2_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return t.y;
}

// One for each part of the channels.
uint32_t* selective_tickets(int64_t channels) {
  return tickets_for(at::cuda::getCurrentCUDAStream(),
                     (channels + kSelectivePart - 1) / kSelectivePart);
}

Tensor selective_update(const Tensor& state, const Tensor& slots_in, const Tensor& x_in,
                        const Tensor& delta_in, const Tensor& A_in, const Tensor& B_in,
                        const Tensor& C_in, const OptionalTensor& D_in) {
  check_selective_update(state, slots_in, x_in, delta_in, A_in, B_in, C_in, D_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor slots = slots_in.contiguous(), x = packed_rows(x_in), delta = packed_rows(delta_in),
               A = A_in.contiguous(), B = packed_rows(B_in), C = packed_rows(C_in);
  const OptionalTensor D = contiguous(D_in);
  auto y = at::empty(x.sizes(), x.options());
  SelectiveUpdateParams p{};
  p.state = state.mutable_data_ptr();
  p.slots = slots.const_data_ptr<int32_t>();
  p.x = x.const_data_ptr();
  p.delta = delta.const_data_ptr<float>();
  p.A = A.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.D = D ? D->const_data_ptr<float>() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_stride = x.stride(0);
  p.delta_stride = delta.stride(0);
  p.b_stride = B.stride(0);
  p.c_stride = C.stride(0);
  p.num_slots = state.size(0);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.b_groups = B.size(1);
  p.c_groups = C.size(1);
  p.tickets = selective_tickets(p.channels);
  p.state_dim = A.size(1);
  p.dtype = dtype_of(x);
  p.state_dtype = dtype_of(state);
  launch_selective_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor mamba1_update(const Tensor& conv_state, const Tensor& state, const Tensor& slots_in,
                     const Tensor& lengths_in, const Tensor& projected_in, const Tensor& dt_in,
                     const Tensor& conv_weight_in, const Tensor& conv_bias_in,
                     const Tensor& dt_bias_in, const Tensor& A_log_in, const Tensor& D_in,
                     int64_t kv_dim) {
  check_mamba1_update(conv_state, state, slots_in, lengths_in, projected_in, dt_in, conv_weight_in,
                      conv_bias_in, dt_bias_in, A_log_in, D_in, kv_dim);
  const c10::cuda::CUDAGuard guard(projected_in.device());
  const int64_t state_dim = state.size(2);
  TORCH_CHECK_NOT_IMPLEMENTED(
      state_dim == 8 || state_dim == 16 || state_dim == 32 || state_dim == 64,
      "mamba1_update: N expected 8, 16, 32 or 64 on CUDA, got ", state_dim);
  const Tensor slots = slots_in.contiguous(), lengths = lengths_in.contiguous(),
               projected = packed_rows(projected_in), dt = packed_rows(dt_in),
               conv_weight = conv_weight_in.contiguous(), conv_bias = conv_bias_in.contiguous(),
               dt_bias = dt_bias_in.contiguous(), A_log = A_log_in.contiguous(),
               D = D_in.contiguous();
  auto y = at::empty({projected.size(0), state.size(1)}, projected.options());
  Mamba1UpdateParams p{};
  p.conv_state = conv_state.mutable_data_ptr();
  p.state = state.mutable_data_ptr();
  p.slots = slots.const_data_ptr<int32_t>();
  p.lengths = lengths.const_data_ptr<int32_t>();
  p.projected = projected.const_data_ptr();
  p.dt = dt.const_data_ptr();
  p.conv_weight = conv_weight.const_data_ptr();
  p.conv_bias = conv_bias.const_data_ptr();
  p.dt_bias = dt_bias.const_data_ptr();
  p.A_log = A_log.const_data_ptr<float>();
  p.D = D.const_data_ptr<float>();
  p.y = y.mutable_data_ptr();
  p.projected_stride = projected.stride(0);
  p.dt_stride = dt.stride(0);
  p.num_slots = state.size(0);
  p.batch = projected.size(0);
  p.channels = state.size(1);
  p.kv_dim = kv_dim;
  p.tickets = selective_tickets(p.channels);
  p.state_dim = state_dim;
  p.width = conv_weight.size(1);
  p.dtype = dtype_of(projected);
  p.state_dtype = dtype_of(state);
  launch_mamba1_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor conv_update(const Tensor& state, const Tensor& slots_in, const Tensor& lengths_in,
                   const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                   bool silu) {
  check_conv_update(state, slots_in, lengths_in, x_in, weight_in, bias_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor slots = slots_in.contiguous(), lengths = lengths_in.contiguous(),
               x = packed_rows(x_in), weight = weight_in.contiguous();
  const OptionalTensor bias = contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options());
  ConvUpdateParams p{};
  p.state = state.mutable_data_ptr();
  p.slots = slots.const_data_ptr<int32_t>();
  p.lengths = lengths.const_data_ptr<int32_t>();
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_stride = x.stride(0);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.width = weight.size(1);
  p.silu = silu;
  p.dtype = dtype_of(x);
  launch_conv_update(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// The rows of x, and whether linear.cu takes their product with `weight`.
struct LinearRows {
  Tensor x;  // (rows, depth)
  const Tensor& weight;
  std::vector<int64_t> sizes;  // of the result

  LinearRows(const Tensor& x_in, const Tensor& weight, int64_t columns)
      : weight(weight), sizes(x_in.sizes().vec()) {
    const int64_t depth = sizes.back();
    x = packed_rows(x_in.reshape({depth ? x_in.numel() / depth : 0, depth}));
    sizes.back() = columns;
  }
  bool stream() const {
    return x.size(0) > 0 && x.size(0) <= kLinearRows && x.scalar_type() != at::kFloat &&
           weight.size(0) % 16 == 0 && x.size(1) % 16 == 0 && x.size(1) > 0 &&
           x.stride(0) % 8 == 0 && weight.is_contiguous() && is_aligned_to_16(x) &&
           is_aligned_to_16(weight);
  }
  LinearParams parameters() const {
    LinearParams p{};
    p.x = x.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.x_stride = x.stride(0);
    p.rows = x.size(0);
    p.columns = weight.size(0);
    p.depth = x.size(1);
    p.dtype = dtype_of(x);
    return p;
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias_in) {
  check_linear(x, weight, bias_in);
  const c10::cuda::CUDAGuard guard(x.device());
  const LinearRows rows(x, weight, weight.size(0));
  if (!rows.stream()) {
    const auto y = at::empty({rows.x.size(0), weight.size(0)}, x.options());
    const bool whole = y.numel() > 0 && x.size(-1) > 0 && x.scalar_type() != at::kFloat &&
                       multiply_unsplit(y, rows.x, weight.contiguous(), contiguous(bias_in));
    return (whole ? y : at::linear(rows.x, weight, bias_in)).reshape(rows.sizes);
  }
  const OptionalTensor bias = contiguous(bias_in);
  auto y = at::empty(rows.sizes, x.options());
  LinearParams p = rows.parameters();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  launch_linear(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor add_rms_norm(const Tensor& h, const OptionalTensor& delta_in, const Tensor& weight_in,
                    double eps) {
  check_add_rms_norm(h, delta_in, weight_in, eps);
  const c10::cuda::CUDAGuard guard(h.device());
  const Tensor weight = weight_in.contiguous();
  const int64_t dim = h.size(-1);
  const OptionalTensor delta =
      delta_in ? OptionalTensor(packed_rows(delta_in->reshape({-1, dim}))) : delta_in;
  auto y = at::empty(h.sizes(), h.options());
  AddRmsNormParams p{};
  p.h = h.mutable_data_ptr();
  p.delta = delta ? delta->const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.delta_stride = delta ? delta->stride(0) : 0;
  p.rows = dim ? h.numel() / dim : 0;
  p.dim = dim;
  p.eps = eps;
  p.dtype = dtype_of(h);
  launch_add_rms_norm(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor gate(const Tensor& x_in, const Tensor& z_in, const OptionalTensor& bias_in) {
  check_gate("gate", x_in, z_in, bias_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = rows_of(x_in), z = rows_of(z_in);
  const OptionalTensor bias = contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options());
  GateParams p{};
  p.x = x.const_data_ptr();
  p.z = z.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.channels = x.size(-1);
  p.rows = p.channels ? x.numel() / p.channels : 0;
  p.x_stride = row_stride(x);
  p.z_stride = row_stride(z);
  p.dtype = dtype_of(x);
  launch_gate(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// dx and dz: rows at one stride, as rows_of gives them.
void differentiate_gate(const Tensor& dy_in, const Tensor& x_in, const Tensor& z_in,
                        const OptionalTensor& bias_in, const Tensor& dx, const Tensor& dz) {
  const Tensor dy = rows_of(dy_in), x = rows_of(x_in), z = rows_of(z_in);
  const OptionalTensor bias = contiguous(bias_in);
  GateBackwardParams p{};
  p.dy = dy.const_data_ptr();
  p.x = x.const_data_ptr();
  p.z = z.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.dx = dx.mutable_data_ptr();
  p.dz = dz.mutable_data_ptr();
  p.channels = x.size(-1);
  p.rows = p.channels ? x.numel() / p.channels : 0;
  p.dy_stride = row_stride(dy);
  p.x_stride = row_stride(x);
  p.z_stride = row_stride(z);
  p.dx_stride = row_stride(dx);
  p.dz_stride = row_stride(dz);
  p.dtype = dtype_of(x);
  launch_gate_backward(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& x, const Tensor& z,
                                         const OptionalTensor& bias) {
  check_gate_backward(dy, x, z, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  auto dx = at::empty(x.sizes(), x.options()), dz = at::empty(x.sizes(), x.options());
  differentiate_gate(dy, x, z, bias, dx, dz);
  return {dx, dz};
}

Tensor swiglu(const Tensor& gate_up) {
  check_swiglu("swiglu", gate_up);
  const auto halves = gate_up.chunk(2, -1);
  return gate(halves[1], halves[0], {});
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  check_swiglu_backward(dy, gate_up);
  const c10::cuda::CUDAGuard guard(gate_up.device());
  auto dgate_up = at::empty(gate_up.sizes(), gate_up.options());
  const auto halves = gate_up.chunk(2, -1), gradients = dgate_up.chunk(2, -1);
  differentiate_gate(dy, halves[1], halves[0], {}, gradients[1], gradients[0]);
  return dgate_up;
}

std::tuple<Tensor, Tensor> distillation_losses(const Tensor& logits, const OptionalTensor& taught,
                                               const Tensor& labels_in, double beta,
                                               double temperature, double kl_weight,
                                               bool gradient) {
  check_distillation_losses(logits, taught, labels_in, beta, temperature, kl_weight);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor labels = labels_in.contiguous();
  const auto wide = logits.options().dtype(at::kFloat);
  auto ce = at::empty({logits.size(0)}, wide), kl = at::empty({logits.size(0)}, wide);
  DistillationLossesParams p{};
  p.logits = logits.mutable_data_ptr();
  p.taught = taught ? taught->const_data_ptr() : nullptr;
  p.labels = labels.const_data_ptr<int64_t>();
  p.ce = ce.mutable_data_ptr<float>();
  p.kl = kl.mutable_data_ptr<float>();
  p.tokens = logits.size(0);
  p.vocab = logits.size(1);
  p.beta = static_cast<float>(beta);
  p.temperature = static_cast<float>(temperature);
  p.kl_weight = static_cast<float>(kl_weight);
  p.gradient = gradient;
  p.dtype = dtype_of(logits);
  launch_distillation_losses(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {ce, kl};
}

Tensor rms_norm_linear(const Tensor& h, const Tensor& norm_weight_in, double eps,
                       const Tensor& weight, const OptionalTensor& bias_in, bool gated) {
  check_rms_norm_linear(h, norm_weight_in, eps, weight, bias_in, gated);
  const c10::cuda::CUDAGuard guard(h.device());
  const LinearRows rows(h, weight, weight.size(0) / (gated ? 2 : 1));
  const Tensor norm_weight = norm_weight_in.contiguous();
  if (!rows.stream() || !can_normalise_in_linear(h.size(-1)) || !is_aligned_to_16(norm_weight)) {
    const Tensor y = reasoners::linear(add_rms_norm(h, {}, norm_weight, eps), weight, bias_in);
    return gated ? swiglu(y) : y;
  }
  const OptionalTensor bias = contiguous(bias_in);
  auto y = at::empty(rows.sizes, h.options());
  LinearParams p = rows.parameters();
  p.norm_weight = norm_weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.eps = eps;
  p.gated = gated;
  launch_linear(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

void add_linear(const Tensor& h, const Tensor& x, const Tensor& weight) {
  check_add_linear(h, x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  const LinearRows rows(x, weight, weight.size(0));
  if (!rows.stream()) {
    h.add_(reasoners::linear(x, weight, {}));
    return;
  }
  LinearParams p = rows.parameters();
  p.sum = h.mutable_data_ptr();
  launch_linear(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void rotate(const Tensor& x, const Tensor& positions_in, const Tensor& inv_freq_in) {
  check_rotate(x, positions_in, inv_freq_in);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor positions = positions_in.contiguous(), inv_freq = inv_freq_in.contiguous();
  RotateParams p{};
  p.x = x.mutable_data_ptr();
  p.positions = positions.const_data_ptr<int32_t>();
  p.inv_freq = inv_freq.const_data_ptr<float>();
  p.x_stride = x.stride(0);
  p.tokens = x.size(0);
  p.heads = x.size(1);
  p.head_dim = x.size(2);
  p.dtype = dtype_of(x);
  launch_rotate(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void count_pending(const Tensor& pending, const Tensor& slots_in, int64_t period) {
  check_count_pending(pending, slots_in, period);
  const c10::cuda::CUDAGuard guard(pending.device());
  const Tensor slots = slots_in.contiguous();
  launch_count_pending({pending.mutable_data_ptr<int32_t>(), slots.const_data_ptr<int32_t>(),
                        static_cast<int>(slots.size(0)), static_cast<int>(period)},
                       at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void advance(const Tensor& token_in, const Tensor& logprob_in, const Tensor& stop_ids_in,
             const Tensor& last, const Tensor& slots, const Tensor& lengths,
             const Tensor& remaining, const Tensor& rng_key, const Tensor& drawn,
             const Tensor& logprobs, const Tensor& step) {
  check_advance(token_in, logprob_in, stop_ids_in, last, slots, lengths, remaining, rng_key, drawn,
                logprobs, step);
  const c10::cuda::CUDAGuard guard(token_in.device());
  const Tensor token = token_in.contiguous(), logprob = logprob_in.contiguous(),
               stop_ids = packed_rows(stop_ids_in);
  AdvanceParams p{};
  p.token = token.const_data_ptr<int64_t>();
  p.logprob = logprob.const_data_ptr<float>();
  p.stop_ids = stop_ids.const_data_ptr<int64_t>();
  p.last = last.mutable_data_ptr<int64_t>();
  p.slots = slots.mutable_data_ptr<int32_t>();
  p.lengths = lengths.mutable_data_ptr<int32_t>();
  p.remaining = remaining.mutable_data_ptr<int32_t>();
  p.rng_key = rng_key.mutable_data_ptr<int64_t>();
  p.drawn = drawn.mutable_data_ptr<int64_t>();
  p.logprobs = logprobs.mutable_data_ptr<float>();
  p.step = step.mutable_data_ptr<int32_t>();
  p.stop_ids_stride = stop_ids.stride(0);
  p.drawn_stride = drawn.stride(0);
  p.logprobs_stride = logprobs.stride(0);
  p.rows = token.size(0);
  p.num_stop_ids = stop_ids.size(1);
  launch_advance(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same (batch, length, ...) tensor; if it is of 16 bits, with every token's values at a
// multiple of 16 bytes where their number allows it.
Tensor aligned_to_16(const Tensor& t) {
  if (t.element_size() != 2) return t;
  const int64_t values = 16 / t.element_size();
  const bool aligned =
      is_aligned_to_16(t) && t.stride(0) % values == 0 && t.stride(1) % values == 0;
  return aligned ? t : t.clone(at::MemoryFormat::Contiguous);
}

// What ssd_scan and its derivative read.
struct SsdScanTensors {
  Tensor x, log_decay, B, C;
  OptionalTensor scale, D, initial_state, cu_seqlens;
  SsdScanParams p{};

  SsdScanTensors(const char* op, const Tensor& x_in, const Tensor& log_decay_in, const Tensor& B_in,
                 const Tensor& C_in, const OptionalTensor& scale_in, const OptionalTensor& D_in,
                 const OptionalTensor& initial_state_in, const OptionalTensor& cu_seqlens_in,
                 int64_t sequences)
      : x(aligned_to_16(packed_rows(x_in, 2))),
        log_decay(packed_rows(log_decay_in, 2)),
        B(aligned_to_16(packed_rows(B_in, 2))),
        C(aligned_to_16(packed_rows(C_in, 2))),
        scale(packed_rows(scale_in, 2)),
        D(contiguous(D_in)),
        initial_state(contiguous(initial_state_in)),
        cu_seqlens(contiguous(cu_seqlens_in)) {
    Check{op}.at_most_on_cuda("N", B.size(3), kSsdScanMaxStateDim);
    if (initial_state && !is_aligned_to_16(*initial_state)) initial_state = initial_state->clone();
    p.x = x.const_data_ptr();
    p.log_decay = log_decay.const_data_ptr<float>();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.scale = data_or_null<float>(scale);
    p.D = data_or_null<float>(D);
    p.initial_state = data_or_null<float>(initial_state);
    p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    p.x_strides = token_strides(x);
    p.log_decay_strides = token_strides(log_decay);
    p.b_strides = token_strides(B);
    p.c_strides = token_strides(C);
    if (scale) p.scale_strides = token_strides(*scale);
    p.batch = x.size(0);
    p.sequences = sequences;
    p.length = x.size(1);
    p.heads = log_decay.size(2);
    p.x_heads = x.size(2);
    p.b_groups = B.size(2);
    p.c_groups = C.size(2);
    p.head_dim = x.size(3);
    p.state_dim = B.size(3);
    p.dtype = dtype_of(x);
  }
};

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& log_decay, const Tensor& B,
                                    const Tensor& C, const OptionalTensor& scale,
                                    const OptionalTensor& D, const OptionalTensor& initial_state,
                                    const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "ssd_scan";
  const int64_t sequences =
      check_ssd_scan(op, x, log_decay, B, C, scale, D, initial_state, cu_seqlens);
  const c10::cuda::CUDAGuard guard(x.device());
  SsdScanTensors t(op, x, log_decay, B, C, scale, D, initial_state, cu_seqlens, sequences);
  auto y = at::empty({x.size(0), x.size(1), t.p.heads, x.size(3)}, x.options());
  auto final_state = at::empty({sequences, t.p.heads, x.size(3), B.size(3)}, log_decay.options());
  const auto scratch = at::empty({count_ssd_scan_scratch(t.p)}, log_decay.options());
  t.p.y = y.mutable_data_ptr();
  t.p.final_state = final_state.mutable_data_ptr<float>();
  t.p.scratch = scratch.mutable_data_ptr<float>();
  t.p.tickets = tickets_for(at::cuda::getCurrentCUDAStream(), kSsdScanTickets);
  launch_ssd_scan(t.p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_scan_backward(
    const Tensor& dy_in, const Tensor& dfinal_state_in, const Tensor& x, const Tensor& log_decay,
    const Tensor& B, const Tensor& C, const OptionalTensor& scale, const OptionalTensor& D,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "ssd_scan_backward";
  const int64_t sequences =
      check_ssd_scan(op, x, log_decay, B, C, scale, D, initial_state, cu_seqlens);
  const int64_t heads = log_decay.size(2);
  const Check check{op};
  check.tensor("dy", dy_in, x, x.scalar_type(), {x.size(0), x.size(1), heads, x.size(3)},
               "(batch, length, H, P)");
  check.tensor("dfinal_state", dfinal_state_in, x, at::kFloat,
               {sequences, heads, x.size(3), B.size(3)}, "(batch or sequences, H, P, N)");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dy = aligned_to_16(packed_rows(dy_in, 2)),
               dfinal_whole = dfinal_state_in.contiguous(),
               dfinal_state = is_aligned_to_16(dfinal_whole) ? dfinal_whole : dfinal_whole.clone();
  SsdScanTensors t(op, x, log_decay, B, C, scale, D, initial_state, cu_seqlens, sequences);
  auto dx = empty_like(x, x), dlog_decay = empty_like(log_decay, log_decay), dB = empty_like(B, x),
       dC = empty_like(C, x), dscale = empty_like(scale, log_decay), dD = empty_like(D, log_decay),
       dinitial_state = empty_like(initial_state, log_decay);
  auto scratch = at::empty({count_ssd_scan_backward_scratch(t.p)}, log_decay.options());
  SsdScanBackwardParams p{};
  p.forward = t.p;
  p.dy = dy.const_data_ptr();
  p.dfinal_state = dfinal_state.const_data_ptr<float>();
  p.dx = dx.mutable_data_ptr();
  p.dlog_decay = dlog_decay.mutable_data_ptr<float>();
  p.dB = dB.mutable_data_ptr();
  p.dC = dC.mutable_data_ptr();
  p.dscale = scale ? dscale.mutable_data_ptr<float>() : nullptr;
  p.dD = D ? dD.mutable_data_ptr<float>() : nullptr;
  p.dinitial_state = initial_state ? dinitial_state.mutable_data_ptr<float>() : nullptr;
  p.scratch = scratch.mutable_data_ptr<float>();
  p.dy_strides = token_strides(dy);
  launch_ssd_scan_backward(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dlog_decay, dB, dC, dscale, dD, dinitial_state};
}

// What selective_scan and its derivative read.
struct SelectiveScanTensors {
  Tensor x, delta, A, B, C;
  OptionalTensor D, initial_state, cu_seqlens;
  SelectiveScanParams p{};

  SelectiveScanTensors(const char* op, const Tensor& x_in, const Tensor& delta_in,
                       const Tensor& A_in, const Tensor& B_in, const Tensor& C_in,
                       const OptionalTensor& D_in, const OptionalTensor& initial_state_in,
                       const OptionalTensor& cu_seqlens_in, int64_t sequences)
      : x(packed_rows(x_in, 2)),
        delta(packed_rows(delta_in, 2)),
        A(A_in.contiguous()),
        B(packed_rows(B_in, 2)),
        C(packed_rows(C_in, 2)),
        D(contiguous(D_in)),
        initial_state(contiguous(initial_state_in)),
        cu_seqlens(contiguous(cu_seqlens_in)) {
    Check{op}.at_most_on_cuda("N", A.size(1), kSelectiveScanMaxStateDim);
    p.x = x.const_data_ptr();
    p.delta = delta.const_data_ptr<float>();
    p.A = A.const_data_ptr<float>();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.D = data_or_null<float>(D);
    p.initial_state = data_or_null<float>(initial_state);
    p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    p.x_strides = token_strides(x);
    p.delta_strides = token_strides(delta);
    p.b_strides = token_strides(B);
    p.c_strides = token_strides(C);
    p.batch = x.size(0);
    p.sequences = sequences;
    p.length = x.size(1);
    p.channels = x.size(2);
    p.b_groups = B.size(2);
    p.c_groups = C.size(2);
    p.state_dim = A.size(1);
    p.dtype = dtype_of(x);
  }
};

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& delta, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "selective_scan";
  const int64_t sequences =
      check_selective_scan(op, x, delta, A, B, C, D, initial_state, cu_seqlens);
  const c10::cuda::CUDAGuard guard(x.device());
  SelectiveScanTensors t(op, x, delta, A, B, C, D, initial_state, cu_seqlens, sequences);
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({sequences, x.size(2), A.size(1)}, A.options());
  t.p.y = y.mutable_data_ptr();
  t.p.final_state = final_state.mutable_data_ptr<float>();
  launch_selective_scan(t.p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& dy_in, const Tensor& dfinal_state_in, const Tensor& x, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "selective_scan_backward";
  const int64_t sequences =
      check_selective_scan(op, x, delta, A, B, C, D, initial_state, cu_seqlens);
  const Check check{op};
  check.tensor("dy", dy_in, x, x.scalar_type(), {x.size(0), x.size(1), x.size(2)},
               "(batch, length, channels)");
  check.tensor("dfinal_state", dfinal_state_in, x, A.scalar_type(),
               {sequences, x.size(2), A.size(1)}, "(batch or sequences, channels, N)");
  const c10::cuda::CUDAGuard guard(x.device());
  SelectiveScanTensors t(op, x, delta, A, B, C, D, initial_state, cu_seqlens, sequences);
  const Tensor dy = packed_rows(dy_in, 2), dfinal_state = dfinal_state_in.contiguous();
  auto dx = empty_like(x, x), ddelta = empty_like(delta, A), dA = empty_like(A, A),
       dB = empty_like(B, x), dC = empty_like(C, x), dD = empty_like(D, A),
       dinitial_state = empty_like(initial_state, A);
  auto scratch = at::empty({count_selective_scan_scratch(t.p)}, A.options());
  SelectiveScanBackwardParams p{};
  p.forward = t.p;
  p.dy = dy.const_data_ptr();
  p.dfinal_state = dfinal_state.const_data_ptr<float>();
  p.dx = dx.mutable_data_ptr();
  p.ddelta = ddelta.mutable_data_ptr<float>();
  p.dA = dA.mutable_data_ptr<float>();
  p.dB = dB.mutable_data_ptr();
  p.dC = dC.mutable_data_ptr();
  p.dD = D ? dD.mutable_data_ptr<float>() : nullptr;
  p.dinitial_state = initial_state ? dinitial_state.mutable_data_ptr<float>() : nullptr;
  p.scratch = scratch.mutable_data_ptr<float>();
  p.dy_strides = token_strides(dy);
  launch_selective_scan_backward(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, ddelta, dA, dB, dC, dD, dinitial_state};
}

// What causal_conv1d and its derivative read.
struct CausalConv1dTensors {
  Tensor x, weight;
  OptionalTensor bias, initial_state, cu_seqlens;
  CausalConv1dParams p{};

  CausalConv1dTensors(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                      const OptionalTensor& initial_state_in, const OptionalTensor& cu_seqlens_in,
                      bool silu, int64_t sequences)
      : x(packed_rows(x_in, 2)),
        weight(weight_in.contiguous()),
        bias(contiguous(bias_in)),
        initial_state(contiguous(initial_state_in)),
        cu_seqlens(contiguous(cu_seqlens_in)) {
    p.x = x.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
    p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    p.x_strides = token_strides(x);
    p.batch = x.size(0);
    p.sequences = sequences;
    p.length = x.size(1);
    p.channels = x.size(2);
    p.width = weight.size(1);
    p.silu = silu;
    p.dtype = dtype_of(x);
  }
};

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const OptionalTensor& bias,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& cu_seqlens, bool silu) {
  const int64_t sequences =
      check_causal_conv1d("causal_conv1d", x, weight, bias, initial_state, cu_seqlens);
  const c10::cuda::CUDAGuard guard(x.device());
  CausalConv1dTensors t(x, weight, bias, initial_state, cu_seqlens, silu, sequences);
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({sequences, weight.size(1) - 1, x.size(2)}, x.options());
  t.p.y = y.mutable_data_ptr();
  t.p.final_state = final_state.mutable_data_ptr();
  launch_causal_conv1d(t.p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& dy_in, const Tensor& dfinal_state_in, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool silu) {
  constexpr const char* op = "causal_conv1d_backward";
  const int64_t sequences = check_causal_conv1d(op, x, weight, bias, initial_state, cu_seqlens);
  const Check check{op};
  check.tensor("dy", dy_in, x, x.scalar_type(), {x.size(0), x.size(1), x.size(2)},
               "(batch, length, channels)");
  check.tensor("dfinal_state", dfinal_state_in, x, x.scalar_type(),
               {sequences, weight.size(1) - 1, x.size(2)},
               "(batch or sequences, width - 1, channels)");
  const c10::cuda::CUDAGuard guard(x.device());
  CausalConv1dTensors t(x, weight, bias, initial_state, cu_seqlens, silu, sequences);
  const Tensor dy = packed_rows(dy_in, 2), dfinal_state = dfinal_state_in.contiguous();
  auto dx = empty_like(x, x), dweight = empty_like(weight, x), dbias = empty_like(bias, x),
       dinitial_state = empty_like(initial_state, x);
  auto partials = at::empty({count_causal_conv1d_partials(t.p)}, x.options().dtype(at::kFloat));
  CausalConv1dBackwardParams p{};
  p.forward = t.p;
  p.dy = dy.const_data_ptr();
  p.dfinal_state = dfinal_state.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  p.dinitial_state = initial_state ? dinitial_state.mutable_data_ptr() : nullptr;
  p.partials = partials.mutable_data_ptr<float>();
  p.dy_strides = token_strides(dy);
  launch_causal_conv1d_backward(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dweight, dbias, dinitial_state};
}

Tensor softplus(const Tensor& x_in, const OptionalTensor& bias_in) {
  check_softplus(x_in, bias_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = rows_of(x_in);
  const OptionalTensor bias = contiguous(bias_in);
  auto y = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  SoftplusParams p{};
  p.x = x.const_data_ptr();
  p.bias = data_or_null<float>(bias);
  p.y = y.mutable_data_ptr<float>();
  p.channels = x.size(-1);
  p.rows = p.channels ? x.numel() / p.channels : 0;
  p.x_stride = row_stride(x);
  p.dtype = dtype_of(x);
  launch_softplus(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// What the two fused mixers over whole sequences have in common. `conv_at`, `z_at` and `a_at`:
// where [x, B, C], z and a begin in a projected row.
struct MixerScanTensors {
  Tensor projected, conv_weight, conv_bias, D, y, last_inputs, final_state;
  OptionalTensor past, initial_state, cu_seqlens;
  MixerScanParams p{};

  MixerScanTensors(const MixerSizes& s, int64_t x_heads, int64_t b_groups, int64_t c_groups,
                   int64_t conv_at, int64_t z_at, int64_t a_at, const Tensor& projected_in,
                   const Tensor& conv_weight_in, const Tensor& conv_bias_in, const Tensor& D_in,
                   const OptionalTensor& past_in, const OptionalTensor& initial_state_in,
                   const OptionalTensor& cu_seqlens_in)
      : projected(packed_rows(projected_in, 2)),
        conv_weight(conv_weight_in.contiguous()),
        conv_bias(conv_bias_in.contiguous()),
        D(D_in.contiguous()),
        past(aligned(past_in)),
        initial_state(aligned(initial_state_in)),
        cu_seqlens(contiguous(cu_seqlens_in)) {
    const int64_t batch = projected.size(0), length = projected.size(1);
    const int64_t size = projected.element_size();
    const auto at = [&](int64_t column) {
      return static_cast<const char*>(projected.const_data_ptr()) + column * size;
    };
    SsdScanParams& scan = p.scan;
    scan.x = at(conv_at);
    scan.B = at(conv_at + x_heads * s.head_dim);
    scan.C = at(conv_at + x_heads * s.head_dim + b_groups * s.state_dim);
    scan.D = D.const_data_ptr<float>();
    scan.initial_state = data_or_null<float>(initial_state);
    scan.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    scan.x_strides = scan.b_strides = scan.c_strides = token_strides(projected);
    scan.batch = batch;
    scan.sequences = s.sequences;
    scan.length = length;
    scan.heads = s.heads;
    scan.x_heads = x_heads;
    scan.b_groups = b_groups;
    scan.c_groups = c_groups;
    scan.head_dim = s.head_dim;
    scan.state_dim = s.state_dim;
    scan.dtype = dtype_of(projected);
    p.z = at(z_at);
    p.a = at(a_at);
    p.conv_weight = conv_weight.const_data_ptr();
    p.conv_bias = conv_bias.const_data_ptr();
    p.past = past ? past->const_data_ptr() : nullptr;
    p.width = conv_weight.size(1);
  }
  static OptionalTensor aligned(const OptionalTensor& t) {
    const OptionalTensor packed = contiguous(t);
    return packed && !is_aligned_to_16(*packed) ? OptionalTensor(packed->clone()) : packed;
  }
  // Whether the fused kernel serves these arguments.
  bool served() const {
    return projected.element_size() == 2 && p.scan.head_dim % 8 == 0 && p.scan.head_dim > 0 &&
           p.scan.head_dim <= 128 && p.scan.state_dim % 8 == 0 && p.scan.state_dim <= 128 &&
           reinterpret_cast<uintptr_t>(p.scan.x) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(p.z) % 16 == 0 && p.scan.x_strides.batch % 8 == 0 &&
           p.scan.x_strides.token % 8 == 0;
  }
  template <typename Launch>
  std::tuple<Tensor, Tensor, Tensor> run(const MixerSizes& s, int64_t scratch_size,
                                         const Launch& launch) {
    const auto wide = projected.options().dtype(at::kFloat);
    y = at::empty({projected.size(0), projected.size(1), s.inner}, projected.options());
    last_inputs = at::empty({s.sequences, p.width - 1, s.channels}, projected.options());
    final_state = at::empty({s.sequences, s.heads, s.head_dim, s.state_dim}, wide);
    const auto scratch = at::empty({scratch_size}, wide);
    p.scan.y = y.mutable_data_ptr();
    p.scan.final_state = final_state.mutable_data_ptr<float>();
    p.scan.scratch = scratch.mutable_data_ptr<float>();
    p.last_inputs = last_inputs.mutable_data_ptr();
    launch(p, at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {y, last_inputs, final_state};
  }
};

std::tuple<Tensor, Tensor, Tensor> discrete_mamba2_scan(
    const Tensor& projected, const Tensor& conv_weight, const Tensor& conv_bias,
    const Tensor& z_bias_in, const Tensor& D, int64_t state_dim, const OptionalTensor& past,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const MixerSizes s = check_discrete_mamba2_scan(projected, conv_weight, conv_bias, z_bias_in, D,
                                                  state_dim, past, initial_state, cu_seqlens);
  const c10::cuda::CUDAGuard guard(projected.device());
  const Tensor z_bias = z_bias_in.contiguous();
  MixerScanTensors t(s, s.heads, s.shared, s.shared, 0, s.channels, s.channels + s.inner, projected,
                     conv_weight, conv_bias, D, past, initial_state, cu_seqlens);
  if (t.served()) {
    t.p.z_bias = z_bias.const_data_ptr();
    return t.run(s, count_discrete_mamba2_scan_scratch(t.p.scan), &launch_discrete_mamba2_scan);
  }
  const auto parts = projected.split_with_sizes({s.channels, s.inner, s.heads}, 2);
  const auto [conv, last_inputs] =
      causal_conv1d(parts[0], conv_weight, conv_bias, past, cu_seqlens, /*silu=*/false);
  const int64_t group = s.shared * s.state_dim;
  const auto xBC = conv.split_with_sizes({s.inner, group, group}, 2);
  const auto [y, final_state] =
      ssd_scan(xBC[0].unflatten(2, {s.heads, s.head_dim}), softplus(parts[2], std::nullopt).neg_(),
               xBC[1].unflatten(2, {s.shared, s.state_dim}),
               xBC[2].unflatten(2, {s.shared, s.state_dim}), {}, D, initial_state, cu_seqlens);
  return {gate(y.flatten(2), parts[1], z_bias), last_inputs, final_state};
}

std::tuple<Tensor, Tensor, Tensor> mamba2_scan(const Tensor& projected, const Tensor& conv_weight,
                                               const Tensor& conv_bias, const Tensor& dt_bias_in,
                                               const Tensor& A_log_in, const Tensor& D,
                                               const Tensor& norm_weight_in, double eps,
                                               int64_t state_dim, const OptionalTensor& past,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& cu_seqlens) {
  const MixerSizes s =
      check_mamba2_scan(projected, conv_weight, conv_bias, dt_bias_in, A_log_in, D, norm_weight_in,
                        eps, state_dim, past, initial_state, cu_seqlens);
  const c10::cuda::CUDAGuard guard(projected.device());
  const Tensor dt_bias = dt_bias_in.contiguous(), A_log = A_log_in.contiguous(),
               norm_weight = norm_weight_in.contiguous();
  MixerScanTensors t(s, s.shared, s.shared, s.heads, s.inner, 0, s.inner + s.channels, projected,
                     conv_weight, conv_bias, D, past, initial_state, cu_seqlens);
  if (t.served()) {
    t.p.dt_bias = dt_bias.const_data_ptr<float>();
    t.p.A_log = A_log.const_data_ptr<float>();
    t.p.norm_weight = norm_weight.const_data_ptr();
    t.p.eps = eps;
    return t.run(s, count_mamba2_scan_scratch(t.p.scan), &launch_mamba2_scan);
  }
  const auto parts = projected.split_with_sizes({s.inner, s.channels, s.heads}, 2);
  const auto [conv, last_inputs] =
      causal_conv1d(parts[1], conv_weight, conv_bias, past, cu_seqlens, /*silu=*/true);
  const auto xBC = conv.split_with_sizes(
      {s.shared * s.head_dim, s.shared * s.state_dim, s.heads * s.state_dim}, 2);
  const Tensor delta = softplus(parts[2], dt_bias);
  const auto [y, final_state] =
      ssd_scan(xBC[0].unflatten(2, {s.shared, s.head_dim}), -delta * A_log.exp(),
               xBC[1].unflatten(2, {s.shared, s.state_dim}),
               xBC[2].unflatten(2, {s.heads, s.state_dim}), delta, D, initial_state, cu_seqlens);
  const Tensor gated = gate(y, parts[0].unflatten(2, {s.heads, s.head_dim}), {});
  const Tensor normal = at::rms_norm(gated, {s.head_dim}, {}, eps);
  return {normal.flatten(2) * norm_weight, last_inputs, final_state};
}

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in, const Tensor& v_in,
               const Tensor& page_table_in, const Tensor& cu_seqlens_q, const Tensor& kv_lengths) {
  check_append_kv(k_cache, v_cache, k_in, v_in, page_table_in, cu_seqlens_q, kv_lengths);
  const c10::cuda::CUDAGuard guard(k_cache.device());
  const Tensor k = packed_rows(k_in), v = packed_rows(v_in),
               page_table = packed_rows(page_table_in), starts = cu_seqlens_q.contiguous(),
               lengths = kv_lengths.contiguous();
  AppendKvParams p{};
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.cu_seqlens_q = starts.const_data_ptr<int32_t>();
  p.kv_lengths = lengths.const_data_ptr<int32_t>();
  p.k_stride = k.stride(0);
  p.v_stride = v.stride(0);
  p.table_stride = page_table.stride(0);
  p.tokens = k.size(0);
  p.rows = lengths.numel();
  p.kv_heads = k_cache.size(1);
  p.page_size = k_cache.size(2);
  p.head_dim = k_cache.size(3);
  p.dtype = dtype_of(k_cache);
  launch_append_kv(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void rotate_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& qkv,
                      const Tensor& inv_freq_in, const Tensor& page_table_in,
                      const Tensor& cu_seqlens_q, const Tensor& kv_lengths) {
  check_rotate_append_kv(k_cache, v_cache, qkv, inv_freq_in, page_table_in, cu_seqlens_q,
                         kv_lengths);
  const c10::cuda::CUDAGuard guard(k_cache.device());
  const Tensor inv_freq = inv_freq_in.contiguous(), page_table = packed_rows(page_table_in),
               starts = cu_seqlens_q.contiguous(), lengths = kv_lengths.contiguous();
  RotateAppendKvParams p{};
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.qkv = qkv.mutable_data_ptr();
  p.inv_freq = inv_freq.const_data_ptr<float>();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.cu_seqlens_q = starts.const_data_ptr<int32_t>();
  p.kv_lengths = lengths.const_data_ptr<int32_t>();
  p.qkv_stride = qkv.stride(0);
  p.table_stride = page_table.stride(0);
  p.tokens = qkv.size(0);
  p.rows = lengths.numel();
  p.kv_heads = k_cache.size(1);
  p.heads = qkv.size(1) - 2 * p.kv_heads;
  p.page_size = k_cache.size(2);
  p.head_dim = k_cache.size(3);
  p.dtype = dtype_of(k_cache);
  launch_rotate_append_kv(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The result, and its log-sum-exp where it is wanted.
std::tuple<Tensor, Tensor> attend(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table_in, const Tensor& cu_seqlens_q,
                                  const Tensor& kv_lengths, double scale, int64_t max_queries,
                                  const OptionalTensor& shared_in, bool wants_lse) {
  check_paged_attention(q_in, k_cache, v_cache, page_table_in, cu_seqlens_q, kv_lengths,
                        max_queries, shared_in);
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = packed_rows(q_in), page_table = packed_rows(page_table_in),
               starts = cu_seqlens_q.contiguous(), lengths = kv_lengths.contiguous();
  const OptionalTensor shared = contiguous(shared_in);
  auto out = at::empty(q.sizes(), q.options());
  Tensor lse;
  if (wants_lse) lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  PagedAttentionParams p{};
  p.q = q.const_data_ptr();
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.cu_seqlens_q = starts.const_data_ptr<int32_t>();
  p.kv_lengths = lengths.const_data_ptr<int32_t>();
  p.shared = data_or_null<int32_t>(shared);
  p.out = out.mutable_data_ptr();
  p.lse = wants_lse ? lse.mutable_data_ptr<float>() : nullptr;
  p.q_stride = q.stride(0);
  p.table_stride = page_table.stride(0);
  p.tokens = q.size(0);
  p.rows = lengths.numel();
  p.max_pages = page_table.size(1);
  p.num_pages = k_cache.size(0);
  p.heads = q.size(1);
  p.kv_heads = k_cache.size(1);
  p.page_size = k_cache.size(2);
  p.head_dim = q.size(2);
  p.decode = max_queries == 1;
  p.scale = scale;
  p.dtype = dtype_of(q);
  const auto scratch = at::empty({count_paged_attention_scratch(p)}, q.options().dtype(at::kFloat));
  p.scratch = scratch.mutable_data_ptr<float>();
  if (const int64_t tickets = count_paged_attention_tickets(p); tickets > 0)
    p.tickets = tickets_for(at::cuda::getCurrentCUDAStream(), tickets);
  launch_paged_attention(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, lse};
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& page_table, const Tensor& cu_seqlens_q,
                       const Tensor& kv_lengths, double scale, int64_t max_queries,
                       const OptionalTensor& shared) {
  return std::get<0>(attend(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale,
                            max_queries, shared, false));
}

std::tuple<Tensor, Tensor> paged_attention_lse(const Tensor& q, const Tensor& k_cache,
                                               const Tensor& v_cache, const Tensor& page_table,
                                               const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                                               double scale, int64_t max_queries,
                                               const OptionalTensor& shared) {
  return attend(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale, max_queries,
                shared, true);
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits_in, const Tensor& temperature_in,
                                  const Tensor& top_k_in, const Tensor& top_p_in,
                                  const Tensor& min_p_in, const Tensor& rng_key_in) {
  check_sample(logits_in, temperature_in, top_k_in, top_p_in, min_p_in, rng_key_in);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const Tensor logits = packed_rows(logits_in), temperature = temperature_in.contiguous(),
               top_k = top_k_in.contiguous(), top_p = top_p_in.contiguous(),
               min_p = min_p_in.contiguous(), rng_key = rng_key_in.contiguous();
  auto token = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  auto logprob = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  SampleParams p{};
  p.logits = logits.const_data_ptr();
  p.temperature = temperature.const_data_ptr<float>();
  p.top_k = top_k.const_data_ptr<int32_t>();
  p.top_p = top_p.const_data_ptr<float>();
  p.min_p = min_p.const_data_ptr<float>();
  p.rng_key = rng_key.const_data_ptr<int64_t>();
  p.token = token.mutable_data_ptr<int64_t>();
  p.logprob = logprob.mutable_data_ptr<float>();
  p.logits_stride = logits.stride(0);
  p.batch = logits.size(0);
  p.vocabulary = logits.size(1);
  p.dtype = dtype_of(logits);
  launch_sample(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {token, logprob};
}

TORCH_LIBRARY_IMPL(reasoners, CUDA, m) {
  m.impl("state_update", &state_update);
  m.impl("deferred_state_update", &deferred_state_update);
  m.impl("count_pending", &count_pending);
  m.impl("discrete_mamba2_update", &discrete_mamba2_update);
  m.impl("mamba2_update", &mamba2_update);
  m.impl("selective_update", &selective_update);
  m.impl("mamba1_update", &mamba1_update);
  m.impl("conv_update", &conv_update);
  m.impl("linear", &linear);
  m.impl("rms_norm_linear", &rms_norm_linear);
  m.impl("add_linear", &add_linear);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rotate", &rotate);
  m.impl("advance", &advance);
  m.impl("ssd_scan", &ssd_scan);
  m.impl("ssd_scan_backward", &ssd_scan_backward);
  m.impl("discrete_mamba2_scan", &discrete_mamba2_scan);
  m.impl("mamba2_scan", &mamba2_scan);
  m.impl("selective_scan", &selective_scan);
  m.impl("selective_scan_backward", &selective_scan_backward);
  m.impl("causal_conv1d", &causal_conv1d);
  m.impl("causal_conv1d_backward", &causal_conv1d_backward);
  m.impl("gate", &gate);
  m.impl("gate_backward", &gate_backward);
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("distillation_losses", &distillation_losses);
  m.impl("softplus", &softplus);
  m.impl("append_kv", &append_kv);
  m.impl("rotate_append_kv", &rotate_append_kv);
  m.impl("paged_attention", &paged_attention);
  m.impl("paged_attention_lse", &paged_attention_lse);
  m.impl("sample", &sample);
}

}  // namespace
}  // namespace reasoners
