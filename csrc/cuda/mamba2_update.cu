// MambaInLlama's Mamba-2 mixer for one token, from in_proj's row [z, x, B, C, dt] to out_proj's: a
// convolution step with SiLU on [x, B, C], delta = softplus(dt + dt_bias),
// S = exp(-delta exp(A_log)) S + delta x B^T, y = S C + D x, g = y silu(z), and g normalised over
// its head, in one launch. x and B belong to a kv head and serve its query heads: each of their
// blocks (state_step.cuh) convolves them again, out of the second-level cache.

#include "projected_inputs.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct Mamba2 : ProjectedInputs<data_t, true> {
  using ProjectedInputs<data_t, true>::p;

  __device__ float scale(int64_t row, int head) const {
    return softplus(to_float(this->projected(row)[p.a_offset + head]) + p.dt_bias[head]);
  }
  __device__ float log_decay(int64_t row, int head) const {
    return -scale(row, head) * expf(p.A_log[head]);
  }
  __device__ float output_constants(int head, int i) const {
    return this->parameter(p.norm_weight, head * p.head_dim + i);
  }
  template <typename Sync>
  __device__ void finish(float* partial, const Sync& sync, float norm_weight, int64_t row, int head,
                         int i, bool valid, float y, float z) const {
    const float gated = valid ? y * silu(z) : 0.f;
    float squares = gated * gated;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    // Heads fill whole warps of the first P threads, the other warps add nothing.
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
    sync();
    if (!valid) return;
    squares = 0.f;
    for (int warp = 0; warp < (p.head_dim + 31) / 32; ++warp) squares += partial[warp];
    const float norm = rsqrtf(squares / p.head_dim + p.eps);
    this->store(row, head, i, to_float(from_float<data_t>(gated * norm)) * norm_weight);
  }
};

}  // namespace

void launch_mamba2_update(const MixerUpdateParams& p, cudaStream_t stream) {
  launch_mixer_step<Mamba2>(p, stream);
}

}  // namespace reasoners
