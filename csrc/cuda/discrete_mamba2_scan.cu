// Llamba's mixer over whole sequences, from in_proj's rows [x, B, C, z, a] to out_proj's: a
// convolution of [x, B, C], S = sigmoid(-a) S + x B^T, y = S C + D x, out = y silu(z + z_bias), in
// one pass: ssd_walk.cuh says how.
//
//   P, N         64, 64   96, 64   128, 64   64, 128   128, 128      the next larger serves others
//   parts           1        2        2         2          2         of 4 warps each
//   shared, kB     76       95       112       121        165
//   blocks per SM   3        2        2         1          1
//
// A chunk is kept once as it came and once convolved, instead of twice: three blocks of 64 x 64 fit
// only without gaps between the rows of what came and of z, and with one copy of the state. That
// copy, the scalars and the convolution are written between two barriers, so that it costs no
// third. The three inputs before a chunk are read again, out of the second-level cache: 5 % more
// reads there, and a block may begin anywhere.
//
// Bytes that must move at Llamba-1B, a token and head: 514 in, 128 out, 225 us for 8 x 4096. A
// warp's instructions a chunk are twice those of the scan alone: 780 of the convolution, 300 of the
// gate. A head's blocks of one group each convolve its B and C.
//
// H100, bfloat16, us: 8 x 4096 430, 64 x 512 350, 1 x 2048 55; the operators one after the other
// 713, 731 and 67. At 8 x 4096 two blocks are on a multiprocessor, and a chunk's products wait for
// its convolution: warps that convolve beside warps that multiply are what to try next.

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
