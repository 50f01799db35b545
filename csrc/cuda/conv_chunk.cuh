// The convolution in front of a mixer, of a chunk in shared memory.
//
// A thread convolves kVec neighbouring channels of kRows tokens at a time, with the inputs before
// them read again: 11 rows for 8. Wider tasks would not divide evenly among the threads, and taps
// in registers would not be there any more after the products of a chunk.
#pragma once

#include <cstdint>

#include "exponential.cuh"
#include "mma.cuh"
#include "ssd_chunk.cuh"

namespace reasoners {

constexpr int kMaxPast = 3;  // inputs before a token that it sees, width - 1 at most

// x / (1 + exp(-x)), a few units in the last place of fp32 off: of 16-bit data nobody sees it.
__device__ inline float silu_fast(float v) {
  return v * reciprocal_fast(1.f + exp2_fast(-kLog2e * v));
}

// Inputs of a chunk and the kMaxPast tokens before it. The rows of a half warp's tasks are whole
// lines, so that they need no gaps between them.
template <typename data_t, int kColumns>
struct alignas(16) RawChunk {
  data_t at[kMaxPast + kChunk][kColumns];
  float weight[kMaxPast + 1][kColumns],
      bias[kColumns];  // zeros before a shorter convolution's taps

  // The taps of `channel` in `column`, zeros for a negative one.
  __device__ void put_taps(int column, const data_t* weights, const data_t* biases, int channel,
                           int width) {
    const auto* mine = weights + int64_t(channel) * width;
#pragma unroll
    for (int w = 0; w <= kMaxPast; ++w) {
      const int tap = w - (kMaxPast + 1 - width);
      weight[w][column] = channel >= 0 && tap >= 0 ? to_float(mine[tap]) : 0.f;
    }
    bias[column] = channel >= 0 ? to_float(biases[channel]) : 0.f;
  }

  // The columns from kFirst on, of kMatrices like `to`: the second is `other`. Rows from `rows` on
  // are zeros. By kThreads threads, of which this is `thread`.
  template <bool kSilu, int kThreads, int kFirst, int kMatrices, int kWidth>
  __device__ void convolve(int thread, int rows, Matrix<data_t, kChunk, kWidth>& to,
                           Matrix<data_t, kChunk, kWidth>& other) const {
    constexpr int kRows = 8, kVec = 4, kVectors = kMatrices * kWidth / kVec;
    constexpr int kTasks = kVectors * (kChunk / kRows);
#pragma unroll 1
    for (int task = thread; task < kTasks; task += kThreads) {
      const int column = task % kVectors * kVec, first = task / kVectors * kRows;
      float taps[kMaxPast + 1][kVec], start[kVec], u[kMaxPast + kRows][kVec];
      const auto read = [&](const float* from, float (&values)[kVec]) {
        const auto some = *reinterpret_cast<const float4*>(from + kFirst + column);
        values[0] = some.x, values[1] = some.y, values[2] = some.z, values[3] = some.w;
      };
#pragma unroll
      for (int w = 0; w <= kMaxPast; ++w) read(weight[w], taps[w]);
      read(bias, start);
#pragma unroll
      for (int i = 0; i < kMaxPast + kRows; ++i) {
        const uint2 bits = *reinterpret_cast<const uint2*>(&at[first + i][kFirst + column]);
        const float2 low = unpack<data_t>(bits.x), high = unpack<data_t>(bits.y);
        u[i][0] = low.x, u[i][1] = low.y, u[i][2] = high.x, u[i][3] = high.y;
      }
      data_t* out = column < kWidth ? &to.at[first][column] : &other.at[first][column - kWidth];
      const auto put = [&](int i, uint2 values) {
        *reinterpret_cast<uint2*>(out + i * to.kPitch) = values;
      };
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float sum[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          sum[k] = start[k];
#pragma unroll
          for (int w = 0; w <= kMaxPast; ++w) sum[k] = fmaf(taps[w][k], u[i + w][k], sum[k]);
          if (kSilu) sum[k] = silu_fast(sum[k]);
        }
        put(i, {pack<data_t>(sum[0], sum[1]), pack<data_t>(sum[2], sum[3])});
      }
#pragma unroll 1
      for (int i = max(rows - first, 0); i < kRows; ++i) put(i, uint2{0, 0});
    }
  }
};

// Rows whose vectors of 16 bytes change places, so that those of eight rows below each other lie in
// different banks without gaps between the rows.
template <typename data_t, int kColumns>
struct alignas(16) Swizzled {
  data_t at[kChunk][kColumns];

  __device__ data_t* vector(int row, int column) {
    const int moved = column / 8 ^ (kColumns % 64 == 0 ? row % 8 : row / 2 % 4);
    return &at[row][moved * 8];
  }
  // As Matrix::load_a.
  __device__ void load_a(uint32_t (&a)[4], int row, int column) {
    const int l = threadIdx.x % 32;
    load_matrices(a, vector(row + l % 16, column + l / 16 * 8));
  }
};

}  // namespace reasoners
