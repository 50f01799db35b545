// Half-split rotary embedding in place: a thread takes one pair of channels of a token through all
// its heads, so that sine and cosine of the pair's angle are computed once.

#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rotation.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;

template <typename data_t>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const RotateParams p) {
  let_next_start();
  wait_for_inputs();
  const int half = p.head_dim / 2;
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = unit / half;
  const int i = unit % half;
  if (token >= p.tokens) return;
  const Rotation rotation(p.positions[token], p.inv_freq[i]);
  auto* x = static_cast<data_t*>(p.x) + token * p.x_stride + i;
  // Heads are split over the grid's second dimension when there are few tokens.
  for (int head = blockIdx.y; head < p.heads; head += gridDim.y) {
    data_t* pair = x + int64_t(head) * p.head_dim;
    const float first = to_float(pair[0]), second = to_float(pair[half]);
    pair[0] = from_float<data_t>(rotation.first(first, second));
    pair[half] = from_float<data_t>(rotation.second(first, second));
  }
}

template <typename data_t>
void launch(const RotateParams& p, cudaStream_t stream) {
  const int64_t units = int64_t(p.tokens) * (p.head_dim / 2);
  const int64_t blocks = (units + kThreads - 1) / kThreads;
  const dim3 grid(blocks, blocks < 264 ? p.heads : 1);
  launch_overlapping(rotate_kernel<data_t>, grid, kThreads, 0, stream, p);
}

}  // namespace

void launch_rotate(const RotateParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0 || p.head_dim < 2) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch<float>(p, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return launch<__half>(p, stream);
  }
}

}  // namespace reasoners
