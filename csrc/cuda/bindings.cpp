// Tensors to params to a launch on the current stream; registers the CUDA operators. The only file
// that includes both torch and CUDA headers.

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "checks.h"
#include "kernels.h"

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

// The same tensor with everything but the first dimension packed; in_proj's slices are that
// already.
Tensor packed_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    if (t.size(i) != 1 && t.stride(i) != expected) return t.contiguous();
    expected *= t.size(i);
  }
  return t;
}

OptionalTensor packed_rows(const OptionalTensor& t) {
  return t ? OptionalTensor(packed_rows(*t)) : t;
}

Tensor state_update(const Tensor& state, const Tensor& slots_in, const Tensor& x_in,
                    const Tensor& log_decay_in, const Tensor& B_in, const Tensor& C_in,
                    const OptionalTensor& scale_in, const OptionalTensor& D_in) {
  check_state_update(state, slots_in, x_in, log_decay_in, B_in, C_in, scale_in, D_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor slots = slots_in.contiguous(), x = packed_rows(x_in),
               log_decay = packed_rows(log_decay_in), B = packed_rows(B_in), C = packed_rows(C_in);
  const OptionalTensor scale = packed_rows(scale_in);
  const OptionalTensor D = D_in ? OptionalTensor(D_in->contiguous()) : D_in;
  auto y = at::empty({x.size(0), log_decay.size(1), x.size(2)}, x.options());
  StateUpdateParams p{};
  p.state = state.mutable_data_ptr();
  p.slots = slots.const_data_ptr<int32_t>();
  p.x = x.const_data_ptr();
  p.log_decay = log_decay.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.C = C.const_data_ptr();
  p.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  p.D = D ? D->const_data_ptr<float>() : nullptr;
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

TORCH_LIBRARY_IMPL(reasoners, CUDA, m) { m.impl("state_update", &state_update); }

}  // namespace
}  // namespace reasoners
