// After a step: one more recent token in every row's slot, or none if the step wrote the state.

#include "kernels.h"
#include "launch.cuh"

namespace reasoners {
namespace {

__global__ void count_pending_kernel(const CountPendingParams p) {
  let_next_start();
  wait_for_inputs();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.batch || p.slots[row] < 0) return;
  int32_t& pending = p.pending[p.slots[row]];
  pending = pending + 1 >= p.period ? 0 : pending + 1;
}

}  // namespace

void launch_count_pending(const CountPendingParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  launch_overlapping(count_pending_kernel, (p.batch + 127) / 128, 128, 0, stream, p);
}

}  // namespace reasoners
