// h += delta, then y = h / rms(h) * weight: a residual connection and the norm behind it, in one
// launch.
//
// A block a row; the row stays in registers between the sum of squares and the product, so it is
// read once and written once as h and once as y: 4 x 2 bytes a channel with delta. kPer channels a
// thread in vectors of 16 bytes; rows of other lengths, or too long, take the loop. Rounded where
// the plain composition rounds: h, the normalised value, and y.

#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rms_norm.cuh"

namespace reasoners {
namespace {

constexpr int kMaxThreads = RmsNormShape::kMostThreads;

__device__ float block_sum(float v, float* shared) {
  v = sum_warp(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  return sum_warp(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f);
}

template <typename data_t, int kVec, int kTurns>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(const AddRmsNormParams p) {
  __shared__ float shared[kMaxThreads / 32];
  using vec_t = Vec<data_t, kVec>;
  const int64_t row = blockIdx.x;
  auto* h = static_cast<data_t*>(p.h) + row * p.dim;
  const auto* delta = static_cast<const data_t*>(p.delta) + row * p.delta_stride;
  auto* y = static_cast<data_t*>(p.y) + row * p.dim;
  const auto* weight = static_cast<const data_t*>(p.weight);

  vec_t values[kTurns], scales[kTurns];
  float squares = 0.f;
  let_next_start();
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = (turn * blockDim.x + threadIdx.x) * kVec;
    if (i < p.dim) scales[turn] = *reinterpret_cast<const vec_t*>(weight + i);
  }
  wait_for_inputs();
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = (turn * blockDim.x + threadIdx.x) * kVec;
    if (i >= p.dim) break;
    values[turn] = *reinterpret_cast<const vec_t*>(h + i);
    if (p.delta) {
      const auto more = *reinterpret_cast<const vec_t*>(delta + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        values[turn].at[k] =
            from_float<data_t>(to_float(values[turn].at[k]) + to_float(more.at[k]));
      *reinterpret_cast<vec_t*>(h + i) = values[turn];
    }
    squares = add_squares(squares, values[turn]);
  }
  const float norm = inverse_rms(block_sum(squares, shared), p.dim, p.eps);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = (turn * blockDim.x + threadIdx.x) * kVec;
    if (i >= p.dim) break;
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      values[turn].at[k] = normalised(values[turn].at[k], norm, scales[turn].at[k]);
    *reinterpret_cast<vec_t*>(y + i) = values[turn];
  }
}

template <typename data_t>
__global__ void __launch_bounds__(kMaxThreads) any_row_kernel(const AddRmsNormParams p) {
  __shared__ float shared[kMaxThreads / 32];
  const int64_t row = blockIdx.x;
  auto* h = static_cast<data_t*>(p.h) + row * p.dim;
  auto* y = static_cast<data_t*>(p.y) + row * p.dim;
  float squares = 0.f;
  for (int i = threadIdx.x; i < p.dim; i += blockDim.x) {
    if (p.delta)
      h[i] = from_float<data_t>(
          to_float(h[i]) + to_float(static_cast<const data_t*>(p.delta)[row * p.delta_stride + i]));
    squares += to_float(h[i]) * to_float(h[i]);
  }
  const float norm = inverse_rms(block_sum(squares, shared), p.dim, p.eps);
  for (int i = threadIdx.x; i < p.dim; i += blockDim.x)
    y[i] = normalised(h[i], norm, static_cast<const data_t*>(p.weight)[i]);
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <typename data_t>
void launch(const AddRmsNormParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(data_t);
  const int vectors = p.dim / kVec;
  const bool fits = p.dim % kVec == 0 && p.delta_stride % kVec == 0 && aligned(p.h) &&
                    aligned(p.delta) && aligned(p.weight) && vectors <= 4 * kMaxThreads;
  const auto [turns, threads] = RmsNormShape::of(vectors);
  if (!fits)
    any_row_kernel<data_t><<<p.rows, 256, 0, stream>>>(p);
  else if (turns == 4)
    launch_overlapping(add_rms_norm_kernel<data_t, kVec, 4>, p.rows, threads, 0, stream, p);
  else if (turns == 2)
    launch_overlapping(add_rms_norm_kernel<data_t, kVec, 2>, p.rows, threads, 0, stream, p);
  else
    launch_overlapping(add_rms_norm_kernel<data_t, kVec, 1>, p.rows, threads, 0, stream, p);
}

}  // namespace

void launch_add_rms_norm(const AddRmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.dim == 0) return;
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
