// Where a token of a packed batch stands in its row, found on the device so that a captured graph
// stays valid while the rows change.
#pragma once

#include <cstdint>

namespace reasoners {

struct RowPosition {
  int row;
  int position;  // of the token in its row, counted from the row's first; negative: padding
};

// A row's tokens are its last positions. Decode has one token a row, so that guess is tried first;
// otherwise the row is the first one that ends after the token, which skips rows without tokens.
__device__ inline RowPosition locate_token(const int32_t* cu_seqlens_q, const int32_t* kv_lengths,
                                           int rows, int token) {
  int row = token;
  if (token >= rows || cu_seqlens_q[token] > token || cu_seqlens_q[token + 1] <= token) {
    int end = rows;
    row = 0;
    while (row < end) {
      const int middle = row + (end - row) / 2;
      if (cu_seqlens_q[middle + 1] <= token) {
        row = middle + 1;
      } else {
        end = middle;
      }
    }
    if (row == rows) return {-1, -1};
  }
  const int length = kv_lengths[row];
  return {row, length <= 0 ? -1 : length - cu_seqlens_q[row + 1] + token};
}

// Positions to pages; a shift where the page size is a power of two, as division is slow.
struct PageSize {
  int size, shift;  // shift < 0: not a power of two

  explicit PageSize(int page_size) : size(page_size), shift(-1) {
    for (int s = 0; s < 31; ++s)
      if (page_size == 1 << s) shift = s;
  }
  __device__ int page(int position) const {
    return shift >= 0 ? position >> shift : position / size;
  }
};

}  // namespace reasoners
