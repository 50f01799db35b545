// Rounding to nearest for loops: branch-free, so that the compiler vectorises it, and the same bits
// as the conversions of ATen.
#pragma once

#include <ATen/ATen.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace reasoners {

inline at::BFloat16 bfloat16_from(uint32_t bits) {  // the upper half of a float
  return at::BFloat16(static_cast<uint16_t>(bits >> 16), at::BFloat16::from_bits());
}

template <typename to_t, typename from_t>
inline to_t narrow(from_t value) {
  if constexpr (std::is_same_v<to_t, at::BFloat16> && std::is_same_v<from_t, float>) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return bfloat16_from((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded);
  } else {
    return static_cast<to_t>(value);
  }
}

}  // namespace reasoners
