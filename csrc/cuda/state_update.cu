// One token of S = exp(log_decay) S + scale x B^T, y = S C + D x, in place on each row's slot.
//
// A block serves one (row, head) and a tile of the head's P rows. kLanes neighbouring threads hold
// one row of the (P, N) state, kVec entries each per turn, so that a warp reads and writes whole
// 128-byte lines; the product with C is reduced over the lanes by shuffles in a fixed order. The
// state is read and written once and nothing else of size moves: the floor is 2 x state bytes over
// the bandwidth. A negative slot is a padding row: zeros out, no state touched.
//
//   N         <= 16   <= 32   <= 64   more       (kVec = 4; kVec = 1 and 32 lanes if N % 4 != 0)
//   kLanes      4       8      16      32        rows of P in flight per block: 128 / kLanes

#include "convert.cuh"
#include "kernels.h"

namespace reasoners {
namespace {

constexpr int kThreads = 128;

template <typename data_t, typename state_t, int kLanes, int kVec>
__global__ void __launch_bounds__(kThreads) state_update_kernel(const StateUpdateParams p) {
  const int64_t row = blockIdx.x / p.heads;
  const int head = blockIdx.x % p.heads;
  const int lane = threadIdx.x % kLanes;
  constexpr int kRows = kThreads / kLanes;
  const int first = blockIdx.y * kRows + threadIdx.x / kLanes;
  const int stride = gridDim.y * kRows;
  auto* y = static_cast<data_t*>(p.y) + (row * p.heads + head) * p.head_dim;

  const int64_t slot = p.slots[row];
  if (slot < 0) {
    if (lane == 0)
      for (int i = first; i < p.head_dim; i += stride) y[i] = from_float<data_t>(0.f);
    return;
  }
  const auto* x = static_cast<const data_t*>(p.x) + row * p.x_stride +
                  int64_t(head / (p.heads / p.x_heads)) * p.head_dim;
  const auto* b = static_cast<const data_t*>(p.B) + row * p.b_stride +
                  int64_t(head / (p.heads / p.b_groups)) * p.state_dim;
  const auto* c = static_cast<const data_t*>(p.C) + row * p.c_stride +
                  int64_t(head / (p.heads / p.c_groups)) * p.state_dim;
  const float decay = expf(p.log_decay[row * p.log_decay_stride + head]);
  const float scale = p.scale ? p.scale[row * p.scale_stride + head] : 1.f;
  const float skip = p.D ? p.D[head] : 0.f;
  auto* state =
      static_cast<state_t*>(p.state) + (slot * p.heads + head) * int64_t(p.head_dim) * p.state_dim;

  for (int i = first; i < p.head_dim; i += stride) {
    const float input = to_float(x[i]);
    const float gain = scale * input;
    state_t* s = state + int64_t(i) * p.state_dim;
    float sum = 0.f;
    for (int n = lane * kVec; n < p.state_dim; n += kLanes * kVec) {
      auto entries = *reinterpret_cast<const Vec<state_t, kVec>*>(s + n);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float next = decay * to_float(entries.at[k]) + gain * to_float(b[n + k]);
        entries.at[k] = from_float<state_t>(next);
        sum += next * to_float(c[n + k]);
      }
      *reinterpret_cast<Vec<state_t, kVec>*>(s + n) = entries;
    }
    // The lanes of one row agree on `i`, so they are all here; other rows of the warp may not be.
    const unsigned mates = (kLanes == 32 ? ~0u : (1u << kLanes) - 1)
                           << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(mates, sum, offset, kLanes);
    if (lane == 0) y[i] = from_float<data_t>(sum + skip * input);
  }
}

template <typename data_t, typename state_t, int kLanes, int kVec>
void launch(const StateUpdateParams& p, cudaStream_t stream) {
  const int rows = kThreads / kLanes;
  const dim3 grid(p.batch * p.heads, min((p.head_dim + rows - 1) / rows, 8));
  state_update_kernel<data_t, state_t, kLanes, kVec><<<grid, kThreads, 0, stream>>>(p);
}

template <typename data_t, typename state_t>
void dispatch_width(const StateUpdateParams& p, cudaStream_t stream) {
  if (p.state_dim % 4 != 0) return launch<data_t, state_t, 32, 1>(p, stream);
  if (p.state_dim <= 16) return launch<data_t, state_t, 4, 4>(p, stream);
  if (p.state_dim <= 32) return launch<data_t, state_t, 8, 4>(p, stream);
  if (p.state_dim <= 64) return launch<data_t, state_t, 16, 4>(p, stream);
  launch<data_t, state_t, 32, 4>(p, stream);
}

template <typename data_t>
void dispatch_state(const StateUpdateParams& p, cudaStream_t stream) {
  switch (p.state_dtype) {
    case DType::kFloat32:
      return dispatch_width<data_t, float>(p, stream);
    case DType::kBFloat16:
      return dispatch_width<data_t, __nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_width<data_t, __half>(p, stream);
  }
}

}  // namespace

void launch_state_update(const StateUpdateParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.head_dim == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_state<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_state<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_state<__half>(p, stream);
  }
}

}  // namespace reasoners
