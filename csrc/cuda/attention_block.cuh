// What fixes the bits of an attention row on the tensor cores, whichever kernel computes it.
//
//   step   16 positions: one chain of products of a warp
//   block  64 positions: a warp takes their steps one after the other, with the online softmax of
//          Dao 2023 (FlashAttention-2), from nothing
//   split  256 positions: the results of four blocks are merged in order
//   row    its splits are folded in order, from the first
//
// Blocks and splits begin at multiples of their size. A block's result depends on its positions and
// on the one column (query and head) alone, so that it does not matter which thread block computes
// it, beside what, or whether it waits in memory until it is folded. Products and sums that the
// compiler could contract in one kernel and not in another are spelled out.
//
// K (16 x D) times the queries (D x 8) gives the scores, V^T (D x 16) times the weights (16 x 8)
// the values, both with m16n8k16. K's fragments are 16-byte loads straight from the cache, because
// the order of the channels in a dot product is free; V's are put together from two positions by
// byte permutations, the weights' by an 8 x 8 transposition. Weights are split in two numbers of
// the data type, so that nothing is lost against float32.
#pragma once

#include <cstring>

#include "convert.cuh"
#include "softmax.cuh"

namespace reasoners {

constexpr int kStep = 16;
constexpr int kBlock = 64;
constexpr int kWalkers = 4;  // blocks of a split
constexpr int kSplit = kWalkers * kBlock;
constexpr int kTileHeads = 8;  // columns of one product

// Softmax over some positions, and a few channels of their weighted values, not yet divided by the
// sum.
template <int kVec>
struct Part {
  float max, sum;
  Vec<float, kVec> values;
};
template <int kVec>
__device__ inline Part<kVec> nothing() {
  return {kMinusInfinity, 0.f, {}};
}

__device__ inline float fold(float all, float keep, float part, float take) {
  return __fmaf_rn(take, part, __fmul_rn(keep, all));
}
template <int kVec>
__device__ inline void fold(Part<kVec>& all, const Part<kVec>& part) {
  const float top = fmaxf(all.max, part.max);
  const float keep = weight(all.max, top), take = weight(part.max, top);
  all.max = top;
  all.sum = fold(all.sum, keep, part.sum, take);
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    all.values.at[i] = fold(all.values.at[i], keep, part.values.at[i], take);
}

template <int kVec>
__device__ inline Vec<float, kVec> load_vector(const float* from) {
  return *reinterpret_cast<const Vec<float, kVec>*>(from);
}
template <int kVec>
__device__ inline void store_vector(float* to, const Vec<float, kVec>& values) {
  *reinterpret_cast<Vec<float, kVec>*>(to) = values;
}

// Results of several walkers for some heads, in shared memory.
template <int kCount, int kHeads, int kDim>
struct alignas(16) Partials {
  float max[kCount][kHeads], sum[kCount][kHeads];
  alignas(16) float values[kCount][kHeads][kDim];

  template <int kVec>
  __device__ Part<kVec> read(int walker, int head, int channel) const {
    return {max[walker][head], sum[walker][head],
            load_vector<kVec>(&values[walker][head][channel])};
  }
  template <int kVec>
  __device__ void write(int walker, int head, int channel, const Part<kVec>& part) {
    store_vector<kVec>(&values[walker][head][channel], part.values);
    if (channel == 0) max[walker][head] = part.max, sum[walker][head] = part.sum;
  }
  template <int kVec>
  __device__ Part<kVec> merged(int head, int channel) const {
    auto all = nothing<kVec>();
#pragma unroll
    for (int w = 0; w < kCount; ++w) all.max = fmaxf(all.max, max[w][head]);
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      const float fade = weight(max[w][head], all.max);
      const auto part = load_vector<kVec>(&values[w][head][channel]);
      all.sum = __fmaf_rn(fade, sum[w][head], all.sum);
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        all.values.at[i] = __fmaf_rn(fade, part.at[i], all.values.at[i]);
    }
    return all;
  }
};

template <typename data_t>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The 8 x 8 matrix of which lane (g, t) = (lane / 4, lane % 4) holds row g, columns 2t and 2t + 1.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// a in the low half, b in the high half.
template <typename data_t>
__device__ inline uint32_t pack(float a, float b) {
  const Vec<data_t, 2> pair{{from_float<data_t>(a), from_float<data_t>(b)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
// The same, and what rounding takes from them.
template <typename data_t>
__device__ inline void coarse_and_fine(float a, float b, uint32_t& coarse, uint32_t& fine) {
  coarse = pack<data_t>(a, b);
  Vec<data_t, 2> rounded;
  memcpy(&rounded, &coarse, sizeof(coarse));
  fine = pack<data_t>(a - to_float(rounded.at[0]), b - to_float(rounded.at[1]));
}

// Lane (g, t) = (lane / 4, lane % 4) of a warp holds, of the 16 positions of a step:
//   K        positions g and g + 8, channels 32 c + 8 t + (0 to 7) of every chunk c of 32
//   scores   positions g and g + 8 of columns 2t and 2t + 1
//   V        positions 2t, 2t + 1, 2t + 8, 2t + 9, channels 8 kWide j + kWide g + (0 to kWide - 1)
//   values   those channels of columns 2t and 2t + 1
template <int kDim>
struct Fragments {
  static constexpr int kChunks = kDim / 32;             // 16-byte loads of a position of K
  static constexpr int kWide = kDim % 64 == 0 ? 8 : 4;  // channels of one load of V
  static constexpr int kLoads = kDim / (8 * kWide);     // loads of a position of V
  static constexpr int kPairs = kWide / 2;              // pairs of channels in one of them
  using KChunk = Vec<uint32_t, 4>;
  using VChunk = Vec<uint32_t, kPairs>;
};

// K and V of a step, in registers, as they come.
template <typename data_t, int kDim>
struct StepLoads : Fragments<kDim> {
  using typename Fragments<kDim>::KChunk;
  using typename Fragments<kDim>::VChunk;
  using Fragments<kDim>::kChunks, Fragments<kDim>::kLoads, Fragments<kDim>::kWide;
  KChunk k[2][kChunks];
  VChunk v[4][kLoads];

  // Lane first + i knows the place of position i, counted in vectors.
  __device__ void read(const data_t* k_cache, const data_t* v_cache, int place, int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = g + 8 * r;
      const data_t* from = k_cache + int64_t(__shfl_sync(kAll, place, first + i)) * kDim + t * 8;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) k[r][c] = *reinterpret_cast<const KChunk*>(from + c * 32);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = 2 * t + r % 2 + r / 2 * 8;
      const data_t* from =
          v_cache + int64_t(__shfl_sync(kAll, place, first + i)) * kDim + g * kWide;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        v[r][j] = *reinterpret_cast<const VChunk*>(from + j * 8 * kWide);
    }
  }
};

// The same as the products take them.
template <typename data_t, int kDim>
struct StepFragments : Fragments<kDim> {
  using Fragments<kDim>::kChunks, Fragments<kDim>::kLoads, Fragments<kDim>::kPairs;
  uint32_t k[kChunks][2][4];
  uint32_t v[kLoads][kPairs][4];  // row g is the even channel of the pair, row g + 8 the odd one

  __device__ explicit StepFragments(const StepLoads<data_t, kDim>& from) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) k[c][i / 4][i % 4] = from.k[i % 2][c].at[i / 2];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kPairs; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[j][e][i] = __byte_perm(from.v[i / 2 * 2][j].at[e], from.v[i / 2 * 2 + 1][j].at[e],
                                   i % 2 ? 0x7632 : 0x5410);
  }
};

// What a warp has seen of a block, for eight columns.
template <typename data_t, int kDim>
struct BlockTile : Fragments<kDim> {
  using typename Fragments<kDim>::KChunk;
  using Fragments<kDim>::kChunks, Fragments<kDim>::kLoads, Fragments<kDim>::kWide;
  using Fragments<kDim>::kPairs;
  float values[kLoads][kPairs][4];
  float max[2], sum[2];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kPairs; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j][e][i] = 0.f;
    max[0] = max[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.f;
  }

  // Positions from `seen` on count for nothing, but their values must not be NaN.
  // scale: of the scores, times log2(e). query(c): chunk c of column g, in K's order of channels.
  template <typename Query>
  __device__ void take(const StepFragments<data_t, kDim>& step, int seen, float scale,
                       const Query& query) {
    const int g = threadIdx.x % 32 / 4;
    float score[4] = {};  // (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const KChunk q = query(c);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        multiply_add<data_t>(score, step.k[c][i], {q.at[2 * i], q.at[2 * i + 1]});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      score[i] = g + i / 2 * 8 < seen ? __fmul_rn(score[i], scale) : kMinusInfinity;

    float fade[2], w[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(score[h], score[2 + h]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        top = fmaxf(top, __shfl_xor_sync(kAll, top, offset));
      top = fmaxf(top, max[h]);
      fade[h] = weight(max[h], top);
      max[h] = top;
      w[h] = weight(score[h], top);
      w[2 + h] = weight(score[2 + h], top);
      sum[h] = __fmaf_rn(sum[h], fade[h], __fadd_rn(w[h], w[2 + h]));
    }
    uint32_t coarse[2], fine[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      coarse_and_fine<data_t>(w[2 * r], w[2 * r + 1], coarse[r], fine[r]);
      coarse[r] = transpose(coarse[r]);
      fine[r] = transpose(fine[r]);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kPairs; ++e) {
        float (&c)[4] = values[j][e];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = __fmul_rn(c[i], fade[i % 2]);
        multiply_add<data_t>(c, step.v[j][e], coarse);
        multiply_add<data_t>(c, step.v[j][e], fine);
      }
  }

  __device__ void store(Partials<kWalkers, kTileHeads, kDim>& partials, int walker) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        sum[h] = __fadd_rn(sum[h], __shfl_xor_sync(kAll, sum[h], offset));
      const int head = 2 * t + h;
      if (g == 0) partials.max[walker][head] = max[h], partials.sum[walker][head] = sum[h];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
#pragma unroll
        for (int e = 0; e < kPairs; ++e)
          *reinterpret_cast<float2*>(
              &partials.values[walker][head][j * 8 * kWide + g * kWide + 2 * e]) =
              make_float2(values[j][e][h], values[j][e][2 + h]);
    }
  }
};

}  // namespace reasoners
