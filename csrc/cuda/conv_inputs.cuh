// What the convolution and its derivative read: inputs that reach back before a sequence, weights,
// where a token's sequence is, and how the tokens of a walk come in ahead of it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace reasoners {

__device__ inline float unpack(uint32_t word, int, float) { return __uint_as_float(word); }
__device__ inline float unpack(uint32_t word, int half, __nv_bfloat16) {
  const float2 pair = unpack<__nv_bfloat16>(word);
  return half ? pair.y : pair.x;
}
__device__ inline float unpack(uint32_t word, int half, __half) {
  return __half2float(__ushort_as_half(half ? word >> 16 : word));
}

// kVec neighbouring channels as they lie in memory, in whole words. Halves of words that live
// across a branch get registers of their own: the compiler takes words apart right after a load,
// which waits for it there.
template <typename data_t, int kVec>
struct alignas(sizeof(data_t) * kVec) Words {
  static constexpr int kBytes = sizeof(data_t) * kVec, kParts = 4 / sizeof(data_t);
  using word_t = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;

  __device__ float operator[](int k) const {
    return unpack(words[k / kParts], k % kParts, data_t());
  }

  word_t words[kBytes / sizeof(word_t)];
};

// A walk's tokens come through kSlots places in shared memory that are the thread's own, kAhead of
// them on their way while one is computed: the place of the token before is free by then.
constexpr int kSlots = 8, kAhead = kSlots - 1;

// Begins to copy one there; wait_for_copies waits for it.
template <typename data_t, int kVec>
__device__ inline void copy_ahead(Words<data_t, kVec>* shared, const data_t* global) {
  constexpr int kBytes = sizeof(data_t) * kVec;
  static_assert(kBytes == 16 || kVec == 1);
  if constexpr (kBytes == 16) {
    copy_async_16_once(shared, global, true);
  } else if constexpr (kBytes == 4) {
    copy_async_4(shared, global);
  } else {  // less than such a copy moves
    *shared = *reinterpret_cast<const Words<data_t, kVec>*>(global);
  }
}

// Where a sequence's inputs are: token t of it for any t >= -kHistory, from `channel` on.
template <typename data_t, int kVec, int kHistory>
struct Inputs {
  using Channels = Words<data_t, kVec>;

  __device__ Inputs(const CausalConv1dParams& p, const Sequence& sequence, int64_t index,
                    int channel)
      : x(static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch +
          sequence.begin * p.x_strides.token + channel),
        past(p.initial_state ? static_cast<const data_t*>(p.initial_state) +
                                   index * kHistory * p.channels + channel
                             : nullptr),
        token(p.x_strides.token),
        channels(p.channels) {}
  // Zeros have all their bits zero.
  __device__ Channels at(int64_t t) const {
    const data_t* from = t >= 0 ? x + t * token : past ? past + (kHistory + t) * channels : nullptr;
    return from ? *reinterpret_cast<const Channels*>(from) : Channels{};
  }

  const data_t *x, *past;
  int64_t token, channels;
};

// The sequence that holds token `at` of the batch: the last to begin there or before. All threads
// of a warp ask together, and each looks at one of 32 sequences: bisection waits for memory five
// times as often.
__device__ inline int64_t sequence_of(const CausalConv1dParams& p, int64_t at) {
  if (p.cu_seqlens == nullptr) return at / p.length;
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = p.sequences;  // the answer is in [low, high)
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, place = low + lane * step;
    const bool before = place < high && p.cu_seqlens[place] <= at;
    low += (max(__popc(__ballot_sync(~0u, before)), 1) - 1) * step;
    high = min(high, low + step);
  }
  return low;
}

// The weights and the bias of kVec neighbouring channels.
template <typename data_t, int kVec, int kWidth>
struct Taps {
  using Channels = Vec<data_t, kVec>;

  __device__ Taps(const CausalConv1dParams& p, int channel) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {  // the channels' weights are kVec * kWidth neighbours
      const auto some = *reinterpret_cast<const Channels*>(static_cast<const data_t*>(p.weight) +
                                                           int64_t(channel) * kWidth + i * kVec);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        weight[(i * kVec + k) % kWidth][(i * kVec + k) / kWidth] = to_float(some.at[k]);
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      bias[k] = p.bias ? to_float(static_cast<const data_t*>(p.bias)[channel + k]) : 0.f;
  }
  // Of channel `k` and the inputs from u[i] on.
  template <int kCount>
  __device__ float convolve(const Words<data_t, kVec> (&u)[kCount], int i, int k) const {
    float sum = bias[k];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sum = fmaf(weight[w][k], u[i + w][k], sum);
    return sum;
  }

  float weight[kWidth][kVec], bias[kVec];
};

}  // namespace reasoners
