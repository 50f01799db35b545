// Tensors as rows of channels at one stride.
#pragma once

#include <ATen/ATen.h>

namespace reasoners {

// Rows of a tensor whose last dimension is contiguous and whose other dimensions collapse to one
// stride, as a slice of a projection's output does; anything else is copied first.
inline at::Tensor rows_of(const at::Tensor& t) {
  if (t.stride(-1) != 1 && t.size(-1) != 1) return t.contiguous();
  for (int64_t i = 0; i + 2 < t.dim(); ++i)
    if (t.size(i) != 1 && t.stride(i) != t.stride(i + 1) * t.size(i + 1)) return t.contiguous();
  return t;
}

inline int64_t row_stride(const at::Tensor& t) { return t.dim() >= 2 ? t.stride(-2) : t.size(-1); }

}  // namespace reasoners
