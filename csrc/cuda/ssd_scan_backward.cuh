// What the two kernels behind ssd_scan_backward share: scratch memory, and gradients in parts.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace reasoners {

// A gradient (tokens, groups, width) that is a sum of `count` parts, which are in fp32 until they
// are added up; a single part is the gradient itself.
struct PartedGradient {
  int64_t parts;  // in the scratch memory
  int count, groups, width;
};

// Places in the scratch memory, in floats; every part begins on 16 bytes.
struct SsdScanScratch {
  int64_t dD;      // (blocks of a head, heads)
  int64_t states;  // kept on the way
  int64_t size;    // of all so far

  int64_t take(int64_t floats) {
    const int64_t part = size;
    size += (floats + 3) / 4 * 4;
    return part;
  }
};

// For any dtype, head_dim and state_dim; see ssd_scan_backward_rows.cu.
int64_t count_ssd_scan_rows_scratch(const SsdScanParams& forward);
void launch_ssd_scan_rows_backward(const SsdScanBackwardParams& params, cudaStream_t stream);

}  // namespace reasoners
