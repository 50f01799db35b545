// Llamba's mixer for one token, from in_proj's row [x, B, C, z, a] to out_proj's: a convolution
// step on [x, B, C], S = sigmoid(-a) S + x B^T, y = S C + D x, out = y silu(z + z_bias), in one
// launch.
//
// A block is one (row, head) of state_step.cuh; its threads convolve the head's P + 2 N channels
// while the state is on its way. In 16 bits at 64 x 64 the token moves 16384 bytes of state and
// beside them 6 x 128 of inputs and outputs and 4 x 384 of the convolution's ring: 1.11 of the bare
// update.

#include "projected_inputs.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct DiscreteMamba2 : ProjectedInputs<data_t, false> {
  using ProjectedInputs<data_t, false>::p;

  __device__ float log_decay(int64_t row, int head) const {
    return -softplus(to_float(this->projected(row)[p.a_offset + head]));
  }
  __device__ float scale(int64_t, int) const { return 1.f; }
  __device__ float output_constants(int head, int i) const {
    return this->parameter(p.z_bias, head * p.head_dim + i);
  }
  template <typename Sync>
  __device__ void finish(float*, const Sync&, float z_bias, int64_t row, int head, int i,
                         bool valid, float y, float z) const {
    if (valid) this->store(row, head, i, y * silu(z + z_bias));
  }
};

}  // namespace

void launch_discrete_mamba2_update(const MixerUpdateParams& p, cudaStream_t stream) {
  launch_mixer_step<DiscreteMamba2>(p, stream);
}

}  // namespace reasoners
