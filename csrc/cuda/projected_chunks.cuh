// What a fused mixer's block reads of in_proj's rows, chunk by chunk: x, B and C of its head, which
// it convolves, z and a.
#pragma once

#include <cstdint>

#include "async_copy.cuh"
#include "conv_chunk.cuh"
#include "kernels.h"
#include "ssd_chunk.cuh"

namespace reasoners {

// The sequence and the head of a block, and where in a token's x, B and C the head's are.
struct WalkPlace {
  int head, index, batch, begin, length;  // `index` of the sequence, which is in row `batch`
  int x_offset, b_offset, c_offset;
};

// Columns of a chunk in shared memory are those of x, B, C, one after the other; kUsed of them are
// needed. The block's threads from kFirstMaker on copy and convolve them, and call what is not
// request_z.
template <typename Tile, typename Params, int kP, int kN, int kUsed>
struct ProjectedChunks {
  using data_t = typename Tile::data_t;
  static constexpr int kThreads = Tile::kMakers, kColumns = kP + 2 * kN;

  const Params& params;
  typename Tile::Shared& shared;
  WalkPlace place;

  __device__ static unsigned thread() { return threadIdx.x - Tile::kFirstMaker; }

  // A column of the head: its data at the first token of the sequence's batch row, and its channel
  // of the convolution, negative where there is none.
  struct Column {
    const data_t* data;
    int channel;
  };
  __device__ Column column_at(int column) const {
    const SsdScanParams& p = params.scan;
    const auto of = [&](const void* data, int offset, int width, int first_channel) {
      return Column{
          static_cast<const data_t*>(data) + place.batch * p.x_strides.batch + offset + column,
          column < width ? first_channel + offset + column : -1};
    };
    const int b_channel = p.x_heads * p.head_dim, c_channel = b_channel + p.b_groups * p.state_dim;
    if (column < kP) return of(p.x, place.x_offset, p.head_dim, 0);
    column -= kP;
    if (column < kN) return of(p.B, place.b_offset, p.state_dim, b_channel);
    column -= kN;
    return of(p.C, place.c_offset, p.state_dim, c_channel);
  }
  __device__ int64_t channels() const {
    const SsdScanParams& p = params.scan;
    return p.x_heads * p.head_dim + (p.b_groups + p.c_groups) * p.state_dim;
  }
  // The input of token t of the sequence, which may lie before the first; null where that is zero.
  __device__ const data_t* input_at(const Column& column, int t) const {
    if (column.channel < 0) return nullptr;
    if (t >= 0) return column.data + int64_t(place.begin + t) * params.scan.x_strides.token;
    const int history = params.width - 1;
    if (params.past == nullptr || history + t < 0) return nullptr;
    return static_cast<const data_t*>(params.past) +
           (int64_t(place.index) * history + history + t) * channels() + column.channel;
  }

  // kWidth columns from `first` on, of 64 tokens.
  template <int kWidth>
  __device__ void copy_columns(int first, int t) const {
    constexpr int kVectors = kWidth / 8, kCopies = kChunk * kVectors / kThreads;
    const int64_t stride = params.scan.x_strides.token;
    const auto copy = [&](const data_t* from, bool in, int i, int column) {
      copy_async_16_once(&shared.raw.at[kMaxPast + i][first + column], from,
                         in && t + i < place.length);
    };
    if constexpr (kThreads % kVectors == 0) {  // always the same columns
      constexpr int kStep = kThreads / kVectors;
      const int i = thread() / kVectors, column = thread() % kVectors * 8;
      const Column mine = column_at(first + column);
      const data_t* from = mine.data + (place.begin + t + i) * stride;
#pragma unroll
      for (int u = 0; u < kCopies; ++u, from += kStep * stride)
        copy(from, mine.channel >= 0, i + u * kStep, column);
    } else {
#pragma unroll
      for (int u = 0; u < kCopies; ++u) {
        const int v = thread() + u * kThreads, i = v / kVectors, column = v % kVectors * 8;
        const Column mine = column_at(first + column);
        copy(mine.data + (place.begin + t + i) * stride, mine.channel >= 0, i, column);
      }
    }
  }
  // What the chunk at token t is convolved from.
  __device__ void request(int t) const {
    copy_columns<kP>(0, t);
    copy_columns<kN>(kP, t);
    if (kUsed == kColumns) copy_columns<kN>(kP + kN, t);
    constexpr int kVectors = kUsed / 8;
    static_assert(kMaxPast * kVectors <= kThreads);
    if (thread() < kMaxPast * kVectors) {
      const int w = thread() / kVectors, column = thread() % kVectors * 8;
      const data_t* from = input_at(column_at(column), t - kMaxPast + w);
      copy_async_16_once(&shared.raw.at[w][column], from ? from : params.scan.x, from != nullptr);
    }
  }
  // z of a warp's part of the chunk: kBlock tokens from `row` on and kWidth columns from `first`
  // on.
  template <int kWidth>
  __device__ void request_z(int t, int row, int first) const {
    constexpr int kVectors = kWidth / 8;
    const SsdScanParams& p = params.scan;
    const int64_t stride = p.x_strides.token;
    const auto* z = static_cast<const data_t*>(params.z) + place.batch * p.x_strides.batch +
                    place.head * p.head_dim;
#pragma unroll
    for (int u = 0; u < kBlock * kVectors / 32; ++u) {
      const int v = threadIdx.x % 32 + u * 32, i = row + v / kVectors,
                column = first + v % kVectors * 8;
      copy_async_16_once(shared.z.vector(i, column), z + (place.begin + t + i) * stride + column,
                         t + i < place.length && column < p.head_dim);
    }
  }

  template <typename Source>
  __device__ void put_constants(const Source& source) const {
    for (int column = thread(); column < kUsed; column += kThreads)
      shared.raw.put_taps(column, static_cast<const data_t*>(params.conv_weight),
                          static_cast<const data_t*>(params.conv_bias), column_at(column).channel,
                          params.width);
    for (int i = thread(); i < kP; i += kThreads)
      shared.constants[i] = i < params.scan.head_dim ? source.constant(i) : 0.f;
  }
  // x, B and C of the chunk at token t.
  template <bool kSilu>
  __device__ void convolve(int t, typename Tile::Inputs& in) const {
    const auto& raw = shared.raw;
    const int rows = place.length - t;
    raw.template convolve<kSilu, kThreads, 0, 1>(thread(), rows, in.x, in.x);
    raw.template convolve<kSilu, kThreads, kP, kUsed == kColumns ? 2 : 1>(thread(), rows, in.b,
                                                                          in.c);
  }
  // The sequence's last inputs, by the first of the heads that share them.
  __device__ void keep_last() const {
    const SsdScanParams& p = params.scan;
    const int history = params.width - 1;
    const auto owned = [&](int heads) { return place.head % (p.heads / heads) == 0; };
    const bool x_owned = owned(p.x_heads), b_owned = owned(p.b_groups), c_owned = owned(p.c_groups);
    for (int v = thread(); v < history * (kColumns / 8); v += kThreads) {
      const int w = v / (kColumns / 8), at = v % (kColumns / 8) * 8;
      const Column column = column_at(at);
      if (column.channel < 0 || !(at < kP ? x_owned : at < kP + kN ? b_owned : c_owned)) continue;
      const data_t* from = input_at(column, place.length - history + w);
      auto* to = static_cast<data_t*>(params.last_inputs) +
                 (int64_t(place.index) * history + w) * channels() + column.channel;
      *reinterpret_cast<uint4*>(to) = from ? *reinterpret_cast<const uint4*>(from) : uint4{};
    }
  }
};

}  // namespace reasoners
