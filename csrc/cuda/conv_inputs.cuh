// What the convolution and its derivative read: inputs that reach back before a sequence, weights,
// and where a token's sequence is.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace reasoners {

// Where a sequence's inputs are: token t of it for any t >= -kHistory, from `channel` on.
template <typename data_t, int kVec, int kHistory>
struct Inputs {
  using Channels = Vec<data_t, kVec>;

  __device__ Inputs(const CausalConv1dParams& p, const Sequence& sequence, int64_t index,
                    int channel)
      : x(static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch +
          sequence.begin * p.x_strides.token + channel),
        past(p.initial_state ? static_cast<const data_t*>(p.initial_state) +
                                   index * kHistory * p.channels + channel
                             : nullptr),
        token(p.x_strides.token),
        channels(p.channels) {}
  __device__ Channels since_begin(int64_t t) const {
    return *reinterpret_cast<const Channels*>(x + t * token);
  }
  __device__ Channels at(int64_t t) const {
    if (t >= 0) return since_begin(t);
    if (past) return *reinterpret_cast<const Channels*>(past + (kHistory + t) * channels);
    Channels zeros;
#pragma unroll
    for (int k = 0; k < kVec; ++k) zeros.at[k] = from_float<data_t>(0.f);
    return zeros;
  }

  const data_t *x, *past;
  int64_t token, channels;
};

// The sequence that holds token `at` of the batch: the last to begin there or before.
__device__ inline int64_t sequence_of(const CausalConv1dParams& p, int64_t at) {
  if (p.cu_seqlens == nullptr) return at / p.length;
  return sequence_at_place(p.sequences, at, [&](int64_t i) { return p.cu_seqlens[i]; });
}

// The weights and the bias of kVec neighbouring channels.
template <typename data_t, int kVec, int kWidth>
struct Taps {
  using Channels = Vec<data_t, kVec>;

  __device__ Taps(const CausalConv1dParams& p, int channel) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {  // the channels' weights are kVec * kWidth neighbours
      const auto some = *reinterpret_cast<const Channels*>(static_cast<const data_t*>(p.weight) +
                                                           int64_t(channel) * kWidth + i * kVec);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        weight[(i * kVec + k) % kWidth][(i * kVec + k) / kWidth] = to_float(some.at[k]);
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      bias[k] = p.bias ? to_float(static_cast<const data_t*>(p.bias)[channel + k]) : 0.f;
  }
  // Of channel `k` and the inputs from u[i] on.
  template <int kCount>
  __device__ float convolve(const float (&u)[kCount][kVec], int i, int k) const {
    float sum = bias[k];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sum = fmaf(weight[w][k], u[i + w][k], sum);
    return sum;
  }
  template <int kCount>
  __device__ float convolve(const Channels (&u)[kCount], int i, int k) const {
    float sum = bias[k];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sum = fmaf(weight[w][k], to_float(u[i + w].at[k]), sum);
    return sum;
  }

  float weight[kWidth][kVec], bias[kVec];
};

}  // namespace reasoners
