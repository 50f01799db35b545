// Conversions between storage types and float, and small vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace reasoners {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// kSize neighbours that move with one load or store.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T at[kSize];
};

// Two neighbours of 16 bits. Those of bfloat16 take an instruction each.
template <typename T>
__device__ inline float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  const auto pair = *reinterpret_cast<const Vec<T, 2>*>(&bits);
  return {to_float(pair.at[0]), to_float(pair.at[1])};
}

// Whether vectors of type V may be read at the address; null means that none are.
template <typename V>
bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(V) == 0;
}

}  // namespace reasoners
