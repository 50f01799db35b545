// Tensors to params to a launch on the current stream; registers the CUDA operators. The only file
// that includes both torch and CUDA headers.

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "checks.h"
#include "kernels.h"
#include "rows.h"

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

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

TokenStrides token_strides(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

Tensor state_update(const Tensor& state, const Tensor& slots_in, const Tensor& x_in,
                    const Tensor& log_decay_in, const Tensor& B_in, const Tensor& C_in,
                    const OptionalTensor& scale_in, const OptionalTensor& D_in) {
  check_state_update(state, slots_in, x_in, log_decay_in, B_in, C_in, scale_in, D_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor slots = slots_in.contiguous(), x = packed_rows(x_in),
               log_decay = packed_rows(log_decay_in), B = packed_rows(B_in), C = packed_rows(C_in);
  const OptionalTensor scale = packed_rows(scale_in);
  const OptionalTensor D = contiguous(D_in);
  auto y = at::empty({x.size(0), log_decay.size(1), x.size(2)}, x.options());
  StateUpdateParams p{};
  p.state = state.mutable_data_ptr();
  p.slots = slots.const_data_ptr<int32_t>();
  p.x = x.const_data_ptr();
  p.log_decay = log_decay.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.scale = data_or_null<float>(scale);
  p.D = data_or_null<float>(D);
  p.y = y.mutable_data_ptr();
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

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x_in, const Tensor& log_decay_in,
                                    const Tensor& B_in, const Tensor& C_in,
                                    const OptionalTensor& scale_in, const OptionalTensor& D_in,
                                    const OptionalTensor& initial_state_in,
                                    const OptionalTensor& cu_seqlens_in) {
  const int64_t sequences = check_ssd_scan("ssd_scan", x_in, log_decay_in, B_in, C_in, scale_in,
                                           D_in, initial_state_in, cu_seqlens_in);
  Check{"ssd_scan"}.at_most_on_cuda("N", B_in.size(3), kSsdScanMaxStateDim);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = packed_rows(x_in, 2), log_decay = packed_rows(log_decay_in, 2),
               B = packed_rows(B_in, 2), C = packed_rows(C_in, 2);
  const OptionalTensor scale = packed_rows(scale_in, 2), D = contiguous(D_in),
                       initial_state = contiguous(initial_state_in),
                       cu_seqlens = contiguous(cu_seqlens_in);
  const int64_t heads = log_decay.size(2);
  auto y = at::empty({x.size(0), x.size(1), heads, x.size(3)}, x.options());
  auto final_state = at::empty({sequences, heads, x.size(3), B.size(3)}, log_decay.options());
  SsdScanParams p{};
  p.x = x.const_data_ptr();
  p.log_decay = log_decay.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.scale = data_or_null<float>(scale);
  p.D = data_or_null<float>(D);
  p.initial_state = data_or_null<float>(initial_state);
  p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  p.y = y.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr<float>();
  p.x_strides = token_strides(x);
  p.log_decay_strides = token_strides(log_decay);
  p.b_strides = token_strides(B);
  p.c_strides = token_strides(C);
  if (scale) p.scale_strides = token_strides(*scale);
  p.sequences = sequences;
  p.length = x.size(1);
  p.heads = heads;
  p.x_heads = x.size(2);
  p.b_groups = B.size(2);
  p.c_groups = C.size(2);
  p.head_dim = x.size(3);
  p.state_dim = B.size(3);
  p.dtype = dtype_of(x);
  launch_ssd_scan(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x_in, const Tensor& delta_in,
                                          const Tensor& A_in, const Tensor& B_in,
                                          const Tensor& C_in, const OptionalTensor& D_in,
                                          const OptionalTensor& initial_state_in,
                                          const OptionalTensor& cu_seqlens_in) {
  const int64_t sequences = check_selective_scan("selective_scan", x_in, delta_in, A_in, B_in, C_in,
                                                 D_in, initial_state_in, cu_seqlens_in);
  Check{"selective_scan"}.at_most_on_cuda("N", A_in.size(1), kSelectiveScanMaxStateDim);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = packed_rows(x_in, 2), delta = packed_rows(delta_in, 2), A = A_in.contiguous(),
               B = packed_rows(B_in, 2), C = packed_rows(C_in, 2);
  const OptionalTensor D = contiguous(D_in), initial_state = contiguous(initial_state_in),
                       cu_seqlens = contiguous(cu_seqlens_in);
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({sequences, x.size(2), A.size(1)}, A.options());
  SelectiveScanParams p{};
  p.x = x.const_data_ptr();
  p.delta = delta.const_data_ptr<float>();
  p.A = A.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.D = data_or_null<float>(D);
  p.initial_state = data_or_null<float>(initial_state);
  p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  p.y = y.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr<float>();
  p.x_strides = token_strides(x);
  p.delta_strides = token_strides(delta);
  p.b_strides = token_strides(B);
  p.c_strides = token_strides(C);
  p.sequences = sequences;
  p.length = x.size(1);
  p.channels = x.size(2);
  p.b_groups = B.size(2);
  p.c_groups = C.size(2);
  p.state_dim = A.size(1);
  p.dtype = dtype_of(x);
  launch_selective_scan(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x_in, const Tensor& weight_in,
                                         const OptionalTensor& bias_in,
                                         const OptionalTensor& initial_state_in,
                                         const OptionalTensor& cu_seqlens_in, bool silu) {
  const int64_t sequences = check_causal_conv1d("causal_conv1d", x_in, weight_in, bias_in,
                                                initial_state_in, cu_seqlens_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = packed_rows(x_in, 2), weight = weight_in.contiguous();
  const OptionalTensor bias = contiguous(bias_in), initial_state = contiguous(initial_state_in),
                       cu_seqlens = contiguous(cu_seqlens_in);
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({sequences, weight.size(1) - 1, x.size(2)}, x.options());
  CausalConv1dParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
  p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  p.y = y.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr();
  p.x_strides = token_strides(x);
  p.batch = x.size(0);
  p.sequences = sequences;
  p.length = x.size(1);
  p.channels = x.size(2);
  p.width = weight.size(1);
  p.silu = silu;
  p.dtype = dtype_of(x);
  launch_causal_conv1d(p, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state};
}

Tensor gate(const Tensor& x_in, const Tensor& z_in, const OptionalTensor& bias_in) {
  check_gate(x_in, z_in, bias_in);
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

TORCH_LIBRARY_IMPL(reasoners, CUDA, m) {
  m.impl("state_update", &state_update);
  m.impl("ssd_scan", &ssd_scan);
  m.impl("selective_scan", &selective_scan);
  m.impl("causal_conv1d", &causal_conv1d);
  m.impl("gate", &gate);
  m.impl("softplus", &softplus);
}

}  // namespace
}  // namespace reasoners
