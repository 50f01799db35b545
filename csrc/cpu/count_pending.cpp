// How many tokens each row's slot holds back, after one more.

#include <torch/library.h>

#include "checks.h"

namespace reasoners {
namespace {

void count_pending(const Tensor& pending, const Tensor& slots_in, int64_t period) {
  check_count_pending(pending, slots_in, period);
  const Tensor slots = slots_in.contiguous();
  Check{"count_pending"}.slots(slots, pending.size(0));
  const auto* slot_of = slots.const_data_ptr<int32_t>();
  auto* counts = pending.mutable_data_ptr<int32_t>();
  for (int64_t row = 0; row < slots.numel(); ++row) {
    if (slot_of[row] < 0) continue;
    int32_t& count = counts[slot_of[row]];
    count = count + 1 >= period ? 0 : count + 1;
  }
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("count_pending", &count_pending); }

}  // namespace
}  // namespace reasoners
