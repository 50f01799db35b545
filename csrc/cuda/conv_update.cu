// One token of a depthwise causal convolution, in place on each row's ring of past inputs: a thread
// a channel, see conv_step.cuh. It moves width + 1 values a channel in and out and is bound by
// them.

#include "conv_step.cuh"
#include "kernels.h"

namespace reasoners {
namespace {

constexpr int kThreads = 256;

template <bool kSilu, typename data_t>
__global__ void __launch_bounds__(kThreads) conv_update_kernel(const ConvUpdateParams p) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t row = blockIdx.y, slot = p.slots[row];
  auto* y = static_cast<data_t*>(p.y) + row * p.channels + channel;
  if (slot < 0) {
    *y = from_float<data_t>(0.f);
    return;
  }
  const auto taps = conv_taps(static_cast<const data_t*>(p.weight),
                              static_cast<const data_t*>(p.bias), channel, p.width);
  auto* ring = static_cast<data_t*>(p.state) + slot * p.width * p.channels + channel;
  const data_t input = static_cast<const data_t*>(p.x)[row * p.x_stride + channel];
  const int length = p.lengths[row];
  *y = convolve<kSilu>(taps, p.width, past_inputs(ring, p.channels, p.width, length), input);
  ring[(length - 1) % p.width * p.channels] = input;
}

template <typename data_t>
void launch(const ConvUpdateParams& p, cudaStream_t stream) {
  const dim3 grid((p.channels + kThreads - 1) / kThreads, p.batch);
  if (p.silu)
    conv_update_kernel<true, data_t><<<grid, kThreads, 0, stream>>>(p);
  else
    conv_update_kernel<false, data_t><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

void launch_conv_update(const ConvUpdateParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.channels == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch<float>(p, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return launch<__half>(p, stream);
  }
}

}  // namespace reasoners
