// What the walks over tokens share: where a sequence lies, how a state row is dealt out to threads.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "kernels.h"

namespace reasoners {

// Tokens [begin, end) of a batch row.
struct Sequence {
  int64_t batch, begin, end;
};

__device__ inline Sequence sequence_at(const int32_t* cu_seqlens, int64_t length, int64_t index) {
  if (cu_seqlens != nullptr) return {0, cu_seqlens[index], cu_seqlens[index + 1]};
  return {index, 0, length};
}

// How many tokens of the sequence there are from `t` on, `most` at most; none past the end.
__device__ inline int tokens_left(const Sequence& sequence, int64_t t, int most) {
  const int64_t left = sequence.end - t;
  return left < most ? static_cast<int>(left < 0 ? 0 : left) : most;
}

// A state is kept at the start of every span of `span` tokens of every sequence. Sequences take
// their places in order; one more place each than whole spans fit is always enough, so that neither
// the number nor the places depend on where the sequences end.
inline int64_t count_checkpoints(int64_t tokens, int64_t sequences, int64_t span) {
  return tokens / span + sequences;
}
__device__ inline int64_t first_checkpoint(const Sequence& sequence, int64_t length, int64_t index,
                                           int64_t span) {
  return (sequence.batch * length + sequence.begin) / span + index;
}
// The last of `sequences`, at least one, whose first place, first_of(index), is `at` or before.
template <typename First>
__device__ inline int64_t sequence_at_place(int64_t sequences, int64_t at, const First& first_of) {
  int64_t low = 0, high = sequences;  // the answer is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_of(middle) <= at ? low : high) = middle;
  }
  return low;
}

// The elements of a (kRows, kColumns) matrix that a thread moves, neighbours by neighbours. The
// extents are powers of two; rows past the last come up when there are more threads than elements.
template <int kRows, int kColumns, int kThreads>
struct Share {
  static constexpr int kCount = (kRows * kColumns + kThreads - 1) / kThreads;
  __device__ static int row(int k) { return threadIdx.x / kColumns + k * kThreads / kColumns; }
  __device__ static int column(int k) { return threadIdx.x % kColumns + k * kThreads % kColumns; }
};

// A state row of up to kSize entries lives in the registers of kLanes neighbouring threads. A lane
// has its entries in runs of four, kLanes runs apart, so that the lanes together read shared memory
// in whole lines.
template <int kSize_, int kLanes_>
struct StateRow {
  static constexpr int kSize = kSize_, kLanes = kLanes_, kEntries = kSize / kLanes, kRun = 4;
  static_assert(kEntries % kRun == 0 && 32 % kLanes == 0);

  // Where entry `j` of `lane` stands in the row.
  __device__ static int position(int lane, int j) {
    return (j / kRun * kLanes + lane) * kRun + j % kRun;
  }
  // The lane's entries of a row of kSize floats, aligned to a run.
  __device__ static void read(const float* row, int lane, float (&to)[kEntries]) {
#pragma unroll
    for (int j = 0; j < kEntries; j += kRun) {
      const auto run = *reinterpret_cast<const Vec<float, kRun>*>(row + position(lane, j));
#pragma unroll
      for (int k = 0; k < kRun; ++k) to[j + k] = run.at[k];
    }
  }
  // Sum over the lanes of each row, in a fixed order; the whole warp takes part.
  __device__ static float sum(float value) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      value += __shfl_xor_sync(~0u, value, offset, kLanes);
    return value;
  }
};

}  // namespace reasoners
