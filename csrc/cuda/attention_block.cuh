// What fixes the bits of an attention row on the tensor cores, whichever kernel computes it.
//
//   step   16 positions: a product of a warp
//   block  64 positions: all scores, one softmax, then the values, step by step
//   split  256 positions: the results of four blocks are folded in order, from the first
//   row    its splits are folded in order, from the first
//
// Blocks and splits begin at multiples of their size. A block's result depends on its positions and
// on the one column (query and head) alone, so that it does not matter which thread block computes
// it, beside what, or whether it waits in memory until it is folded. Products and sums that the
// compiler could contract in one kernel and not in another are spelled out.
//
// Queries are the rows of all products (m16n8k16): Q K^T gives the scores, and what a lane gets of
// them is what it has to give of the weights. Weights are split in two numbers of the data type, so
// that nothing is lost against float32, and eight columns fill the 16 rows with both: the result's
// rows g and g + 8 are added in the end. K's fragments are 16-byte loads of a position, because the
// order of the channels in a dot product is free.
//
// With the positions as rows, the weights had to be transposed (movmatrix), K's registers sorted,
// and what was seen rescaled after each step of 16: 133 instructions for 16 positions of 64
// channels and 199 of 128, now 88 and 129.
#pragma once

#include "convert.cuh"
#include "exponential.cuh"
#include "matrix.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace reasoners {

constexpr int kStep = 16;
constexpr int kBlock = 64;
constexpr int kWalkers = 4;  // blocks of a split
constexpr int kSplit = kWalkers * kBlock;
constexpr int kTileHeads = 8;  // columns of a tile
constexpr int kBlockSteps = kBlock / kStep;

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

// One operation waits for the fold before it, not two: rows of many splits are long chains of them.
__device__ inline float fold(float all, float keep, float part, float take) {
  return __fmaf_rn(keep, all, __fmul_rn(take, part));
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

// Results of several walkers for some heads, in shared memory; padded, or heads share banks.
template <int kCount, int kHeads, int kDim>
struct alignas(16) Partials {
  float max[kCount][kHeads], sum[kCount][kHeads];
  alignas(16) float values[kCount][kHeads][kDim + 4];

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
  __device__ Part<kVec> folded(int head, int channel) const {
    auto all = nothing<kVec>();
#pragma unroll
    for (int w = 0; w < kCount; ++w) fold(all, read<kVec>(w, head, channel));
    return all;
  }
  // The same but for rounding, and sooner for many walkers.
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

// Of the scores, times log2(e). They are compared before they are scaled, so a negative scale
// becomes one of the queries.
template <typename Chunk>
__device__ inline void take_sign(Chunk& query, float scale) {
  if (scale < 0.f)
#pragma unroll
    for (auto& pair : query.at) pair ^= 0x80008000u;
}

// Two neighbours in the data type, and what rounding takes from them.
template <typename data_t>
__device__ inline void coarse_and_fine(float a, float b, uint32_t& coarse, uint32_t& fine) {
  coarse = pack<data_t>(a, b);
  asm("" : "+r"(coarse));  // or both are converted alone, which is slow
  const float2 rounded = unpack<data_t>(coarse);
  fine = pack<data_t>(__fsub_rn(a, rounded.x), __fsub_rn(b, rounded.y));
}

// Lane (g, t) = (lane / 4, lane % 4) of a warp holds, of a column, the positions 8 n + 2 t and the
// next of every n: their scores, and then their weights, which are a fragment of A.
using Scores = float[kBlock / 8][4];  // column g is the first two, another one the last two

struct Weights {
  float max, sum;
  uint32_t at[kBlockSteps][4];  // rows g: coarse, rows g + 8: fine
};

template <typename data_t>
__device__ inline Weights weigh(const Scores& scores, int column, float scale) {
  Weights weights;
  float top = kMinusInfinity, sum[2];
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n)
    top = fmaxf(top, fmaxf(scores[n][2 * column], scores[n][2 * column + 1]));
  top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
  top = fmaxf(top, __shfl_xor_sync(kAll, top, 2));
  weights.max = __fmul_rn(top, scale);
  const float less = top == kMinusInfinity ? 0.f : -weights.max;
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n) {
    float w[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      w[i] = exp2_fast(__fmaf_rn(scores[n][2 * column + i], scale, less));
      sum[i] = n == 0 ? w[i] : __fadd_rn(sum[i], w[i]);
    }
    uint32_t* pair = &weights.at[n / 2][n % 2 * 2];
    coarse_and_fine<data_t>(w[0], w[1], pair[0], pair[1]);
  }
  float all = __fadd_rn(sum[0], sum[1]);
  all = __fadd_rn(all, __shfl_xor_sync(kAll, all, 1));
  weights.sum = __fadd_rn(all, __shfl_xor_sync(kAll, all, 2));
  return weights;
}

// Lane (g, t) holds, of the 16 positions of a step, as they come from the caches:
//   K  positions g and g + 8, channels 32 c + 8 t + (0 to 7) of every chunk c of 32
//   V  positions 2t, 2t + 1, 2t + 8, 2t + 9, channels 8 kWide j + kWide chunk_of(g) + (0 to
//      kWide - 1): column g of kWide products
// and then of the values of column g the channels of V's columns 2t and 2t + 1, which lie so that
// stores of them go to different banks.
template <int kDim>
struct Fragments {
  static constexpr int kChunks = kDim / 32;             // 16-byte loads of a position of K
  static constexpr int kWide = kDim % 64 == 0 ? 8 : 4;  // channels of one load of V
  static constexpr int kLoads = kDim / (8 * kWide);     // loads of a position of V
  using KChunk = Vec<uint32_t, 4>;
  using VChunk = Vec<uint32_t, kWide / 2>;

  __device__ static int chunk_of(int column) { return column / 2 + column % 2 * 4; }
};

// Lane first + i knows the place of position i of the step, counted in vectors.
template <typename data_t, int kDim>
struct KeyLoads : Fragments<kDim> {
  using typename Fragments<kDim>::KChunk;
  using Fragments<kDim>::kChunks;
  KChunk at[2][kChunks];

  __device__ void read(const data_t* cache, int place, int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const data_t* from =
          cache + int64_t(__shfl_sync(kAll, place, first + g + 8 * r)) * kDim + t * 8;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) at[r][c] = *reinterpret_cast<const KChunk*>(from + c * 32);
    }
  }
};
template <typename data_t, int kDim>
struct ValueLoads : Fragments<kDim> {
  using typename Fragments<kDim>::VChunk;
  using Fragments<kDim>::kLoads, Fragments<kDim>::kWide;
  VChunk at[4][kLoads];

  __device__ void read(const data_t* cache, int place, int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = 2 * t + r % 2 + r / 2 * 8;
      const data_t* from =
          cache + int64_t(__shfl_sync(kAll, place, first + i)) * kDim + this->chunk_of(g) * kWide;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        at[r][j] = *reinterpret_cast<const VChunk*>(from + j * 8 * kWide);
    }
  }
  // Channel e of load j, of positions 2t, 2t + 1 and of 2t + 8, 2t + 9.
  __device__ uint32_t pair(int j, int e, int i) const {
    return __byte_perm(at[2 * i][j].at[e / 2], at[2 * i + 1][j].at[e / 2], e % 2 ? 0x7632 : 0x5410);
  }
};

// The queries of eight columns in shared memory, a fragment of A for 16 channels, in K's order of
// them: columns are there twice, as rows g and g + 8, so that products take what a load brings.
template <int kDim>
struct TileQueries {
  using Chunk = Vec<uint32_t, 4>;
  Chunk at[kDim / 16][32];

  __device__ void put(int column, int channel, Chunk q, float scale) {
    take_sign(q, scale);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      at[channel / 32 * 2 + i][column * 4 + channel / 8 % 4] = {q.at[2 * i], q.at[2 * i],
                                                                q.at[2 * i + 1], q.at[2 * i + 1]};
  }
  __device__ void get(uint32_t (&a)[4], int k) const {
    const Chunk chunk = at[k][threadIdx.x % 32];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = chunk.at[i];
  }
};

// What a warp reads of a block: K of its four steps and then V, kAhead of these eight loads on
// their way at a time. No conditions between them, or the compiler waits at each.
template <typename data_t, int kDim, int kAhead>
struct BlockLoads {
  static constexpr int kCount = 2 * kBlockSteps;
  const data_t *k_cache, *v_cache;
  KeyLoads<data_t, kDim> k[kBlockSteps];
  ValueLoads<data_t, kDim> v[kBlockSteps];

  // Of these eight, or, with kOn, of the block after this one.
  template <bool kOn, typename Places>
  __device__ void request(int load, const Places& places, const Places& after) {
    if (load >= (kOn ? kCount + kAhead : kCount)) return;
    const auto& from = load < kCount ? places : after;
    const int step = load % kBlockSteps, first = step * kStep;
    if (load / kBlockSteps % 2 == 0)
      k[step].read(k_cache, from.of(first), first % 32);
    else
      v[step].read(v_cache, from.of(first), first % 32);
  }
  template <typename Places>
  __device__ void begin(const Places& places) {
#pragma unroll
    for (int load = 0; load < kAhead; ++load) request<false>(load, places, places);
  }
};

// A block of eight columns, straight from the caches.
template <typename data_t, int kDim>
struct BlockTile : Fragments<kDim> {
  using Fragments<kDim>::kLoads, Fragments<kDim>::kWide;
  float values[kLoads][kWide][4];
  float max, sum;

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kWide; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j][e][i] = 0.f;
    max = kMinusInfinity, sum = 0.f;
  }

  // `loads` have begun; with kOn those of the block after it begin in their place. Positions from
  // `seen` on count for nothing, but their values must not be NaN.
  template <bool kOn, int kAhead, typename Places>
  __device__ void take(BlockLoads<data_t, kDim, kAhead>& loads, const Places& places,
                       const Places& after, int seen, float scale,
                       const TileQueries<kDim>& queries) {
    Scores scores = {};
#pragma unroll
    for (int step = 0; step < kBlockSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        uint32_t a[4];
        queries.get(a, i);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t* b = &loads.k[step].at[r][i / 2].at[i % 2 * 2];
          multiply_add<data_t>(scores[2 * step + r], a, b[0], b[1]);
        }
      }
      loads.template request<kOn>(step + kAhead, places, after);
    }
    if (seen < kBlock) {
      const int t = threadIdx.x % 4;
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * n + 2 * t + i >= seen) scores[n][i] = kMinusInfinity;
    }
    const Weights weights = weigh<data_t>(scores, 0, scale);
    max = weights.max, sum = weights.sum;
#pragma unroll
    for (int step = 0; step < kBlockSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
#pragma unroll
        for (int e = 0; e < kWide; ++e)
          multiply_add<data_t>(values[j][e], weights.at[step], loads.v[step].pair(j, e, 0),
                               loads.v[step].pair(j, e, 1));
      loads.template request<kOn>(kBlockSteps + step + kAhead, places, after);
    }
  }

  __device__ void store(Partials<kWalkers, kTileHeads, kDim>& partials, int walker) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (t == 0) partials.max[walker][g] = max, partials.sum[walker][g] = sum;
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < kWide; e += 4) {
          Vec<float, 4> four;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            four.at[i] = __fadd_rn(values[j][e + i][h], values[j][e + i][2 + h]);
          const int channel = j * 8 * kWide + this->chunk_of(2 * t + h) * kWide + e;
          store_vector<4>(&partials.values[walker][g][channel], four);
        }
  }
};

}  // namespace reasoners
