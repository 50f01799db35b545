// One token of the Mamba-1 recurrence S = exp(delta A) S + delta x B, y = S . C + D x, in place on
// each row's slot: the body that selective_update.cu and mamba1_update.cu share.
//
// kLanes neighbouring threads hold a channel's N entries, 16 bytes each, so a block's addresses are
// one linear stream per row. A block keeps its channels' constants (A, taps, biases) for kRows
// rows; everything that it reads of these rows is requested before the first is used. What is one
// number a channel (step size, convolution, gate) is the work of one lane, another for each row,
// which tells the others. A `Mixer` says where inputs come from and what becomes of y.
//
//   N               8      16      32      64
//   lanes, fp32     2       4       8      16
//   lanes, 16 bit   1       2       4       8
//
// 2048 channels, N = 16, batch 512, the whole mixer, H100: with every lane at work on every number,
// and a row's inputs requested after the row before, 115 us in fp32 and 72 in bf16 (floor 51, 29).
#pragma once

#include "state_step.cuh"

namespace reasoners {

constexpr int kSelectiveThreads = 128;

// kCount neighbours; aligned: their address is a multiple of their size, in every row.
template <int kCount, typename data_t>
__device__ inline Vec<data_t, kCount> load_values(const data_t* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vec<data_t, kCount>*>(from);
  Vec<data_t, kCount> values;
#pragma unroll
  for (int k = 0; k < kCount; ++k) values.at[k] = from[k];
  return values;
}

template <typename Mixer, typename state_t, int kStateDim, int kRows>
__global__ void __launch_bounds__(kSelectiveThreads)
    selective_step_kernel(const Mixer mixer, bool aligned) {
  using data_t = typename Mixer::Data;
  constexpr int kVec = 16 / sizeof(state_t), kLanes = kStateDim / kVec;
  const auto& p = mixer.p;
  const int channel = (blockIdx.x * kSelectiveThreads + threadIdx.x) / kLanes;
  const int first = threadIdx.x % kLanes * kVec;
  // Lanes of a channel agree on it, so shuffles below may name all lanes of the warp only if none
  // leaves: channels beyond the last compute on the last and store nothing.
  const bool valid = channel < p.channels;
  const int at = min(channel, p.channels - 1);

  const int lane = threadIdx.x % kLanes;

  let_next_start();
  wait_for_inputs();
  uint4 raw[kRows];
  Vec<data_t, kVec> b[kRows], c[kRows];
  int64_t slots[kRows];
  auto* states = static_cast<state_t*>(p.state) + int64_t(at) * kStateDim + first;
  const int64_t slot_size = int64_t(p.channels) * kStateDim;
  const int first_row = blockIdx.y * kRows;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i;
    slots[i] = row < p.batch ? p.slots[row] : -1;
    raw[i] = uint4{};
    if (slots[i] < 0) continue;
    raw[i] = load_state(states + slots[i] * slot_size);
    b[i] = load_values<kVec>(mixer.B(row, at) + first, aligned);
    c[i] = load_values<kVec>(mixer.C(row, at) + first, aligned);
  }
  // Row i is seen to by lane i % kLanes.
  constexpr int kOwned = (kRows + kLanes - 1) / kLanes;
  typename Mixer::Inputs inputs[kOwned];
  int64_t own_slots[kOwned];
#pragma unroll
  for (int o = 0; o < kOwned; ++o) {
    own_slots[o] = -1;
#pragma unroll
    for (int l = 0; l < kLanes && o * kLanes + l < kRows; ++l)
      if (lane == l) own_slots[o] = slots[o * kLanes + l];
    if (own_slots[o] >= 0)
      inputs[o] = mixer.inputs(first_row + o * kLanes + lane, own_slots[o], at);
  }
  const auto constants = mixer.constants(at);
  float A[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) A[k] = mixer.A(at, first + k) * 1.4426950408889634f;
  float delta[kOwned] = {}, x[kOwned] = {};
#pragma unroll
  for (int o = 0; o < kOwned; ++o)
    if (own_slots[o] >= 0) {
      delta[o] = mixer.delta(constants, inputs[o]);
      x[o] = mixer.x(constants, inputs[o], own_slots[o], at, valid);
    }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i, owner = i % kLanes, o = i / kLanes;
    if (row >= p.batch) break;
    if (slots[i] < 0) {
      if (lane == owner && valid) mixer.store(row, at, 0.f);
      continue;
    }
    const float step = __shfl_sync(~0u, delta[o], owner, kLanes);
    const float input = step * __shfl_sync(~0u, x[o], owner, kLanes);
    auto s = widen(raw[i], state_t{});
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      s.at[k] = fmaf(exp2f(step * A[k]), s.at[k], input * to_float(b[i].at[k]));
      sum = fmaf(s.at[k], to_float(c[i].at[k]), sum);
    }
    if (valid) store_state(states + slots[i] * slot_size, narrow(s, state_t{}));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(~0u, sum, offset, kLanes);
    if (lane == owner && valid) mixer.finish(constants, inputs[o], row, at, x[o], sum);
  }
}

template <typename Mixer, typename state_t, int kStateDim>
void launch_selective_step(const Mixer& mixer, cudaStream_t stream) {
  constexpr int kLanes = kStateDim * sizeof(state_t) / 16;
  const auto& p = mixer.p;
  const bool aligned = mixer.aligned(16 / sizeof(state_t));
  const int channels = kSelectiveThreads / kLanes;
  const int blocks = (p.channels + channels - 1) / channels;
  // Wide vectors of 16-bit entries leave registers for fewer rows.
  constexpr int kMany = sizeof(state_t) == 4 ? 4 : 2;
  if (p.batch < 64) {
    const dim3 grid(blocks, p.batch);
    launch_overlapping(selective_step_kernel<Mixer, state_t, kStateDim, 1>, grid, kSelectiveThreads,
                       0, stream, mixer, aligned);
  } else {
    const dim3 grid(blocks, (p.batch + kMany - 1) / kMany);
    launch_overlapping(selective_step_kernel<Mixer, state_t, kStateDim, kMany>, grid,
                       kSelectiveThreads, 0, stream, mixer, aligned);
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
