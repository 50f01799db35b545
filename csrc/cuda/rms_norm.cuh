// The arithmetic of RMSNorm, and the order of its sum, so that every kernel that normalises a row
// gets the same bits: threads sum the squares of vectors that are `threads` apart, warps their
// lanes, and one warp the warps.
#pragma once

#include "convert.cuh"

namespace reasoners {

// How many threads a row takes, and how many vectors each of them: two where the row is long
// enough, for more bytes in flight a warp.
struct RmsNormShape {
  int turns, threads;

  __host__ __device__ static RmsNormShape of(int vectors) {
    const int turns = vectors > 2 * kMostThreads ? 4 : vectors > 64 ? 2 : 1;
    return {turns, ((vectors + turns - 1) / turns + 31) / 32 * 32};
  }
  static constexpr int kMostThreads = 512;
};

__device__ inline float sum_warp(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

template <typename data_t, int kVec>
__device__ inline float add_squares(float sum, const Vec<data_t, kVec>& values) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const float v = to_float(values.at[k]);
    sum = fmaf(v, v, sum);
  }
  return sum;
}

__device__ inline float inverse_rms(float squares, int dim, float eps) {
  return rsqrtf(squares / dim + eps);
}

// Rounded where the plain composition rounds.
template <typename data_t>
__device__ inline data_t normalised(data_t value, float inverse_rms, data_t weight) {
  const data_t v = from_float<data_t>(to_float(value) * inverse_rms);
  return from_float<data_t>(to_float(v) * to_float(weight));
}

}  // namespace reasoners
