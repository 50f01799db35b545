// y_t = act(bias + sum_w weight[:, w] u_{t - (width - 1) + w}), where u is a sequence's inputs
// after its initial state.
//
// A thread convolves kVec neighbouring channels over a segment of kSegment tokens of the whole
// batch, kAhead tokens loaded at a time, and keeps the last inputs in registers. A segment may hold
// ends of sequences: the thread finds the first one by bisection and reloads its past at each. Few
// long sequences and many short ones are thus the same work. A second, small launch writes the
// final states, one thread per (sequence, place in the history, channels).

#include "activation.cuh"
#include "conv_inputs.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kSegment = 16;
constexpr int kAhead = 4;

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_kernel(const CausalConv1dParams p, int64_t tokens) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Vec<data_t, kVec>;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int vectors = p.channels / kVec;
  int64_t t = at / vectors * kSegment;  // tokens are counted over the batch
  if (t >= tokens) return;
  const int64_t stop = min(t + kSegment, tokens);
  const int channel = at % vectors * kVec;

  const Taps<data_t, kVec, kWidth> taps(p, channel);
  auto* y = static_cast<data_t*>(p.y) + channel;
  for (int64_t index = sequence_of(p, t); t < stop && index < p.sequences; ++index) {
    const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
    const int64_t zero = sequence.batch * p.length + sequence.begin;  // its first token
    const int64_t last = min(stop, sequence.batch * p.length + sequence.end);
    const Inputs<data_t, kVec, kHistory> inputs(p, sequence, index, channel);
    float u[kHistory + kAhead][kVec];
#pragma unroll
    for (int w = 0; w < kHistory; ++w) {
      const Channels past = inputs.at(t - zero - kHistory + w);
#pragma unroll
      for (int k = 0; k < kVec; ++k) u[w][k] = to_float(past.at[k]);
    }
    for (; t < last; t += kAhead) {
      const int count = last - t < kAhead ? int(last - t) : kAhead;
      Channels next[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i < count) next[i] = inputs.since_begin(t - zero + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i >= count) break;
        Channels out;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          u[kHistory + i][k] = to_float(next[i].at[k]);
          const float sum = taps.convolve(u, i, k);
          out.at[k] = from_float<data_t>(p.silu ? silu(sum) : sum);
        }
        *reinterpret_cast<Channels*>(y + (t + i) * p.channels) = out;
      }
#pragma unroll
      for (int w = 0; w < kHistory; ++w)
#pragma unroll
        for (int k = 0; k < kVec; ++k) u[w][k] = u[w + kAhead][k];
    }
    t = last;
  }
}

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads) final_state_kernel(const CausalConv1dParams p) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Vec<data_t, kVec>;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int vectors = p.channels / kVec;
  const int64_t index = at / vectors / kHistory;
  if (index >= p.sequences) return;
  const int channel = at % vectors * kVec, w = at / vectors % kHistory;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const Inputs<data_t, kVec, kHistory> inputs(p, sequence, index, channel);
  *reinterpret_cast<Channels*>(static_cast<data_t*>(p.final_state) +
                               (index * kHistory + w) * p.channels + channel) =
      inputs.at(sequence.end - sequence.begin - kHistory + w);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

template <typename data_t, int kVec, int kWidth>
void launch(const CausalConv1dParams& p, cudaStream_t stream) {
  const int64_t tokens = p.batch * p.length, vectors = p.channels / kVec;
  const int64_t segments = (tokens + kSegment - 1) / kSegment;
  if (segments > 0)
    causal_conv1d_kernel<data_t, kVec, kWidth>
        <<<blocks_for(segments * vectors), kThreads, 0, stream>>>(p, tokens);
  final_state_kernel<data_t, kVec, kWidth>
      <<<blocks_for(p.sequences * (kWidth - 1) * vectors), kThreads, 0, stream>>>(p);
}

template <typename data_t, int kVec>
void dispatch_width(const CausalConv1dParams& p, cudaStream_t stream) {
  if (p.width == 2) return launch<data_t, kVec, 2>(p, stream);
  if (p.width == 3) return launch<data_t, kVec, 3>(p, stream);
  launch<data_t, kVec, 4>(p, stream);
}

template <typename data_t>
void dispatch_vector(const CausalConv1dParams& p, cudaStream_t stream) {
  using Channels = Vec<data_t, 4>;
  const bool whole = p.channels % 4 == 0 && p.x_strides.batch % 4 == 0 &&
                     p.x_strides.token % 4 == 0 && is_aligned<Channels>(p.x) &&
                     is_aligned<Channels>(p.weight) && is_aligned<Channels>(p.initial_state) &&
                     is_aligned<Channels>(p.y) && is_aligned<Channels>(p.final_state);
  return whole ? dispatch_width<data_t, 4>(p, stream) : dispatch_width<data_t, 1>(p, stream);
}

}  // namespace

void launch_causal_conv1d(const CausalConv1dParams& p, cudaStream_t stream) {
  if (p.sequences == 0 || p.channels == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_vector<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_vector<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_vector<__half>(p, stream);
  }
}

}  // namespace reasoners
