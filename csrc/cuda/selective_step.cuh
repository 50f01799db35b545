// One token of the Mamba-1 recurrence S = exp(delta A) S + delta x B, y = S . C + D x, in place on
// each row's slot: the body that selective_update.cu and mamba1_update.cu share.
//
// kLanes neighbouring threads hold a channel's N entries, 16 bytes each, so a block's addresses are
// one linear stream per row. A block keeps its channels' constants (A, taps, biases) for kRows
// rows, whose states are all requested before the first is used. A `Mixer` says where x, delta, B
// and C come from and what becomes of y.
//
//   N               8      16      32      64
//   lanes, fp32     2       4       8      16
//   lanes, 16 bit   1       2       4       8
#pragma once

#include "state_step.cuh"

namespace reasoners {

constexpr int kSelectiveThreads = 128;

template <typename Mixer, typename state_t, int kStateDim, int kRows>
__global__ void __launch_bounds__(kSelectiveThreads) selective_step_kernel(const Mixer mixer) {
  constexpr int kVec = 16 / sizeof(state_t), kLanes = kStateDim / kVec;
  const auto& p = mixer.p;
  const int channel = (blockIdx.x * kSelectiveThreads + threadIdx.x) / kLanes;
  const int first = threadIdx.x % kLanes * kVec;
  // Lanes of a channel agree on it, so shuffles below may name all lanes of the warp only if none
  // leaves: channels beyond the last compute on the last and store nothing.
  const bool valid = channel < p.channels;
  const int at = min(channel, p.channels - 1);

  let_next_start();
  wait_for_inputs();
  uint4 raw[kRows];
  int64_t slots[kRows];
  auto* states = static_cast<state_t*>(p.state) + int64_t(at) * kStateDim + first;
  const int64_t slot_size = int64_t(p.channels) * kStateDim;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = blockIdx.y * kRows + i;
    slots[i] = row < p.batch ? p.slots[row] : -1;
    raw[i] = slots[i] >= 0 ? load_state(states + slots[i] * slot_size) : uint4{};
  }
  const auto constants = mixer.constants(at);
  float A[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) A[k] = mixer.A(at, first + k) * 1.4426950408889634f;

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = blockIdx.y * kRows + i;
    if (row >= p.batch) break;
    if (slots[i] < 0) {
      if (first == 0 && valid) mixer.store(row, at, 0.f);
      continue;
    }
    const float delta = mixer.delta(constants, row, at);
    const float x = mixer.x(constants, row, slots[i], at, valid && first == 0);
    const auto *b = mixer.B(row, at) + first, *c = mixer.C(row, at) + first;
    auto s = widen(raw[i], state_t{});
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      s.at[k] = exp2f(delta * A[k]) * s.at[k] + delta * x * to_float(b[k]);
      sum += s.at[k] * to_float(c[k]);
    }
    if (valid) store_state(states + slots[i] * slot_size, narrow(s, state_t{}));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(~0u, sum, offset, kLanes);
    if (first == 0 && valid) mixer.finish(constants, row, at, x, sum);
  }
}

template <typename Mixer, typename state_t, int kStateDim>
void launch_selective_step(const Mixer& mixer, cudaStream_t stream) {
  constexpr int kLanes = kStateDim * sizeof(state_t) / 16;
  const auto& p = mixer.p;
  const int channels = kSelectiveThreads / kLanes;
  const int blocks = (p.channels + channels - 1) / channels;
  if (p.batch < 64) {
    const dim3 grid(blocks, p.batch);
    launch_overlapping(selective_step_kernel<Mixer, state_t, kStateDim, 1>, grid, kSelectiveThreads,
                       0, stream, mixer);
  } else {
    const dim3 grid(blocks, (p.batch + 3) / 4);
    launch_overlapping(selective_step_kernel<Mixer, state_t, kStateDim, 4>, grid, kSelectiveThreads,
                       0, stream, mixer);
  }
}

template <typename Mixer, typename state_t>
bool launch_selective_step(const Mixer& mixer, cudaStream_t stream) {
  switch (mixer.p.state_dim) {
    case 8:
      launch_selective_step<Mixer, state_t, 8>(mixer, stream);
      return true;
    case 16:
      launch_selective_step<Mixer, state_t, 16>(mixer, stream);
      return true;
    case 32:
      launch_selective_step<Mixer, state_t, 32>(mixer, stream);
      return true;
    case 64:
      launch_selective_step<Mixer, state_t, 64>(mixer, stream);
      return true;
    default:
      return false;
  }
}

}  // namespace reasoners
