// Where a token of a packed batch stands in its row, found on the device so that a captured graph
// stays valid while the rows change.
#pragma once

#include <cstdint>

namespace reasoners {

struct RowPosition {
  int row;
  int position;  // of the token in its row, counted from the row's first; negative: padding
};

// A row's tokens are its last positions. Decode has one token a row, so that guess is tried first,
// and all that it takes is read at once: memory is waited for once, not three times. Otherwise the
// row is the first one that ends after the token, which skips rows without tokens. The first-level
// cache is passed by, for kernels that come here before wait_for_inputs.
__device__ inline RowPosition locate_token(const int32_t* cu_seqlens_q, const int32_t* kv_lengths,
                                           int rows, int token) {
  int row = token, begin = 0, end = 0, length = 0;
  if (token < rows) {
    begin = __ldcg(&cu_seqlens_q[token]);
    end = __ldcg(&cu_seqlens_q[token + 1]);
    length = __ldcg(&kv_lengths[token]);
  }
  if (begin > token || end <= token) {
    int last = rows;
    row = 0;
    while (row < last) {
      const int middle = row + (last - row) / 2;
      if (__ldcg(&cu_seqlens_q[middle + 1]) <= token) {
        row = middle + 1;
      } else {
        last = middle;
      }
    }
    if (row == rows) return {-1, -1};
    end = __ldcg(&cu_seqlens_q[row + 1]);
    length = __ldcg(&kv_lengths[row]);
  }
  return {row, length <= 0 ? -1 : length - end + token};
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
