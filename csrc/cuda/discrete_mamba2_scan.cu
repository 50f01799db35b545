// Llamba's mixer over whole sequences, from in_proj's rows [x, B, C, z, a] to out_proj's: a
// convolution of [x, B, C], S = sigmoid(-a) S + x B^T, y = S C + D x, out = y silu(z + z_bias), in
// one pass: ssd_walk.cuh says how.
//
//   P, N         64, 64   96, 64   128, 64   64, 128   128, 128      the next larger serves others
//   parts           1        2        2         2          2         of 4 warps each that multiply
//   producers       4        0        0         0          0         warps that only convolve
//   shared, kB    115       95       112       121        165
//   blocks per SM   2        2        2         1          1
//
// A 64 x 64 tile's chunk is kept once as it came and twice convolved, so that one is convolved
// while another is multiplied; the scalars and the state's copy are there twice too, so that a
// chunk costs the warps that multiply one barrier. Producers leave them registers, 88 a thread for
// 168: what spills does so outside the walk. A larger tile is kept once each way, and its block
// alternates. The three inputs before a chunk are read again, out of the second-level cache: 5 %
// more reads there, and a block may begin anywhere.
//
// Bytes that must move at Llamba-1B, a token and head: 514 in, 128 out, 225 us for 8 x 4096. A
// warp's instructions a chunk are 780 for the convolution and 250 around it; 1,000 for the products
// and 300 for the gate. A head's blocks of one group each convolve its B and C.
//
// H100, bfloat16, us: 8 x 4096 296, 64 x 512 311, 1 x 2048 43; the operators one after the other
// 713, 723 and 68. With four warps a block that did both in turn it was 430, 350 and 55: the same
// instructions, issued by 8 warps a multiprocessor instead of 16. H200: 291, 312 and 42; 624, 620
// and 63: memory does not limit it.
// Tried on an H200: products by warpgroups, as in ssd_scan_wgmma.cu, two heads a block and for each
// two warps that convolve by products of tensor cores with diagonal matrices of taps, 6,600
// instructions a chunk and head instead of 9,300: 283, 343 and 42 (MambaInLlama-1B's mixer 401, 455
// and 53, here 362, 376 and 49), where fewer instructions were to give 205. Not profiled.
// A profile of what is here: 57 % of issue slots, 70 % of shared memory's rate. Producers wait a
// seventh of their time for copies and a quarter for a free buffer, the others a fifth for them.
// With all inputs in the second-level cache 8 x 4096 takes 275 us of 279. Each second row of
// in_proj's 8,224 columns begins in the middle of a line, for which copies take shared memory ten
// times instead of four; rows of whole lines changed nothing, nor did it help to ask the cache for
// the chunk after the next (2 to 6 % slower).

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
