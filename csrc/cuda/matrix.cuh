// Matrices of 16-bit numbers in shared memory, as the products of mma.cuh take them.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "mma.cuh"

namespace reasoners {

template <typename data_t>
__device__ uint32_t pack(float low, float high) {
  const Vec<data_t, 2> pair{from_float<data_t>(low), from_float<data_t>(high)};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A matrix in shared memory. Rows are 16 bytes further apart than they are long, so that the same
// columns of eight rows lie in different banks.
template <typename data_t, int kRows, int kColumns>
struct Matrix {
  static constexpr int kPitch = kColumns + 8;
  data_t at[kRows][kPitch];

  // The fragment of A with rows [row, row + 16) and columns [column, column + 16).
  __device__ void load_a(uint32_t (&a)[4], int row, int column) const {
    const int l = threadIdx.x % 32;
    load_matrices(a, &at[row + l % 16][column + l / 16 * 8]);
  }
  // The same of the transposed matrix; row and column are those of the transposed matrix.
  __device__ void load_a_transposed(uint32_t (&a)[4], int row, int column) const {
    const int l = threadIdx.x % 32;
    load_matrices_transposed(a, &at[column + l % 8 + l / 16 * 8][row + l / 8 % 2 * 8]);
  }
  // Two fragments of B, b[0], b[1] and b[2], b[3], that have the rows [row, row + 16) and the
  // columns [column, column + 8) and the 8 columns after them.
  __device__ void load_b(uint32_t (&b)[4], int row, int column) const {
    const int l = threadIdx.x % 32;
    load_matrices_transposed(b, &at[row + l % 16][column + l / 16 * 8]);
  }
  __device__ void load_b_transposed(uint32_t (&b)[4], int row, int column) const {
    const int l = threadIdx.x % 32;
    load_matrices(b, &at[column + l % 8 + l / 16 * 8][row + l / 8 % 2 * 8]);
  }
  // Two fragments of B of the transposed matrix below each other: 32 rows, 8 columns.
  __device__ void load_b_transposed_tall(uint32_t (&b)[4], int row, int column) const {
    const int l = threadIdx.x % 32;
    load_matrices(b, &at[column + l % 8][row + l / 8 * 8]);
  }
  __device__ uint32_t pair(int row, int column) const {
    return *reinterpret_cast<const uint32_t*>(&at[row][column]);
  }
  __device__ void put_pair(int row, int column, uint32_t value) {
    *reinterpret_cast<uint32_t*>(&at[row][column]) = value;
  }
};

}  // namespace reasoners
