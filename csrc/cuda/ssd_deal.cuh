// How a scan's sequences are dealt to blocks of chunks: where one block for each sequence and head
// does not fill the machine, a first kernel leaves what each segment adds, carry_kernel makes of it
// the state before each block's first segment, and the blocks begin there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "scan.cuh"
#include "ssd_chunk.cuh"

namespace reasoners {
namespace {

// A segment has so many chunks at least.
constexpr int kSegmentChunks = 4, kSegmentTokens = kSegmentChunks * kChunk;

// How a sequence is cut into segments: into `most` at most, as each leaves a state where they are
// dealt to several blocks. H200, 1 x 32768 of Llamba-1B: 243, 231 and 222 us with 64, 32 and 16 of
// them, later 212 and 206 with 16 and 8.
struct Segments {
  int chunks, count;  // of a segment, of a sequence

  Segments() = default;
  __device__ __host__ Segments(int most, int64_t length) {
    const int all = static_cast<int>((length + kChunk - 1) / kChunk);
    chunks = (all + most - 1) / most;
    if (chunks < kSegmentChunks) chunks = kSegmentChunks;
    count = (all + chunks - 1) / chunks;
  }
  __device__ int first_chunk(int segment) const { return segment * chunks; }
  __device__ int of(int chunk) const { return chunk / chunks; }
};

// How the segments of a sequence are dealt to blocks; `blocks` 0: one block has them all.
struct Deal {
  int each, blocks;
  int most;  // of Segments, by a model's shape alone, as results' bits depend on it
  // In scratch memory, for each place of a segment and head: a state, and a decay.
  int64_t states, decays, size;
};

// Where the segment of a sequence and a head has its place: packed sequences may have as many as
// their tokens allow, others all have the same number.
struct Places {
  int64_t first;
  int heads;

  __device__ Places(const SsdScanParams& p, const Sequence& sequence, int64_t index,
                    const Segments& segments, int head)
      : heads(p.heads) {
    const int64_t before = p.cu_seqlens == nullptr
                               ? index * segments.count
                               : first_checkpoint(sequence, p.length, index, kSegmentTokens);
    first = before * heads + head;
  }
  __device__ int64_t of(int segment) const { return first + int64_t(segment) * heads; }
};

// Turns what each segment adds into the state before it, and leaves the final state.
constexpr int kCarryThreads = 128;

__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(const SsdScanParams p, const Deal deal) {
  wait_for_inputs();
  let_next_start();
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const int64_t element = int64_t(blockIdx.y) * kCarryThreads + threadIdx.x;  // two neighbours
  const int head = blockIdx.x % p.heads, index = blockIdx.x / p.heads;
  if (2 * element >= size) return;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const Segments segments(deal.most, sequence.end - sequence.begin);
  const Places places(p, sequence, index, segments, head);
  const auto vector = [&](float* data, int64_t place) {
    return reinterpret_cast<float2*>(data + place * size) + element;
  };
  float* states = p.scratch + deal.states;
  const int64_t home = int64_t(index) * p.heads + head;
  float2 state{};
  if (p.initial_state) state = *vector(const_cast<float*>(p.initial_state), home);
  constexpr int kAhead = 16;  // segments whose loads are on their way together
  for (int begin = 0; begin < segments.count; begin += kAhead) {
    float2 added[kAhead];
    float decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments.count) break;
      const int64_t place = places.of(begin + k);
      added[k] = *vector(states, place);
      decay[k] = p.scratch[deal.decays + place];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= segments.count) break;
      if ((begin + k) % deal.each == 0) *vector(states, places.of(begin + k)) = state;
      state = {fmaf(decay[k], state.x, added[k].x), fmaf(decay[k], state.y, added[k].y)};
    }
  }
  *vector(p.final_state, home) = state;
}

constexpr int kProcessors = 132;

// The most that any sequence has.
inline int64_t count_segments(const SsdScanParams& p, const Deal& deal) {
  const Segments segments(deal.most, p.length);
  return p.cu_seqlens == nullptr || segments.chunks == kSegmentChunks ? segments.count : deal.most;
}

// As many blocks for each sequence as the machine holds at once: `per_processor` blocks of
// `together` heads on each multiprocessor. Where walks have two thirds of the multiprocessors, each
// walks on alone: a walk that shares its multiprocessor with none is faster than one that does, and
// dealing costs half as much again (H200, 4 x 8192 of Llamba-1B: 168 us beside 247; a mixer's 4 x
// 2048, which would be convolved twice, 112 beside 173).
inline Deal make_deal(const SsdScanParams& p, int per_processor, int together = 1) {
  Deal deal{};
  // A multiple of the blocks that a lone sequence would have.
  constexpr int kFewest = 8;
  const int alone = std::max(kProcessors * per_processor / (p.heads / together), 1);
  deal.most = (kFewest + alone - 1) / alone * alone;
  const int64_t walks = p.sequences * p.heads / together, most = count_segments(p, deal);
  if (walks == 0 || walks * 3 > kProcessors * 2 || most < 2) return deal;
  const int64_t blocks = kProcessors * per_processor / (p.batch * p.heads / together);
  if (blocks < 2) return deal;
  deal.each = static_cast<int>((most + blocks - 1) / blocks);
  deal.blocks = static_cast<int>((most + deal.each - 1) / deal.each);
  const int64_t segments = p.cu_seqlens == nullptr
                               ? p.sequences * most
                               : count_checkpoints(p.length, p.sequences, kSegmentTokens);
  const int64_t places = segments * p.heads;
  deal.decays = places * p.head_dim * p.state_dim;
  deal.size = deal.decays + places;
  return deal;
}

// Makes of what each segment left the state before it; `deal` is that of the kernel to come.
inline void launch_carry(const SsdScanParams& p, const Deal& deal, cudaStream_t stream) {
  const int pairs = p.head_dim * p.state_dim / 2;
  const dim3 grid(p.sequences * p.heads, (pairs + kCarryThreads - 1) / kCarryThreads);
  launch_overlapping(carry_kernel, grid, kCarryThreads, 0, stream, p, deal);
}

}  // namespace
}  // namespace reasoners
