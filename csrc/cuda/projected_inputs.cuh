// What the fused mixers read: x, B and C from a row of in_proj through a step of the convolution,
// and z. Heads that share x or B each convolve for themselves; the first of them stores the new
// inputs.
#pragma once

#include "conv_step.cuh"
#include "state_stream.cuh"

namespace reasoners {

template <typename data_t, bool kSilu>
struct ProjectedInputs {
  MixerUpdateParams p;

  static constexpr bool kConvolves = true, kGates = true;

  __host__ __device__ constexpr int tiles() const { return 1; }
  __device__ const data_t* projected(int64_t row) const {
    return static_cast<const data_t*>(p.projected) + row * p.projected_stride;
  }
  __device__ float parameter(const void* values, int64_t i) const {
    return to_float(static_cast<const data_t*>(values)[i]);
  }
  __device__ float skip(int head) const { return p.D[head]; }

  // Channels of the convolution: those of x, B and C one after the other; a head's are
  // P of x, N of B, N of C.
  __host__ __device__ int b_channel() const { return p.x_heads * p.head_dim; }
  __host__ __device__ int c_channel() const { return b_channel() + p.b_groups * p.state_dim; }
  __host__ __device__ int64_t channels() const { return c_channel() + p.c_groups * p.state_dim; }
  __device__ int channel(const HeadPlace& place, int i) const {
    if (i < p.head_dim) return place.x * p.head_dim + i;
    if (i < p.head_dim + p.state_dim) return b_channel() + place.b * p.state_dim + i - p.head_dim;
    return c_channel() + place.c * p.state_dim + i - p.head_dim - p.state_dim;
  }
  __device__ const data_t* x(int64_t row, const HeadPlace& place) const {
    return projected(row) + p.conv_offset + place.x * p.head_dim;
  }
  __device__ const data_t* B(int64_t row, const HeadPlace& place) const {
    return projected(row) + p.conv_offset + b_channel() + place.b * p.state_dim;
  }
  __device__ const data_t* C(int64_t row, const HeadPlace& place) const {
    return projected(row) + p.conv_offset + c_channel() + place.c * p.state_dim;
  }
  __device__ const data_t* z(int64_t row, int head) const {
    return projected(row) + p.z_offset + head * p.head_dim;
  }

  __device__ int length(int64_t row) const { return p.lengths[row]; }
  // Of the ring, for the current input.
  __device__ int entry(int64_t row) const { return (length(row) - 1) % p.width; }
  static constexpr int kMaxPast = kMaxConvWidth - 1;
  using Past = PastInputs<data_t>;
  __device__ data_t* ring(int64_t slot) const {
    return static_cast<data_t*>(p.conv_state) + slot * p.width * channels();
  }
  // A channel's entries, read before it is known which is the oldest.
  struct Ring {
    data_t at[kMaxConvWidth];
  };
  __device__ Ring ring_inputs(int64_t slot, const HeadPlace& place, int i) const {
    const data_t* mine = ring(slot) + channel(place, i);
    Ring inputs;
#pragma unroll
    for (int w = 0; w < kMaxConvWidth; ++w)
      if (w < p.width) inputs.at[w] = mine[w * channels()];
    return inputs;
  }
  __device__ Past past(const Ring& inputs, int entry) const {
    Past past;
#pragma unroll
    for (int w = 0; w < kMaxPast; ++w) {
      const int from = entry + 1 + w < p.width ? entry + 1 + w : entry + 1 + w - p.width;
#pragma unroll
      for (int k = 0; k < kMaxConvWidth; ++k)
        if (from == k) past.at[w] = inputs.at[k];
    }
    return past;
  }

  // From a copy of the head's entries, oldest first, `stride` apart.
  __device__ Past past_of(const data_t* copy, int stride) const {
    Past past;
    if (p.width == kMaxConvWidth)
#pragma unroll
      for (int w = 0; w < kMaxPast; ++w) past.at[w] = copy[w * stride];
    else
#pragma unroll
      for (int w = 0; w < kMaxPast - 1; ++w)
        if (w < p.width - 1) past.at[w] = copy[w * stride];
    return past;
  }
  // The entry that takes the current input, of all channels.
  __device__ data_t* newest(int64_t slot, int entry) const {
    return ring(slot) + entry * channels();
  }

  // Of one of the head's channels, the same for all rows.
  struct Constants {
    ConvTaps taps;
    int channel;
    bool stores;
  };
  __device__ Constants constants(const HeadPlace& place, int i) const {
    const int channel = this->channel(place, i);
    const bool stores = i < p.head_dim                 ? place.owns_x
                        : i < p.head_dim + p.state_dim ? place.owns_b
                                                       : place.owns_c;
    return {conv_taps(static_cast<const data_t*>(p.conv_weight),
                      static_cast<const data_t*>(p.conv_bias), channel, p.width),
            channel, stores};
  }
  __device__ data_t value(const Constants& constants, data_t input, const Past& past,
                          data_t* newest) const {
    if (constants.stores) newest[constants.channel] = input;
    return convolve<kSilu>(constants.taps, p.width, past, input);
  }
  // Whether all of it may be copied 16 bytes at a time.
  bool aligned() const {
    constexpr int kChunk = 16 / sizeof(data_t);
    const auto fits = [](int64_t count) { return count % kChunk == 0; };
    return fits(p.projected_stride) && fits(p.conv_offset) && fits(p.z_offset) &&
           fits(channels()) && is_aligned<uint4>(p.projected) && is_aligned<uint4>(p.conv_state) &&
           is_aligned<uint4>(p.state) && is_aligned<uint4>(p.recent.tokens);
  }
  __device__ void store(int64_t row, int head, int i, float y) const {
    static_cast<data_t*>(p.y)[(row * p.heads + head) * p.head_dim + i] = from_float<data_t>(y);
  }
};

template <template <typename> typename Mixer, typename data_t>
void launch_mixer_step(const MixerUpdateParams& p, cudaStream_t stream) {
  const Mixer<data_t> mixer{{p}};
  switch (p.state_dtype) {
    case DType::kFloat32:
      launch_state<Mixer<data_t>, data_t, float>(mixer, stream);
      return;
    case DType::kBFloat16:
      launch_state<Mixer<data_t>, data_t, __nv_bfloat16>(mixer, stream);
      return;
    case DType::kFloat16:
      launch_state<Mixer<data_t>, data_t, __half>(mixer, stream);
      return;
  }
}

template <template <typename> typename Mixer>
void launch_mixer_step(const MixerUpdateParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_mixer_step<Mixer, float>(p, stream);
    case DType::kBFloat16:
      return launch_mixer_step<Mixer, __nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return launch_mixer_step<Mixer, __half>(p, stream);
  }
}

}  // namespace reasoners
