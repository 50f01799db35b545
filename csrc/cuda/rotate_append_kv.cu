// rotate and append_kv in one launch: queries are rotated where they are, keys on their way into
// the cache.
//
// A thread takes one vector of channels of the first half of a head and the same one of the second
// half, of any of the token's query, key and value heads; a block takes neighbouring pairs of one
// token, so that few blocks share it and small batches still fill the machine. Sines and cosines of
// the token's position are computed by the block first, one angle a thread, as a head's angles are
// those of every head. The vector is 16 bytes where head_dim, stride and addresses allow, one
// element otherwise. A token of a padding row has no place: its blocks end.

#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rotation.cuh"
#include "rows.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;

template <typename data_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    rotate_append_kv_kernel(const RotateAppendKvParams p, const PageSize pages) {
  using Channels = Vec<data_t, kVec>;
  extern __shared__ Rotation rotations[];  // (head_dim / 2)
  const int half = p.head_dim / 2, vectors = half / kVec, token = blockIdx.x;
  let_next_start();
  wait_for_inputs();
  const auto [row, position] = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, token);
  if (position < 0) return;
  for (int i = threadIdx.x; i < half; i += kThreads)
    rotations[i] = Rotation(position, p.inv_freq[i]);
  __syncthreads();

  const int unit = blockIdx.y * kThreads + threadIdx.x;
  const int head = unit / vectors, channel = unit % vectors * kVec;
  if (head >= p.heads + 2 * p.kv_heads) return;
  auto* from = static_cast<data_t*>(p.qkv) + token * p.qkv_stride + int64_t(head) * p.head_dim;
  auto* to = from;
  if (head >= p.heads) {
    const int turn = pages.page(position);
    const int64_t page = p.page_table[row * p.table_stride + turn];
    const bool is_value = head >= p.heads + p.kv_heads;
    const int kv_head = head - p.heads - (is_value ? p.kv_heads : 0);
    to = static_cast<data_t*>(is_value ? p.v_cache : p.k_cache) +
         ((page * p.kv_heads + kv_head) * p.page_size + (position - turn * p.page_size)) *
             p.head_dim;
    if (is_value) {
      for (int i = channel; i < p.head_dim; i += half)
        *reinterpret_cast<Channels*>(to + i) = *reinterpret_cast<const Channels*>(from + i);
      return;
    }
  }
  auto first = *reinterpret_cast<const Channels*>(from + channel);
  auto second = *reinterpret_cast<const Channels*>(from + half + channel);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float u = to_float(first.at[i]), v = to_float(second.at[i]);
    const Rotation rotation = rotations[channel + i];
    first.at[i] = from_float<data_t>(rotation.first(u, v));
    second.at[i] = from_float<data_t>(rotation.second(u, v));
  }
  *reinterpret_cast<Channels*>(to + channel) = first;
  *reinterpret_cast<Channels*>(to + half + channel) = second;
}

template <typename data_t, int kVec>
void launch(const RotateAppendKvParams& p, cudaStream_t stream) {
  const int half = p.head_dim / 2;
  const int64_t units = int64_t(p.heads + 2 * p.kv_heads) * (half / kVec);
  const dim3 blocks(p.tokens, (units + kThreads - 1) / kThreads);
  launch_overlapping(rotate_append_kv_kernel<data_t, kVec>, blocks, kThreads,
                     half * int(sizeof(Rotation)), stream, p, PageSize(p.page_size));
}

template <typename data_t>
void launch(const RotateAppendKvParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(data_t);
  using Channels = Vec<data_t, kVec>;
  const bool whole = p.head_dim / 2 % kVec == 0 && p.qkv_stride % kVec == 0 &&
                     is_aligned<Channels>(p.qkv) && is_aligned<Channels>(p.k_cache) &&
                     is_aligned<Channels>(p.v_cache);
  whole ? launch<data_t, kVec>(p, stream) : launch<data_t, 1>(p, stream);
}

}  // namespace

void launch_rotate_append_kv(const RotateAppendKvParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads + p.kv_heads == 0 || p.head_dim < 2) return;
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
