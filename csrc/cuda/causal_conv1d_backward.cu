// With s_t = bias + sum_w weight[:, w] u_{t - H + w}, H = width - 1, and g_t = dy_t act'(s_t):
//   du_t = sum_w weight[:, w] g_{t + H - w} (+ dfinal_state where t is one of the last H inputs)
//   dweight[:, w] = sum_t g_t u_{t - H + w},   dbias = sum_t g_t
// dx is du of the sequence's tokens, dinitial_state that of the H inputs before them.
//
// A thread walks kVec neighbouring channels over a run of kRun tokens of the whole batch, kAhead
// tokens loaded at a time, with the last H inputs and the H gradients that are still open in
// registers. Gradients of its last tokens need g of up to H tokens past the run, which it computes
// again: 3 tokens in 35. A run may hold ends of sequences, as in the forward. dweight and dbias are
// summed over the run in registers, over the kRows runs of a block in shared memory, and the
// blocks' partial sums by a second launch, all in fixed order. dinitial_state is a small launch of
// its own, one thread per (sequence, place in the history, channels).
//
// Bytes that must move, 16-bit: x, dy and dx once, 6 a channel and token; the partial sums add
// 2 * 4 (width + 1) / 128 = 0.3 and the tokens read twice 0.4, most of it from L2.
//
//   block   32 columns of kVec = 4 (or 1) channels x 4 runs of 32 tokens; three blocks a
//   multiprocessor

#include "conv_inputs.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

constexpr int kColumns = 32, kRows = 4, kThreads = kColumns * kRows;
constexpr int kRun = 32;
constexpr int kAhead = 4;
template <typename data_t>
constexpr int kBlocks =
    sizeof(data_t) == 2 ? 3 : 2;         // per multiprocessor: 24 kB and more are on their way
constexpr int64_t kTile = kRows * kRun;  // tokens of a block

// dy act'(s)
__device__ inline float through_activation(float dy, float s, bool silu) {
  if (!silu) return dy;
  const float sigmoid = __fdividef(1.f, 1.f + __expf(-s));
  return dy * sigmoid * fmaf(s, 1.f - sigmoid, 1.f);
}

template <typename data_t, int kVec>
struct Gradients {
  using Channels = Vec<data_t, kVec>;

  __device__ Gradients(const CausalConv1dBackwardParams& p, const Sequence& sequence, int64_t index,
                       int channel)
      : dy(static_cast<const data_t*>(p.dy) + sequence.batch * p.dy_strides.batch +
           sequence.begin * p.dy_strides.token + channel),
        dfinal(static_cast<const data_t*>(p.dfinal_state) +
               index * (p.forward.width - 1) * p.forward.channels + channel),
        token(p.dy_strides.token),
        channels(p.forward.channels),
        first_final(sequence.end - sequence.begin - (p.forward.width - 1)) {}
  __device__ Channels dy_at(int64_t t) const {
    return *reinterpret_cast<const Channels*>(dy + t * token);
  }
  // What du_t starts from, for a token before the end of the sequence.
  __device__ void open(int64_t t, float (&du)[kVec]) const {
    if (t < first_final) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) du[k] = 0.f;
      return;
    }
    const auto final =
        *reinterpret_cast<const Channels*>(dfinal + (t - first_final) * int64_t(channels));
#pragma unroll
    for (int k = 0; k < kVec; ++k) du[k] = to_float(final.at[k]);
  }

  const data_t *dy, *dfinal;
  int64_t token;
  int channels;
  int64_t first_final;
};

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks<data_t>)
    causal_conv1d_backward_kernel(const CausalConv1dBackwardParams p, int64_t tokens,
                                  int column_blocks) {
  constexpr int kHistory = kWidth - 1, kSums = kWidth + 1;
  using Channels = Vec<data_t, kVec>;
  __shared__ float run_sums[kRows][kSums][kColumns * kVec];
  const CausalConv1dParams& f = p.forward;
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t tile = blockIdx.x / column_blocks;
  const int first_channel = blockIdx.x % column_blocks * (kColumns * kVec);
  const int channel = first_channel + column * kVec;
  const int64_t start = tile * kTile + row * kRun, stop = min(start + kRun, tokens);

  float sums[kSums][kVec] = {};  // of dweight, then dbias
  if (channel < f.channels && start < stop) {
    const Taps<data_t, kVec, kWidth> taps(f, channel);
    auto* dx = static_cast<data_t*>(p.dx) + channel;
    int64_t first = start;
    for (int64_t index = sequence_of(f, start); first < stop && index < f.sequences; ++index) {
      const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
      const int64_t zero = sequence.batch * f.length + sequence.begin;  // its first token
      const int64_t end = sequence.batch * f.length + sequence.end, last = min(stop, end);
      if (first >= last) continue;
      const Inputs<data_t, kVec, kHistory> inputs(f, sequence, index, channel);
      const Gradients<data_t, kVec> gradients(p, sequence, index, channel);
      // Inputs stay as they were read, to leave registers for the tokens that are on their way.
      Channels u[kHistory + kAhead], dy[kAhead], next_u[kAhead], next_dy[kAhead];
      float du[kWidth][kVec] = {};  // of the tokens that the current one reads
#pragma unroll
      for (int w = 0; w < kHistory; ++w) u[w] = inputs.at(first - zero - kHistory + w);
      const auto fetch = [&](int64_t t) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (t + i >= end || t >= last + kHistory) continue;
          next_u[i] = inputs.since_begin(t - zero + i);
          next_dy[i] = gradients.dy_at(t - zero + i);
        }
      };
      fetch(first);
      for (int64_t t = first; t < last + kHistory; t += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          u[kHistory + i] = next_u[i];
          dy[i] = next_dy[i];
        }
        fetch(t + kAhead);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (t + i < end) {
            const bool own = t + i < last;
            gradients.open(t - zero + i, du[kHistory]);
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
              const float g =
                  through_activation(to_float(dy[i].at[k]), taps.convolve(u, i, k), f.silu);
#pragma unroll
              for (int w = 0; w < kWidth; ++w) {
                du[w][k] = fmaf(taps.weight[w][k], g, du[w][k]);
                if (own) sums[w][k] = fmaf(g, to_float(u[i + w].at[k]), sums[w][k]);
              }
              if (own) sums[kWidth][k] += g;
            }
          }
          const int64_t done = t + i - kHistory;
          if (done >= first && done < last) {
            Channels out;
#pragma unroll
            for (int k = 0; k < kVec; ++k) out.at[k] = from_float<data_t>(du[0][k]);
            *reinterpret_cast<Channels*>(dx + done * f.channels) = out;
          }
#pragma unroll
          for (int w = 0; w < kHistory; ++w)
#pragma unroll
            for (int k = 0; k < kVec; ++k) du[w][k] = du[w + 1][k];
        }
#pragma unroll
        for (int w = 0; w < kHistory; ++w) u[w] = u[w + kAhead];
      }
      first = last;
    }
  }

#pragma unroll
  for (int w = 0; w < kSums; ++w)
#pragma unroll
    for (int k = 0; k < kVec; ++k) run_sums[row][w][column * kVec + k] = sums[w][k];
  __syncthreads();
  // (channels, width) as in dweight, then (channels) as in dbias
  float* partials = p.partials + tile * kSums * f.channels;
  for (int i = threadIdx.x; i < kSums * kColumns * kVec; i += kThreads) {
    const bool weight = i < kWidth * kColumns * kVec;
    const int local = weight ? i / kWidth : i - kWidth * kColumns * kVec;
    const int w = weight ? i % kWidth : kWidth;
    if (first_channel + local >= f.channels) continue;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += run_sums[r][w][local];
    const int64_t at = first_channel + local;
    partials[weight ? at * kWidth + w : int64_t(f.channels) * kWidth + at] = sum;
  }
}

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads)
    dinitial_state_kernel(const CausalConv1dBackwardParams p) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Vec<data_t, kVec>;
  const CausalConv1dParams& f = p.forward;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int vectors = f.channels / kVec;
  const int64_t index = at / vectors / kHistory;
  if (index >= f.sequences) return;
  const int channel = at % vectors * kVec, place = at / vectors % kHistory;
  const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
  const int64_t length = sequence.end - sequence.begin;
  const Inputs<data_t, kVec, kHistory> inputs(f, sequence, index, channel);
  const Gradients<data_t, kVec> gradients(p, sequence, index, channel);
  const Taps<data_t, kVec, kWidth> taps(f, channel);
  float du[kVec];
  gradients.open(place - kHistory, du);
  for (int t = 0; t <= place && t < length; ++t) {  // the tokens that read this input
    Channels u[kWidth];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) u[w] = inputs.at(t - kHistory + w);
    const Channels dy = gradients.dy_at(t);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float g = through_activation(to_float(dy.at[k]), taps.convolve(u, 0, k), f.silu);
#pragma unroll
      for (int w = 0; w < kWidth; ++w)
        if (w == place - t) du[k] = fmaf(taps.weight[w][k], g, du[k]);
    }
  }
  Channels out;
#pragma unroll
  for (int k = 0; k < kVec; ++k) out.at[k] = from_float<data_t>(du[k]);
  *reinterpret_cast<Channels*>(static_cast<data_t*>(p.dinitial_state) +
                               (index * kHistory + place) * f.channels + channel) = out;
}

int64_t tiles_of(const CausalConv1dParams& f) { return (f.batch * f.length + kTile - 1) / kTile; }

template <typename data_t, int kVec, int kWidth>
void launch(const CausalConv1dBackwardParams& p, cudaStream_t stream) {
  const CausalConv1dParams& f = p.forward;
  const int64_t tiles = tiles_of(f), pitch = int64_t(f.channels) * (kWidth + 1);
  const int column_blocks = (f.channels + kColumns * kVec - 1) / (kColumns * kVec);
  if (tiles > 0)
    causal_conv1d_backward_kernel<data_t, kVec, kWidth>
        <<<static_cast<unsigned>(tiles * column_blocks), kThreads, 0, stream>>>(
            p, f.batch * f.length, column_blocks);
  const int64_t weights = int64_t(f.channels) * kWidth;
  sum_partials(p.partials, pitch, tiles, weights, static_cast<data_t*>(p.dweight), stream);
  if (p.dbias != nullptr)
    sum_partials(p.partials + weights, pitch, tiles, f.channels, static_cast<data_t*>(p.dbias),
                 stream);
  const int64_t places = f.sequences * (kWidth - 1) * (f.channels / kVec);
  if (p.dinitial_state != nullptr && places > 0)
    dinitial_state_kernel<data_t, kVec, kWidth>
        <<<static_cast<unsigned>((places + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
}

template <typename data_t, int kVec>
void dispatch_width(const CausalConv1dBackwardParams& p, cudaStream_t stream) {
  if (p.forward.width == 2) return launch<data_t, kVec, 2>(p, stream);
  if (p.forward.width == 3) return launch<data_t, kVec, 3>(p, stream);
  launch<data_t, kVec, 4>(p, stream);
}

template <typename data_t>
void dispatch_vector(const CausalConv1dBackwardParams& p, cudaStream_t stream) {
  using Channels = Vec<data_t, 4>;
  const CausalConv1dParams& f = p.forward;
  bool whole = f.channels % 4 == 0 && f.x_strides.batch % 4 == 0 && f.x_strides.token % 4 == 0 &&
               p.dy_strides.batch % 4 == 0 && p.dy_strides.token % 4 == 0;
  for (const void* data :
       {f.x, f.weight, f.initial_state, p.dy, p.dfinal_state, static_cast<const void*>(p.dx),
        static_cast<const void*>(p.dinitial_state)})
    whole = whole && is_aligned<Channels>(data);
  return whole ? dispatch_width<data_t, 4>(p, stream) : dispatch_width<data_t, 1>(p, stream);
}

}  // namespace

int64_t count_causal_conv1d_partials(const CausalConv1dParams& forward) {
  return tiles_of(forward) * forward.channels * (forward.width + 1);
}

void launch_causal_conv1d_backward(const CausalConv1dBackwardParams& p, cudaStream_t stream) {
  if (p.forward.channels == 0) return;
  switch (p.forward.dtype) {
    case DType::kFloat32:
      return dispatch_vector<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_vector<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_vector<__half>(p, stream);
  }
}

}  // namespace reasoners
