// S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t, y_t = S_t . C_t + D x_t, one token after the
// other, with a decay for every channel and state entry.
//
// A block serves one sequence and a tile of neighbouring channels that read the same group of B and
// of C, and walks all tokens of the sequence. kLanes neighbouring threads hold their channels'
// states and rows of A in registers. Tokens come in stages of kStage: while one stage is computed
// from shared memory, the next is on its way into registers, and the two buffers in shared memory
// let one barrier a stage suffice. Channels past the tile and entries past N are zeros that take
// part and are not written.
//
// N <= 16: a tile is 16 channels, as many as read one group in MambaInLlama, and each thread brings
// four neighbours of two tokens of each input a stage. kLanes threads hold kPer channels, 16 /
// kLanes entries of each. The products with C are added up for as many tokens at once as make one
// sum a thread: threads exchange halves, so that kLanes sums take kLanes - 1 shuffles and not
// kLanes log2(kLanes), and each thread finishes one y. The fewer entries a thread has, the more
// warps there are, and the more each token costs:
//
//   tiles    < 396   < 792   more     of all sequences
//   kLanes       8       4      4
//   kPer         1       1      2     channels
//   threads    128      64     32
//   kStage      64      32     16     tokens
//   issued    10.1     9.0    8.6     instructions a state entry and token; 1.3 of them for loads
//
// All three add in the same order (pairs, then neighbours, their neighbours, ...), so the bits do
// not depend on which of them runs. The exponentials set the floor, one per state entry and token:
// a warp's takes a scheduler 8 cycles, 290 us for 32,768 tokens of 2048 channels with N = 16 on 132
// multiprocessors at 1.755 GHz, where the bytes (8 a channel and token, 16-bit) take 180 us at 3
// TB/s. Making a share of them by a polynomial on the multiply-add units costs nine instructions
// more for each, and as many are issued as there are cycles already. Cutting a sequence into
// segments computes all exponentials twice, for what a segment adds and then for y.
//
// H200, bfloat16, 2048 channels with N = 16, us, and before, with tiles of 32 channels and a
// shuffle tree for every token:
//   1 x 2048  58 (225)   8 x 4096  469 (1486)   64 x 512  410   1 x 32768  889
//
// N above 16: kLanes threads hold one channel, and the sum goes over them by shuffles.
//
//   N        <= 32   <= 64   <= 128   <= 256
//   kLanes       4       8       16       32     channels per block: 128 / kLanes
//   kStage      16       8        8        4     tokens

#include <numeric>

#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "scan.cuh"
#include "selective_tile.cuh"

namespace reasoners {
namespace {

// ---- N <= 16

// How the states of a tile are dealt out to threads.
template <int kLanes_, int kPer_>
struct NarrowDeal {
  static constexpr int kLanes = kLanes_, kPer = kPer_, kEntries = kNarrow / kLanes;
  static constexpr int kThreads = kNarrow / kPer * kLanes;
  static constexpr int kRows = kThreads * kFour / kNarrow;  // tokens that they bring at once
  static constexpr int kStage = 2 * kRows;
  static constexpr int kGroup = kLanes / kPer;  // tokens whose sums are exchanged
  static constexpr int kTurn = 2 * kGroup;      // tokens of an iteration
  static_assert(kStage % kTurn == 0);
  // Rows of x are this far apart: a warp reads kGroup rows at once, each in banks of its own.
  static constexpr int kPitch = kNarrow + 32 / kLanes * kPer % kNarrow;
};

// Tokens lie in pairs, so that a thread of few entries reads what it needs of both at once.
template <typename Deal>
struct alignas(32) NarrowStage {
  using Entries = Vec<float, Deal::kEntries>;
  using Steps = Vec<float2, Deal::kPer>;
  Vec<Entries, 2> b[Deal::kStage / 2][Deal::kLanes], c[Deal::kStage / 2][Deal::kLanes];
  Vec<Steps, 2> steps[Deal::kStage / 2][kNarrow / Deal::kPer];  // delta, delta x
  float x[Deal::kStage][Deal::kPitch];

  __device__ float& b_at(int i, int n) {
    return of(b, i, n / Deal::kEntries).at[n % Deal::kEntries];
  }
  __device__ float& c_at(int i, int n) {
    return of(c, i, n / Deal::kEntries).at[n % Deal::kEntries];
  }
  __device__ float2& steps_at(int i, int k) {
    return of(steps, i, k / Deal::kPer).at[k % Deal::kPer];
  }

 private:
  template <typename T, int kRows, int kColumns>
  __device__ static T& of(Vec<T, 2> (&all)[kRows][kColumns], int i, int column) {
    return all[i / 2][column].at[i % 2];
  }
};

template <typename data_t, typename Deal>
__global__ void __launch_bounds__(Deal::kThreads, 512 / Deal::kThreads)
    narrow_scan_kernel(const SelectiveScanParams p, int run, int tiles, bool aligned) {
  constexpr int kLanes = Deal::kLanes, kPer = Deal::kPer, kEntries = Deal::kEntries,
                kRows = Deal::kRows, kStage = Deal::kStage, kGroup = Deal::kGroup;
  __shared__ NarrowStage<Deal> stages[2];

  const int blocks = p.channels / run * tiles;  // of one sequence
  const int64_t index = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int first_of_run = block / tiles * run, first = first_of_run + block % tiles * kNarrow;
  const int channels = min(kNarrow, first_of_run + run - first);  // of this tile
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);

  // This thread's part of every stage: four neighbours of a token.
  const int row = threadIdx.x / (kNarrow / kFour), column = threadIdx.x % (kNarrow / kFour) * kFour;
  const int64_t begin = sequence.begin + row;
  const auto* x = static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch +
                  begin * p.x_strides.token + first + column;
  const float* delta = p.delta + sequence.batch * p.delta_strides.batch +
                       begin * p.delta_strides.token + first + column;
  const auto* b = static_cast<const data_t*>(p.B) + sequence.batch * p.b_strides.batch +
                  begin * p.b_strides.token +
                  int64_t(first / (p.channels / p.b_groups)) * p.state_dim + column;
  const auto* c = static_cast<const data_t*>(p.C) + sequence.batch * p.c_strides.batch +
                  begin * p.c_strides.token +
                  int64_t(first / (p.channels / p.c_groups)) * p.state_dim + column;
  Four<data_t> next_b[2], next_c[2], next_x[2];
  Four<float> next_delta[2];
  const auto fetch = [&](int left) {  // tokens from the stage's first on
    const int entries = p.state_dim - column, inputs = channels - column;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool in = row + k * kRows < left;
      const data_t *from_b = b + k * kRows * p.b_strides.token,
                   *from_c = c + k * kRows * p.c_strides.token,
                   *from_x = x + k * kRows * p.x_strides.token;
      const float* from_delta = delta + k * kRows * p.delta_strides.token;
      if (aligned) {
        next_b[k] = next_c[k] = next_x[k] = {};
        next_delta[k] = {};
        if (in && entries > 0) {
          next_b[k] = *reinterpret_cast<const Four<data_t>*>(from_b);
          next_c[k] = *reinterpret_cast<const Four<data_t>*>(from_c);
        }
        if (in && inputs > 0) {
          next_x[k] = *reinterpret_cast<const Four<data_t>*>(from_x);
          next_delta[k] = *reinterpret_cast<const Four<float>*>(from_delta);
        }
      } else {
        next_b[k] = load_four(from_b, in ? entries : 0);
        next_c[k] = load_four(from_c, in ? entries : 0);
        next_x[k] = load_four(from_x, in ? inputs : 0);
        next_delta[k] = load_four(from_delta, in ? inputs : 0);
      }
    }
    b += kStage * p.b_strides.token;
    c += kStage * p.c_strides.token;
    x += kStage * p.x_strides.token;
    delta += kStage * p.delta_strides.token;
  };
  const auto put = [&](NarrowStage<Deal>& stage) {
    // As many as lie together.
    const auto entries = [&](float* first, float* second, float4 from) {
      if constexpr (kEntries == kFour) {
        *reinterpret_cast<float4*>(first) = from;
      } else {
        *reinterpret_cast<float2*>(first) = {from.x, from.y};
        *reinterpret_cast<float2*>(second) = {from.z, from.w};
      }
    };
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row + k * kRows;
      entries(&stage.b_at(i, column), &stage.b_at(i, column + 2), to_floats(data_t(), next_b[k]));
      entries(&stage.c_at(i, column), &stage.c_at(i, column + 2), to_floats(data_t(), next_c[k]));
      const float4 input = to_floats(data_t(), next_x[k]), step = to_floats(0.f, next_delta[k]);
      *reinterpret_cast<float4*>(&stage.x[i][column]) = input;
      const float4 one{step.x, step.x * input.x, step.y, step.y * input.y},
          two{step.z, step.z * input.z, step.w, step.w * input.w};
      if constexpr (kPer == 2) {
        *reinterpret_cast<float4*>(&stage.steps_at(i, column)) = one;
        *reinterpret_cast<float4*>(&stage.steps_at(i, column + 2)) = two;
      } else {
        stage.steps_at(i, column) = {one.x, one.y};
        stage.steps_at(i, column + 1) = {one.z, one.w};
        stage.steps_at(i, column + 2) = {two.x, two.y};
        stage.steps_at(i, column + 3) = {two.z, two.w};
      }
    }
  };

  // Of the sums that its neighbours exchange, this thread finishes that of one token and channel.
  const int lane = threadIdx.x % kLanes, local = threadIdx.x / kLanes * kPer;
  const int token = lane / kPer, own = local + lane % kPer;
  const float skip = p.D && own < channels ? p.D[first + own] : 0.f;
  const int64_t home = (index * p.channels + first + local) * p.state_dim;  // in a state tensor
  // exp(delta A) is 2 to the power of delta times this: one multiplication less an entry.
  float exponent[kPer][kEntries], state[kPer][kEntries];
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      const int n = lane * kEntries + j;
      const bool in = local + e < channels && n < p.state_dim;
      const float* A = p.A + int64_t(first + local + e) * p.state_dim;
      exponent[e][j] = in ? A[n] * kLog2e : 0.f;
      state[e][j] = in && p.initial_state ? p.initial_state[home + e * p.state_dim + n] : 0.f;
    }
  }

  auto* y = static_cast<data_t*>(p.y) +
            (sequence.batch * p.length + sequence.begin + token) * p.channels + first + own;
  int buffer = 0;
  int left = static_cast<int>(sequence.end - sequence.begin);
  fetch(left);
  for (; left > 0; left -= kStage) {
    const auto& stage = stages[buffer];
    put(stages[buffer]);
    buffer ^= 1;
    __syncthreads();
    fetch(left - kStage);
    // Tokens past the last have neither input nor decay, and leave the state as it is.
    const int count = min(left, kStage);
    for (int turn = 0; turn < count; turn += Deal::kTurn) {
#pragma unroll
      for (int group = 0; group < Deal::kTurn; group += kGroup) {
        float sums[kLanes];
        Vec<Vec<float, kEntries>, 2> in, out;
        Vec<Vec<float2, kPer>, 2> steps;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          const int pair = (turn + group + k) / 2;
          if (k % 2 == 0) {
            in = stage.b[pair][lane];
            out = stage.c[pair][lane];
            steps = stage.steps[pair][local / kPer];
          }
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            const float2 step = steps.at[k % 2].at[e];
            float pairs[kEntries / 2];
#pragma unroll
            for (int j = 0; j < kEntries; ++j) {
              float& s = state[e][j];
              const float from = in.at[k % 2].at[j], to = out.at[k % 2].at[j];
              s = fmaf(exp2_fast(step.x * exponent[e][j]), s, step.y * from);
              pairs[j / 2] = j % 2 == 0 ? s * to : fmaf(s, to, pairs[j / 2]);
            }
            sums[k * kPer + e] = pairs[0];
            if constexpr (kEntries == 4) sums[k * kPer + e] += pairs[1];
          }
        }
        const float sum = exchange_sums(sums, lane);
        const int i = turn + group + token;
        if (i < count && own < channels) *y = from_float<data_t>(fmaf(skip, stage.x[i][own], sum));
        y += int64_t(kGroup) * p.channels;
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      const int n = lane * kEntries + j;
      if (local + e < channels && n < p.state_dim)
        p.final_state[home + e * p.state_dim + n] = state[e][j];
    }
  }
}

template <typename data_t, typename Deal>
void launch_narrow(const SelectiveScanParams& p, int run, int tiles, cudaStream_t stream) {
  const bool aligned = come_in_fours<data_t>(p, run);
  const int64_t blocks = p.sequences * (p.channels / run) * tiles;
  narrow_scan_kernel<data_t, Deal>
      <<<static_cast<unsigned>(blocks), Deal::kThreads, 0, stream>>>(p, run, tiles, aligned);
}

template <typename data_t>
void dispatch_narrow(const SelectiveScanParams& p, cudaStream_t stream) {
  const int run = std::gcd(p.channels / p.b_groups, p.channels / p.c_groups);
  const int tiles = (run + kNarrow - 1) / kNarrow;
  constexpr int64_t kProcessors = 132;
  const int64_t blocks = p.sequences * (p.channels / run) * tiles;
  if (blocks < 3 * kProcessors)
    return launch_narrow<data_t, NarrowDeal<8, 1>>(p, run, tiles, stream);
  if (blocks < 6 * kProcessors)
    return launch_narrow<data_t, NarrowDeal<4, 1>>(p, run, tiles, stream);
  launch_narrow<data_t, NarrowDeal<4, 2>>(p, run, tiles, stream);
}

// ---- N above 16

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // per multiprocessor: room for the registers of four unrolled tokens

template <int kChannels, int kSize, int kStage>
struct alignas(16) Stage {
  float b[kStage][kSize], c[kStage][kSize], x[kStage][kChannels], delta[kStage][kChannels];
};

// `run` neighbouring channels share B and C; each run is cut into `tiles` tiles.
template <typename data_t, typename Row, int kStage>
__global__ void __launch_bounds__(kThreads, kBlocks)
    selective_scan_kernel(const SelectiveScanParams p, int run, int tiles) {
  constexpr int kSize = Row::kSize, kEntries = Row::kEntries, kChannels = kThreads / Row::kLanes;
  using Matrix = Share<kStage, kSize, kThreads>;
  using Input = Share<kStage, kChannels, kThreads>;
  constexpr int kMatrix = Matrix::kCount, kInput = Input::kCount;
  __shared__ Stage<kChannels, kSize, kStage> stages[2];

  const int blocks = p.channels / run * tiles;  // of one sequence
  const int64_t index = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int first_of_run = block / tiles * run, first = first_of_run + block % tiles * kChannels;
  const int channels = min(kChannels, first_of_run + run - first);  // of this tile
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const auto* x = static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch + first;
  const float* delta = p.delta + sequence.batch * p.delta_strides.batch + first;
  const auto* b = static_cast<const data_t*>(p.B) + sequence.batch * p.b_strides.batch +
                  int64_t(first / (p.channels / p.b_groups)) * p.state_dim;
  const auto* c = static_cast<const data_t*>(p.C) + sequence.batch * p.c_strides.batch +
                  int64_t(first / (p.channels / p.c_groups)) * p.state_dim;

  // This thread's tokens of the next stage, on their way to shared memory.
  data_t next_b[kMatrix], next_c[kMatrix], next_x[kInput];
  float next_delta[kInput];
  const auto fetch = [&](int64_t t) {
    const data_t zero = from_float<data_t>(0.f);
    const int left = tokens_left(sequence, t, kStage);
    const data_t *from_b = b + t * p.b_strides.token, *from_c = c + t * p.c_strides.token,
                 *from_x = x + t * p.x_strides.token;
    const float* from_delta = delta + t * p.delta_strides.token;
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      const int i = Matrix::row(k), n = Matrix::column(k);
      const bool in = i < left && n < p.state_dim;
      next_b[k] = in ? from_b[i * p.b_strides.token + n] : zero;
      next_c[k] = in ? from_c[i * p.c_strides.token + n] : zero;
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      const int i = Input::row(k), n = Input::column(k);
      const bool in = i < left && n < channels;
      next_x[k] = in ? from_x[i * p.x_strides.token + n] : zero;
      next_delta[k] = in ? from_delta[i * p.delta_strides.token + n] : 0.f;
    }
  };
  const auto put = [&](Stage<kChannels, kSize, kStage>& stage) {
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      stage.b[Matrix::row(k)][Matrix::column(k)] = to_float(next_b[k]);
      stage.c[Matrix::row(k)][Matrix::column(k)] = to_float(next_c[k]);
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      if (Input::row(k) >= kStage) continue;
      stage.x[Input::row(k)][Input::column(k)] = to_float(next_x[k]);
      stage.delta[Input::row(k)][Input::column(k)] = next_delta[k];
    }
  };

  const int lane = threadIdx.x % Row::kLanes, local = threadIdx.x / Row::kLanes;
  const bool writes = local < channels;
  const int64_t channel = first + local;
  const float skip = p.D && writes ? p.D[channel] : 0.f;
  const int64_t home = (index * p.channels + channel) * p.state_dim;  // in a state tensor
  // exp(delta A) is 2 to the power of delta times this: one multiplication less an entry.
  float exponent[kEntries], state[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    const bool in = writes && n < p.state_dim;
    exponent[j] = in ? p.A[channel * p.state_dim + n] * kLog2e : 0.f;
    state[j] = in && p.initial_state ? p.initial_state[home + n] : 0.f;
  }

  auto* y = static_cast<data_t*>(p.y) + sequence.batch * p.length * p.channels + channel;
  int buffer = 0;
  fetch(sequence.begin);
  for (int64_t t = sequence.begin; t < sequence.end; t += kStage) {
    const auto& stage = stages[buffer];
    put(stages[buffer]);
    buffer ^= 1;
    __syncthreads();
    fetch(t + kStage);
    const int count = tokens_left(sequence, t, kStage);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float in[kEntries], out[kEntries];
      Row::read(stage.b[i], lane, in);
      Row::read(stage.c[i], lane, out);
      const float step = stage.delta[i][local], input = stage.x[i][local];
      const float gain = step * input;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kEntries; ++j) {
        state[j] = fmaf(exp2_fast(step * exponent[j]), state[j], gain * in[j]);
        sum = fmaf(state[j], out[j], sum);
      }
      sum = Row::sum(sum);
      if (lane == 0 && writes) y[(t + i) * p.channels] = from_float<data_t>(fmaf(skip, input, sum));
    }
  }
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    if (writes && n < p.state_dim) p.final_state[home + n] = state[j];
  }
}

template <typename data_t, int kSize, int kLanes, int kStage>
void launch(const SelectiveScanParams& p, cudaStream_t stream) {
  const int run = std::gcd(p.channels / p.b_groups, p.channels / p.c_groups);
  const int per_block = kThreads / kLanes, tiles = (run + per_block - 1) / per_block;
  const int64_t blocks = p.sequences * (p.channels / run) * tiles;
  selective_scan_kernel<data_t, StateRow<kSize, kLanes>, kStage>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, run, tiles);
}

template <typename data_t>
void dispatch_width(const SelectiveScanParams& p, cudaStream_t stream) {
  if (p.state_dim <= kNarrow) return dispatch_narrow<data_t>(p, stream);
  if (p.state_dim <= 32) return launch<data_t, 32, 4, 16>(p, stream);
  if (p.state_dim <= 64) return launch<data_t, 64, 8, 8>(p, stream);
  if (p.state_dim <= 128) return launch<data_t, 128, 16, 8>(p, stream);
  launch<data_t, kSelectiveScanMaxStateDim, 32, 4>(p, stream);
}

}  // namespace

void launch_selective_scan(const SelectiveScanParams& p, cudaStream_t stream) {
  if (p.sequences == 0 || p.channels == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_width<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_width<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_width<__half>(p, stream);
  }
}

}  // namespace reasoners
