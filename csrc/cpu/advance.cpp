// The end of a decode step: what was drawn is recorded, and each row moves on or ends.

#include <torch/library.h>

#include <algorithm>

#include "checks.h"

namespace reasoners {
namespace {

void advance(const Tensor& token_in, const Tensor& logprob_in, const Tensor& stop_ids_in,
             const Tensor& last, const Tensor& slots, const Tensor& lengths,
             const Tensor& remaining, const Tensor& rng_key, const Tensor& drawn,
             const Tensor& logprobs, const Tensor& step) {
  check_advance(token_in, logprob_in, stop_ids_in, last, slots, lengths, remaining, rng_key, drawn,
                logprobs, step);
  const Tensor token = token_in.contiguous(), logprob = logprob_in.contiguous(),
               stop_ids = stop_ids_in.contiguous();
  const int64_t rows = token.size(0), stops = stop_ids.size(1);
  int32_t& now = *step.mutable_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(now >= 0 && now < drawn.size(0), "advance: step expected 0 to ",
                    drawn.size(0) - 1, ", got ", now);
  const auto* tokens = token.const_data_ptr<int64_t>();
  const auto* from = logprob.const_data_ptr<float>();
  const auto* stop_data = stop_ids.const_data_ptr<int64_t>();
  auto* slot_of = slots.mutable_data_ptr<int32_t>();
  auto* length_of = lengths.mutable_data_ptr<int32_t>();
  auto* left = remaining.mutable_data_ptr<int32_t>();
  auto* last_of = last.mutable_data_ptr<int64_t>();
  auto* keys = rng_key.mutable_data_ptr<int64_t>();
  auto* drawn_now = drawn.mutable_data_ptr<int64_t>() + now * drawn.size(1);
  auto* logprobs_now = logprobs.mutable_data_ptr<float>() + now * drawn.size(1);

  for (int64_t row = 0; row < rows; ++row) {
    if (slot_of[row] < 0) {
      drawn_now[row] = -2;
      continue;
    }
    const int64_t chosen = tokens[row];
    drawn_now[row] = last_of[row] = chosen;
    logprobs_now[row] = from[row];
    left[row] -= 1;
    const auto *stop = stop_data + row * stops, *stops_end = stop + stops;
    if (chosen < 0 || left[row] == 0 || std::find(stop, stops_end, chosen) != stops_end) {
      slot_of[row] = -1;
      length_of[row] = 0;
    } else {
      length_of[row] += 1;
      keys[4 * row + 3] += 1;
    }
  }
  now += 1;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("advance", &advance); }

}  // namespace
}  // namespace reasoners
