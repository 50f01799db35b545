// One token of the Mamba-1 recurrence S = exp(delta A) S + delta x B, y = S . C + D x, in place on
// each row's slot: the body that selective_update.cu and mamba1_update.cu share. For many rows of
// N = 16 see selective_stream.cuh.
//
// kLanes neighbouring threads hold a channel's N entries, 16 bytes each, so a block's addresses are
// one linear stream. What is one number a channel (step size, convolution, gate) is the work of the
// first lane, which tells the others. While the kernel before still runs, the slot's lines are
// fetched into the second-level cache, and weights are read. A `Mixer` says where inputs come from
// and what becomes of y.
//
//   N               8      16      32      64
//   lanes, fp32     2       4       8      16
//   lanes, 16 bit   1       2       4       8
#pragma once

#include "selective_stream.cuh"

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

template <typename Mixer, typename state_t, int kStateDim>
__global__ void __launch_bounds__(kSelectiveThreads, 8)
    selective_step_kernel(const Mixer mixer, bool aligned) {
  constexpr int kVec = 16 / sizeof(state_t), kLanes = kStateDim / kVec;
  const auto& p = mixer.p;
  __builtin_assume(p.state_dim == kStateDim);
  const int64_t row = blockIdx.x;
  const int channel = (blockIdx.y * kSelectiveThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes, first = lane * kVec;
  // Lanes of a channel agree on it, so shuffles below may name all lanes of the warp only if none
  // leaves: channels beyond the last compute on the last and store nothing.
  const bool valid = channel < p.channels, leads = lane == 0;
  const int at = min(channel, p.channels - 1);
  const auto state_of = [&](int64_t slot) {
    return static_cast<state_t*>(p.state) + (slot * p.channels + at) * kStateDim + first;
  };

  let_next_start();
  if (const int64_t slot = guess_slot(p, row); slot >= 0) {
    prefetch(state_of(slot));
    if (leads) mixer.prefetch_slot(slot, at);
  }
  const auto place = mixer.place(mixer.part(0, p.channels), at);
  if constexpr (!Mixer::kWeights) wait_for_inputs();
  const auto constants = mixer.constants(at);
  float A[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) A[k] = exponent(mixer, mixer.decays(at)[first + k]);
  if constexpr (Mixer::kWeights) wait_for_inputs();

  // All that is read of the row is asked for at once.
  const int64_t slot = __ldcg(&p.slots[row]);
  const int length = mixer.length(row);
  auto in = mixer.inputs(row, place, at);
  const auto b = load_values<kVec>(mixer.B(row) + place.b + first, aligned);
  const auto c = load_values<kVec>(mixer.C(row) + place.c + first, aligned);
  if (slot < 0) {
    if (leads && valid) mixer.store(row, at, 0.f);
    return;
  }
  const uint4 raw = load_state(state_of(slot));
  float delta = 0.f, x = 0.f;
  if (leads) {
    mixer.read_ring(in, slot, length, at);
    delta = mixer.delta(constants, in);
    x = mixer.x(constants, in, valid);
  }
  const float step = __shfl_sync(~0u, delta, 0, kLanes);
  const float input = step * __shfl_sync(~0u, x, 0, kLanes);
  const auto [next, partial] = advance(raw, A, step, input, b, c, state_t{});
  if (valid) store_state(state_of(slot), next);
  float sum = partial;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(~0u, sum, offset, kLanes);
  if (leads && valid) mixer.finish(constants, in, row, at, x, sum);
}

template <typename Mixer, typename state_t, int kStateDim>
void launch_selective_step(const Mixer& mixer, cudaStream_t stream) {
  constexpr int kChannels = kSelectiveThreads / (kStateDim * sizeof(state_t) / 16);
  const auto& p = mixer.p;
  if constexpr (kStateDim == kStreamStateDim)
    if (launch_selective_stream<Mixer, state_t>(mixer, stream)) return;
  const dim3 grid(p.batch, (p.channels + kChannels - 1) / kChannels);
  launch_overlapping(selective_step_kernel<Mixer, state_t, kStateDim>, grid, kSelectiveThreads, 0,
                     stream, mixer, mixer.aligned(16 / sizeof(state_t)));
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
