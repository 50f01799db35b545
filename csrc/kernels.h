// What a CUDA launch needs to know, free of torch: one params struct and one launch declaration per
// operator. Strides are in elements; a last dimension is always contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace reasoners {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

struct StateUpdateParams {
  void* state;             // (slots, heads, head_dim, state_dim), state_dtype
  const int32_t* slots;    // (batch), negative = padding row
  const void* x;           // (batch, x_heads, head_dim), dtype
  const float* log_decay;  // (batch, heads)
  const void* B;           // (batch, b_groups, state_dim), dtype
  const void* C;           // (batch, c_groups, state_dim), dtype
  const float* scale;      // (batch, heads) or null
  const float* D;          // (heads) or null
  void* y;                 // (batch, heads, head_dim), dtype
  int64_t x_stride, log_decay_stride, b_stride, c_stride, scale_stride;  // of the batch dimension
  int batch, heads, x_heads, b_groups, c_groups, head_dim, state_dim;
  DType dtype, state_dtype;
};
void launch_state_update(const StateUpdateParams& params, cudaStream_t stream);

}  // namespace reasoners
