// What a CUDA launch needs to know, free of torch: one params struct and one launch declaration per
// operator. Strides are in elements; a last dimension is always contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace reasoners {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Tokens that a slot's stored state does not contain yet; pending is null when there are none.
struct RecentTokens {
  void* tokens;            // (slots, capacity, x_heads * head_dim + b_groups * state_dim), dtype
  float* decays;           // (slots, capacity, 2, heads): log_decay, scale
  const int32_t* pending;  // (slots)
  int capacity, period;
};

// state_update and deferred_state_update
struct StateUpdateParams {
  void* state;             // (slots, heads, head_dim, state_dim), state_dtype
  const int32_t* slots;    // (batch), negative = padding row
  const void* x;           // (batch, x_heads, head_dim), dtype
  const float* log_decay;  // (batch, heads)
  const void* B;           // (batch, b_groups, state_dim), dtype
  const void* C;           // (batch, c_groups, state_dim), dtype
  const float* scale;      // (batch, heads) or null
  const float* D;          // (heads) or null
  const int64_t* rng_key;  // (batch, 4) or null
  void* y;                 // (batch, heads, head_dim), dtype
  uint32_t* tickets;       // (heads), zeros, and zeros again afterwards
  RecentTokens recent;
  int64_t x_stride, log_decay_stride, b_stride, c_stride, scale_stride;  // of the batch dimension
  int num_slots, batch, heads, x_heads, b_groups, c_groups, head_dim, state_dim;
  DType dtype, state_dtype;
};
void launch_state_update(const StateUpdateParams& params, cudaStream_t stream);

// discrete_mamba2_update and mamba2_update: from a row of in_proj to a row of out_proj
struct MixerUpdateParams {
  void* conv_state;         // (slots, width, channels), dtype; position t in entry t % width
  void* state;              // (slots, heads, head_dim, state_dim), state_dtype
  const int32_t* slots;     // (batch), negative = padding row
  const int32_t* lengths;   // (batch), tokens of the sequence including this one
  const void* projected;    // (batch, ...), dtype
  const void* conv_weight;  // (channels, width), dtype
  const void* conv_bias;    // (channels), dtype
  const void* z_bias;       // (heads * head_dim), dtype; discrete_mamba2 only
  const float* dt_bias;     // (heads); mamba2 only
  const float* A_log;       // (heads); mamba2 only
  const float* D;           // (heads)
  const void* norm_weight;  // (heads * head_dim), dtype; mamba2 only
  const int64_t* rng_key;   // (batch, 4) or null
  void* y;                  // (batch, heads * head_dim), dtype
  uint32_t* tickets;        // (heads), zeros, and zeros again afterwards
  RecentTokens recent;
  int64_t projected_stride;             // of the batch dimension
  int conv_offset, z_offset, a_offset;  // in a projected row: [x, B, C], z, and a or dt
  int num_slots, batch, heads, x_heads, b_groups, c_groups, head_dim, state_dim, width;
  float eps;
  DType dtype, state_dtype;
};
void launch_discrete_mamba2_update(const MixerUpdateParams& params, cudaStream_t stream);
void launch_mamba2_update(const MixerUpdateParams& params, cudaStream_t stream);

// Channels that a block of selective_update or mamba1_update serves where rows are many.
constexpr int kSelectivePart = 128;
struct SelectiveUpdateParams {
  void* state;                                         // (slots, channels, state_dim), state_dtype
  const int32_t* slots;                                // (batch), negative = padding row
  const void* x;                                       // (batch, channels), dtype
  const float* delta;                                  // (batch, channels)
  const float* A;                                      // (channels, state_dim)
  const void* B;                                       // (batch, b_groups, state_dim), dtype
  const void* C;                                       // (batch, c_groups, state_dim), dtype
  const float* D;                                      // (channels) or null
  void* y;                                             // (batch, channels), dtype
  uint32_t* tickets;                                   // (parts), zeros, and zeros again afterwards
  int64_t x_stride, delta_stride, b_stride, c_stride;  // of the batch dimension
  int num_slots, batch, channels, b_groups, c_groups, state_dim;
  DType dtype, state_dtype;
};
void launch_selective_update(const SelectiveUpdateParams& params, cudaStream_t stream);

struct Mamba1UpdateParams {
  void* conv_state;         // (slots, width, channels), dtype; position t in entry t % width
  void* state;              // (slots, channels, state_dim), state_dtype
  const int32_t* slots;     // (batch), negative = padding row
  const int32_t* lengths;   // (batch), tokens of the sequence including this one
  const void* projected;    // (batch, [z channels, x kv_dim, B kv_dim, C channels, ...]), dtype
  const void* dt;           // (batch, channels), dtype
  const void* conv_weight;  // (channels, width), dtype
  const void* conv_bias;    // (channels), dtype
  const void* dt_bias;      // (channels), dtype
  const float* A_log;       // (channels, state_dim)
  const float* D;           // (channels)
  void* y;                  // (batch, channels), dtype
  uint32_t* tickets;        // (parts), zeros, and zeros again afterwards
  int64_t projected_stride, dt_stride;  // of the batch dimension
  int num_slots, batch, channels, kv_dim, state_dim, width;
  DType dtype, state_dtype;
};
void launch_mamba1_update(const Mamba1UpdateParams& params, cudaStream_t stream);

struct ConvUpdateParams {
  void* state;             // (slots, width, channels), dtype; position t in entry t % width
  const int32_t* slots;    // (batch), negative = padding row
  const int32_t* lengths;  // (batch), tokens of the sequence including this one
  const void* x;           // (batch, channels), dtype
  const void* weight;      // (channels, width), dtype
  const void* bias;        // (channels), dtype, or null
  void* y;                 // (batch, channels), dtype
  int64_t x_stride;        // of the batch dimension
  int batch, channels, width;
  bool silu;
  DType dtype;
};
void launch_conv_update(const ConvUpdateParams& params, cudaStream_t stream);

// At most this many rows; see linear.cu.
constexpr int kLinearRows = 4;
struct LinearParams {
  const void* x;            // (rows, depth), dtype
  const void* norm_weight;  // (depth), dtype, or null; otherwise x is normalised first
  const void* weight;       // (columns, depth), dtype
  const void* bias;         // (columns), dtype, or null
  void* y;                  // (rows, columns), or columns / 2 if gated, dtype
  void* sum;                // (rows, columns), dtype, or null; y is added to it and not written
  int64_t x_stride;         // of rows
  int rows, columns, depth;
  float eps;    // of the norm
  bool gated;   // half of the columns are gates of the other half
  DType dtype;  // 16 bits
};
bool can_normalise_in_linear(int depth);
void launch_linear(const LinearParams& params, cudaStream_t stream);

struct AddRmsNormParams {
  void* h;             // (rows, dim), dtype; delta is added in place
  const void* delta;   // (rows, dim), dtype, or null
  const void* weight;  // (dim), dtype
  void* y;             // (rows, dim), dtype
  int64_t delta_stride;
  int rows, dim;
  float eps;
  DType dtype;
};
void launch_add_rms_norm(const AddRmsNormParams& params, cudaStream_t stream);

struct RotateParams {
  void* x;                   // (tokens, heads, head_dim), dtype; in place
  const int32_t* positions;  // (tokens)
  const float* inv_freq;     // (head_dim / 2)
  int64_t x_stride;          // of the token dimension
  int tokens, heads, head_dim;
  DType dtype;
};
void launch_rotate(const RotateParams& params, cudaStream_t stream);

struct CountPendingParams {
  int32_t* pending;      // (slots)
  const int32_t* slots;  // (batch), negative = padding row
  int batch, period;
};
void launch_count_pending(const CountPendingParams& params, cudaStream_t stream);

// The end of a decode step; see ops.advance for what each one means.
struct AdvanceParams {
  const int64_t* token;                                    // (rows)
  const float* logprob;                                    // (rows)
  const int64_t* stop_ids;                                 // (rows, num_stop_ids), -1 = none
  int64_t* last;                                           // (rows)
  int32_t* slots;                                          // (rows)
  int32_t* lengths;                                        // (rows)
  int32_t* remaining;                                      // (rows)
  int64_t* rng_key;                                        // (rows, 4)
  int64_t* drawn;                                          // (steps, >= rows)
  float* logprobs;                                         // (steps, >= rows)
  int32_t* step;                                           // (1)
  int64_t stop_ids_stride, drawn_stride, logprobs_stride;  // of the first dimension
  int rows, num_stop_ids;
};
void launch_advance(const AdvanceParams& params, cudaStream_t stream);

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
  float* scratch;              // count_ssd_scan_scratch
  uint32_t* tickets;           // kSsdScanTickets, zero
  TokenStrides x_strides, log_decay_strides, b_strides, c_strides, scale_strides;
  int64_t batch, sequences, length;
  int heads, x_heads, b_groups, c_groups, head_dim, state_dim;
  DType dtype;
};
constexpr int kSsdScanMaxStateDim = 256, kSsdScanTickets = 264;
// initial_state and 16-bit data begin on 16 bytes, and so do the data's rows where head_dim and
// state_dim are multiples of 8. Floats of scratch memory.
int64_t count_ssd_scan_scratch(const SsdScanParams& params);
void launch_ssd_scan(const SsdScanParams& params, cudaStream_t stream);
// For any dtype, head_dim and state_dim; see ssd_scan_rows.cu.
void launch_ssd_scan_rows(const SsdScanParams& params, cudaStream_t stream);
// On Hopper, where `suits` says so; see ssd_scan_wgmma.cu.
bool suits_ssd_scan_wgmma(const SsdScanParams& params);
int64_t count_ssd_scan_wgmma_scratch(const SsdScanParams& params);
void launch_ssd_scan_wgmma(const SsdScanParams& params, cudaStream_t stream);

// discrete_mamba2_scan and mamba2_scan: from in_proj's rows to out_proj's. x, B and C of `scan` are
// the columns [x, B, C] of the projected rows, from which the convolution makes the scan's; their
// strides, which are the same, are those of z and a too. Its log_decay and scale are null.
struct MixerScanParams {
  SsdScanParams scan;
  const void* z;            // (batch, length, heads * head_dim), dtype
  const void* a;            // (batch, length, heads), dtype: a or dt
  const void* conv_weight;  // (channels, width), dtype
  const void* conv_bias;    // (channels), dtype
  const void* past;         // (sequences, width - 1, channels), dtype, or null
  const void* z_bias;       // (heads * head_dim), dtype; discrete_mamba2 only
  const float* dt_bias;     // (heads); mamba2 only
  const float* A_log;       // (heads); mamba2 only
  const void* norm_weight;  // (heads * head_dim), dtype; mamba2 only
  void* last_inputs;        // (sequences, width - 1, channels), dtype
  int width;                // 2 to 4
  float eps;
};
// For what runs on tensor cores, with the projected rows, z, past and initial_state on 16 bytes.
// Floats of scratch memory.
int64_t count_discrete_mamba2_scan_scratch(const SsdScanParams& scan);
void launch_discrete_mamba2_scan(const MixerScanParams& params, cudaStream_t stream);
int64_t count_mamba2_scan_scratch(const SsdScanParams& scan);
void launch_mamba2_scan(const MixerScanParams& params, cudaStream_t stream);

// dy begins on 16 bytes as the other data does.
struct SsdScanBackwardParams {
  SsdScanParams forward;      // y, final_state and scratch are null
  const void* dy;             // (batch, length, heads, head_dim), dtype
  const float* dfinal_state;  // (sequences, heads, head_dim, state_dim)
  void* dx;                   // (batch, length, x_heads, head_dim), dtype
  float* dlog_decay;          // (batch, length, heads)
  void* dB;                   // (batch, length, b_groups, state_dim), dtype
  void* dC;                   // (batch, length, c_groups, state_dim), dtype
  float* dscale;              // (batch, length, heads) or null
  float* dD;                  // (heads) or null
  float* dinitial_state;      // (sequences, heads, head_dim, state_dim) or null
  float* scratch;             // count_ssd_scan_backward_scratch
  TokenStrides dy_strides;
};
// Floats of scratch memory.
int64_t count_ssd_scan_backward_scratch(const SsdScanParams& forward);
void launch_ssd_scan_backward(const SsdScanBackwardParams& params, cudaStream_t stream);

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
  int64_t batch, sequences, length;
  int channels, b_groups, c_groups, state_dim;
  DType dtype;
};
constexpr int kSelectiveScanMaxStateDim = 256;
void launch_selective_scan(const SelectiveScanParams& params, cudaStream_t stream);

struct SelectiveScanBackwardParams {
  SelectiveScanParams forward;  // y and final_state are null
  const void* dy;               // (batch, length, channels), dtype
  const float* dfinal_state;    // (sequences, channels, state_dim)
  void* dx;                     // (batch, length, channels), dtype
  float* ddelta;                // (batch, length, channels)
  float* dA;                    // (channels, state_dim)
  void* dB;                     // (batch, length, b_groups, state_dim), dtype
  void* dC;                     // (batch, length, c_groups, state_dim), dtype
  float* dD;                    // (channels) or null
  float* dinitial_state;        // (sequences, channels, state_dim) or null
  float* scratch;               // count_selective_scan_scratch
  TokenStrides dy_strides;
};
// Floats of scratch memory.
int64_t count_selective_scan_scratch(const SelectiveScanParams& forward);
void launch_selective_scan_backward(const SelectiveScanBackwardParams& params, cudaStream_t stream);

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

struct CausalConv1dBackwardParams {
  CausalConv1dParams forward;  // y and final_state are null
  const void* dy;              // (batch, length, channels), dtype as everything here
  const void* dfinal_state;    // (sequences, width - 1, channels)
  void* dx;                    // (batch, length, channels)
  void* dweight;               // (channels, width)
  void* dbias;                 // (channels) or null
  void* dinitial_state;        // (sequences, width - 1, channels) or null
  float* partials;             // count_causal_conv1d_partials
  TokenStrides dy_strides;
};
// Floats of scratch memory.
int64_t count_causal_conv1d_partials(const CausalConv1dParams& forward);
void launch_causal_conv1d_backward(const CausalConv1dBackwardParams& params, cudaStream_t stream);

struct GateParams {
  const void* x;     // (rows, channels), dtype as everything here
  const void* z;     // (rows, channels)
  const void* bias;  // (channels) or null
  void* y;           // (rows, channels)
  int64_t rows, channels, x_stride, z_stride;
  DType dtype;
};
void launch_gate(const GateParams& params, cudaStream_t stream);

struct GateBackwardParams {
  const void* dy;    // (rows, channels), dtype as everything here
  const void* x;     // (rows, channels)
  const void* z;     // (rows, channels)
  const void* bias;  // (channels) or null
  void* dx;          // (rows, channels)
  void* dz;          // (rows, channels)
  int64_t rows, channels, dy_stride, x_stride, z_stride, dx_stride, dz_stride;
  DType dtype;
};
void launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream);

struct DistillationLossesParams {
  void* logits;           // (tokens, vocab), dtype; becomes the gradient
  const void* taught;     // (tokens, vocab), dtype, or null
  const int64_t* labels;  // (tokens)
  float *ce, *kl;         // (tokens)
  int64_t tokens, vocab;
  float beta, temperature, kl_weight;
  bool gradient;  // is wanted
  DType dtype;
};
void launch_distillation_losses(const DistillationLossesParams& params, cudaStream_t stream);

struct SoftplusParams {
  const void* x;      // (rows, channels), dtype
  const float* bias;  // (channels) or null
  float* y;           // (rows, channels)
  int64_t rows, channels, x_stride;
  DType dtype;
};
void launch_softplus(const SoftplusParams& params, cudaStream_t stream);

struct AppendKvParams {
  void *k_cache, *v_cache;                   // (pages, kv_heads, page_size, head_dim), dtype
  const void *k, *v;                         // (tokens, kv_heads, head_dim), dtype
  const int32_t* page_table;                 // (rows, max_pages)
  const int32_t* cu_seqlens_q;               // (rows + 1)
  const int32_t* kv_lengths;                 // (rows), 0 or less = padding row
  int64_t k_stride, v_stride, table_stride;  // of tokens, tokens, rows
  int tokens, rows, kv_heads, page_size, head_dim;
  DType dtype;
};
void launch_append_kv(const AppendKvParams& params, cudaStream_t stream);

struct RotateAppendKvParams {
  void *k_cache, *v_cache;           // (pages, kv_heads, page_size, head_dim), dtype
  void* qkv;                         // (tokens, heads + 2 * kv_heads, head_dim), dtype
  const float* inv_freq;             // (head_dim / 2)
  const int32_t* page_table;         // (rows, max_pages)
  const int32_t* cu_seqlens_q;       // (rows + 1)
  const int32_t* kv_lengths;         // (rows), 0 or less = padding row
  int64_t qkv_stride, table_stride;  // of tokens, rows
  int tokens, rows, heads, kv_heads, page_size, head_dim;
  DType dtype;
};
void launch_rotate_append_kv(const RotateAppendKvParams& params, cudaStream_t stream);

struct PagedAttentionParams {
  const void* q;                   // (tokens, heads, head_dim), dtype
  const void *k_cache, *v_cache;   // (pages, kv_heads, page_size, head_dim), dtype
  const int32_t* page_table;       // (rows, max_pages)
  const int32_t* cu_seqlens_q;     // (rows + 1)
  const int32_t* kv_lengths;       // (rows), 0 or less = padding row
  const int32_t* shared;           // (rows, 2): first row of the group, tokens it shares; or null
  void* out;                       // (tokens, heads, head_dim), dtype
  float* lse;                      // (tokens, heads), log-sum-exp of the scaled scores; or null
  float* scratch;                  // as many as count_paged_attention_scratch says
  uint32_t* tickets;               // as many as are counted, zeros, and zeros again afterwards
  int64_t q_stride, table_stride;  // of tokens, rows
  int tokens, rows, max_pages, num_pages, heads, kv_heads, page_size, head_dim;
  bool decode;  // by the kernels for one query a row
  float scale;
  DType dtype;
};
int64_t count_paged_attention_scratch(const PagedAttentionParams& params);
int64_t count_paged_attention_tickets(const PagedAttentionParams& params);
void launch_paged_attention(const PagedAttentionParams& params, cudaStream_t stream);
// Of it, what is no decode and has 16-bit data in vectors of 16 bytes, of 64, 96 or 128.
void launch_paged_prefill(const PagedAttentionParams& params, cudaStream_t stream);
// Of that, on Hopper all of it; takes kPagedPrefillTickets.
constexpr int kPagedPrefillTickets = 2;
bool runs_paged_prefill_wgmma();
void launch_paged_prefill_wgmma(const PagedAttentionParams& params, cudaStream_t stream);

struct SampleParams {
  const void* logits;          // (batch, vocabulary), dtype: float32 or bfloat16
  const float* temperature;    // (batch)
  const int32_t* top_k;        // (batch)
  const float *top_p, *min_p;  // (batch)
  const int64_t* rng_key;      // (batch, 4)
  int64_t* token;              // (batch)
  float* logprob;              // (batch)
  int64_t logits_stride;       // of the batch dimension
  int batch, vocabulary;
  DType dtype;
};
void launch_sample(const SampleParams& params, cudaStream_t stream);

}  // namespace reasoners
