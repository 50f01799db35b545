// What selective_scan and its derivative share for N <= 16: tiles of 16 channels, brought to shared
// memory four neighbours at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.cuh"
#include "kernels.h"

namespace reasoners {

constexpr int kNarrow = 16;  // entries of a state, channels of a tile
constexpr int kFour = 4;     // neighbours that a thread brings at once

// Sums of each of kLanes values over kLanes neighbouring threads, of which each leaves with one:
// thread l with that of value l. The whole warp takes part.
template <int kLanes>
__device__ float exchange_sums(float (&v)[kLanes], int lane) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < kLanes / 2; ++i) {
      if (i >= kLanes / 2 / offset) continue;
      const float kept = upper ? v[2 * i + 1] : v[2 * i], sent = upper ? v[2 * i] : v[2 * i + 1];
      v[i] = kept + __shfl_xor_sync(~0u, sent, offset);
    }
  }
  return v[0];
}

// Four neighbours as they come: taken apart at once, they would have to be there at once.
template <typename data_t>
using Four = Vec<uint32_t, sizeof(data_t)>;

template <typename data_t>
__device__ Four<data_t> load_four(const data_t* from, int count) {
  data_t values[kFour];
#pragma unroll
  for (int k = 0; k < kFour; ++k) values[k] = k < count ? from[k] : from_float<data_t>(0.f);
  Four<data_t> to;
  memcpy(&to, values, sizeof(to));
  return to;
}

__device__ inline float4 to_floats(float, const Four<float>& from) {
  return {__uint_as_float(from.at[0]), __uint_as_float(from.at[1]), __uint_as_float(from.at[2]),
          __uint_as_float(from.at[3])};
}
__device__ inline float4 to_floats(__nv_bfloat16, const Four<__nv_bfloat16>& from) {
  const float2 one = unpack<__nv_bfloat16>(from.at[0]), two = unpack<__nv_bfloat16>(from.at[1]);
  return {one.x, one.y, two.x, two.y};
}
__device__ inline float4 to_floats(__half, const Four<__half>& from) {
  __half2 pairs[2];
  memcpy(pairs, &from, sizeof(from));
  const float2 one = __half22float2(pairs[0]), two = __half22float2(pairs[1]);
  return {one.x, one.y, two.x, two.y};
}

template <typename data_t>
bool come_in_fours(const void* data, const TokenStrides& strides) {
  return is_aligned<Four<data_t>>(data) && strides.batch % kFour == 0 && strides.token % kFour == 0;
}
// Whether all tiles of all rows of all inputs begin and end at multiples of four elements; `run`
// channels share B and C.
template <typename data_t>
bool come_in_fours(const SelectiveScanParams& p, int run) {
  return run % kFour == 0 && p.state_dim % kFour == 0 && come_in_fours<data_t>(p.x, p.x_strides) &&
         come_in_fours<float>(p.delta, p.delta_strides) &&
         come_in_fours<data_t>(p.B, p.b_strides) && come_in_fours<data_t>(p.C, p.c_strides);
}

}  // namespace reasoners
