// Where the sequences of a (batch, length, ...) tensor lie, packed by cu_seqlens or one per batch
// row.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

namespace reasoners {

// Offsets count tokens in the flattened (batch * length) rows.
struct Sequences {
  Sequences(const std::optional<at::Tensor>& cu_seqlens, int64_t length) : length(length) {
    if (!cu_seqlens) return;
    offsets = cu_seqlens->contiguous();
    starts = offsets.const_data_ptr<int32_t>();
  }
  int64_t begin(int64_t i) const { return starts ? starts[i] : i * length; }
  int64_t end(int64_t i) const { return starts ? starts[i + 1] : (i + 1) * length; }

  at::Tensor offsets;
  const int32_t* starts = nullptr;
  int64_t length;
};

}  // namespace reasoners
