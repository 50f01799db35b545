// A chunk of the SSD recurrence on tensor cores: what the forward kernel and the derivative share.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "matrix.cuh"

namespace reasoners {

constexpr int kChunk = 64, kBlock = 16, kBlocks = kChunk / kBlock;
// Steps below this are as good as -inf in fp32, and sums over a chunk stay exact enough.
constexpr float kSmallestStep = -110.f;

// Where rows of 16 are dealt to four warps, warp r has the r-th eight tokens and the r-th last, so
// that all have as many tokens to see. So token `i` has the row row_of(i), and row m is that of
// token_of(m); either has i % 8 == m % 8.
__device__ constexpr int row_of(int i) {
  return i < 32 ? i / 8 * 16 + i % 8 : 120 - i / 8 * 16 + i % 8;
}
__device__ constexpr int token_of(int m) {
  return m % 16 < 8 ? m / 16 * 8 + m % 8 : 56 - m / 16 * 8 + m % 8;
}

// What every token of a chunk is weighed with.
struct alignas(16) Scalars {
  float c[kChunk];      // log_decay summed from the start of the chunk, for powers of 2
  float scale[kChunk];  // as it came
  float since[kChunk], until[kChunk];
  float gain[kChunk];  // until * scale
  float whole;         // since of the last token
};

// By one warp: lane i has tokens 2 i and 2 i + 1.
__device__ inline void put_scalars(Scalars& to, const float (&log_decay)[2],
                                   const float (&scale)[2]) {
  const int lane = threadIdx.x % 32;
  // Written so that a NaN stays one.
  const float first = kLog2e * (log_decay[0] < kSmallestStep ? kSmallestStep : log_decay[0]);
  const float second = kLog2e * (log_decay[1] < kSmallestStep ? kSmallestStep : log_decay[1]);
  float sum = first + second;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += before;
  }
  const float before = __shfl_up_sync(~0u, sum, 1);
  const float sums[2] = {lane > 0 ? before + first : first, sum};
  const float last = __shfl_sync(~0u, sum, 31);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = 2 * lane + k;
    const float until = exp2_fast(last - sums[k]);
    to.c[i] = sums[k];
    to.scale[i] = scale[k];
    to.since[i] = exp2_fast(sums[k]);
    to.until[i] = until;
    to.gain[i] = until * scale[k];
  }
  if (lane == 0) to.whole = exp2_fast(last);
}

// D += A B^T for the rows [row, row + 16) of A and kTiles tiles of 8 columns from `column` on,
// which are rows of B.
template <typename data_t, int kDepth, int kTiles, typename A, typename B>
__device__ void multiply_by_transposed(float (&d)[kTiles][4], const A& a_rows, int row,
                                       const B& b_rows, int column) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    a_rows.load_a(a, row, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      b_rows.load_b_transposed(b, k, column + n * 8);
      multiply_add<data_t>(d[n], a, b[0], b[1]);
      multiply_add<data_t>(d[n + 1], a, b[2], b[3]);
    }
  }
}
template <typename data_t, int kDepth, int kTiles, typename A, typename B>
__device__ void multiply(float (&d)[kTiles][4], const A& a_rows, int row, const B& b_rows,
                         int column) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    a_rows.load_a(a, row, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      b_rows.load_b(b, k, column + n * 8);
      multiply_add<data_t>(d[n], a, b[0], b[1]);
      multiply_add<data_t>(d[n + 1], a, b[2], b[3]);
    }
  }
}
// The same with one 16 x 16 fragment of A at hand.
template <typename data_t, int kTiles, typename B>
__device__ void multiply_block(float (&d)[kTiles][4], const uint32_t (&a)[4], const B& b_rows,
                               int row, int column) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    uint32_t b[4];
    b_rows.load_b(b, row, column + n * 8);
    multiply_add<data_t>(d[n], a, b[0], b[1]);
    multiply_add<data_t>(d[n + 1], a, b[2], b[3]);
  }
}

// to += (weight rows)^T columns, summed over the chunk's tokens: of a state, the rows 16 (r + 4 m)
// and the columns first_column + 8 n.
template <typename data_t, int kP, int kRowTiles, int kColumnTiles, typename Rows, typename Columns>
__device__ void add_outer_products(float (&to)[kRowTiles][kColumnTiles][4], const Rows& rows,
                                   const float* weight, const Columns& columns, int r,
                                   int first_column) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kChunk; k += 16) {
    const float2 low = *reinterpret_cast<const float2*>(weight + k + 2 * q),
                 high = *reinterpret_cast<const float2*>(weight + k + 2 * q + 8);
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (16 * (r + kBlocks * m) >= kP) continue;
      rows.load_a_transposed(a[m], 16 * (r + kBlocks * m), k);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float2 pair = unpack<data_t>(a[m][v]), w = v < 2 ? low : high;
        a[m][v] = pack<data_t>(pair.x * w.x, pair.y * w.y);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      columns.load_b(b, k, first_column + n * 8);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (16 * (r + kBlocks * m) >= kP) continue;
        multiply_add<data_t>(to[m][n], a[m], b[0], b[1]);
        multiply_add<data_t>(to[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Whether a scan runs on tensor cores. Rows of 16 bytes must be there to be copied; bindings.cpp
// sees to their alignment.
inline bool on_tensor_cores(const SsdScanParams& f) {
  return f.dtype != DType::kFloat32 && f.head_dim % 8 == 0 && f.head_dim <= 128 &&
         f.state_dim % 8 == 0 && f.state_dim <= 128 && f.state_dim > 0;
}

}  // namespace reasoners
