// The end of a decode step: each row keeps its token, ends or moves on. One block serves all rows,
// since the step's counter may move only when everybody has read it.

#include "kernels.h"
#include "launch.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kNothing = -2;  // drawn by a row that has ended

__global__ void __launch_bounds__(kThreads) advance_kernel(const AdvanceParams p) {
  let_next_start();
  wait_for_inputs();
  const int64_t step = p.step[0];
  for (int row = threadIdx.x; row < p.rows; row += kThreads) {
    int64_t& drawn = p.drawn[step * p.drawn_stride + row];
    if (p.slots[row] < 0) {
      drawn = kNothing;
      continue;
    }
    const int64_t token = p.token[row];
    drawn = token;
    p.logprobs[step * p.logprobs_stride + row] = p.logprob[row];
    p.last[row] = token;
    const int remaining = --p.remaining[row];
    bool ends = token < 0 || remaining == 0;
    for (int i = 0; i < p.num_stop_ids; ++i)
      ends |= p.stop_ids[row * p.stop_ids_stride + i] == token;
    if (ends) {
      p.slots[row] = -1;
      p.lengths[row] = 0;
    } else {
      ++p.lengths[row];
      ++p.rng_key[row * 4 + 3];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.step[0] = step + 1;
}

}  // namespace

void launch_advance(const AdvanceParams& p, cudaStream_t stream) {
  launch_overlapping(advance_kernel, 1, kThreads, 0, stream, p);
}

}  // namespace reasoners
