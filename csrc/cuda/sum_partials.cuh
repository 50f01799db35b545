// Sums of what several blocks left in fp32, in the order of the blocks, so that every run gives the
// same bits.
#pragma once

#include <cstdint>

#include "convert.cuh"

namespace reasoners {

// sums[i] = sum of partials[k * pitch + i] over k < count. kRows rows of threads share one sum.
template <typename data_t, int kRows>
__global__ void __launch_bounds__(256)
    sum_partials_kernel(const float* partials, int64_t pitch, int64_t count, int64_t size,
                        data_t* sums) {
  constexpr int kColumns = 256 / kRows;
  __shared__ float row_sums[kRows][kColumns];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t i = int64_t(blockIdx.x) * kColumns + column;
  float sum = 0.f;
  if (i < size) {
#pragma unroll 4
    for (int64_t k = row; k < count; k += kRows) sum += partials[k * pitch + i];
  }
  if (kRows > 1) {
    row_sums[row][column] = sum;
    __syncthreads();
    if (row > 0) return;
#pragma unroll
    for (int k = 1; k < kRows; ++k) sum += row_sums[k][column];
  }
  if (i < size) sums[i] = from_float<data_t>(sum);
}

template <typename data_t>
void sum_partials(const float* partials, int64_t pitch, int64_t count, int64_t size, data_t* sums,
                  cudaStream_t stream) {
  if (size == 0) return;
  if (count >= 16) {
    sum_partials_kernel<data_t, 8><<<static_cast<unsigned>((size + 31) / 32), 256, 0, stream>>>(
        partials, pitch, count, size, sums);
  } else {
    sum_partials_kernel<data_t, 1><<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(
        partials, pitch, count, size, sums);
  }
}

}  // namespace reasoners
