// With s_t = bias + sum_w weight[:, w] u_{t - H + w}, H = width - 1, and g_t = dy_t act'(s_t):
//   du_t = sum_w weight[:, w] g_{t + H - w} (+ dfinal_state where t is one of the last H inputs)
//   dweight[:, w] = sum_t g_t u_{t - H + w},   dbias = sum_t g_t
// dx is du of the sequence's tokens, dinitial_state that of the H inputs before them.
//
// A thread walks kVec neighbouring channels, 16 bytes of them, over a run of kRun tokens of the
// whole batch. Step j of a walk finds g of token j and, from the last width g in registers, all
// that concerns input j - H: its du, and its products with g, which dweight sums. A run thus takes
// H more steps than it has tokens, with g that the next run finds again. A run may hold ends of
// sequences, as in the forward; the walk begins anew at each.
//
// Tokens come through shared memory, where each thread has kSlots places of its own for x and for
// dy: while a step is computed, the tokens of the next kAhead are on their way, and none takes
// registers. (Registers as the places were tried. The compiler waits for a load where the branch
// ends that it is in, to put 16-bit halves together, so that one token a warp was on its way.)
//
// dweight and dbias are summed over the run in registers, over the kRows runs of a block in shared
// memory, and the blocks' partial sums by a second launch, all in fixed order. dinitial_state is a
// small launch of its own, one thread per (sequence, place in the history, channels).
//
// Bytes that must move, 16-bit: x, dy and dx once, 6 a channel and token; the partial sums add
// 2 * 4 (width + 1) / 256 = 0.16 and the tokens read twice 2 H / 64 = 0.1, twice that with SiLU.
// With 12 warps a multiprocessor, 86 kB are on their way; the reads need 21. H200, 16,384 x 6,144,
// width 4, bfloat16, no SiLU: 167 us, 86 % of a copy's rate; from registers it took 535.
//
//   block   32 columns of kVec = 16 bytes (or 1 channel) x 4 runs of 64 tokens

#include "async_copy.cuh"
#include "conv_inputs.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

constexpr int kColumns = 32, kRows = 4, kThreads = kColumns * kRows;
constexpr int kRun = 64;
constexpr int kGroup = 4;                // steps between two moves of the last g and inputs
constexpr int kBlocks = 3;               // per multiprocessor
constexpr int64_t kTile = kRows * kRun;  // tokens of a block

// dy silu'(s)
__device__ inline float through_silu(float dy, float s) {
  const float sigmoid = __fdividef(1.f, 1.f + __expf(-s));
  return dy * sigmoid * fmaf(s, 1.f - sigmoid, 1.f);
}

template <typename data_t, int kVec>
struct Gradients {
  using Channels = Words<data_t, kVec>;

  __device__ Gradients(const CausalConv1dBackwardParams& p, const Sequence& sequence, int64_t index,
                       int channel)
      : dy(static_cast<const data_t*>(p.dy) + sequence.batch * p.dy_strides.batch +
           sequence.begin * p.dy_strides.token + channel),
        dfinal(static_cast<const data_t*>(p.dfinal_state) +
               index * (p.forward.width - 1) * p.forward.channels + channel),
        token(p.dy_strides.token),
        channels(p.forward.channels) {}
  const data_t *dy, *dfinal;
  int64_t token, channels;
};

// Places for what a thread's steps read, of the thread alone, and then its sums.
template <typename data_t, int kVec, int kWidth>
union Scratch {
  using Channels = Words<data_t, kVec>;
  struct {
    Channels x[kSlots][kThreads], dy[kSlots][kThreads], dfinal[kWidth - 1][kThreads];
  } slots;
  float run_sums[kRows][kWidth + 1][kColumns * kVec];
};

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    causal_conv1d_backward_kernel(const CausalConv1dBackwardParams p, int64_t tokens,
                                  int column_blocks) {
  constexpr int kHistory = kWidth - 1, kSums = kWidth + 1;
  using Channels = Words<data_t, kVec>;
  __shared__ Scratch<data_t, kVec, kWidth> shared;
  auto& slots = shared.slots;
  const CausalConv1dParams& f = p.forward;
  const int thread = threadIdx.x, column = thread % kColumns, row = thread / kColumns;
  const int64_t tile = blockIdx.x / column_blocks;
  const int first_channel = blockIdx.x % column_blocks * (kColumns * kVec);
  const int channel = first_channel + column * kVec;
  const int64_t start = tile * kTile + row * kRun, stop = min(start + kRun, tokens);

  float sums[kSums][kVec] = {};  // of dweight, then dbias
  int64_t index = start < stop ? sequence_of(f, start) : f.sequences;
  if (channel < f.channels && start < stop) {
    const Taps<data_t, kVec, kWidth> taps(f, channel);
    auto* dx = static_cast<data_t*>(p.dx) + start * f.channels + channel;
    for (int64_t first = start; first < stop && index < f.sequences; ++index) {
      const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
      const int64_t zero = sequence.batch * f.length + sequence.begin;  // its first token
      const int64_t end = sequence.batch * f.length + sequence.end, last = min(stop, end);
      if (first >= last) continue;
      const Inputs<data_t, kVec, kHistory> inputs(f, sequence, index, channel);
      const Gradients<data_t, kVec> gradients(p, sequence, index, channel);
      // Step j is token first + j. There are g before step `there`, and where that is the end of
      // the sequence, the final state has the inputs of the steps from there on. Inputs are summed
      // from step `own` on: those before the run belong to others, those before the sequence not.
      const int count = static_cast<int>(last - first), steps = count + kHistory;
      const int there = static_cast<int>(min(end - first, int64_t(steps)));
      const int there_x = f.silu ? there : count;
      const bool starts = first == zero && inputs.past != nullptr;
      const int own = starts ? 0 : kHistory;
      const data_t* x = inputs.x + (first - zero) * inputs.token;
      const data_t* dy = gradients.dy + (first - zero) * gradients.token;
      const auto fetch = [&](int j) {  // one step after the other
        if (j < there_x) copy_ahead<data_t, kVec>(&slots.x[j % kSlots][thread], x);
        if (j < there) copy_ahead<data_t, kVec>(&slots.dy[j % kSlots][thread], dy);
        x += inputs.token;
        dy += gradients.token;
        commit_copies();
      };
      wait_for_copies<0>();
#pragma unroll
      for (int w = 0; w < kHistory; ++w)
        if (there + w >= kHistory && there + w < steps)
          copy_ahead<data_t, kVec>(&slots.dfinal[w][thread],
                                   gradients.dfinal + w * gradients.channels);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) fetch(j);
      Channels u[kHistory + kGroup];
      float g[kHistory + kGroup][kVec];
#pragma unroll
      for (int w = 0; w < kHistory; ++w) {
        u[w] = starts || f.silu ? inputs.at(first - zero - kHistory + w) : Channels{};
#pragma unroll
        for (int k = 0; k < kVec; ++k) g[w][k] = 0.f;
      }
      for (int from = 0; from < steps; from += kGroup) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const int j = from + i;
          wait_for_copies<kAhead - 1>();
          fetch(j + kAhead);
          u[kHistory + i] = slots.x[j % kSlots][thread];  // not looked at where none came
          if (j < there) {
            const Channels dy_j = slots.dy[j % kSlots][thread];
#pragma unroll
            for (int k = 0; k < kVec; ++k) g[kHistory + i][k] = dy_j[k];
            if (f.silu) {
#pragma unroll
              for (int k = 0; k < kVec; ++k)
                g[kHistory + i][k] = through_silu(g[kHistory + i][k], taps.convolve(u, i, k));
            }
          } else {
#pragma unroll
            for (int k = 0; k < kVec; ++k) g[kHistory + i][k] = 0.f;
          }
          if (j < own || j >= steps) continue;
          float du[kVec] = {};
          if (j >= there && j >= kHistory) {
            const Channels dfinal = slots.dfinal[j - there][thread];
#pragma unroll
            for (int k = 0; k < kVec; ++k) du[k] = dfinal[k];
          }
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            const float input = u[i][k];
#pragma unroll
            for (int w = kHistory; w >= 0; --w) {
              const float g_w = g[i + kHistory - w][k];
              du[k] = fmaf(taps.weight[w][k], g_w, du[k]);
              sums[w][k] = fmaf(g_w, input, sums[w][k]);
            }
            sums[kWidth][k] += g[i][k];
          }
          if (j < kHistory) continue;  // an input before the sequence
          Vec<data_t, kVec> out;
#pragma unroll
          for (int k = 0; k < kVec; ++k) out.at[k] = from_float<data_t>(du[k]);
          *reinterpret_cast<Vec<data_t, kVec>*>(dx) = out;
          dx += f.channels;
        }
#pragma unroll
        for (int w = 0; w < kHistory; ++w) {
          u[w] = u[w + kGroup];
#pragma unroll
          for (int k = 0; k < kVec; ++k) g[w][k] = g[w + kGroup][k];
        }
      }
      first = last;
    }
  }

  __syncthreads();  // the slots are free
#pragma unroll
  for (int w = 0; w < kSums; ++w)
#pragma unroll
    for (int k = 0; k < kVec; ++k) shared.run_sums[row][w][column * kVec + k] = sums[w][k];
  __syncthreads();
  // (channels, width) as in dweight, then (channels) as in dbias
  float* partials = p.partials + tile * kSums * f.channels;
  for (int i = thread; i < kSums * kColumns * kVec; i += kThreads) {
    const bool weight = i < kWidth * kColumns * kVec;
    const int local = weight ? i / kWidth : i - kWidth * kColumns * kVec;
    const int w = weight ? i % kWidth : kWidth;
    if (first_channel + local >= f.channels) continue;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += shared.run_sums[r][w][local];
    const int64_t at = first_channel + local;
    partials[weight ? at * kWidth + w : int64_t(f.channels) * kWidth + at] = sum;
  }
}

template <typename data_t, int kVec, int kWidth>
__global__ void __launch_bounds__(kThreads)
    dinitial_state_kernel(const CausalConv1dBackwardParams p) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Words<data_t, kVec>;
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
  float du[kVec] = {};
  if (length <= place) {  // still in the final state
    const Channels dfinal = *reinterpret_cast<const Channels*>(
        gradients.dfinal + (place - length) * gradients.channels);
#pragma unroll
    for (int k = 0; k < kVec; ++k) du[k] = dfinal[k];
  }
  for (int t = 0; t <= place && t < length; ++t) {  // the tokens that read this input
    Channels u[kWidth];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) u[w] = inputs.at(t - kHistory + w);
    const auto dy = *reinterpret_cast<const Channels*>(gradients.dy + t * gradients.token);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float g = f.silu ? through_silu(dy[k], taps.convolve(u, 0, k)) : dy[k];
#pragma unroll
      for (int w = 0; w < kWidth; ++w)
        if (w == place - t) du[k] = fmaf(taps.weight[w][k], g, du[k]);
    }
  }
  Vec<data_t, kVec> out;
#pragma unroll
  for (int k = 0; k < kVec; ++k) out.at[k] = from_float<data_t>(du[k]);
  *reinterpret_cast<Vec<data_t, kVec>*>(static_cast<data_t*>(p.dinitial_state) +
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
  constexpr int kVec = 16 / sizeof(data_t);
  using Channels = Vec<data_t, kVec>;
  const CausalConv1dParams& f = p.forward;
  bool whole = f.channels % kVec == 0 && f.x_strides.batch % kVec == 0 &&
               f.x_strides.token % kVec == 0 && p.dy_strides.batch % kVec == 0 &&
               p.dy_strides.token % kVec == 0;
  for (const void* data :
       {f.x, f.weight, f.initial_state, p.dy, p.dfinal_state, static_cast<const void*>(p.dx),
        static_cast<const void*>(p.dinitial_state)})
    whole = whole && is_aligned<Channels>(data);
  return whole ? dispatch_width<data_t, kVec>(p, stream) : dispatch_width<data_t, 1>(p, stream);
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
