// MambaInLlama's Mamba-1 mixer for one token, from in_proj's row [z, x, B, C, ...] and dt_proj's
// row to out_proj's: a convolution step with SiLU on x, delta = softplus(dt + dt_bias), S =
// exp(-delta exp(A_log)) S + delta x B, y = S . C + D x, out = y silu(z), in one launch
// (selective_step.cuh). x and B are those of the kv heads, repeated in chunks of N channels.

#include "conv_step.cuh"
#include "selective_step.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct Mamba1 {
  using Data = data_t;
  Mamba1UpdateParams p;

  struct Constants {
    ConvTaps taps;
    float dt_bias, D;
  };
  // Whether `count` values of B, or of C, stand at a multiple of their size.
  bool aligned(int count) const {
    return reinterpret_cast<uintptr_t>(p.projected) % (count * sizeof(data_t)) == 0 &&
           p.projected_stride % count == 0 && p.channels % count == 0 && p.kv_dim % count == 0;
  }
  struct Inputs {
    PastInputs<data_t> past;
    data_t x, dt, z;
    int length;
  };
  __device__ const data_t* values(const void* parameter) const {
    return static_cast<const data_t*>(parameter);
  }
  __device__ const data_t* projected(int64_t row) const {
    return values(p.projected) + row * p.projected_stride;
  }
  // The kv heads' chunk of N channels that a channel repeats.
  __device__ int chunk(int channel) const {
    return channel / p.state_dim / (p.channels / p.kv_dim) * p.state_dim;
  }
  __device__ Constants constants(int channel) const {
    return {conv_taps(values(p.conv_weight), values(p.conv_bias), channel, p.width),
            to_float(values(p.dt_bias)[channel]), p.D[channel]};
  }
  __device__ float A(int channel, int n) const {
    return -expf(p.A_log[int64_t(channel) * p.state_dim + n]);
  }
  __device__ data_t* ring(int64_t slot, int channel) const {
    return static_cast<data_t*>(p.conv_state) + slot * p.width * p.channels + channel;
  }
  __device__ Inputs inputs(int64_t row, int64_t slot, int channel) const {
    Inputs in;
    in.length = p.lengths[row];
    in.past = past_inputs(ring(slot, channel), p.channels, p.width, in.length);
    in.x = projected(row)[p.channels + chunk(channel) + channel % p.state_dim];
    in.dt = values(p.dt)[row * p.dt_stride + channel];
    in.z = projected(row)[channel];
    return in;
  }
  __device__ float delta(const Constants& constants, const Inputs& in) const {
    return softplus(to_float(in.dt) + constants.dt_bias);
  }
  __device__ float x(const Constants& constants, const Inputs& in, int64_t slot, int channel,
                     bool stores) const {
    if (stores) ring(slot, channel)[(in.length - 1) % p.width * p.channels] = in.x;
    return to_float(convolve<true>(constants.taps, p.width, in.past, in.x));
  }
  __device__ const data_t* B(int64_t row, int channel) const {
    return projected(row) + p.channels + p.kv_dim + chunk(channel);
  }
  __device__ const data_t* C(int64_t row, int channel) const {
    return projected(row) + p.channels + 2 * p.kv_dim + channel / p.state_dim * p.state_dim;
  }
  __device__ void store(int64_t row, int channel, float y) const {
    static_cast<data_t*>(p.y)[row * p.channels + channel] = from_float<data_t>(y);
  }
  __device__ void finish(const Constants& constants, const Inputs& in, int64_t row, int channel,
                         float x, float y) const {
    store(row, channel, (y + constants.D * x) * silu(to_float(in.z)));
  }
};

template <typename data_t>
void dispatch_state(const Mamba1UpdateParams& p, cudaStream_t stream) {
  const Mamba1<data_t> mixer{p};
  switch (p.state_dtype) {
    case DType::kFloat32:
      launch_selective_step<Mamba1<data_t>, float>(mixer, stream);
      return;
    case DType::kBFloat16:
      launch_selective_step<Mamba1<data_t>, __nv_bfloat16>(mixer, stream);
      return;
    case DType::kFloat16:
      launch_selective_step<Mamba1<data_t>, __half>(mixer, stream);
      return;
  }
}

}  // namespace

void launch_mamba1_update(const Mamba1UpdateParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.channels == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_state<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_state<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_state<__half>(p, stream);
  }
}

}  // namespace reasoners
