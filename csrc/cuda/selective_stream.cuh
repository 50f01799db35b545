// The body of selective_step.cuh for many rows of N = 16: blocks that stay.
//
// A block serves 128 channels, a thread each, whose constants (A, taps, biases) stay in registers
// for all its rows. A row comes into a stage of shared memory: its state, 4 or 8 kB in one piece,
// by one bulk copy, its inputs and the convolution's ring by 16-byte asynchronous copies of the
// first warp; an mbarrier a stage says when it is there. The new state takes the place of the old
// in the stage, leaves by one bulk copy, and the stage's next row is sent for. A block's first rows
// are dealt; the others are drawn, by a ticket, a turn ahead.
//
// A channel's 64 (32) bytes of state are 4 (2) chunks of 16, which threads take in different
// orders, so that 8 neighbours touch all banks once. The sums over chunks are paired as the lanes
// of selective_step.cuh pair theirs: y has the same bits there.
//
// Why: instructions. With four (two) threads to a channel, each at the channel's addresses, taps
// and gate for itself, and a new block every 4 (2) rows, a warp executed 1696 (1312) instructions
// for 8 (16) channels of 4 (2) rows of fp32 (bf16) state: 57 and 46 us of issue slots at batch 512.
// With a thread to a channel it is 330 for 32 channels of a row, and 280 of the first warp for all
// 128: 14 us. The floor is memory's: at 2048 channels a row moves 297 (166) kB, which takes an H200
// 36.6 (20.4) us for 512 rows at 4.2 TB/s.
//
//   2048 channels, the whole mixer, H200, us     1    16    64   128   256   512  1024
//   before, fp32 state                         4.6   5.7  14.5  26.5  46.8  87.3   169
//   before, bf16 state                         4.1   5.7  11.4  17.5  31.0  56.7   108
//   now, fp32 state                            2.3   4.3   7.2  12.4  22.1  41.9  81.0
//   now, bf16 state                            2.2   3.2   6.5   8.4  13.4  24.4  47.2
// That is 88 and 85 % of a copy's rate at 512 rows. 1 and 16 rows are selective_step.cuh's.
#pragma once

#include "exponential.cuh"
#include "state_step.cuh"

namespace reasoners {

constexpr int kStreamStateDim = 16;
constexpr int kStreamChannels = kSelectivePart;
// Blocks on a multiprocessor, as registers allow without spills, and rows under way to each: 60 to
// 120 kB in flight, where 45 keep an H200's memory busy.
template <typename data_t, typename state_t>
constexpr int kStreamBlocks = sizeof(state_t) == 2  ? 7
                              : sizeof(data_t) == 2 ? 6
                                                    : 4;
template <typename state_t>
constexpr int kStreamStages = sizeof(state_t) == 4 ? 2 : 3;

// Rows of a part, for each multiprocessor, below which more threads to a channel are done sooner.
constexpr int kStreamFewest = 2;

template <typename Mixer>
__device__ inline float exponent(const Mixer& mixer, float decay) {
  return mixer.A(decay) * kLog2e;
}

template <int kVec, typename data_t>
__device__ inline Floats<kVec> widen(const Vec<data_t, kVec>& values) {
  Floats<kVec> v;
#pragma unroll
  for (int k = 0; k < kVec; ++k) v.at[k] = to_float(values.at[k]);
  return v;
}
// Two at a time: 2 instructions instead of 3, as unpack says.
template <int kVec>
__device__ inline Floats<kVec> widen(const Vec<__nv_bfloat16, kVec>& values) {
  Floats<kVec> v;
#pragma unroll
  for (int k = 0; k < kVec; k += 2) {
    const float2 pair = unpack<__nv_bfloat16>(reinterpret_cast<const uint32_t&>(values.at[k]));
    v.at[k] = pair.x;
    v.at[k + 1] = pair.y;
  }
  return v;
}

// 16 bytes of a channel's state after the token, and their part of y.
struct Advanced {
  uint4 state;
  float y;
};
template <int kVec, typename data_t, typename state_t>
__device__ inline Advanced advance(uint4 raw, const float (&A)[kVec], float step, float input,
                                   const Vec<data_t, kVec>& B, const Vec<data_t, kVec>& C,
                                   state_t type) {
  auto s = widen(raw, type);
  const auto b = widen(B), c = widen(C);
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    s.at[k] = fmaf(exp2_fast(step * A[k]), s.at[k], input * b.at[k]);
    sum = fmaf(s.at[k], c.at[k], sum);
  }
  return {narrow(s, type), sum};
}

// A row in shared memory.
template <typename Mixer, typename state_t>
struct alignas(128) SelectiveStage {
  uint4 state[kStreamChannels * kStreamStateDim * sizeof(state_t) / 16];
  typename Mixer::Staged inputs;
  void* newest;   // where the ring takes the first channel's input
  int row, slot;  // row >= batch: there are no more
};

template <typename Mixer, typename state_t>
__global__ void __launch_bounds__(kStreamChannels, kStreamBlocks<typename Mixer::Data, state_t>)
    selective_stream_kernel(const Mixer mixer) {
  constexpr int kStages = kStreamStages<state_t>;
  constexpr int kVec = 16 / sizeof(state_t), kChunks = kStreamStateDim / kVec;
  using Values = Vec<typename Mixer::Data, kVec>;
  __shared__ SelectiveStage<Mixer, state_t> stages[kStages];
  __shared__ uint64_t full[kStages];
  const auto& p = mixer.p;
  __builtin_assume(p.state_dim == kStreamStateDim);
  const int thread = threadIdx.x, lane = thread % 32;
  const bool fetches = thread < 32;
  const int first = blockIdx.x * kStreamChannels, count = min(kStreamChannels, p.channels - first);
  const int state_bytes = count * kStreamStateDim * sizeof(state_t);
  // Threads beyond the last channel compute on garbage and store nothing.
  const bool valid = thread < count;
  const int channel = min(first + thread, p.channels - 1);
  const int walkers = gridDim.y, dealt = min(p.batch, kStages * walkers), drawn = p.batch - dealt;
  const auto dealt_row = [&](int turn) { return static_cast<int>(blockIdx.y) + turn * walkers; };
  const auto state_of = [&](int64_t slot) {
    return static_cast<state_t*>(p.state) + (slot * p.channels + first) * kStreamStateDim;
  };

  if (thread == 0) {
    // The first warp's lanes as their copies land, and the first of them once more.
    for (int stage = 0; stage < kStages; ++stage) init_barrier(&full[stage], 33);
    show_barriers();
  }
  let_next_start();
  // The first rows, a warp each.
  static_assert(kStages <= kStreamChannels / 32);
  if (const int turn = thread / 32; turn < kStages && dealt_row(turn) < dealt)
    if (const int64_t slot = guess_slot(p, dealt_row(turn)); slot >= 0) {
      if (lane == 0) prefetch_bulk(state_of(slot), state_bytes);
      mixer.prefetch_slot(slot, min(first + lane * kStreamChannels / 32, p.channels - 1));
    }
  if constexpr (!Mixer::kWeights) wait_for_inputs();
  const auto constants = mixer.constants(channel);
  const auto part = mixer.part(first, count);
  const auto place = mixer.place(part, channel);
  const int order = thread * kChunks / 8 % kChunks;
  float A[kChunks][kVec];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const float* decays = mixer.decays(channel) + (j ^ order) * kVec;
#pragma unroll
    for (int k = 0; k < kVec; k += 4) {
      const auto some = *reinterpret_cast<const Vec<float, 4>*>(decays + k);
#pragma unroll
      for (int l = 0; l < 4; ++l) A[j][k + l] = exponent(mixer, some.at[l]);
    }
  }
  if constexpr (Mixer::kWeights) wait_for_inputs();
  __syncthreads();

  // What the first warp must know of a row before it can send for it.
  struct Row {
    int row, slot, length;
  };
  const auto look_at = [&](int row) {
    if (row >= p.batch) return Row{p.batch, -1, 0};
    return Row{row, __ldcg(&p.slots[row]), mixer.length(row)};
  };
  const auto fetch = [&](const Row& next, SelectiveStage<Mixer, state_t>& stage, uint64_t* full) {
    void* newest = nullptr;
    if (next.slot >= 0) {
      if (lane == 0) copy_bulk_once(stage.state, state_of(next.slot), state_bytes, full);
      newest = mixer.fetch(stage.inputs, part, next.row, next.slot, next.length);
    }
    if (lane == 0) {
      stage.newest = newest, stage.row = next.row, stage.slot = next.slot;
      arrive_expecting(full, next.slot >= 0 ? state_bytes : 0);
    }
    arrive_after_copies(full);
  };
  const auto draw_next = [&] {
    return lane == 0 ? draw_ticket(&p.tickets[blockIdx.x], drawn, walkers) : 0;
  };
  int ticket = 0;
  if (fetches) {
    Row rows[kStages];
#pragma unroll
    for (int turn = 0; turn < kStages; ++turn)
      rows[turn] = look_at(dealt_row(turn) < dealt ? dealt_row(turn) : p.batch);
    if (drawn > 0) ticket = draw_next();
#pragma unroll
    for (int turn = 0; turn < kStages; ++turn) fetch(rows[turn], stages[turn], &full[turn]);
  }

  int at = 0, parity = 0;
  while (true) {
    Row next{p.batch, -1, 0};
    if (fetches) {
      const int i = __shfl_sync(~0u, ticket, 0);
      if (i < drawn) {
        next = look_at(dealt + i);
        ticket = draw_next();
      }
    }
    auto& stage = stages[at];
    wait_for(&full[at], parity);
    const int row = stage.row;
    if (row >= p.batch) break;
    const int slot = stage.slot;
    if (slot >= 0) {
      const auto in = mixer.staged(stage.inputs, place, stage.newest);
      const float delta = mixer.delta(constants, in);
      const float x = mixer.x(constants, in, valid), input = delta * x;
      float y[kChunks];
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int chunk = j ^ order;
        const auto values = [&](const auto* from) {
          return *reinterpret_cast<const Values*>(from + chunk * kVec);
        };
        uint4& raw = stage.state[thread * kChunks + chunk];
        const auto advanced = advance(raw, A[j], delta, input, values(stage.inputs.B + place.b),
                                      values(stage.inputs.C + place.c), state_t{});
        raw = advanced.state, y[j] = advanced.y;
      }
      show_to_copies();
#pragma unroll
      for (int offset = kChunks / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int j = 0; j < offset; ++j) y[j] += y[j + offset];
      if (valid) mixer.finish(constants, in, row, channel, x, y[0]);
    } else if (valid) {
      mixer.store(row, channel, 0.f);
    }
    __syncthreads();
    if (fetches) {
      if (lane == 0 && slot >= 0) {
        store_bulk_once(state_of(slot), stage.state, state_bytes);
        commit_bulk_stores();
        wait_bulk_stores_read();
      }
      __syncwarp();
      fetch(next, stage, &full[at]);
    }
    if (++at == kStages) at = 0, parity ^= 1;
  }
  if (thread == 0) wait_bulk_stores();
}

// False for few rows, or if something is not where 16-byte copies want it.
template <typename Mixer, typename state_t>
bool launch_selective_stream(const Mixer& mixer, cudaStream_t stream) {
  const auto& p = mixer.p;
  const int parts = (p.channels + kStreamChannels - 1) / kStreamChannels;
  const int processors = count_processors();
  int per_processor = 0;
  if (int64_t(p.batch) * parts < kStreamFewest * processors || !mixer.streams()) return false;
  const auto kernel = selective_stream_kernel<Mixer, state_t>;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kStreamChannels, 0);
  const int rows_at_once = processors * per_processor / parts;
  if (rows_at_once < 1) return false;
  launch_overlapping(kernel, dim3(parts, std::min(rows_at_once, p.batch)), kStreamChannels, 0,
                     stream, mixer);
  return true;
}

}  // namespace reasoners
