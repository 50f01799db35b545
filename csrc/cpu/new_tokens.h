// Where the new tokens of packed rows go in the paged cache.
#pragma once

#include <vector>

#include "checks.h"

namespace reasoners {

struct Place {
  int64_t position;  // in the row; negative: a padding row
  int64_t vector;    // of head 0 in the caches, counted in head vectors
};

// The last queries of a row are its new tokens: token i of a row with n of them goes to position
// length - n + i.
inline std::vector<Place> places_of_new_tokens(const Tensor& k_cache, const Tensor& page_table,
                                               const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                                               int64_t tokens) {
  const int64_t heads = k_cache.size(1), page_size = k_cache.size(2);
  const auto table = page_table.accessor<int32_t, 2>();
  const auto* starts = cu_seqlens_q.const_data_ptr<int32_t>();
  std::vector<Place> places(tokens, {-1, 0});
  for (int64_t row = 0; row < kv_lengths.numel(); ++row) {
    const int64_t length = kv_lengths.const_data_ptr<int32_t>()[row], end = starts[row + 1];
    if (length <= 0) continue;
    for (int64_t token = starts[row]; token < end; ++token) {
      const int64_t position = length - end + token;
      const int64_t page = table[row][position / page_size];
      places[token] = {position, page * heads * page_size + position % page_size};
    }
  }
  return places;
}

}  // namespace reasoners
