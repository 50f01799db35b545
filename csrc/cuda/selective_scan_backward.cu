// The derivative of selective_scan. With dS_t the gradient of the state after token t (dy_t C_t and
// what later tokens pass back) and decay_t = exp(delta_t A):
//   dC_t = sum over channels of dy_t S_t        dB_t = sum over channels of delta_t x_t dS_t
//   dx_t = delta_t (dS_t . B_t) + D dy_t        dS_{t-1} = decay_t dS_t + dy_{t-1} C_{t-1}
//   with e_t = dS_t decay_t S_{t-1}: ddelta_t = e_t . A + x_t (dS_t . B_t), dA = sum of delta_t e_t
//
// N <= 16 with up to 64 channels to a group: selective_segments.cuh. Else a block serves one
// sequence, a tile of neighbouring channels that read the same group of B and of C, and kLanes
// neighbouring threads hold one channel's state. A block first walks its sequence forwards and
// leaves the state at the start of every span of kSpan tokens in global memory (each thread its own
// entries, in an order of its own). Then it takes the spans from the last to the first: forwards
// again with the state of every stage of kStage tokens left in shared memory, then stage by stage
// backwards, with the states of the stage's tokens in registers.
//
// dx and ddelta go through shared memory to rows of whole lines. Sums over channels are made within
// a warp by exchanging halves, across warps in shared memory, across tiles of a group by a second
// launch from fp32; dA and dD across sequences likewise; everything in fixed order.
//
//   N        <= 16   <= 32   <= 64   <= 128   <= 256
//   kLanes      4       8      16       32       32     of 256 threads
//
// Bytes that must move, 16-bit: 14 a channel and token (x, delta, dy in, dx, ddelta out) beside B,
// C and their gradients: 4.7 us for a million at 3 TB/s. The four exponentials a state entry and
// token are 64 of them at N = 16: 4 cycles of a multiprocessor, 18 us for a million on 132. They
// count, and the multiply-adds beside them; keeping the decays in registers, one less, costs half
// of the threads. States at starts of spans take N / 16 bytes a channel and token, sums across the
// tiles of a group 4 N bytes a tile and token.

#include <numeric>

#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "scan.cuh"
#include "scan_backward.cuh"
#include "selective_segments.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

constexpr int kStage = 8;                // tokens
constexpr int kStages = 8;               // of a span
constexpr int kSpan = kStage * kStages;  // tokens

template <typename Row>
constexpr int kBlocks = Row::kSize <= 32 ? 2 : 1;  // per multiprocessor

// Neighbouring channels that read the same group of B and of C.
int count_run(const SelectiveScanParams& f) {
  return std::gcd(f.channels / f.b_groups, f.channels / f.c_groups);
}

// How the channels are dealt out to blocks; see the forward.
struct Tiles {
  int run, per_run, blocks;  // channels that share B and C, tiles of those, tiles of a sequence
  int b_tiles, c_tiles;      // that sum into one group of B, of C

  Tiles(const SelectiveScanParams& f, int per_block)
      : run(count_run(f)),
        per_run((run + per_block - 1) / per_block),
        blocks(f.channels / run * per_run),
        b_tiles(f.channels / f.b_groups / run * per_run),
        c_tiles(f.channels / f.c_groups / run * per_run) {}
};

// Parts of the scratch memory, in floats.
struct Scratch {
  int64_t dA = 0, dD = 0, dB = 0, dC = 0, checkpoints = 0, size = 0;

  Scratch(const SelectiveScanParams& f, const Tiles& tiles, int64_t state_floats) {
    const int64_t tokens = f.batch * f.length;
    const auto take = [&](int64_t& part, int64_t floats) {
      part = size;
      size += floats;
    };
    take(dA, f.sequences * f.channels * f.state_dim);
    take(dD, f.D ? f.sequences * f.channels : 0);
    take(dB, tiles.b_tiles > 1 ? tiles.b_tiles * tokens * f.b_groups * f.state_dim : 0);
    take(dC, tiles.c_tiles > 1 ? tiles.c_tiles * tokens * f.c_groups * f.state_dim : 0);
    take(checkpoints, count_checkpoints(tokens, f.sequences, kSpan) * tiles.blocks * state_floats);
  }
};

template <typename Row, int kThreads>
struct alignas(16) Shared {
  static constexpr int kChannels = kThreads / Row::kLanes;
  struct Stage {
    float b[kStage][Row::kSize], c[kStage][Row::kSize];
    float x[kStage][kChannels], delta[kStage][kChannels];  // later dx and ddelta
    float dy[kStage][kChannels];
  };
  Stage stages[2];
  Vec<float, Row::kRun> starts[kStages][Row::kEntries / Row::kRun][kThreads];
  float sums[kStage][kThreads / 32][2 * Row::kSize];  // of dB, then dC
};

template <typename data_t, typename Row, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocks<Row>)
    selective_scan_backward_kernel(const SelectiveScanBackwardParams p, const Tiles tiles,
                                   const Scratch scratch) {
  constexpr int kSize = Row::kSize, kEntries = Row::kEntries, kChannels = kThreads / Row::kLanes;
  using Matrix = Share<kStage, kSize, kThreads>;
  using Input = Share<kStage, kChannels, kThreads>;
  using Sums = RowSums<Row, 2 * kEntries>;
  constexpr int kMatrix = Matrix::kCount, kInput = Input::kCount;
  extern __shared__ float4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<Row, kThreads>*>(shared_memory);

  const SelectiveScanParams& f = p.forward;
  const int64_t index = blockIdx.x / tiles.blocks;
  const int block = blockIdx.x % tiles.blocks;
  const int first_of_run = block / tiles.per_run * tiles.run;
  const int first = first_of_run + block % tiles.per_run * kChannels;
  const int channels = min(kChannels, first_of_run + tiles.run - first);  // of this tile
  const int b_share = f.channels / f.b_groups, c_share = f.channels / f.c_groups;
  const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
  const auto* x = static_cast<const data_t*>(f.x) + sequence.batch * f.x_strides.batch + first;
  const float* delta = f.delta + sequence.batch * f.delta_strides.batch + first;
  const auto* b = static_cast<const data_t*>(f.B) + sequence.batch * f.b_strides.batch +
                  int64_t(first / b_share) * f.state_dim;
  const auto* c = static_cast<const data_t*>(f.C) + sequence.batch * f.c_strides.batch +
                  int64_t(first / c_share) * f.state_dim;
  const auto* dy = static_cast<const data_t*>(p.dy) + sequence.batch * p.dy_strides.batch + first;

  // This thread's tokens of the next stage, on their way to shared memory. Walks forwards leave out
  // what only the way back needs.
  data_t next_b[kMatrix], next_c[kMatrix], next_x[kInput], next_dy[kInput];
  float next_delta[kInput];
  const auto fetch = [&](int64_t t, bool back) {
    const data_t zero = from_float<data_t>(0.f);
    const int left = t < sequence.begin ? 0 : tokens_left(sequence, t, kStage);
    const data_t *from_b = b + t * f.b_strides.token, *from_c = c + t * f.c_strides.token,
                 *from_x = x + t * f.x_strides.token, *from_dy = dy + t * p.dy_strides.token;
    const float* from_delta = delta + t * f.delta_strides.token;
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      const int i = Matrix::row(k), n = Matrix::column(k);
      const bool in = i < left && n < f.state_dim;
      next_b[k] = in ? from_b[i * f.b_strides.token + n] : zero;
      next_c[k] = in && back ? from_c[i * f.c_strides.token + n] : zero;
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      const int i = Input::row(k), n = Input::column(k);
      const bool in = i < left && n < channels;
      next_x[k] = in ? from_x[i * f.x_strides.token + n] : zero;
      next_dy[k] = in && back ? from_dy[i * p.dy_strides.token + n] : zero;
      next_delta[k] = in ? from_delta[i * f.delta_strides.token + n] : 0.f;
    }
  };
  int buffer = 1;
  // Puts the stage that was fetched where all threads find it; one barrier.
  const auto put = [&] {
    buffer ^= 1;
    auto& stage = shared.stages[buffer];
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      if (Matrix::row(k) >= kStage) continue;
      stage.b[Matrix::row(k)][Matrix::column(k)] = to_float(next_b[k]);
      stage.c[Matrix::row(k)][Matrix::column(k)] = to_float(next_c[k]);
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      if (Input::row(k) >= kStage) continue;
      stage.x[Input::row(k)][Input::column(k)] = to_float(next_x[k]);
      stage.dy[Input::row(k)][Input::column(k)] = to_float(next_dy[k]);
      stage.delta[Input::row(k)][Input::column(k)] = next_delta[k];
    }
    __syncthreads();
  };

  const int lane = threadIdx.x % Row::kLanes, local = threadIdx.x / Row::kLanes;
  const int lane_of_warp = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool writes = local < channels;
  const int64_t channel = first + local;
  const float skip = f.D && writes ? f.D[channel] : 0.f;
  const int64_t home = (index * f.channels + channel) * f.state_dim;  // in a state tensor
  float exponent[kEntries], state[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    const bool in = writes && n < f.state_dim;
    exponent[j] = in ? f.A[channel * f.state_dim + n] * kLog2e : 0.f;
    state[j] = in && f.initial_state ? f.initial_state[home + n] : 0.f;
  }
  const auto advance = [&](const typename Shared<Row, kThreads>::Stage& stage, int i) {
    float in[kEntries];
    Row::read(stage.b[i], lane, in);
    const float step = stage.delta[i][local], gain = step * stage.x[i][local];
#pragma unroll
    for (int j = 0; j < kEntries; ++j)
      state[j] = fmaf(exp2_fast(step * exponent[j]), state[j], gain * in[j]);
  };

  float* checkpoint = p.scratch + scratch.checkpoints + threadIdx.x +
                      (first_checkpoint(sequence, f.length, index, kSpan) * tiles.blocks + block) *
                          kEntries * kThreads;
  const int64_t per_checkpoint = int64_t(tiles.blocks) * kEntries * kThreads;
  const int64_t spans = (sequence.end - sequence.begin + kSpan - 1) / kSpan;
  if (spans > 1) fetch(sequence.begin, false);
  for (int64_t span = 0; span < spans; ++span, checkpoint += per_checkpoint) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) checkpoint[j * kThreads] = state[j];
    if (span + 1 == spans) break;
    for (int k = 0; k < kStages; ++k) {
      put();
      fetch(sequence.begin + (span * kStages + k + 1) * kStage, false);
#pragma unroll 4
      for (int i = 0; i < kStage; ++i) advance(shared.stages[buffer], i);
    }
  }

  float dstate[kEntries], dA[kEntries] = {}, dD = 0.f;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    dstate[j] = writes && n < f.state_dim ? p.dfinal_state[home + n] : 0.f;
  }
  const int64_t row = sequence.batch * f.length;  // of the gradients that this kernel makes
  auto* dx = static_cast<data_t*>(p.dx) + row * f.channels + first;
  float* ddelta = p.ddelta + row * f.channels + first;
  const int64_t tokens = f.batch * f.length;
  const int b_tile = first_of_run % b_share / tiles.run * tiles.per_run + block % tiles.per_run;
  const int c_tile = first_of_run % c_share / tiles.run * tiles.per_run + block % tiles.per_run;
  const int64_t b_pitch = int64_t(f.b_groups) * f.state_dim,
                c_pitch = int64_t(f.c_groups) * f.state_dim;
  const auto store = [&](void* whole, int64_t part, int count, int tile, int64_t pitch, int group,
                         int64_t t, int n, float sum) {
    const int64_t at = (row + t) * pitch + int64_t(group) * f.state_dim + n;
    if (count > 1) {
      p.scratch[part + tile * tokens * pitch + at] = sum;
    } else {
      static_cast<data_t*>(whole)[at] = from_float<data_t>(sum);
    }
  };

  for (int64_t span = spans - 1; span >= 0; --span, checkpoint -= per_checkpoint) {
    const int64_t begin = sequence.begin + span * kSpan;
    const int stages = (tokens_left(sequence, begin, kSpan) + kStage - 1) / kStage;
#pragma unroll
    for (int j = 0; j < kEntries; ++j) state[j] = checkpoint[j * kThreads];
    const auto keep = [&](int k) {
#pragma unroll
      for (int j = 0; j < kEntries; j += Row::kRun) {
        Vec<float, Row::kRun> run;
#pragma unroll
        for (int l = 0; l < Row::kRun; ++l) run.at[l] = state[j + l];
        shared.starts[k][j / Row::kRun][threadIdx.x] = run;
      }
    };
    fetch(begin, false);
    for (int k = 0; k + 1 < stages; ++k) {
      keep(k);
      put();
      fetch(begin + (k + 1) * kStage, false);
#pragma unroll 4
      for (int i = 0; i < kStage; ++i) advance(shared.stages[buffer], i);
    }
    keep(stages - 1);
    fetch(begin + (stages - 1) * kStage, true);
    for (int k = stages - 1; k >= 0; --k) {
      const int64_t t = begin + k * kStage;
      const int count = tokens_left(sequence, t, kStage);
      put();
      auto& stage = shared.stages[buffer];
      if (k > 0) fetch(t - kStage, true);

      float before[kStage][kEntries];
#pragma unroll
      for (int j = 0; j < kEntries; j += Row::kRun) {
        const auto run = shared.starts[k][j / Row::kRun][threadIdx.x];
#pragma unroll
        for (int l = 0; l < Row::kRun; ++l) state[j + l] = run.at[l];
      }
      // Tokens past the end have neither input nor decay: they pass the states on as they are.
#pragma unroll
      for (int i = 0; i < kStage; ++i) {
#pragma unroll
        for (int j = 0; j < kEntries; ++j) before[i][j] = state[j];
        advance(stage, i);
      }
#pragma unroll
      for (int i = kStage - 1; i >= 0; --i) {
        float in[kEntries], out[kEntries], sums[2 * kEntries];
        Row::read(stage.b[i], lane, in);
        Row::read(stage.c[i], lane, out);
        const float step = stage.delta[i][local], input = stage.x[i][local], g = stage.dy[i][local],
                    gain = step * input;
        float dgain = 0.f, dstep = 0.f;
#pragma unroll
        for (int j = 0; j < kEntries; ++j) {
          const float total = fmaf(g, out[j], dstate[j]);
          sums[j] = total * gain;
          sums[kEntries + j] = g * state[j];
          dgain = fmaf(total, in[j], dgain);
          dstate[j] = total * exp2_fast(step * exponent[j]);
          const float dexponent = dstate[j] * before[i][j];
          dstep = fmaf(dexponent, exponent[j], dstep);
          dA[j] = fmaf(dexponent, step, dA[j]);
          state[j] = before[i][j];
        }
        dgain = Row::sum(dgain);
        dstep = Row::sum(dstep);
        __syncwarp();  // the channel's other threads have read what is written over
        if (lane == 0) {
          stage.x[i][local] = fmaf(dgain, step, skip * g);
          stage.delta[i][local] = fmaf(dgain, input, dstep * (1.f / kLog2e));
        }
        dD = fmaf(g, input, dD);
        Sums::reduce(sums, lane_of_warp);
        const int kept = Sums::first(lane_of_warp);
#pragma unroll
        for (int l = 0; l < Sums::kKept; ++l) {
          const int v = kept + l;
          shared.sums[i][warp][v < kEntries ? Row::position(lane, v)
                                            : kSize + Row::position(lane, v - kEntries)] = sums[l];
        }
      }
      __syncthreads();
#pragma unroll
      for (int l = 0; l < kInput; ++l) {
        const int i = Input::row(l), n = Input::column(l);
        if (i >= count || n >= channels) continue;
        dx[(t + i) * f.channels + n] = from_float<data_t>(stage.x[i][n]);
        ddelta[(t + i) * f.channels + n] = stage.delta[i][n];
      }
      for (int v = threadIdx.x; v < kStage * 2 * kSize; v += kThreads) {
        const int i = v / (2 * kSize), n = v % kSize;
        if (i >= count || n >= f.state_dim) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kThreads / 32; ++w) sum += shared.sums[i][w][v % (2 * kSize)];
        if (v % (2 * kSize) < kSize) {
          store(p.dB, scratch.dB, tiles.b_tiles, b_tile, b_pitch, first / b_share, t + i, n, sum);
        } else {
          store(p.dC, scratch.dC, tiles.c_tiles, c_tile, c_pitch, first / c_share, t + i, n, sum);
        }
      }
    }
  }
  if (!writes) return;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    if (n >= f.state_dim) continue;
    p.scratch[scratch.dA + home + n] = dA[j];
    if (p.dinitial_state) p.dinitial_state[home + n] = dstate[j];
  }
  if (f.D && lane == 0) p.scratch[scratch.dD + index * f.channels + channel] = dD;
}

// What a shape runs on; the two uses are the launch and the size of its scratch memory.
template <typename Use>
void with_tile(const SelectiveScanParams& f, const Use& use) {
  if (f.state_dim <= 16) {
    use(StateRow<16, 4>(), std::integral_constant<int, 256>());
  } else if (f.state_dim <= 32) {
    use(StateRow<32, 8>(), std::integral_constant<int, 256>());
  } else if (f.state_dim <= 64) {
    use(StateRow<64, 16>(), std::integral_constant<int, 256>());
  } else if (f.state_dim <= 128) {
    use(StateRow<128, 32>(), std::integral_constant<int, 256>());
  } else {
    use(StateRow<kSelectiveScanMaxStateDim, 32>(), std::integral_constant<int, 256>());
  }
}

// Whether a shape runs in segments: with more channels to a group, the sums of dB and dC over the
// tiles of a group would move more than all else.
bool in_segments(const SelectiveScanParams& f, int run) {
  return f.state_dim <= kNarrow && run <= 4 * kNarrow;
}

template <typename data_t>
void launch(const SelectiveScanBackwardParams& p, cudaStream_t stream) {
  const SelectiveScanParams& f = p.forward;
  if (const int run = count_run(f); in_segments(f, run))
    return launch_segments<data_t>(p, Segments(f, run), stream);
  with_tile(f, [&](auto row, auto threads) {
    using Row = decltype(row);
    constexpr int kThreads = decltype(threads)::value;
    const Tiles tiles(f, kThreads / Row::kLanes);
    const Scratch scratch(f, tiles, Row::kEntries * kThreads);
    const int64_t tokens = f.batch * f.length;
    constexpr int kBytes = sizeof(Shared<Row, kThreads>);
    auto* kernel = &selective_scan_backward_kernel<data_t, Row, kThreads>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    const auto blocks = static_cast<unsigned>(f.sequences * tiles.blocks);
    if (blocks > 0) kernel<<<blocks, kThreads, kBytes, stream>>>(p, tiles, scratch);
    const auto add_up = [&](int64_t part, int64_t count, int64_t size, auto* sums) {
      sum_partials(p.scratch + part, size, count, size, sums, stream);
    };
    const int64_t states = int64_t(f.channels) * f.state_dim;
    add_up(scratch.dA, f.sequences, states, p.dA);
    if (p.dD != nullptr) add_up(scratch.dD, f.sequences, f.channels, p.dD);
    if (tiles.b_tiles > 1)
      add_up(scratch.dB, tiles.b_tiles, tokens * f.b_groups * f.state_dim,
             static_cast<data_t*>(p.dB));
    if (tiles.c_tiles > 1)
      add_up(scratch.dC, tiles.c_tiles, tokens * f.c_groups * f.state_dim,
             static_cast<data_t*>(p.dC));
  });
}

}  // namespace

int64_t count_selective_scan_scratch(const SelectiveScanParams& f) {
  if (f.channels == 0) return 0;
  if (const int run = count_run(f); in_segments(f, run)) return Segments(f, run).size;
  int64_t floats = 0;
  with_tile(f, [&](auto row, auto threads) {
    using Row = decltype(row);
    constexpr int kThreads = decltype(threads)::value;
    const Tiles tiles(f, kThreads / Row::kLanes);
    floats = Scratch(f, tiles, Row::kEntries * kThreads).size;
  });
  return floats;
}

void launch_selective_scan_backward(const SelectiveScanBackwardParams& p, cudaStream_t stream) {
  if (p.forward.channels == 0) return;
  switch (p.forward.dtype) {
    case DType::kFloat32:
      return launch<float>(p, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return launch<__half>(p, stream);
  }
}

}  // namespace reasoners
