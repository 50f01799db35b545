// rotate and append_kv in one launch: queries are rotated where they are, keys on their way into
// the cache.
//
// A thread takes one vector of channels of the first half of a head and the same one of the second
// half, of any of a token's query, key and value heads. Few tokens: a block takes neighbouring
// pairs of one token, so that few blocks share it and small batches still fill the machine. Many: a
// block takes kMany tokens, and a thread asks for several pairs before it has one, or the waits for
// a token's row, page and angles, one after the other, would cost more than its bytes. Sines and
// cosines of the tokens' positions are computed by the block first, one angle a thread, as a head's
// angles are those of every head. The vector is 16 bytes where head_dim, stride and addresses
// allow, one element otherwise. A token of a padding row has no place: nothing is done for it.
//
// H200, bfloat16, 32 query and 8 kv heads of 64: 1.6, 2.8, 3.3 and 38 us for 1, 64, 512 and 8,192
// tokens; these took 86 with a block each, where their bytes need 24.

#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rotation.cuh"
#include "rows.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kMany = 4, kBatch = 3;  // tokens of a block, pairs of a thread at a time
constexpr int kManyFrom = 2048;       // tokens of a launch

template <typename data_t, int kVec, int kTokens>
__global__ void __launch_bounds__(kThreads)
    rotate_append_kv_kernel(const RotateAppendKvParams p, const PageSize pages) {
  using Channels = Vec<data_t, kVec>;
  constexpr bool kOne = kTokens == 1;
  constexpr int kPairs = kOne ? 1 : kBatch;
  extern __shared__ Rotation rotations[];  // (kTokens, head_dim / 2)
  __shared__ RowPosition places[kTokens];
  const int half = p.head_dim / 2, vectors = half / kVec;
  const int heads = p.heads + 2 * p.kv_heads, units = heads * vectors;
  const int first_token = blockIdx.x * kTokens;
  let_next_start();
  wait_for_inputs();
  RowPosition place{-1, -1};
  if (const int token = first_token + (kOne ? 0 : threadIdx.x);
      (kOne || threadIdx.x < kTokens) && token < p.tokens)
    place = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, token);
  if (kOne && place.position < 0) return;
  if (!kOne) {
    if (threadIdx.x < kTokens) places[threadIdx.x] = place;
    __syncthreads();
  }
  const auto place_of = [&](int t) { return kOne ? place : places[t]; };
  for (int i = threadIdx.x; i < kTokens * half; i += kThreads)
    rotations[i] = Rotation(place_of(i / half).position, p.inv_freq[i % half]);
  __syncthreads();

  for (int begin = blockIdx.y * kThreads + threadIdx.x; begin < kTokens * units;
       begin += gridDim.y * kThreads * kPairs) {
    struct Pair {
      Channels first, second;
      data_t* to;
      const Rotation* rotations;  // null: a value, which is copied
    } pairs[kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      Pair& pair = pairs[k];
      const int unit = begin + k * gridDim.y * kThreads, t = kOne ? 0 : unit / units;
      pair.to = nullptr;
      if (unit >= kTokens * units) continue;
      const auto [row, position] = place_of(t);
      if (position < 0) continue;
      const int head = (unit - t * units) / vectors, channel = (unit - t * units) % vectors * kVec;
      auto* from = static_cast<data_t*>(p.qkv) + (first_token + t) * p.qkv_stride +
                   int64_t(head) * p.head_dim + channel;
      pair.first = *reinterpret_cast<const Channels*>(from);
      pair.second = *reinterpret_cast<const Channels*>(from + half);
      pair.to = from;
      pair.rotations = rotations + t * half + channel;
      if (head < p.heads) continue;
      const int turn = pages.page(position);
      const int64_t page = p.page_table[row * p.table_stride + turn];
      const bool is_value = head >= p.heads + p.kv_heads;
      const int kv_head = head - p.heads - (is_value ? p.kv_heads : 0);
      pair.to = static_cast<data_t*>(is_value ? p.v_cache : p.k_cache) +
                ((page * p.kv_heads + kv_head) * p.page_size + (position - turn * p.page_size)) *
                    p.head_dim +
                channel;
      if (is_value) pair.rotations = nullptr;
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      Pair& pair = pairs[k];
      if (pair.to == nullptr) continue;
      if (pair.rotations != nullptr) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float u = to_float(pair.first.at[i]), v = to_float(pair.second.at[i]);
          const Rotation rotation = pair.rotations[i];
          pair.first.at[i] = from_float<data_t>(rotation.first(u, v));
          pair.second.at[i] = from_float<data_t>(rotation.second(u, v));
        }
      }
      *reinterpret_cast<Channels*>(pair.to) = pair.first;
      *reinterpret_cast<Channels*>(pair.to + half) = pair.second;
    }
  }
}

template <typename data_t, int kVec, int kTokens>
void launch(const RotateAppendKvParams& p, cudaStream_t stream) {
  const int half = p.head_dim / 2;
  const int64_t units = int64_t(p.heads + 2 * p.kv_heads) * (half / kVec);
  const dim3 blocks((p.tokens + kTokens - 1) / kTokens,
                    kTokens > 1 ? 1 : (units + kThreads - 1) / kThreads);
  launch_overlapping(rotate_append_kv_kernel<data_t, kVec, kTokens>, blocks, kThreads,
                     kTokens * half * int(sizeof(Rotation)), stream, p, PageSize(p.page_size));
}

template <typename data_t, int kVec>
void launch(const RotateAppendKvParams& p, cudaStream_t stream) {
  p.tokens >= kManyFrom ? launch<data_t, kVec, kMany>(p, stream)
                        : launch<data_t, kVec, 1>(p, stream);
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
