// What the two kernels behind ssd_scan_backward share: scratch memory, and sums over heads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "sum_partials.cuh"

namespace reasoners {

// A gradient (tokens, groups, width) that is a sum of `count` parts, which blocks leave in fp32,
// one after the other; a single part is the gradient itself.
struct PartedGradient {
  int64_t parts;  // in the scratch memory
  int count, groups, width;
};

// Places in the scratch memory, in floats; every part begins on 16 bytes.
struct SsdScanScratch {
  int64_t dD;      // (sequences, heads, tiles)
  int64_t states;  // kept on the way
  int64_t size;

  int64_t take(int64_t floats) {
    const int64_t part = size;
    size += (floats + 3) / 4 * 4;
    return part;
  }
  PartedGradient take_parts(const SsdScanParams& f, int count, int groups, int width) {
    const int64_t floats = count > 1 ? f.batch * f.length * groups * width : 0;
    return {take(count * floats), count, groups, width};
  }
};

// Of a PartedGradient.
template <typename data_t>
void sum_parts(const PartedGradient& gradient, const SsdScanBackwardParams& p, data_t* sum,
               cudaStream_t stream) {
  const int64_t size = p.forward.batch * p.forward.length * gradient.groups * gradient.width;
  if (gradient.count > 1)
    sum_partials(p.scratch + gradient.parts, size, gradient.count, size, sum, stream);
}

// For any dtype, head_dim and state_dim; see ssd_scan_backward_rows.cu.
int64_t count_ssd_scan_rows_scratch(const SsdScanParams& forward);
void launch_ssd_scan_rows_backward(const SsdScanBackwardParams& params, cudaStream_t stream);

}  // namespace reasoners
