// One token of the Mamba-1 recurrence on given x, delta, B and C: see selective_step.cuh. State
// dimensions other than 8, 16, 32 and 64 take the loop at the end, a thread to a channel, which is
// right and no more.

#include "selective_step.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct Bare {
  using Data = data_t;
  static constexpr bool kWeights = false;  // A and D may be the kernel before's
  SelectiveUpdateParams p;

  struct Constants {
    float D;
  };
  // Whether `count` values of B, and of C, stand at a multiple of their size.
  bool aligned(int count) const {
    const auto whole = [&](const void* first, int64_t stride) {
      return reinterpret_cast<uintptr_t>(first) % (count * sizeof(data_t)) == 0 &&
             stride % count == 0;
    };
    return whole(p.B, p.b_stride) && whole(p.C, p.c_stride);
  }
  // Whether fetch's pieces stand at multiples of 16 bytes, and vectors of A, and the groups that a
  // block reads are no more than there is room for.
  bool streams() const {
    constexpr int kChunk = 16 / sizeof(data_t);
    const auto fits = [](int channels) { return channels % kStreamStateDim == 0; };
    return aligned(kChunk) && is_aligned<uint4>(p.x) && p.x_stride % kChunk == 0 &&
           is_aligned<uint4>(p.delta) && p.delta_stride % 4 == 0 && is_aligned<uint4>(p.state) &&
           is_aligned<uint4>(p.A) && fits(p.channels / p.b_groups) && fits(p.channels / p.c_groups);
  }
  struct Inputs {
    data_t x;
    float delta;
  };
  __device__ Constants constants(int channel) const { return {p.D ? p.D[channel] : 0.f}; }
  __device__ const float* decays(int channel) const { return p.A + int64_t(channel) * p.state_dim; }
  __device__ float A(float decay) const { return decay; }
  __device__ void prefetch_slot(int64_t, int) const {}
  __device__ int length(int64_t) const { return 0; }
  __device__ const data_t* values(const void* tensor) const {
    return static_cast<const data_t*>(tensor);
  }
  __device__ const data_t* x(int64_t row) const { return values(p.x) + row * p.x_stride; }
  __device__ const float* delta(int64_t row) const { return p.delta + row * p.delta_stride; }

  // What a block reads of a row, in shared memory.
  struct alignas(128) Staged {
    float delta[kStreamChannels];
    data_t x[kStreamChannels], B[kStreamChannels], C[kStreamChannels];
  };
  // A range of channels, and what they read of B and C.
  struct Part {
    int first, count, b_first, b_count, c_first, c_count;
  };
  // The first entry of a channel's group.
  __device__ int group(int channel, int groups) const {
    return channel / (p.channels / groups) * p.state_dim;
  }
  __device__ Part part(int first, int count) const {
    const int b = group(first, p.b_groups), c = group(first, p.c_groups), last = first + count - 1;
    return {first, count,
            b,     group(last, p.b_groups) + p.state_dim - b,
            c,     group(last, p.c_groups) + p.state_dim - c};
  }
  struct Place {
    int b, c;  // a channel's first entries of B and C, in those of its part
  };
  __device__ Place place(const Part& part, int channel) const {
    return {group(channel, p.b_groups) - part.b_first, group(channel, p.c_groups) - part.c_first};
  }
  __device__ Inputs inputs(int64_t row, const Place&, int channel) const {
    return {x(row)[channel], delta(row)[channel]};
  }
  __device__ void read_ring(Inputs&, int64_t, int, int) const {}
  // By a warp.
  __device__ void* fetch(Staged& staged, const Part& part, int64_t row, int64_t, int) const {
    const auto copy = [](auto* to, const auto* from, int count) {
      constexpr int kChunk = 16 / sizeof(*to);
      static_assert(32 * kChunk >= kStreamChannels);
      const int at = threadIdx.x % 32 * kChunk;
      if (at < count) copy_async_16(to + at, from + at);
    };
    copy(staged.delta, delta(row) + part.first, part.count);
    copy(staged.x, x(row) + part.first, part.count);
    copy(staged.B, B(row) + part.b_first, part.b_count);
    copy(staged.C, C(row) + part.c_first, part.c_count);
    return nullptr;
  }
  __device__ Inputs staged(const Staged& staged, const Place&, void*) const {
    return {staged.x[threadIdx.x], staged.delta[threadIdx.x]};
  }

  __device__ float delta(const Constants&, const Inputs& in) const { return in.delta; }
  __device__ float x(const Constants&, const Inputs& in, bool) const { return to_float(in.x); }
  __device__ const data_t* B(int64_t row) const { return values(p.B) + row * p.b_stride; }
  __device__ const data_t* C(int64_t row) const { return values(p.C) + row * p.c_stride; }
  __device__ void store(int64_t row, int channel, float y) const {
    static_cast<data_t*>(p.y)[row * p.channels + channel] = from_float<data_t>(y);
  }
  __device__ void finish(const Constants& constants, const Inputs&, int64_t row, int channel,
                         float x, float y) const {
    store(row, channel, y + constants.D * x);
  }
};

template <typename data_t, typename state_t>
__global__ void __launch_bounds__(128) any_width_kernel(const Bare<data_t> mixer) {
  const auto& p = mixer.p;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t row = blockIdx.x, slot = p.slots[row];
  if (slot < 0) return mixer.store(row, channel, 0.f);
  const auto constants = mixer.constants(channel);
  const auto place = mixer.place(mixer.part(0, p.channels), channel);
  const auto in = mixer.inputs(row, place, channel);
  const float delta = mixer.delta(constants, in);
  const float x = mixer.x(constants, in, true);
  const data_t *b = mixer.B(row) + place.b, *c = mixer.C(row) + place.c;
  auto* s = static_cast<state_t*>(p.state) + (slot * p.channels + channel) * p.state_dim;
  float sum = 0.f;
  for (int n = 0; n < p.state_dim; ++n) {
    const float next =
        expf(delta * mixer.decays(channel)[n]) * to_float(s[n]) + delta * x * to_float(b[n]);
    s[n] = from_float<state_t>(next);
    sum += next * to_float(c[n]);
  }
  mixer.finish(constants, in, row, channel, x, sum);
}

template <typename data_t, typename state_t>
void dispatch_width(const SelectiveUpdateParams& p, cudaStream_t stream) {
  const Bare<data_t> mixer{p};
  const dim3 grid(p.batch, (p.channels + 127) / 128);
  if (!launch_selective_step<Bare<data_t>, state_t>(mixer, stream))
    any_width_kernel<data_t, state_t><<<grid, 128, 0, stream>>>(mixer);
}

template <typename data_t>
void dispatch_state(const SelectiveUpdateParams& p, cudaStream_t stream) {
  switch (p.state_dtype) {
    case DType::kFloat32:
      return dispatch_width<data_t, float>(p, stream);
    case DType::kBFloat16:
      return dispatch_width<data_t, __nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_width<data_t, __half>(p, stream);
  }
}

}  // namespace

void launch_selective_update(const SelectiveUpdateParams& p, cudaStream_t stream) {
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
