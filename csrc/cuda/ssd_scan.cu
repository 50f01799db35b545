// S_t = exp(log_decay_t) S_{t-1} + scale_t x_t B_t^T, y_t = S_t C_t + D x_t, on tensor cores for
// 16-bit data; ssd_scan_rows.cu serves the rest, and on Hopper ssd_scan_wgmma.cu all but some heads
// of 64 x 128.
//
// A block walks one head of one sequence, kChunk tokens at a time, while the next chunk's x, B, C
// and scalars are on their way. Within a chunk, where c_i = log_decay_0 + ... + log_decay_i,
// L_ij = exp(c_i - c_j) scale_j for j <= i and 0 elsewhere, and S is the state before the chunk:
//   y = exp(c) (C S^T) + (C B^T * L) x + D x         S after = exp(c_last) S + (gain x)^T B
// with gain_j = exp(c_last - c_j) scale_j. C B^T stays in registers, where the sums of one product
// are the factors of the next; the state is fp32 in registers, and a copy in the data's type in
// shared memory is for the product with C.
//
// States are summed in segments of four chunks or more (ssd_deal.cuh): a local state that begins
// with zeros, and carried + decay since the segment's start times it. So what a segment adds does
// not depend on what came before, and the segments of a sequence can be dealt to several blocks
// without a bit of difference: where sequences and heads alone do not fill the machine, a first
// kernel finds what each segment adds (from x and B alone), a second carries states from segment to
// segment, and the blocks of the third begin at theirs. How is decided from shapes alone.
//
// Warp (r, h) has the tokens 16 r to 16 r + 15 and part h of the columns of y, and the rows 16 r
// (and 16 r + 64) of the state and part h of its columns.
//
//   P, N         64, 64   96, 64   128, 64   64, 128   128, 128      the next larger serves others
//   parts           1        2        2         2          2         of 4 warps each
//   shared, kB     75       91       108       105        174
//   blocks per SM   3        2        2         2          1
//
// Bytes that must move (P = N = 64, no sharing), a head and token: 512 for x, B, C and y, 4 or 8
// for scalars; split, 256 more for x and B and 64 to 128 for states. 70 FLOP a byte.
//
// That is what ssd_walk.cuh does for heads that ssd_scan_wgmma.cu does not take, and within the
// mixers; times stand there.

#include "ssd_walk.cuh"

namespace reasoners {
namespace {

template <typename data>
struct Tensors {
  using data_t = data;
  using Params = SsdScanParams;
  static constexpr bool kConvolves = false;
  __host__ __device__ static const SsdScanParams& scan(const Params& p) { return p; }

  __device__ Tensors(const Params& p, int head) : p(p), head(head) {}
  // Of a token, or what past the end changes nothing.
  __device__ void read(float& log_decay, float& scale, int64_t batch, int64_t token,
                       bool there) const {
    const auto of = [&](const float* values, TokenStrides strides) {
      return values[batch * strides.batch + token * strides.token + head];
    };
    log_decay = there ? of(p.log_decay, p.log_decay_strides) : 0.f;
    scale = there && p.scale ? of(p.scale, p.scale_strides) : 1.f;
  }

  const Params& p;
  int head;
};

}  // namespace

int64_t count_ssd_scan_scratch(const SsdScanParams& p) {
  if (!on_tensor_cores(p)) return 0;
  return suits_ssd_scan_wgmma(p) ? count_ssd_scan_wgmma_scratch(p) : count_walk_scratch<Tensors>(p);
}

void launch_ssd_scan(const SsdScanParams& p, cudaStream_t stream) {
  if (p.sequences == 0 || p.heads == 0 || p.head_dim == 0) return;
  if (!on_tensor_cores(p)) return launch_ssd_scan_rows(p, stream);
  if (suits_ssd_scan_wgmma(p)) return launch_ssd_scan_wgmma(p, stream);
  launch_walks<Tensors>(p, stream);
}

}  // namespace reasoners
