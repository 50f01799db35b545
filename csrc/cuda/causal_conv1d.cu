// y_t = act(bias + sum_w weight[:, w] u_{t - (width - 1) + w}), where u is a sequence's inputs
// after its initial state.
//
// A thread convolves kVec neighbouring channels, 16 bytes of them, over a run of tokens of the
// whole batch and keeps the last inputs in registers. Tokens come through shared memory, where each
// thread has kSlots places of its own: while one token is convolved, the next kAhead are on their
// way, and none takes registers. A run may hold ends of sequences: the thread finds the first one
// and begins anew at each. Few long sequences and many short ones are thus the same work. A second,
// small launch writes the final states, one thread per (sequence, place in the history, channels).
//
// Bytes that must move, 16-bit: 4 a channel and token; inputs read twice add 2 * 3 / 64 = 0.1. With
// 16 warps a multiprocessor, 57 kB are on their way; the reads need 16. H200, 16,384 x 6,144, width
// 4, bfloat16: 108 us, 89 % of a copy's rate; with 16 tokens a thread and four loads at a time 179.
//
//   block   32 columns of kVec = 16 bytes (or 1 channel) x 4 runs of kRun = 64 tokens, less where
//           there are few

#include "activation.cuh"
#include "async_copy.cuh"
#include "conv_inputs.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "scan.cuh"

namespace reasoners {
namespace {

constexpr int kColumns = 32, kRows = 4, kThreads = kColumns * kRows;
constexpr int kRun = 64, kShortRun = 8;
constexpr int kGroup = 4;   // tokens between two moves of the last inputs
constexpr int kBlocks = 4;  // per multiprocessor

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    causal_conv1d_kernel(const CausalConv1dParams p, int64_t tokens, int run, int column_blocks) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Words<data_t, kVec>;
  __shared__ Channels slots[kSlots][kThreads];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int channel = (blockIdx.x % column_blocks * kColumns + column) * kVec;
  int64_t first = (blockIdx.x / column_blocks * int64_t(kRows) + row) * run;
  const int64_t stop = min(first + run, tokens);
  if (first >= stop) return;
  int64_t index = sequence_of(p, first);
  if (channel >= p.channels) return;

  const Taps<data_t, kVec, kWidth> taps(p, channel);
  auto* y = static_cast<data_t*>(p.y) + first * p.channels + channel;
  for (; first < stop && index < p.sequences; ++index) {
    const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
    const int64_t zero = sequence.batch * p.length + sequence.begin;  // its first token
    const int64_t last = min(stop, sequence.batch * p.length + sequence.end);
    if (first >= last) continue;
    const int count = static_cast<int>(last - first);
    const Inputs<data_t, kVec, kHistory> inputs(p, sequence, index, channel);
    const data_t* x = inputs.x + (first - zero) * inputs.token;
    const auto fetch = [&](int j) {  // one token after the other
      if (j < count) copy_ahead<data_t, kVec>(&slots[j % kSlots][threadIdx.x], x);
      x += inputs.token;
      commit_copies();
    };
    wait_for_copies<0>();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fetch(j);
    Channels u[kHistory + kGroup];
#pragma unroll
    for (int w = 0; w < kHistory; ++w) u[w] = inputs.at(first - zero - kHistory + w);
    for (int from = 0; from < count; from += kGroup) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int j = from + i;
        if (j >= count) break;
        wait_for_copies<kAhead - 1>();
        u[kHistory + i] = slots[j % kSlots][threadIdx.x];
        fetch(j + kAhead);
        Vec<data_t, kVec> out;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float sum = taps.convolve(u, i, k);
          out.at[k] = from_float<data_t>(p.silu ? silu(sum) : sum);
        }
        *reinterpret_cast<Vec<data_t, kVec>*>(y) = out;
        y += p.channels;
      }
#pragma unroll
      for (int w = 0; w < kHistory; ++w) u[w] = u[w + kGroup];
    }
    first = last;
  }
}

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads) final_state_kernel(const CausalConv1dParams p) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Words<data_t, kVec>;
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
  const int64_t column_blocks = (vectors + kColumns - 1) / kColumns;
  int run = kRun;
  const auto blocks = [&] { return (tokens + kRows * run - 1) / (kRows * run) * column_blocks; };
  const int64_t enough = 2 * count_processors();  // blocks: with fewer, shorter runs pay
  while (run > kShortRun && blocks() < enough) run /= 2;
  if (tokens > 0)
    causal_conv1d_kernel<data_t, kVec, kWidth>
        <<<static_cast<unsigned>(blocks()), kThreads, 0, stream>>>(p, tokens, run,
                                                                   static_cast<int>(column_blocks));
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
  constexpr int kVec = 16 / sizeof(data_t);
  using Channels = Vec<data_t, kVec>;
  const bool whole = p.channels % kVec == 0 && p.x_strides.batch % kVec == 0 &&
                     p.x_strides.token % kVec == 0 && is_aligned<Channels>(p.x) &&
                     is_aligned<Channels>(p.weight) && is_aligned<Channels>(p.initial_state) &&
                     is_aligned<Channels>(p.y) && is_aligned<Channels>(p.final_state);
  return whole ? dispatch_width<data_t, kVec>(p, stream) : dispatch_width<data_t, 1>(p, stream);
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
