// rotate and append_kv in one pass over the tokens: queries are rotated where they are, keys on
// their way into the cache.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/new_tokens.h"
#include "cpu/rotation.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 2048;  // elements a thread takes at least

template <typename scalar_t>
void run(const Tensor& k_cache, const Tensor& v_cache, const Tensor& qkv, const Tensor& inv_freq,
         const std::vector<Place>& places) {
  const int64_t tokens = qkv.size(0), head_dim = qkv.size(2), stride = qkv.stride(0);
  const int64_t kv_heads = k_cache.size(1), heads = qkv.size(1) - 2 * kv_heads;
  const int64_t head_stride = k_cache.size(2) * head_dim;  // in the caches
  const auto* frequencies = inv_freq.const_data_ptr<float>();
  auto* data = qkv.mutable_data_ptr<scalar_t>();
  auto* k_data = k_cache.mutable_data_ptr<scalar_t>();
  auto* v_data = v_cache.mutable_data_ptr<scalar_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / (qkv.size(1) * head_dim));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    Rotation<scalar_t> rotation(frequencies, head_dim / 2);
    for (int64_t token = begin; token < end; ++token) {
      const Place& place = places[token];
      if (place.position < 0) continue;
      rotation.move_to(place.position);
      scalar_t* q = data + token * stride;
      for (int64_t head = 0; head < heads; ++head)
        rotation.rotate_head(q + head * head_dim, q + head * head_dim);
      const scalar_t *k = q + heads * head_dim, *v = k + kv_heads * head_dim;
      for (int64_t head = 0; head < kv_heads; ++head) {
        const int64_t to = place.vector * head_dim + head * head_stride;
        rotation.rotate_head(k + head * head_dim, k_data + to);
        std::copy_n(v + head * head_dim, head_dim, v_data + to);
      }
    }
  });
}

void rotate_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& qkv,
                      const Tensor& inv_freq, const Tensor& page_table, const Tensor& cu_seqlens_q,
                      const Tensor& kv_lengths) {
  check_rotate_append_kv(k_cache, v_cache, qkv, inv_freq, page_table, cu_seqlens_q, kv_lengths);
  const Tensor offsets = cu_seqlens_q.contiguous(), lengths = kv_lengths.contiguous();
  check_page_values("rotate_append_kv", k_cache, page_table, offsets, lengths, qkv.size(0));
  if (qkv.numel() == 0) return;
  const auto places = places_of_new_tokens(k_cache, page_table, offsets, lengths, qkv.size(0));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, qkv.scalar_type(), "rotate_append_kv", [&] {
    run<scalar_t>(k_cache, v_cache, qkv, inv_freq.contiguous(), places);
  });
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("rotate_append_kv", &rotate_append_kv); }

}  // namespace
}  // namespace reasoners
