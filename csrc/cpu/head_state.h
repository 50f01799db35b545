// One head's (P, N) state of the scalar-decay recurrence: a token onto it, and its rounding to
// storage.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/narrow.h"
#include "philox.h"

namespace reasoners {

// bfloat16 above or below, each as often as it is near: adding uniform bits to those that are
// dropped carries with just that probability. NaN and inf have nothing to carry.
inline at::BFloat16 round_by(float value, uint16_t noise) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t kept =
      (bits & 0x007fffffu) ? 0x7fc00000u : bits;  // NaN, however small its payload
  return bfloat16_from(finite ? bits + noise : kept);
}

// The noise that rounds a state: element e of a slot has half e % 2 of word (e % 8) / 2 of block
// 0x80000000 | e / 8, which no draw of a token uses.
class RoundingNoise {
 public:
  // `size` elements of the row's state from element `first` on.
  const uint16_t* operator()(const int64_t* rng_key, int64_t first, int64_t size) {
    const NoiseStream stream(rng_key);
    const int64_t block = first / 8, blocks = (first + size + 7) / 8 - block;
    bits_.resize(8 * blocks);
    uint16_t* to = bits_.data();
    // Several blocks at a time, word by word, which vectorises.
    constexpr int64_t kLanes = 16;
    for (int64_t i = 0; i < blocks; i += kLanes) {
      uint32_t words[4][kLanes];
      for (int64_t k = 0; k < kLanes; ++k) {
        const auto w = stream.block(0x80000000u | static_cast<uint32_t>(block + i + k));
        words[0][k] = w.a;
        words[1][k] = w.b;
        words[2][k] = w.c;
        words[3][k] = w.d;
      }
      for (int64_t k = 0; k < std::min(kLanes, blocks - i); ++k)
        for (int word = 0; word < 4; ++word) {
          *to++ = static_cast<uint16_t>(words[word][k]);
          *to++ = static_cast<uint16_t>(words[word][k] >> 16);
        }
    }
    return bits_.data() + first % 8;
  }

 private:
  std::vector<uint16_t> bits_;
};

// state = decay state + scale x b^T, out = state c + skip x. noise: one number an element, or null
// for rounding to nearest.
template <typename scalar_t, typename state_t, typename acc_t>
void token_onto_head(state_t* state, const scalar_t* x, const acc_t* b, const acc_t* c, acc_t decay,
                     acc_t scale, acc_t skip, const uint16_t* noise, int64_t head_dim,
                     int64_t state_dim, scalar_t* out) {
  for (int64_t p = 0; p < head_dim; ++p, state += state_dim) {
    const acc_t input = static_cast<acc_t>(x[p]);
    const acc_t gain = scale * input;
    acc_t sum = 0;
    if constexpr (std::is_same_v<state_t, at::BFloat16>) {
      if (noise) {
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < state_dim; ++n) {
          const acc_t next = decay * static_cast<acc_t>(state[n]) + gain * b[n];
          state[n] = round_by(next, noise[n]);
          sum += next * c[n];
        }
        noise += state_dim;
        out[p] = static_cast<scalar_t>(sum + skip * input);
        continue;
      }
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < state_dim; ++n) {
      const acc_t next = decay * static_cast<acc_t>(state[n]) + gain * b[n];
      state[n] = narrow<state_t>(next);
      sum += next * c[n];
    }
    out[p] = static_cast<scalar_t>(sum + skip * input);
  }
}

}  // namespace reasoners
