// What the derivatives of the two scans share: sums over the rows of a state.
#pragma once

#include <cstdint>

#include "scan.cuh"

namespace reasoners {

// Sums over the rows that a warp holds, in a fixed order: every row comes with kValues values, and
// leaves with the sums of kValues / rows of them. Of the values v[first(lane)] on, the sums are in
// v[0] on.
template <typename Row, int kValues>
struct RowSums {
  static constexpr int kRows = 32 / Row::kLanes, kKept = kValues / kRows;
  static_assert(kValues % kRows == 0);

  __device__ static int first(int lane_of_warp) {
    int first = 0;
#pragma unroll
    for (int rows = kRows / 2, half = kValues / 2; rows > 0; rows /= 2, half /= 2)
      if (lane_of_warp & rows * Row::kLanes) first += half;
    return first;
  }
  __device__ static void reduce(float (&v)[kValues], int lane_of_warp) {
#pragma unroll
    for (int rows = kRows / 2, half = kValues / 2; rows > 0; rows /= 2, half /= 2) {
      const bool upper = lane_of_warp & rows * Row::kLanes;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i >= half) continue;
        const float kept = upper ? v[i + half] : v[i], sent = upper ? v[i] : v[i + half];
        v[i] = kept + __shfl_xor_sync(~0u, sent, rows * Row::kLanes);
      }
    }
  }
};

}  // namespace reasoners
