// One token of the Mamba-1 recurrence on given x, delta, B and C: see selective_step.cuh. State
// dimensions other than 16, 32 and 64 take the loop at the end, a thread to a channel, which is
// right and no more.

#include "selective_step.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct Bare {
  using Data = data_t;
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
  struct Inputs {
    data_t x;
    float delta;
  };
  __device__ Constants constants(int channel) const { return {p.D ? p.D[channel] : 0.f}; }
  __device__ float A(int channel, int n) const { return p.A[int64_t(channel) * p.state_dim + n]; }
  __device__ Inputs inputs(int64_t row, int64_t, int channel) const {
    return {static_cast<const data_t*>(p.x)[row * p.x_stride + channel],
            p.delta[row * p.delta_stride + channel]};
  }
  __device__ float delta(const Constants&, const Inputs& in) const { return in.delta; }
  __device__ float x(const Constants&, const Inputs& in, int64_t, int, bool) const {
    return to_float(in.x);
  }
  __device__ const data_t* B(int64_t row, int channel) const {
    return static_cast<const data_t*>(p.B) + row * p.b_stride +
           int64_t(channel / (p.channels / p.b_groups)) * p.state_dim;
  }
  __device__ const data_t* C(int64_t row, int channel) const {
    return static_cast<const data_t*>(p.C) + row * p.c_stride +
           int64_t(channel / (p.channels / p.c_groups)) * p.state_dim;
  }
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
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t row = blockIdx.y, slot = p.slots[row];
  if (slot < 0) return mixer.store(row, channel, 0.f);
  const auto constants = mixer.constants(channel);
  const auto in = mixer.inputs(row, slot, channel);
  const float delta = mixer.delta(constants, in);
  const float x = mixer.x(constants, in, slot, channel, true);
  const data_t *b = mixer.B(row, channel), *c = mixer.C(row, channel);
  auto* s = static_cast<state_t*>(p.state) + (slot * p.channels + channel) * p.state_dim;
  float sum = 0.f;
  for (int n = 0; n < p.state_dim; ++n) {
    const float next =
        expf(delta * mixer.A(channel, n)) * to_float(s[n]) + delta * x * to_float(b[n]);
    s[n] = from_float<state_t>(next);
    sum += next * to_float(c[n]);
  }
  mixer.finish(constants, in, row, channel, x, sum);
}

template <typename data_t, typename state_t>
void dispatch_width(const SelectiveUpdateParams& p, cudaStream_t stream) {
  const Bare<data_t> mixer{p};
  const dim3 grid((p.channels + 127) / 128, p.batch);
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
