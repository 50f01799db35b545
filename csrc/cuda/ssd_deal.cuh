// How a scan's sequences are dealt to blocks of chunks: where one block for each sequence and head
// does not fill the machine, a first kernel leaves what each segment adds, carry_kernel makes of it
// the state before each block's first segment, and the blocks begin there.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "scan.cuh"
#include "ssd_chunk.cuh"

namespace reasoners {
namespace {

constexpr int kSegmentTokens = kSegment * kChunk;

__device__ __host__ constexpr int count_segments(int64_t length) {
  return static_cast<int>((length + kSegmentTokens - 1) / kSegmentTokens);
}

// How the segments of a sequence are dealt to blocks; `blocks` 0: one block has them all.
struct Deal {
  int each, blocks;
  // In scratch memory, for each place of a segment and head: a state, and a decay.
  int64_t states, decays, size;
};

// Where the segment of a sequence and a head has its place.
struct Places {
  int64_t first;
  int heads;

  __device__ Places(const SsdScanParams& p, const Sequence& sequence, int64_t index, int head)
      : first(first_checkpoint(sequence, p.length, index, kSegmentTokens) * p.heads + head),
        heads(p.heads) {}
  __device__ int64_t of(int segment) const { return first + int64_t(segment) * heads; }
};

// Turns what each segment adds into the state before it, and leaves the final state.
constexpr int kCarryThreads = 128;

__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(const SsdScanParams p, const Deal deal) {
  let_next_start();
  wait_for_inputs();
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const int64_t element = int64_t(blockIdx.y) * kCarryThreads + threadIdx.x;
  const int head = blockIdx.x % p.heads, index = blockIdx.x / p.heads;
  if (4 * element >= size) return;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const int segments = count_segments(sequence.end - sequence.begin);
  const Places places(p, sequence, index, head);
  const auto vector = [&](float* data, int64_t place) {
    return reinterpret_cast<float4*>(data + place * size) + element;
  };
  float* states = p.scratch + deal.states;
  const int64_t home = int64_t(index) * p.heads + head;
  float4 state{};
  if (p.initial_state) state = *vector(const_cast<float*>(p.initial_state), home);
  constexpr int kAhead = 8;  // segments whose loads are on their way together
  for (int begin = 0; begin < segments; begin += kAhead) {
    float4 added[kAhead];
    float decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments) break;
      const int64_t place = places.of(begin + k);
      added[k] = *vector(states, place);
      decay[k] = p.scratch[deal.decays + place];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments) break;
      if ((begin + k) % deal.each == 0) *vector(states, places.of(begin + k)) = state;
      state = {fmaf(decay[k], state.x, added[k].x), fmaf(decay[k], state.y, added[k].y),
               fmaf(decay[k], state.z, added[k].z), fmaf(decay[k], state.w, added[k].w)};
    }
  }
  *vector(p.final_state, home) = state;
}

constexpr int kProcessors = 132;

// As many blocks for each sequence as the machine holds at once: `per_processor` blocks of
// `together` heads on each multiprocessor.
inline Deal make_deal(const SsdScanParams& p, int per_processor, int together = 1) {
  const int64_t walks = p.sequences * p.heads / together;
  const int64_t most = count_segments(p.length);
  if (walks == 0 || walks * 5 >= kProcessors * 6 || most < 2) return {};
  const int64_t blocks = kProcessors * per_processor / (p.batch * p.heads / together);
  if (blocks < 2) return {};
  Deal deal{};
  deal.each = static_cast<int>((most + blocks - 1) / blocks);
  deal.blocks = static_cast<int>((most + deal.each - 1) / deal.each);
  const int64_t places =
      count_checkpoints(p.batch * p.length, p.sequences, kSegmentTokens) * p.heads;
  deal.decays = places * p.head_dim * p.state_dim;
  deal.size = deal.decays + places;
  return deal;
}

// Makes of what each segment left the state before it; `deal` is that of the kernel to come.
inline void launch_carry(const SsdScanParams& p, const Deal& deal, cudaStream_t stream) {
  const int vectors = p.head_dim * p.state_dim / 4;
  const dim3 grid(p.sequences * p.heads, (vectors + kCarryThreads - 1) / kCarryThreads);
  launch_overlapping(carry_kernel, grid, kCarryThreads, 0, stream, p, deal);
}

}  // namespace
}  // namespace reasoners
