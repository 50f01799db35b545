// MambaInLlama's Mamba-2 mixer over whole sequences, from in_proj's rows [z, x, B, C, dt] to
// out_proj's: a convolution with SiLU of [x, B, C], delta = softplus(dt + dt_bias),
// S = exp(-delta exp(A_log)) S + delta x B^T, y = S C + D x, g = y silu(z), and g normalised over
// its head, in one pass. x and B belong to a kv head and serve its query heads: each of their
// blocks convolves them again, out of the second-level cache.
//
// H100, MambaInLlama-1B, bfloat16, us: 8 x 4096 356, 64 x 512 372, 1 x 2048 49; the operators one
// after the other 1560, 1578 and 133. ssd_walk.cuh says how, discrete_mamba2_scan.cu what limits.

#include "activation.cuh"
#include "ssd_walk.cuh"

namespace reasoners {
namespace {

template <typename Data>
struct Mamba2 {
  using data_t = Data;
  using Params = MixerScanParams;
  static constexpr bool kConvolves = true, kSilu = true, kNormalises = true;
  __host__ __device__ static const SsdScanParams& scan(const Params& p) { return p.scan; }

  __device__ Mamba2(const Params& p, int head)
      : p(p), head(head), dt_bias(p.dt_bias[head]), rate(expf(p.A_log[head])) {}
  // dt of a token, or what past the end changes nothing; and what it means.
  __device__ void read(float& dt, float&, int64_t batch, int64_t token, bool there) const {
    const auto* row = static_cast<const data_t*>(p.a) + batch * p.scan.x_strides.batch +
                      token * p.scan.x_strides.token;
    dt = there ? to_float(row[head]) : -INFINITY;
  }
  __device__ void weigh(float& dt, float& scale) const {
    scale = softplus(__fadd_rn(dt, dt_bias));
    dt = -scale * rate;
  }
  // Of a column of y.
  __device__ float constant(int i) const {
    return to_float(static_cast<const data_t*>(p.norm_weight)[head * p.scan.head_dim + i]);
  }
  __device__ static float gate(float y, float z, float) { return y * silu_fast(z); }
  // What a row is multiplied with, from the sum of its squares.
  __device__ float norm(float squares) const { return rsqrtf(squares / p.scan.head_dim + p.eps); }

  const Params& p;
  int head;
  float dt_bias, rate;
};

}  // namespace

int64_t count_mamba2_scan_scratch(const SsdScanParams& p) { return count_walk_scratch<Mamba2>(p); }

void launch_mamba2_scan(const MixerScanParams& p, cudaStream_t stream) {
  if (p.scan.sequences == 0 || p.scan.heads == 0 || p.scan.head_dim == 0) return;
  launch_walks<Mamba2>(p, stream);
}

}  // namespace reasoners
