// Llamba's mixer over whole sequences, from in_proj's rows [x, B, C, z, a] to out_proj's: a
// convolution of [x, B, C], S = sigmoid(-a) S + x B^T, y = S C + D x, out = y silu(z + z_bias), in
// one pass.

#include "activation.cuh"
#include "ssd_walk.cuh"

namespace reasoners {
namespace {

template <typename Data>
struct DiscreteMamba2 {
  using data_t = Data;
  using Params = MixerScanParams;
  static constexpr bool kConvolves = true, kSilu = false, kNormalises = false;
  __host__ __device__ static const SsdScanParams& scan(const Params& p) { return p.scan; }

  __device__ DiscreteMamba2(const Params& p, int head) : p(p), head(head) {}
  // a of a token, or what past the end changes nothing; and what it means.
  __device__ void read(float& a, float&, int64_t batch, int64_t token, bool there) const {
    const auto* row = static_cast<const data_t*>(p.a) + batch * p.scan.x_strides.batch +
                      token * p.scan.x_strides.token;
    a = there ? to_float(row[head]) : -INFINITY;
  }
  __device__ void weigh(float& a, float& scale) const {
    a = -softplus(a);
    scale = 1.f;
  }
  // Of a column of y.
  __device__ float constant(int i) const {
    return to_float(static_cast<const data_t*>(p.z_bias)[head * p.scan.head_dim + i]);
  }
  __device__ static float gate(float y, float z, float z_bias) { return y * silu_fast(z + z_bias); }

  const Params& p;
  int head;
};

}  // namespace

int64_t count_discrete_mamba2_scan_scratch(const SsdScanParams& p) {
  return count_walk_scratch<DiscreteMamba2>(p);
}

void launch_discrete_mamba2_scan(const MixerScanParams& p, cudaStream_t stream) {
  if (p.scan.sequences == 0 || p.scan.heads == 0 || p.scan.head_dim == 0) return;
  launch_walks<DiscreteMamba2>(p, stream);
}

}  // namespace reasoners
