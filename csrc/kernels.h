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

// Of a (batch, length, ...) tensor whose dimensions after the first two are packed.
struct TokenStrides {
  int64_t batch, token;
};

// Without cu_seqlens every batch row is a sequence; with it batch is 1 and sequence i holds the
// tokens cu_seqlens[i] to cu_seqlens[i + 1]. The offsets are read on the device only.
struct SsdScanParams {
  const void* x;               // (batch, length, x_heads, head_dim), dtype
  const float* log_decay;      // (batch, length, heads)
  const void* B;               // (batch, length, b_groups, state_dim), dtype
  const void* C;               // (batch, length, c_groups, state_dim), dtype
  const float* scale;          // (batch, length, heads) or null
  const float* D;              // (heads) or null
  const float* initial_state;  // (sequences, heads, head_dim, state_dim) or null
  const int32_t* cu_seqlens;   // (sequences + 1) or null
  void* y;                     // (batch, length, heads, head_dim), dtype
  float* final_state;          // (sequences, heads, head_dim, state_dim)
  TokenStrides x_strides, log_decay_strides, b_strides, c_strides, scale_strides;
  int64_t sequences, length;
  int heads, x_heads, b_groups, c_groups, head_dim, state_dim;
  DType dtype;
};
constexpr int kSsdScanMaxStateDim = 256;
void launch_ssd_scan(const SsdScanParams& params, cudaStream_t stream);

struct SelectiveScanParams {
  const void* x;               // (batch, length, channels), dtype
  const float* delta;          // (batch, length, channels)
  const float* A;              // (channels, state_dim)
  const void* B;               // (batch, length, b_groups, state_dim), dtype
  const void* C;               // (batch, length, c_groups, state_dim), dtype
  const float* D;              // (channels) or null
  const float* initial_state;  // (sequences, channels, state_dim) or null
  const int32_t* cu_seqlens;   // (sequences + 1) or null
  void* y;                     // (batch, length, channels), dtype
  float* final_state;          // (sequences, channels, state_dim)
  TokenStrides x_strides, delta_strides, b_strides, c_strides;
  int64_t sequences, length;
  int channels, b_groups, c_groups, state_dim;
  DType dtype;
};
constexpr int kSelectiveScanMaxStateDim = 256;
void launch_selective_scan(const SelectiveScanParams& params, cudaStream_t stream);

struct CausalConv1dParams {
  const void* x;              // (batch, length, channels), dtype as everything here
  const void* weight;         // (channels, width), width 2 to 4
  const void* bias;           // (channels) or null
  const void* initial_state;  // (sequences, width - 1, channels) or null
  const int32_t* cu_seqlens;  // (sequences + 1) or null
  void* y;                    // (batch, length, channels)
  void* final_state;          // (sequences, width - 1, channels)
  TokenStrides x_strides;
  int64_t batch, sequences, length;
  int channels, width;
  bool silu;
  DType dtype;
};
void launch_causal_conv1d(const CausalConv1dParams& params, cudaStream_t stream);

struct GateParams {
  const void* x;     // (rows, channels), dtype as everything here
  const void* z;     // (rows, channels)
  const void* bias;  // (channels) or null
  void* y;           // (rows, channels)
  int64_t rows, channels, x_stride, z_stride;
  DType dtype;
};
void launch_gate(const GateParams& params, cudaStream_t stream);

struct SoftplusParams {
  const void* x;      // (rows, channels), dtype
  const float* bias;  // (channels) or null
  float* y;           // (rows, channels)
  int64_t rows, channels, x_stride;
  DType dtype;
};
void launch_softplus(const SoftplusParams& params, cudaStream_t stream);

}  // namespace reasoners
