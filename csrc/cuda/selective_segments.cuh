// The derivative of selective_scan (its equations: selective_scan_backward.cu) for N <= 16 where
// few channels read one group: segments of kTokens tokens that all run at once.
//
// 1. A block for each segment and tile of 16 channels walks its tokens and leaves what the segment
//    adds: to the state after it, from zero, and to the gradient of the state before it, the sum of
//    the products of decays up to a token times dy C. Both come of one exponential a state entry
//    and token. The decay of a segment is the exponential of A times the sum of its delta.
// 2. One thread a state entry goes through the segments forwards, another backwards, and makes of
//    that the state before, and the gradient after, each segment.
// 3. A block for each segment and tile brings all its inputs to shared memory, walks forwards and
//    leaves the state at the start of each stage of kStage tokens there, and takes the stages
//    backwards: forwards once more with states and decays in registers, then back.
//
// Four neighbouring threads hold a channel's state. Sums over them are exchanged for four tokens at
// once, so that each thread finishes one token's dx and ddelta. For the sums over channels all
// threads leave their parts of four tokens in shared memory, where each thread adds up eight
// channels' parts of four entries, and two neighbours put theirs together. Sums of dB over the
// tiles of a group are made by the blocks of a cluster where a group of C is one tile; other sums
// over tiles, and those of dA and dD over the segments, by other launches. Everything is in fixed
// order.
//
// Exponentials: three a state entry and token, 24 cycles of a scheduler for a warp's. Instructions,
// by the compiled loops: 8.5 in step 1 and 26 in step 3, and about 3 more for loads and stores.
// H200, bfloat16, 2048 channels with N = 16, us, and by one block for a sequence and tile:
//   1 x 2048  206 (906)   8 x 4096  2924 (3368)   64 x 512  2953   1 x 32768  2833
// 780 of 32,768 tokens' are the exponentials'; what takes the rest is not profiled yet.
// Bytes, 16-bit: 8 + 14 a channel and token, N / 2 for the segments, and 4 N a tile and token,
// written and read, for sums over tiles that no cluster makes. Places for segments are dealt out as
// those of checkpoints are (scan.cuh); those that no segment takes leave zeros for the sums of dA
// and dD.
#pragma once

#include "cluster.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "scan.cuh"
#include "selective_tile.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

struct Segments {
  static constexpr int kTokens = 64, kStage = 8, kStages = kTokens / kStage;
  static constexpr int kLanes = 4, kEntries = kNarrow / kLanes, kThreads = kNarrow * kLanes;
  static constexpr int kBatch = 4;   // tokens whose sums are made at once
  static constexpr int kBlocks = 5;  // per multiprocessor, as many as shared memory has room for

  int run, per_run, blocks;  // channels that share B and C, tiles of those, tiles of a sequence
  int b_tiles, c_tiles;      // that sum into one group of B, of C
  int cluster;               // neighbouring tiles that sum dB among themselves, or 1
  int64_t places;
  // In scratch memory, in floats. At each place and channel: a state, later dA; the gradient of a
  // state; the sum of delta, later dD.
  int64_t states, gradients, steps, dB, dC, size;

  Segments(const SelectiveScanParams& f, int run)
      : run(run),
        per_run((run + kNarrow - 1) / kNarrow),
        blocks(f.channels / run * per_run),
        b_tiles(f.channels / f.b_groups / run * per_run),
        c_tiles(f.channels / f.c_groups / run * per_run),
        cluster(c_tiles == 1 && b_tiles <= kMostClusterBlocks ? b_tiles : 1),
        places(f.sequences > 0 ? count_checkpoints(f.batch * f.length, f.sequences, kTokens) : 0) {
    const int64_t tokens = f.batch * f.length, entries = places * f.channels * f.state_dim;
    states = 0;
    gradients = entries;
    steps = 2 * entries;
    const bool apart = b_tiles > cluster;
    dB = steps + places * f.channels;
    dC = dB + (apart ? b_tiles * tokens * f.b_groups * f.state_dim : 0);
    size = dC + (c_tiles > 1 ? c_tiles * tokens * f.c_groups * f.state_dim : 0);
  }
};

__device__ inline int64_t count_segments(const Sequence& sequence) {
  const int64_t tokens = sequence.end - sequence.begin;
  return tokens <= Segments::kTokens ? 1 : (tokens + Segments::kTokens - 1) / Segments::kTokens;
}

// What a block serves.
struct Segment {
  int64_t index, place;  // of the sequence; of the segment
  int64_t begin;         // its first token
  int count;             // its tokens; an empty sequence has a segment without any
  int first, channels;   // of the tile
  bool exists, leads;    // or the place is free; the first of its sequence
  Sequence sequence;

  __device__ Segment(const SelectiveScanParams& f, const Segments& s) {
    place = blockIdx.x / s.blocks;
    const int block = blockIdx.x % s.blocks;
    const int first_of_run = block / s.per_run * s.run;
    first = first_of_run + block % s.per_run * kNarrow;
    channels = min(kNarrow, first_of_run + s.run - first);
    const auto first_place = [&](int64_t i) {
      return first_checkpoint(sequence_at(f.cu_seqlens, f.length, i), f.length, i,
                              Segments::kTokens);
    };
    index = sequence_at_place(f.sequences, place, first_place);
    sequence = sequence_at(f.cu_seqlens, f.length, index);
    const int64_t segment = place - first_place(index);
    exists = segment < count_segments(sequence);
    leads = segment == 0;
    begin = sequence.begin + segment * Segments::kTokens;
    count = tokens_left(sequence, begin, Segments::kTokens);
  }
};

// The inputs of a segment and a tile.
template <typename data_t>
struct alignas(16) Tokens {
  static constexpr int kTokens = Segments::kTokens;
  float b[kTokens][kNarrow], c[kTokens][kNarrow], dy[kTokens][kNarrow];
  float2 steps[kTokens][kNarrow];  // delta, delta x
  alignas(16) data_t x[kTokens][kNarrow];
};

// Brings them, all on their way together; zeros past the last token, channel or entry.
template <typename data_t>
__device__ void bring(const SelectiveScanBackwardParams& p, const Segment& segment, bool aligned,
                      Tokens<data_t>& to) {
  constexpr int kRows = Segments::kThreads * kFour / kNarrow, kCount = Segments::kTokens / kRows;
  const SelectiveScanParams& f = p.forward;
  const int row = threadIdx.x / (kNarrow / kFour), column = threadIdx.x % (kNarrow / kFour) * kFour;
  const int entries = f.state_dim - column, inputs = segment.channels - column;
  const int64_t batch = segment.sequence.batch, begin = segment.begin + row;
  const auto from = [&](auto* data, const TokenStrides& strides, int64_t offset) {
    return data + batch * strides.batch + begin * strides.token + offset + column;
  };
  const auto* x = from(static_cast<const data_t*>(f.x), f.x_strides, segment.first);
  const auto* dy = from(static_cast<const data_t*>(p.dy), p.dy_strides, segment.first);
  const auto* delta = from(f.delta, f.delta_strides, segment.first);
  const auto* b = from(static_cast<const data_t*>(f.B), f.b_strides,
                       int64_t(segment.first / (f.channels / f.b_groups)) * f.state_dim);
  const auto* c = from(static_cast<const data_t*>(f.C), f.c_strides,
                       int64_t(segment.first / (f.channels / f.c_groups)) * f.state_dim);
  Four<data_t> next_b[kCount], next_c[kCount], next_x[kCount], next_dy[kCount];
  Four<float> next_delta[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const bool in = row + k * kRows < segment.count;
    if (aligned) {
      next_b[k] = next_c[k] = next_x[k] = next_dy[k] = {};
      next_delta[k] = {};
      if (in && entries > 0) {
        next_b[k] = *reinterpret_cast<const Four<data_t>*>(b + k * kRows * f.b_strides.token);
        next_c[k] = *reinterpret_cast<const Four<data_t>*>(c + k * kRows * f.c_strides.token);
      }
      if (in && inputs > 0) {
        next_x[k] = *reinterpret_cast<const Four<data_t>*>(x + k * kRows * f.x_strides.token);
        next_dy[k] = *reinterpret_cast<const Four<data_t>*>(dy + k * kRows * p.dy_strides.token);
        next_delta[k] =
            *reinterpret_cast<const Four<float>*>(delta + k * kRows * f.delta_strides.token);
      }
    } else {
      next_b[k] = load_four(b + k * kRows * f.b_strides.token, in ? entries : 0);
      next_c[k] = load_four(c + k * kRows * f.c_strides.token, in ? entries : 0);
      next_x[k] = load_four(x + k * kRows * f.x_strides.token, in ? inputs : 0);
      next_dy[k] = load_four(dy + k * kRows * p.dy_strides.token, in ? inputs : 0);
      next_delta[k] = load_four(delta + k * kRows * f.delta_strides.token, in ? inputs : 0);
    }
  }
  const auto four = [](float* place) -> float4& { return *reinterpret_cast<float4*>(place); };
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int i = row + k * kRows;
    four(&to.b[i][column]) = to_floats(data_t(), next_b[k]);
    four(&to.c[i][column]) = to_floats(data_t(), next_c[k]);
    four(&to.dy[i][column]) = to_floats(data_t(), next_dy[k]);
    const float4 input = to_floats(data_t(), next_x[k]), step = to_floats(0.f, next_delta[k]);
    four(&to.steps[i][column].x) = {step.x, step.x * input.x, step.y, step.y * input.y};
    four(&to.steps[i][column + 2].x) = {step.z, step.z * input.z, step.w, step.w * input.w};
    *reinterpret_cast<Four<data_t>*>(&to.x[i][column]) = next_x[k];
  }
  __syncthreads();
}

// What a thread holds of its channel: entries of a state from lane * kEntries on.
struct Holding {
  int lane, local;  // of its channel; channel of the tile
  bool in;          // the channel is one of the tile's
  int64_t channel;

  __device__ Holding(const Segment& segment)
      : lane(threadIdx.x % Segments::kLanes),
        local(threadIdx.x / Segments::kLanes),
        in(local < segment.channels),
        channel(segment.first + local) {}
  __device__ int entry(int j) const { return lane * Segments::kEntries + j; }
};

template <typename data_t>
__global__ void __launch_bounds__(Segments::kThreads, 8)
    sum_segments_kernel(const SelectiveScanBackwardParams p, const Segments s, bool aligned) {
  constexpr int kEntries = Segments::kEntries;
  __shared__ Tokens<data_t> tokens;
  const SelectiveScanParams& f = p.forward;
  const Segment segment(f, s);
  if (!segment.exists) return;
  bring(p, segment, aligned, tokens);
  const Holding mine(segment);
  float exponent[kEntries], state[kEntries] = {}, product[kEntries], gradient[kEntries] = {};
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = mine.entry(j);
    const bool in = mine.in && n < f.state_dim;
    exponent[j] = in ? f.A[mine.channel * f.state_dim + n] * kLog2e : 0.f;
    product[j] = 1.f;
  }
  float steps = 0.f;
#pragma unroll 8
  for (int i = 0; i < segment.count; ++i) {
    const auto in = *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.b[i][mine.entry(0)]);
    const auto out = *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.c[i][mine.entry(0)]);
    const float2 step = tokens.steps[i][mine.local];
    const float g = tokens.dy[i][mine.local];
    steps += step.x;
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      const float decay = exp2_fast(step.x * exponent[j]);
      state[j] = fmaf(decay, state[j], step.y * in.at[j]);
      product[j] *= decay;
      gradient[j] = fmaf(product[j], g * out.at[j], gradient[j]);
    }
  }
  if (!mine.in) return;
  const int64_t home = segment.place * f.channels + mine.channel;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = mine.entry(j);
    if (n >= f.state_dim) continue;
    p.scratch[s.states + home * f.state_dim + n] = state[j];
    p.scratch[s.gradients + home * f.state_dim + n] = gradient[j];
  }
  if (mine.lane == 0) p.scratch[s.steps + home] = steps;
}

// Backwards in the second row of blocks.
constexpr int kJoinThreads = 128;

__global__ void __launch_bounds__(kJoinThreads)
    join_segments_kernel(const SelectiveScanBackwardParams p, const Segments s, int blocks) {
  constexpr int kAhead = 8;  // segments whose loads are on their way together
  const SelectiveScanParams& f = p.forward;
  const int64_t size = int64_t(f.channels) * f.state_dim, index = blockIdx.x / blocks;
  const int64_t element = int64_t(blockIdx.x % blocks) * kJoinThreads + threadIdx.x;
  if (element >= size) return;
  const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
  const int64_t segments = count_segments(sequence);
  const bool back = blockIdx.y == 1;
  const int64_t first = first_checkpoint(sequence, f.length, index, Segments::kTokens);
  const float exponent = f.A[element] * kLog2e;
  float* parts = p.scratch + (back ? s.gradients : s.states) + element;
  const float* steps = p.scratch + s.steps + element / f.state_dim;
  float value = 0.f;
  if (back) {
    value = p.dfinal_state[index * size + element];
  } else if (f.initial_state) {
    value = f.initial_state[index * size + element];
  }
  for (int64_t begin = 0; begin < segments; begin += kAhead) {
    float added[kAhead], step[kAhead];
    const auto place = [&](int k) { return first + (back ? segments - 1 - begin - k : begin + k); };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments) break;
      added[k] = parts[place(k) * size];
      step[k] = steps[place(k) * f.channels];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments) break;
      parts[place(k) * size] = value;
      value = fmaf(exp2_fast(step[k] * exponent), value, added[k]);
    }
  }
}

// Parts of the sums over channels: of dB and dC, 16 entries each, in turns swapped so that two
// channels' parts lie in different banks.
struct alignas(16) Parts {
  float of[Segments::kBatch][kNarrow][2][kNarrow];
};

// Where a thread's four entries of the sums over the channels of a tile go.
template <typename data_t>
struct Output {
  int64_t pitch;
  data_t* whole;
  float* partial;  // instead, of this tile of several; or null
  int entries;     // that there are
  bool in_fours;

  __device__ Output(const SelectiveScanBackwardParams& p, const Segments& s, const Segment& segment,
                    void* whole_, int groups, int64_t part, bool apart, int n)
      : partial(nullptr), entries(p.forward.state_dim - n) {
    const SelectiveScanParams& f = p.forward;
    const int share = f.channels / groups, first_of_run = segment.first / s.run * s.run;
    pitch = int64_t(groups) * f.state_dim;
    in_fours = f.state_dim % kFour == 0;
    const int64_t at = (segment.sequence.batch * f.length + segment.begin) * pitch +
                       int64_t(segment.first / share) * f.state_dim + n;
    whole = static_cast<data_t*>(whole_) + at;
    const int tile =
        first_of_run % share / s.run * s.per_run + (segment.first - first_of_run) / kNarrow;
    if (apart) partial = p.scratch + part + tile * f.batch * f.length * pitch + at;
  }
  __device__ void store(int i, float4 sum) const {
    if (entries <= 0) return;
    const float sums[] = {sum.x, sum.y, sum.z, sum.w};
    Vec<data_t, kFour> rounded;
#pragma unroll
    for (int l = 0; l < kFour; ++l) rounded.at[l] = from_float<data_t>(sums[l]);
    if (partial == nullptr && in_fours) {
      *reinterpret_cast<Vec<data_t, kFour>*>(whole + i * pitch) = rounded;
      return;
    }
#pragma unroll
    for (int l = 0; l < kFour; ++l) {
      if (l >= entries) continue;
      if (partial) {
        partial[i * pitch + l] = sums[l];
      } else {
        whole[i * pitch + l] = rounded.at[l];
      }
    }
  }
};

// Writes the sums over the tile's channels that are where B and C were; those of dB are first added
// up over the cluster's tiles, each block some of the tokens.
template <typename data_t>
__device__ void store_sums(const SelectiveScanBackwardParams& p, const Segments& s,
                           const Segment& segment, Tokens<data_t>& tokens) {
  constexpr int kRows = Segments::kThreads * kFour / kNarrow;
  const int row = threadIdx.x / (kNarrow / kFour), n = threadIdx.x % (kNarrow / kFour) * kFour;
  const auto four = [](const float* from) { return *reinterpret_cast<const float4*>(from); };
  if (s.cluster > 1) arrive_in_cluster();
  const Output<data_t> dC(p, s, segment, p.dC, p.forward.c_groups, s.dC, s.c_tiles > 1, n);
  for (int i = row; i < segment.count; i += kRows) dC.store(i, four(&tokens.c[i][n]));
  const Output<data_t> dB(p, s, segment, p.dB, p.forward.b_groups, s.dB, s.b_tiles > s.cluster, n);
  if (s.cluster == 1) {
    for (int i = row; i < segment.count; i += kRows) dB.store(i, four(&tokens.b[i][n]));
    return;
  }
  wait_for_cluster();
  const int rank = blockIdx.x % s.cluster;
  for (int i = rank * kRows + row; i < segment.count; i += s.cluster * kRows) {
    float4 sum{};
    for (int r = 0; r < s.cluster; ++r) {
      const float4 part = four(in_block(&tokens.b[i][n], r));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    dB.store(i, sum);
  }
  arrive_in_cluster();
  wait_for_cluster();
}

template <typename data_t>
__global__ void __launch_bounds__(Segments::kThreads, Segments::kBlocks)
    segment_gradients_kernel(const SelectiveScanBackwardParams p, const Segments s, bool aligned) {
  constexpr int kEntries = Segments::kEntries, kStage = Segments::kStage, kBatch = Segments::kBatch;
  __shared__ Tokens<data_t> tokens;
  __shared__ float4 starts[Segments::kStages][Segments::kThreads];
  __shared__ Parts parts;
  const SelectiveScanParams& f = p.forward;
  wait_for_inputs();
  const Segment segment(f, s);
  const Holding mine(segment);
  const int64_t home = segment.place * f.channels + mine.channel;
  float exponent[kEntries], state[kEntries], dstate[kEntries], dA[kEntries] = {}, dD = 0.f;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = mine.entry(j);
    const bool in = segment.exists && mine.in && n < f.state_dim;
    exponent[j] = in ? f.A[mine.channel * f.state_dim + n] * kLog2e : 0.f;
    state[j] = in ? p.scratch[s.states + home * f.state_dim + n] : 0.f;
    dstate[j] = in ? p.scratch[s.gradients + home * f.state_dim + n] : 0.f;
  }
  if (segment.exists) {
    bring(p, segment, aligned, tokens);
    const float skip = f.D && mine.in ? f.D[mine.channel] : 0.f;
    const int stages = (segment.count + kStage - 1) / kStage;
    for (int k = 0; k < stages; ++k) {
      starts[k][threadIdx.x] = {state[0], state[1], state[2], state[3]};
      if (k + 1 == stages) break;
#pragma unroll
      for (int l = 0; l < kStage; ++l) {
        const int i = k * kStage + l;
        const auto in = *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.b[i][mine.entry(0)]);
        const float2 step = tokens.steps[i][mine.local];
#pragma unroll
        for (int j = 0; j < kEntries; ++j)
          state[j] = fmaf(exp2_fast(step.x * exponent[j]), state[j], step.y * in.at[j]);
      }
    }

    const int64_t row = segment.sequence.batch * f.length + segment.begin;
    auto* dx = static_cast<data_t*>(p.dx) + row * f.channels + mine.channel;
    float* ddelta = p.ddelta + row * f.channels + mine.channel;
    // This thread's place in the sums over channels: of a token of the batch, of dB or dC, four
    // entries of eight channels, and then two entries of all. They go where B and C of those tokens
    // were, which nobody needs any more.
    const int summed = threadIdx.x / 16, half = threadIdx.x / 8 % 2, of_c = threadIdx.x / 4 % 2;
    const int quad = threadIdx.x % 4 * kFour;
    float* summed_to = &(of_c ? tokens.c : tokens.b)[summed][quad + 2 * half];

    for (int k = stages - 1; k >= 0; --k) {
      float before[kStage][kEntries], decays[kStage][kEntries];
      const float4 start = starts[k][threadIdx.x];
      state[0] = start.x, state[1] = start.y, state[2] = start.z, state[3] = start.w;
      // Tokens past the end have neither input nor decay: they pass the states on as they are.
#pragma unroll
      for (int l = 0; l < kStage; ++l) {
        const int i = k * kStage + l;
        const auto in = *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.b[i][mine.entry(0)]);
        const float2 step = tokens.steps[i][mine.local];
#pragma unroll
        for (int j = 0; j < kEntries; ++j) {
          before[l][j] = state[j];
          decays[l][j] = exp2_fast(step.x * exponent[j]);
          state[j] = fmaf(decays[l][j], state[j], step.y * in.at[j]);
        }
      }
#pragma unroll
      for (int batch = kStage - kBatch; batch >= 0; batch -= kBatch) {
        float dgain[kBatch], dstep[kBatch];
#pragma unroll
        for (int l = kBatch - 1; l >= 0; --l) {
          const int i = k * kStage + batch + l;
          const auto in =
              *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.b[i][mine.entry(0)]);
          const auto out =
              *reinterpret_cast<const Vec<float, kEntries>*>(&tokens.c[i][mine.entry(0)]);
          const float2 step = tokens.steps[i][mine.local];
          const float g = tokens.dy[i][mine.local];
          Vec<float, kEntries> dB, dC;
          dgain[l] = 0.f, dstep[l] = 0.f;
#pragma unroll
          for (int j = 0; j < kEntries; ++j) {
            const float total = fmaf(g, out.at[j], dstate[j]);
            dB.at[j] = total * step.y;
            dC.at[j] = g * state[j];
            dgain[l] = fmaf(total, in.at[j], dgain[l]);
            dstate[j] = total * decays[batch + l][j];
            state[j] = before[batch + l][j];
            const float dexponent = dstate[j] * state[j];
            dstep[l] = fmaf(dexponent, exponent[j], dstep[l]);
            dA[j] = fmaf(dexponent, step.x, dA[j]);
          }
          auto& of = parts.of[l][mine.local];
          *reinterpret_cast<Vec<float, kEntries>*>(&of[mine.local % 2][mine.entry(0)]) = dB;
          *reinterpret_cast<Vec<float, kEntries>*>(&of[1 - mine.local % 2][mine.entry(0)]) = dC;
        }
        // Each of a channel's threads finishes one token.
        const float of_gain = exchange_sums(dgain, mine.lane);
        const float of_step = exchange_sums(dstep, mine.lane);
        if (const int i = k * kStage + batch + mine.lane; i < segment.count && mine.in) {
          const float input = to_float(tokens.x[i][mine.local]), g = tokens.dy[i][mine.local];
          dx[int64_t(i) * f.channels] =
              from_float<data_t>(fmaf(of_gain, tokens.steps[i][mine.local].x, skip * g));
          ddelta[int64_t(i) * f.channels] = fmaf(of_gain, input, of_step * (1.f / kLog2e));
          dD = fmaf(g, input, dD);
        }
        __syncthreads();
        float sums[kFour];
#pragma unroll
        for (int r = 0; r < kNarrow / 2; ++r) {
          const auto part = *reinterpret_cast<const Vec<float, kFour>*>(
              &parts.of[summed][half * (kNarrow / 2) + r][of_c ^ (r % 2)][quad]);
#pragma unroll
          for (int l = 0; l < kFour; ++l) sums[l] = r == 0 ? part.at[l] : sums[l] + part.at[l];
        }
        float2 sum;
        sum.x = half ? sums[2] : sums[0], sum.y = half ? sums[3] : sums[1];
        sum.x += __shfl_xor_sync(~0u, half ? sums[0] : sums[2], 8);
        sum.y += __shfl_xor_sync(~0u, half ? sums[1] : sums[3], 8);
        *reinterpret_cast<float2*>(summed_to + (k * kStage + batch) * kNarrow) = sum;
        __syncthreads();
      }
    }
    store_sums(p, s, segment, tokens);
    if (p.dinitial_state && segment.leads && mine.in) {
#pragma unroll
      for (int j = 0; j < kEntries; ++j) {
        const int n = mine.entry(j);
        if (n < f.state_dim)
          p.dinitial_state[(segment.index * f.channels + mine.channel) * f.state_dim + n] =
              dstate[j];
      }
    }
  }
  // Now nobody needs the state and the sum of delta there any more.
#pragma unroll
  for (int offset = 1; offset < Segments::kLanes; offset *= 2)
    dD += __shfl_xor_sync(~0u, dD, offset);
  if (!mine.in) return;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = mine.entry(j);
    if (n < f.state_dim) p.scratch[s.states + home * f.state_dim + n] = dA[j];
  }
  if (mine.lane == 0) p.scratch[s.steps + home] = dD;
}

template <typename data_t>
void launch_segments(const SelectiveScanBackwardParams& p, const Segments& s, cudaStream_t stream) {
  const SelectiveScanParams& f = p.forward;
  const int64_t states = int64_t(f.channels) * f.state_dim, tokens = f.batch * f.length;
  if (s.places > 0) {
    const auto blocks = static_cast<unsigned>(s.places * s.blocks);
    const bool aligned =
        come_in_fours<data_t>(f, s.run) && come_in_fours<data_t>(p.dy, p.dy_strides);
    const auto parts = static_cast<unsigned>((states + kJoinThreads - 1) / kJoinThreads);
    sum_segments_kernel<data_t><<<blocks, Segments::kThreads, 0, stream>>>(p, s, aligned);
    join_segments_kernel<<<dim3(static_cast<unsigned>(f.sequences * parts), 2), kJoinThreads, 0,
                           stream>>>(p, s, parts);
    launch_clusters(segment_gradients_kernel<data_t>, s.cluster, blocks, Segments::kThreads, 0,
                    stream, p, s, aligned);
  }
  sum_partials(p.scratch + s.states, states, s.places, states, p.dA, stream);
  if (p.dD != nullptr)
    sum_partials(p.scratch + s.steps, f.channels, s.places, f.channels, p.dD, stream);
  const auto add_up = [&](int64_t part, int count, int64_t size, void* sums) {
    if (count > 1)
      sum_partials(p.scratch + part, size, count, size, static_cast<data_t*>(sums), stream);
  };
  if (s.b_tiles > s.cluster) add_up(s.dB, s.b_tiles, tokens * f.b_groups * f.state_dim, p.dB);
  add_up(s.dC, s.c_tiles, tokens * f.c_groups * f.state_dim, p.dC);
}

}  // namespace
}  // namespace reasoners
