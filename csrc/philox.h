// Random numbers that depend on nothing but their name: Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011), free of torch and of state.
//
// The noise of token i, for a row named (seed, prompt, sample, position), is a word of 32 bits. Its
// high half is half i % 8 of the block at
//   key     = first two words of name,  name = philox(counter = (prompt, sample), key = seed)
//   counter = (i / 8, position, last two words of name)
// and its low half is the same half of the block at i / 8 + 2^30. (Half e of a block is of its word
// e / 2 the low half if e is even, else the high one.) So one block tells of eight tokens whether
// any of them can win, which needs little more than the high halves; the other one is seldom drawn.
// With the seed as its key Philox is a permutation of 128 bits, so two different (prompt, sample)
// never share a name, and two different (prompt, sample, position, i) never share a half of what
// has the same key and counter: within a seed no two draws meet. Seed, prompt and sample count in
// full (64 bits each), position modulo 2^32.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define REASONERS_HOST_DEVICE __host__ __device__
#else
#define REASONERS_HOST_DEVICE
#endif

namespace reasoners {

struct PhiloxBlock {
  uint32_t a, b, c, d;

  REASONERS_HOST_DEVICE constexpr uint32_t half(int i) const {
    const uint32_t first = i & 4 ? c : a, second = i & 4 ? d : b, word = i & 2 ? second : first;
    return i & 1 ? word >> 16 : word & 0xffff;
  }
};

REASONERS_HOST_DEVICE constexpr PhiloxBlock philox(PhiloxBlock counter, uint32_t key0,
                                                   uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xD2511F53} * counter.a, q = uint64_t{0xCD9E8D57} * counter.c;
    counter = {static_cast<uint32_t>(q >> 32) ^ counter.b ^ key0, static_cast<uint32_t>(q),
               static_cast<uint32_t>(p >> 32) ^ counter.d ^ key1, static_cast<uint32_t>(p)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// Known answers, from the authors' Random123 distribution (kat_vectors).
constexpr bool equal(PhiloxBlock x, PhiloxBlock y) {
  return x.a == y.a && x.b == y.b && x.c == y.c && x.d == y.d;
}
static_assert(equal(philox({0, 0, 0, 0}, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
static_assert(equal(philox({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u),
                    {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
static_assert(equal(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822,
                           0x299f31d0),
                    {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));

// Where the low halves of a row's noise begin: above the high ones of 2^31 tokens, and below the
// blocks that round states.
constexpr uint32_t kLowHalves = 1u << 30;

// The noise of one row, in blocks.
class NoiseStream {
 public:
  // rng_key: seed, prompt, sample, position.
  REASONERS_HOST_DEVICE constexpr explicit NoiseStream(const int64_t* rng_key)
      : name_(philox({low(rng_key[1]), high(rng_key[1]), low(rng_key[2]), high(rng_key[2])},
                     low(rng_key[0]), high(rng_key[0]))),
        position_(low(rng_key[3])) {}

  REASONERS_HOST_DEVICE constexpr PhiloxBlock block(uint32_t index) const {
    return philox({index, position_, name_.c, name_.d}, name_.a, name_.b);
  }

 private:
  friend class NoiseRounds;
  REASONERS_HOST_DEVICE static constexpr uint32_t low(int64_t x) {
    return static_cast<uint32_t>(x);
  }
  REASONERS_HOST_DEVICE static constexpr uint32_t high(int64_t x) {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32);
  }
  PhiloxBlock name_;
  uint32_t position_;
};

// The same blocks for less, where many are drawn: what does not depend on the index is worked out
// once, of the first round one half, of the second all but a product, and the keys. 18 products and
// 19 exclusive ors are left.
class NoiseRounds {
 public:
  REASONERS_HOST_DEVICE constexpr explicit NoiseRounds(const NoiseStream& noise) {
    const PhiloxBlock& name = noise.name_;
    uint32_t key0 = name.a, key1 = name.b;
    const uint64_t q = kSecond * name.c;
    const uint64_t p = kFirst * (high(q) ^ noise.position_ ^ key0);
    for_c_[0] = name.d ^ key1;
    for (int round = 1; round < 10; ++round) {
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
      for_a_[round - 1] = key0 ^ (round == 1 ? low(q) : 0);
      for_c_[round] = key1 ^ (round == 1 ? high(p) : round == 2 ? low(p) : 0);
    }
  }

  REASONERS_HOST_DEVICE constexpr PhiloxBlock block(uint32_t index) const {
    uint64_t p = kFirst * index, q = kSecond * (high(p) ^ for_c_[0]);
    uint32_t a = high(q) ^ for_a_[0], b = low(q), c = low(p) ^ for_c_[1], d = 0;
    for (int round = 2; round < 10; ++round) {
      p = kFirst * a, q = kSecond * c;
      a = high(q) ^ b ^ for_a_[round - 1];
      c = high(p) ^ d ^ for_c_[round];
      b = low(q), d = low(p);
    }
    return {a, b, c, d};
  }

 private:
  static constexpr uint64_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
  REASONERS_HOST_DEVICE static constexpr uint32_t low(uint64_t x) {
    return static_cast<uint32_t>(x);
  }
  REASONERS_HOST_DEVICE static constexpr uint32_t high(uint64_t x) {
    return static_cast<uint32_t>(x >> 32);
  }
  uint32_t for_a_[9]{}, for_c_[10]{};
};
namespace noise_rounds_check {
constexpr int64_t kKey[] = {-0x243f6a8885a308d4, 0x13198a2e03707344, -0x5bf7c6ddd660ce30, 7};
constexpr NoiseStream kStream(kKey);
constexpr NoiseRounds kRounds(kStream);
static_assert(equal(kStream.block(0), kRounds.block(0)));
static_assert(equal(kStream.block(32063), kRounds.block(32063)));
static_assert(equal(kStream.block(~0u), kRounds.block(~0u)));
}  // namespace noise_rounds_check

// The noise of a token, given the row's NoiseStream or NoiseRounds.
template <typename noise_t>
REASONERS_HOST_DEVICE constexpr uint32_t noise_word(const noise_t& noise, uint32_t token) {
  const uint32_t high = noise.block(token / 8).half(token % 8);
  return high << 16 | noise.block(kLowHalves | token / 8).half(token % 8);
}
// Uniform on (0, 1], finest near 0, where the winning draws are.
REASONERS_HOST_DEVICE inline float noise_uniform(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}
// A Gumbel variable, as minus the log of an exponential one; 25 stands for the -log of 1 - 1.
REASONERS_HOST_DEVICE inline float noise_gumbel(uint32_t word) {
  return -logf(fminf(-log1pf(-noise_uniform(word)), 25.0f));
}
constexpr float kMaxGumbel = 22.9f;  // noise_gumbel(0) = 33 log 2 = 22.87

}  // namespace reasoners
