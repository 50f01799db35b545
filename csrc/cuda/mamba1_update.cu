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
  static constexpr bool kWeights = true;  // constants and decays are, no kernel's results
  Mamba1UpdateParams p;
  int share;  // channels of B's, and x's, chunks to one of C's

  struct Constants {
    ConvTaps taps;
    float dt_bias, D;
  };
  // Whether `count` values of B, or of C, stand at a multiple of their size.
  bool aligned(int count) const {
    return reinterpret_cast<uintptr_t>(p.projected) % (count * sizeof(data_t)) == 0 &&
           p.projected_stride % count == 0 && p.channels % count == 0 && p.kv_dim % count == 0;
  }
  // Whether fetch's pieces stand at multiples of 16 bytes, and vectors of decays.
  bool streams() const {
    constexpr int kChunk = 16 / sizeof(data_t);
    return aligned(kChunk) && p.dt_stride % kChunk == 0 && is_aligned<uint4>(p.dt) &&
           is_aligned<uint4>(p.conv_state) && is_aligned<uint4>(p.state) &&
           is_aligned<uint4>(p.A_log);
  }
  struct Inputs {
    PastInputs<data_t> past;
    data_t x, dt, z;
    data_t* newest;  // where the ring takes x
  };
  __device__ const data_t* values(const void* parameter) const {
    return static_cast<const data_t*>(parameter);
  }
  __device__ const data_t* projected(int64_t row) const {
    return values(p.projected) + row * p.projected_stride;
  }
  // The kv heads' chunk of N channels that a channel repeats.
  __device__ int chunk(int channel) const { return channel / p.state_dim / share * p.state_dim; }
  __device__ Constants constants(int channel) const {
    return {conv_taps(values(p.conv_weight), values(p.conv_bias), channel, p.width),
            to_float(values(p.dt_bias)[channel]), p.D[channel]};
  }
  __device__ const float* decays(int channel) const {
    return p.A_log + int64_t(channel) * p.state_dim;
  }
  __device__ float A(float decay) const { return -expf(decay); }
  __device__ data_t* ring(int64_t slot, int channel) const {
    return static_cast<data_t*>(p.conv_state) + slot * p.width * p.channels + channel;
  }
  __device__ void prefetch_slot(int64_t slot, int channel) const {
#pragma unroll
    for (int w = 0; w < kMaxConvWidth; ++w)
      if (w < p.width) prefetch(ring(slot, channel) + w * p.channels);
  }
  __device__ int length(int64_t row) const { return p.lengths[row]; }
  // What a block reads of a row, in shared memory.
  struct alignas(128) Staged {
    data_t z[kStreamChannels], dt[kStreamChannels], C[kStreamChannels];
    data_t x[kStreamChannels], B[kStreamChannels];  // fewer, where they are shared
    data_t past[kMaxConvWidth - 1][kStreamChannels];
  };
  // A range of channels, and what they read of x and B.
  struct Part {
    int first, count, kv_first, kv_count;
  };
  __device__ Part part(int first, int count) const {
    const int kv = chunk(first);
    return {first, count, kv, chunk(first + count - 1) + p.state_dim - kv};
  }
  struct Place {
    int x, b, c;  // a channel's x, and first entries of B and C, in those of its part
  };
  __device__ Place place(const Part& part, int channel) const {
    const int b = chunk(channel) - part.kv_first, n = channel % p.state_dim;
    return {b + n, b, channel - n - part.first};
  }
  __device__ Inputs inputs(int64_t row, const Place& place, int channel) const {
    Inputs in;
    in.x = projected(row)[p.channels + place.x];
    in.dt = values(p.dt)[row * p.dt_stride + channel];
    in.z = projected(row)[channel];
    return in;
  }
  // Entries of the ring: the oldest input, the one after another, the one that takes the newest.
  __device__ int oldest(int length) const { return p.width == 4 ? length & 3 : length % p.width; }
  __device__ int after(int entry) const { return entry + 1 == p.width ? 0 : entry + 1; }
  __device__ int newest(int oldest) const { return oldest == 0 ? p.width - 1 : oldest - 1; }
  __device__ void read_ring(Inputs& in, int64_t slot, int length, int channel) const {
    data_t* ring = this->ring(slot, channel);
    int entry = oldest(length);
    in.newest = ring + newest(entry) * p.channels;
#pragma unroll
    for (int w = 0; w < kMaxConvWidth - 1; ++w)
      if (w < p.width - 1) {
        in.past.at[w] = ring[entry * p.channels];
        entry = after(entry);
      }
  }
  // By a warp. Returns where the ring takes the inputs.
  __device__ data_t* fetch(Staged& staged, const Part& part, int64_t row, int64_t slot,
                           int length) const {
    constexpr int kChunk = 16 / sizeof(data_t);
    static_assert(32 * kChunk >= kStreamChannels);
    const int at = threadIdx.x % 32 * kChunk;
    const data_t* from = projected(row) + at;
    data_t* ring = this->ring(slot, part.first);
    int entry = oldest(length);
    data_t* newest = ring + this->newest(entry) * p.channels;
    if (at < part.count) {
      copy_async_16(staged.z + at, from + part.first);
      copy_async_16(staged.C + at, C(row) + part.first + at);
      copy_async_16(staged.dt + at, values(p.dt) + row * p.dt_stride + part.first + at);
#pragma unroll
      for (int w = 0; w < kMaxConvWidth - 1; ++w)
        if (w < p.width - 1) {
          copy_async_16(staged.past[w] + at, ring + at + entry * p.channels);
          entry = after(entry);
        }
    }
    if (at < part.kv_count) {
      copy_async_16(staged.x + at, from + p.channels + part.kv_first);
      copy_async_16(staged.B + at, B(row) + part.kv_first + at);
    }
    return newest;
  }
  __device__ Inputs staged(const Staged& staged, const Place& place, void* newest) const {
    Inputs in;
#pragma unroll
    for (int w = 0; w < kMaxConvWidth - 1; ++w) in.past.at[w] = staged.past[w][threadIdx.x];
    in.x = staged.x[place.x];
    in.dt = staged.dt[threadIdx.x];
    in.z = staged.z[threadIdx.x];
    in.newest = static_cast<data_t*>(newest) + threadIdx.x;
    return in;
  }

  __device__ float delta(const Constants& constants, const Inputs& in) const {
    return softplus(to_float(in.dt) + constants.dt_bias);
  }
  __device__ float x(const Constants& constants, const Inputs& in, bool stores) const {
    if (stores) *in.newest = in.x;
    return to_float(convolve<true>(constants.taps, p.width, in.past, in.x));
  }
  __device__ const data_t* B(int64_t row) const { return projected(row) + p.channels + p.kv_dim; }
  __device__ const data_t* C(int64_t row) const {
    return projected(row) + p.channels + 2 * p.kv_dim;
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
  const Mamba1<data_t> mixer{p, p.channels / p.kv_dim};
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
