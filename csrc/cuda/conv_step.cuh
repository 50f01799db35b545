// One token of a depthwise causal convolution of width 2 to 4.
//
// The past inputs are a ring of `width` entries a slot, position t in entry t % width: a token
// reads width - 1 of them and writes the one that nobody reads, so a channel may be convolved by
// several blocks at once as long as one of them stores.
#pragma once

#include "activation.cuh"
#include "convert.cuh"

namespace reasoners {

constexpr int kMaxConvWidth = 4;

// The taps and the bias of one channel.
struct ConvTaps {
  float at[kMaxConvWidth], bias;
};

template <typename data_t>
__device__ inline ConvTaps conv_taps(const data_t* weight, const data_t* bias, int channel,
                                     int width) {
  ConvTaps taps;
  const data_t* mine = weight + int64_t(channel) * width;
  if (width == 4) {
    const auto all = *reinterpret_cast<const Vec<data_t, 4>*>(mine);
#pragma unroll
    for (int w = 0; w < 4; ++w) taps.at[w] = to_float(all.at[w]);
  } else {
#pragma unroll
    for (int w = 0; w < kMaxConvWidth; ++w) taps.at[w] = w < width ? to_float(mine[w]) : 0.f;
  }
  taps.bias = bias ? to_float(bias[channel]) : 0.f;
  return taps;
}

// The inputs that a token reads, oldest first.
template <typename data_t>
struct PastInputs {
  data_t at[kMaxConvWidth - 1];
};

// `ring`: the channel's place in its slot; `length`: of the sequence including the current input.
template <typename data_t>
__device__ inline PastInputs<data_t> past_inputs(const data_t* ring, int64_t channels, int width,
                                                 int length) {
  PastInputs<data_t> past;
  int entry = length % width;
#pragma unroll
  for (int w = 0; w < kMaxConvWidth - 1; ++w)
    if (w < width - 1) {
      past.at[w] = ring[entry * channels];
      entry = entry + 1 == width ? 0 : entry + 1;
    }
  return past;
}

template <bool kSilu, typename data_t>
__device__ inline data_t convolve(const ConvTaps& taps, int width, const PastInputs<data_t>& past,
                                  data_t input) {
  float sum = taps.bias;
  if (width == kMaxConvWidth) {
#pragma unroll
    for (int w = 0; w < kMaxConvWidth - 1; ++w) sum += taps.at[w] * to_float(past.at[w]);
    sum += taps.at[kMaxConvWidth - 1] * to_float(input);
  } else {
    sum += taps.at[0] * to_float(past.at[0]);
    if (width == 3) sum += taps.at[1] * to_float(past.at[1]);
    sum += (width == 3 ? taps.at[2] : taps.at[1]) * to_float(input);
  }
  return from_float<data_t>(kSilu ? silu(sum) : sum);
}

}  // namespace reasoners
