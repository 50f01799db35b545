// Writes the keys and values of new tokens to their places in the paged cache. Places are resolved
// first, on one thread; then tokens are copied in parallel.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "checks.h"
#include "cpu/new_tokens.h"

namespace reasoners {
namespace {

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in, const Tensor& v_in,
               const Tensor& page_table, const Tensor& cu_seqlens_q, const Tensor& kv_lengths) {
  check_append_kv(k_cache, v_cache, k_in, v_in, page_table, cu_seqlens_q, kv_lengths);
  const Tensor offsets = cu_seqlens_q.contiguous(), lengths = kv_lengths.contiguous();
  const Tensor k = k_in.contiguous(), v = v_in.contiguous();
  const int64_t tokens = k.size(0), heads = k.size(1), page_size = k_cache.size(2);
  check_page_values("append_kv", k_cache, page_table, offsets, lengths, tokens);
  const auto places = places_of_new_tokens(k_cache, page_table, offsets, lengths, tokens);

  const int64_t bytes = k.size(2) * k.element_size();
  const auto copy = [&](const Tensor& cache, const Tensor& data, int64_t token) {
    auto* to = static_cast<char*>(cache.mutable_data_ptr()) + places[token].vector * bytes;
    const auto* from = static_cast<const char*>(data.const_data_ptr()) + token * heads * bytes;
    for (int64_t head = 0; head < heads; ++head)
      std::memcpy(to + head * page_size * bytes, from + head * bytes, bytes);
  };
  constexpr int64_t kGrainBytes = 1 << 16;  // less is copied faster than a thread wakes up
  const int64_t grain = 1 + kGrainBytes / std::max<int64_t>(1, 2 * heads * bytes);
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (places[token].position < 0) continue;
      copy(k_cache, k, token);
      copy(v_cache, v, token);
    }
  });
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("append_kv", &append_kv); }

}  // namespace
}  // namespace reasoners
