// From logits to a token: temperature, top-k, top-p, min-p, and Gumbel-max over what is kept.
//
// A cluster of 1 to 8 blocks serves a row: many for a few rows, few for many rows, but enough that
// the row stays in their shared memory and is read from global memory once. One block a row took
// 66 us for a row of 128,256 bfloat16 (92 with top-k 50 and top-p 0.95), and 240 (332) for 512 of
// them, of which every pass came from cache again, where 44 is the time to read them.
//   1. As a block's part comes in, by bulk copies in four pieces: log-sum-exp of the raw logits,
//      the maximum and its lowest id. What the next block in its place will load is meanwhile sent
//      for, to the L2 cache.
//   2. The winner of z + Gumbel noise. Noise belongs to the token (philox.h), so that no order of
//      evaluation can change the choice. One Philox block has the high halves of eight tokens'
//      uniforms. As -log(-log(1 - v)) <= -log(v), the least of them tells whether any of the eight
//      could win with the highest logit that this thread has, for which nothing but the noise is
//      looked at; only then come logits, low halves and logarithms. The bar to reach is first the
//      best score among the maxima of what the warps read, then the best that the block has found.
//      Greedy rows are done after 1.
// Filters:
//   top-k. A row has 384 disjoint parts. k of them have a maximum as high as the k-th highest one,
//      so that what top-k keeps is no lower: little more than k candidates, which one block ranks,
//      filters and draws from, a thread to each. For a large k, or more ties than threads, a
//      threshold on the logit: a histogram of all logits, in bins of 1/64 of the temperature, is
//      summed from the top until k are above; within the bin that this finds, the threshold is
//      found digit by digit (10 bits, highest first) on how many values of the type lie between a
//      logit and the bin's highest.
//   top-p, without candidates. Draw first, ask afterwards: the winner is in the nucleus if less
//      than top_p of the mass is above it. Then it wins there too. If not, nothing that is no
//      higher is in the nucleus either, and it is drawn again from what is higher. 1 / top_p draws
//      or fewer are to be expected, mostly one; a refusal about halves the mass that is left.
//      With temperature 1 the mass of all is known from step 1, and what is below the winner is
//      mostly more than the share that top-p drops, even of the warps that have read nothing
//      higher, or else of a fifth of the row: then it is in. Only otherwise the row is read again
//      for what is above the winner, by the warps that have read something higher; with other
//      temperatures by all, for the mass of all, too.
// Neither token nor log-probability depends on the number of blocks: maxima and counts have no
// order, candidates weigh in fixed point, and what else is added are always the same lanes of
// kGroups parts of the row, in the same order.
// 384 threads let three blocks be on a multiprocessor. H200, rows of 128,256, us:
//                       greedy   no filter   top-k 50   and top-p 0.95, min-p 0.05   top-p 0.95
//   1, bfloat16           4.2        8.2         8.7              9.0                     9.1
//   512, float32         76        138         127              129                     170
//   512, bfloat16        50        100          89               91                     125
// (float32 before a closer look went by the eight's own highest logit: bfloat16 took 117 and 138
// then, min-p alone 108 instead of 78.)
// Nearly all that is not reading is instructions. With Philox for every four tokens, and a barrier
// of the cluster, which waits until all memory is written, wherever blocks send each other
// something: 89, 171, 134, 136 and 206 in float32, 54, 127, 91, 93 and 159 in bfloat16. A warp's
// instructions for eight logits a lane, then and now (wide products, at a quarter of the rate, in
// brackets):
//   log-sum-exp   64 -> 63, bfloat16 76 -> 68; and 72 -> 64 cycles of exponentials
//   draw          114 (36) -> 50 (18), and about 10 for the closer look that one in eight needs
//   top-p         108 -> 83 for a fifth of the row, which 3 in 4 rows needed and now 1 in 2; 25 to
//                 41 for what is above, for the quarter of random rows that this does not settle
// Tried: 256 threads, of which nearly all have something to do in every step: the same to 2 %. An
// H100, before: 119 greedy, 200 unfiltered, 167 all, 280 top-p alone; and 161 and 222 with
// log-sum-exp in step 2 and nothing sent for ahead; 765 with top-p 0.95, by a histogram of masses.

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "philox.h"
#include "roles.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 384;
constexpr int kWarps = kThreads / 32;
constexpr int kLogMostBlocks = 3;
constexpr int kMostBlocks = 1 << kLogMostBlocks;  // of a cluster
static_assert(kMostBlocks <= kMostClusterBlocks);
constexpr int kGroups = kMostBlocks;
constexpr int kPartsOfWarp = 4;  // of what a warp reads of a group, for the bound of top-k
constexpr int kParts = kGroups * kWarps * kPartsOfWarp;
constexpr int kCandidates = kThreads;
constexpr int kRoom = kCandidates / kGroups;  // for a group's candidates
constexpr int kPerSM = 3;                     // blocks on a multiprocessor
constexpr int kResident = 132 * kPerSM;
constexpr int kPieces = 4;  // of what a block stages
constexpr int kDigit = 10;
constexpr int kBins = 1 << kDigit;
constexpr float kBinsPerUnit = 64;  // of z
constexpr int kBinsOfThread = (kBins + kThreads - 1) / kThreads;
constexpr unsigned kAll = ~0u;
constexpr float kLag = 8;  // by which a sum's reference may be below the maximum
constexpr float kRaised = 4;
constexpr float kMostBelow = 0.125f;  // of the mass, that a fifth of the row is likely to have
constexpr float kInfinity = INFINITY;
constexpr float kLowest = -0x1.fffffep+127f;
static_assert(kBins % 32 == 0 && kWarps <= 32 && kThreads % kMostBlocks == 0);
static_assert(kParts == kThreads && kMostBlocks * kPartsOfWarp <= 32);
static_assert(kGroups * kWarps % 32 == 0);

// A part of the row: its maximum, the lowest id there, and the sum of exp(x - maximum).
struct alignas(16) Summary {
  float max;
  int id;
  float sum;
};

// The best score of a part of the row, its lowest id, and the logit there.
struct alignas(16) Best {
  float score;
  int id;
  float logit;
};

// exp(x - max) of an x that is no higher; 0 where both are -inf.
__device__ inline float exp_below(float x, float max) {
  return exp2_fast((x - fmaxf(max, kLowest)) * kLog2e);
}

// Of lanes that differ in the bits [kFrom, kTo), the same bits in each of them.
template <int kFrom = 1, int kTo = 32>
__device__ float max_of_lanes(float mine) {
#pragma unroll
  for (int offset = kFrom; offset < kTo; offset *= 2)
    mine = fmaxf(mine, __shfl_xor_sync(kAll, mine, offset));
  return mine;
}
template <typename T>
__device__ T sum_of_lanes(T mine) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) mine += __shfl_xor_sync(kAll, mine, offset);
  return mine;
}

__device__ inline Summary combine(const Summary& a, const Summary& b) {
  const int id = a.max > b.max ? a.id : a.max < b.max ? b.id : min(a.id, b.id);
  const float max = fmaxf(a.max, b.max);
  return {max, id, a.sum * exp_below(a.max, max) + b.sum * exp_below(b.max, max)};
}
// The lanes' summaries as one, given the highest of their maxima.
__device__ inline Summary combine_lanes(const Summary& mine, float max) {
  const int id = __reduce_min_sync(kAll, mine.max == max ? mine.id : INT_MAX);
  return {max, id, sum_of_lanes(mine.sum * exp_below(mine.max, max))};
}

__device__ inline Best combine(const Best& a, const Best& b) {
  const bool first = a.score > b.score || (a.score == b.score && a.id < b.id);
  return first ? a : b;
}
__device__ inline Best combine_lanes(const Best& mine) {
  const float score = max_of_lanes(mine.score);
  const int id = __reduce_min_sync(kAll, mine.score == score ? mine.id : INT_MAX);
  const unsigned here = __ballot_sync(kAll, mine.score == score && mine.id == id);
  return {score, id, __shfl_sync(kAll, mine.logit, __ffs(here) - 1)};
}

// Addresses in shared memory. Through a shuffle, as the compiler would work them out anew for every
// access, from the block's number in the cluster.
__device__ inline uint32_t same_address(const void* p) {
  return __shfl_sync(kAll, shared_address(p), 0);
}
using Words = Vec<uint32_t, 4>;
__device__ inline Words load_shared(uint32_t from) {
  Words v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.at[0]), "=r"(v.at[1]), "=r"(v.at[2]), "=r"(v.at[3])
               : "r"(from));
  return v;
}
__device__ inline int load_shared_int(uint32_t from) {
  int v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}
__device__ inline void store_shared(uint32_t to, Words v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.at[0]), "r"(v.at[1]),
               "r"(v.at[2]), "r"(v.at[3])
               : "memory");
}
// Integers in the order of the logits, and back. A bfloat16 is a float32 whose lower half is 0.
template <typename data_t>
struct Key {
  static constexpr int kBits = 8 * sizeof(data_t);
  __device__ static uint32_t of(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits ^ (bits >> 31 ? ~0u : 0x80000000u)) >> (32 - kBits);
  }
  __device__ static float value(uint32_t key) {
    const uint32_t bits = key << (32 - kBits);
    return __uint_as_float(key >> (kBits - 1) ? bits ^ 0x80000000u : ~bits & (~0u << (32 - kBits)));
  }
};

struct Filters {
  float scale;   // of logits, to z; 0: greedy
  float kept_z;  // what min-p keeps at least
  float top_p;
  int top_k;  // 0: of all
};

// What top-k may keep.
struct Candidate {
  float x;
  int id;
};
struct Candidates {
  float x[kCandidates];
  uint64_t mass[kCandidates];
};

struct Shared {
  union {
    uint32_t bins[kBins];
    Candidate incoming[kCandidates];  // a section for every group
    Candidates candidates;            // one after the other
  };
  alignas(16) float part_maxima[kParts];
  uint32_t counts[kGroups];  // of candidates
  Summary summaries[kGroups * kWarps];
  Best bests[kMostBlocks * kWarps];
  double masses[2][kGroups * kWarps];  // kOfAll that is kept; kAbove the winner
  uint64_t of_warps[kWarps];
  uint64_t arrived[kPieces];  // mbarriers: what is staged,
  uint64_t sent[4];           // and what blocks send each other, kSummaries to kMasses
  Summary summary;            // of the row
  Filters filters;
  alignas(16) NoiseRounds noise;
  uint32_t above;  // tokens above the chosen bin
  uint32_t bin;    // the chosen one
  float higher;    // than the winner's logit, the next one
  // Whether the winner is in the nucleus: by summaries, by what lies below it, by all. Apart, as
  // warps that are ahead answer the next question while others still read the answer before.
  bool settled, has_enough, in_nucleus;
  int bar;  // bits of a score that was reached, more than 0 by kRaised
};
constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kStageBytes = (233472 / kPerSM - 1024 - kSharedBytes) / 16 * 16;

struct Geometry {
  int blocks;  // of a row's cluster
  int log_blocks;
  int units_per_group;  // units of 16 bytes, whole eights of logits
  int staged;           // units that a block keeps in shared memory
  int piece;            // units of them that arrive together, whole eights
};

template <typename data_t, bool kAligned>
class Row {
 public:
  static constexpr int kUnit = 16 / sizeof(data_t);
  static constexpr int kUnitsOfEight = 8 / kUnit;

  __device__ Row(const SampleParams& p, const Geometry& g, char* memory)
      : g_(g),
        rank_(blockIdx.x & (g.blocks - 1)),
        row_(blockIdx.x >> g.log_blocks),
        size_(p.vocabulary),
        units_((p.vocabulary + kUnit - 1) / kUnit),
        first_(rank_ * (kGroups >> g.log_blocks) * g.units_per_group),
        logits_(static_cast<const data_t*>(p.logits) + row_ * p.logits_stride),
        shared_(*reinterpret_cast<Shared*>(memory)),
        stage_(same_address(memory + kSharedBytes)) {}

  __device__ void run(const SampleParams& p) {
    if (threadIdx.x == 0) {
      shared_.bar = 0;
      for (uint64_t& arrived : shared_.arrived) init_barrier(&arrived, 1);
      for (uint64_t& sent : shared_.sent) init_barrier(&sent, 1);
      show_barriers();
      show_to_copies();
    }
    if (g_.blocks > 1) begin_in_cluster();
    summarize(p);
    if (!(fabsf(summary_.max) < kInfinity) || isnan(summary_.sum)) return write(p, {0.f, -1, NAN});
    const auto [scale, kept_z, top_p, top_k] = shared_.filters;
    if (scale == 0) return write(p, {0.f, summary_.id, summary_.max});
    scale_ = scale;
    float kept = -kInfinity;
    if (top_k > 0) {
      if (top_k <= kCandidates / 2 && collect(top_k))
        return draw_candidate(p, top_k, top_p, kept_z);
      kept = threshold(top_k);
    }
    // The winner is in the nucleus if less than top_p of the mass is above it. If not, nor is
    // anything that is no higher than it.
    const bool sum_is_mass = scale_ == 1 && kept == -kInfinity;
    const float least = kept;
    Best best{};
    bool first = true;
    for (int parity = 0;; first = false, parity ^= 1) {
      if (!first || top_k > 0) {  // else it is set already
        if (threadIdx.x < 32) set_bar(kept, kept_z);
        __syncthreads();
      }
      draw(kept, kept_z, top_p < 1 ? g_.blocks : 1);
      if (rank_ > 0 && !(top_p < 1)) return;  // the first block does the rest
      receive(kBests, g_.blocks * kWarps * 16, parity);
      if (threadIdx.x < 32) {
        best = winner(g_.blocks * kWarps);
        const float higher = nextafterf(best.logit, kInfinity);
        const bool settled =
            first && sum_is_mass && top_p < 1 && is_enough(below_in_summaries(higher), 1 - top_p);
        if (threadIdx.x == 0) {
          shared_.higher = higher;
          shared_.settled = settled;
        }
      }
      if (!(top_p < 1)) break;
      __syncthreads();
      kept = shared_.higher;
      if (shared_.settled) break;
      if (first && sum_is_mass && 1 - top_p < kMostBelow && has_enough_below(kept, 1 - top_p))
        break;
      const bool both = first && !sum_is_mass;
      if (both)
        weigh_both(kept, least);
      else
        weigh(kept);
      receive(kMasses, (both ? 2 : 1) * kGroups * kWarps * 8, parity);
      if (threadIdx.x < 32) {
        const double above = mass_of(kAbove), all = sum_is_mass ? summary_.sum : mass_of(kOfAll);
        if (threadIdx.x == 0) {
          shared_.in_nucleus = above == 0 || above < top_p * all;
          shared_.bar = 0;
        }
      }
      __syncthreads();
      if (shared_.in_nucleus) break;
    }
    write(p, best);
  }

 private:
  enum { kOfAll, kAbove };
  enum { kSummaries, kBests, kBelow, kMasses };
  using Unit = Vec<data_t, kUnit>;

  __device__ float z(float x) const { return (x - summary_.max) * scale_; }
  // exp(z) in fixed point, which has the same sum in any order; that of a row fits 63 bits.
  __device__ uint64_t mass(float x) const {
    const int point = 30 + __clz(size_);
    return __float2ull_rn(expf(z(x)) * __uint_as_float(static_cast<uint32_t>(point + 127) << 23));
  }
  // The mass that top-p keeps at least, of all of it.
  __device__ static uint64_t share(double top_p, uint64_t all) {
    const double part = ceil(top_p * static_cast<double>(all));
    return part > 1 ? static_cast<uint64_t>(part) : 1;  // the maximum stays
  }

  __device__ void sync() const {
    if (g_.blocks == 1) return __syncthreads();
    arrive_in_cluster();
    wait_for_cluster();
  }

  // What warps find goes to other blocks without a barrier of the cluster, which would wait until
  // everybody's writes of whatever kind can be seen. None ends before it has what is sent to it.
  // Between two times that the same is sent, something else is, by warps that have the first.
  template <typename T>
  __device__ void send(T* to, T mine, int block, int what) const {
    if (g_.blocks == 1) {
      *to = mine;
      return;
    }
    using Moved = std::conditional_t<sizeof(T) == 16, float4, double>;
    store_to_block(address_in_block(shared_address(to), block), __builtin_bit_cast(Moved, mine),
                   address_in_block(shared_address(&shared_.sent[what]), block));
  }
  // All that is sent to this block is there, for its first warp.
  __device__ void receive(int what, int bytes, int parity) const {
    if (g_.blocks == 1) return __syncthreads();
    if (threadIdx.x == 0) arrive_expecting(&shared_.sent[what], bytes);
    if (threadIdx.x < 32) wait_for_blocks(&shared_.sent[what], parity);
  }

  // Past the row's end is -inf.
  __device__ Unit fetch(int index) const {
    const int64_t begin = int64_t{index} * kUnit;
    if constexpr (kAligned) {
      return *reinterpret_cast<const Unit*>(logits_ + begin);
    } else {
      Unit unit;
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        unit.at[i] = begin + i < size_ ? logits_[begin + i] : from_float<data_t>(-kInfinity);
      return unit;
    }
  }

  __device__ Unit read(int index) const {
    const int place = index - first_;
    if (place >= g_.staged) return fetch(index);
    return __builtin_bit_cast(Unit, load_shared(stage_ + 16 * place));
  }

  __device__ int units_of_block() const { return (kGroups >> g_.log_blocks) * g_.units_per_group; }
  __device__ int end_of(int group) const { return min((group + 1) * g_.units_per_group, units_); }

  // One logit of what this block has, or -inf past the row's end.
  __device__ float logit(int id) const {
    const int place = id - first_ * kUnit;
    if (id >= size_) return -kInfinity;
    if (place >= g_.staged * kUnit) return to_float(logits_[id]);
    const char* const stage = reinterpret_cast<const char*>(&shared_) + kSharedBytes;
    return to_float(reinterpret_cast<const data_t*>(stage)[place]);
  }

  // Calls visit(first token, its kUnit logits) on this thread's units of a group, in rising order.
  template <typename visit_t>
  __device__ void for_units(int group, visit_t visit) const {
    const int end = end_of(group);
    for (int at = group * g_.units_per_group + threadIdx.x; at < end; at += kThreads) {
      const Unit unit = read(at);
      float x[kUnit];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) x[i] = to_float(unit.at[i]);
      visit(at * kUnit, x);
    }
  }
  // Eight logits that a thread takes at once. Float32 ones are two units, of which every other four
  // lanes load the second one first: each quarter of a warp from all banks, so.
  struct Eight {
    Words units[kUnitsOfEight];
    __device__ float operator[](int i) const {
      if constexpr (kUnit == 4) return __uint_as_float(units[i / 4].at[i % 4]);
      const float2 pair = unpack<__nv_bfloat16>(units[0].at[i / 2]);
      return i % 2 ? pair.y : pair.x;
    }
    __device__ void widen(float (&x)[8]) const {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = (*this)[i];
    }
    __device__ float maximum() const {  // passes over NaN
      if constexpr (kUnit == 4) {
        float x[8];
        widen(x);
        return Row::maximum(x);
      } else {
        const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(units[0].at);
        const auto top = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
        return fmaxf(__low2float(top), __high2float(top));
      }
    }
    // The lowest token of eight number `at` that has this logit.
    __device__ int find(int at, float logit) const {
      int id = INT_MAX;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if ((*this)[i] == logit) id = min(id, 8 * at + (i ^ second()));
      return id;
    }
    // 4 in lanes that load the second unit first, else 0.
    __device__ static int second() { return kUnitsOfEight == 2 ? threadIdx.x & 4 : 0; }
  };
  // Those from here on are not in shared memory as a whole.
  __device__ int end_of_staged() const { return min(units_, first_ + g_.staged) / kUnitsOfEight; }
  // Where the first unit of eight 0 would be in shared memory, and how far the second one is.
  __device__ uint32_t stage_of_eights() const {
    return opaque(stage_ - 16 * first_ + 4 * Eight::second());
  }
  __device__ static uint32_t to_second() { return opaque(16 - 8 * Eight::second()); }
  // -inf past the row's end.
  __device__ Eight read_eight(int at, int staged, uint32_t stage, uint32_t to_second) const {
    Eight eight;
    if (at < staged) {
      const uint32_t from = stage + 16 * kUnitsOfEight * at;
#pragma unroll
      for (int k = 0; k < kUnitsOfEight; ++k) eight.units[k] = load_shared(from + k * to_second);
      return eight;
    }
#pragma unroll
    for (int k = 0; k < kUnitsOfEight; ++k) {
      const int unit = kUnitsOfEight * at + (Eight::second() ? 1 - k : k);
      Unit logits;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) logits.at[i] = from_float<data_t>(-kInfinity);
      if (unit < units_) logits = read(unit);
      eight.units[k] = __builtin_bit_cast(Words, logits);
    }
    return eight;
  }
  __device__ Eight read_eight(int at) const {
    return read_eight(at, end_of_staged(), stage_of_eights(), to_second());
  }
  __device__ int first_eight(int group) const { return group * g_.units_per_group / kUnitsOfEight; }
  __device__ int end_of_eights(int group) const {
    return (end_of(group) + kUnitsOfEight - 1) / kUnitsOfEight;
  }
  struct Now {
    __device__ void operator()(int) const {}
  };
  // The same by eights: visit(number of the eight, its logits), after before(that number).
  template <typename visit_t, typename before_t = Now>
  __device__ void for_eights(int group, visit_t visit, before_t before = {}) const {
    const int end = end_of_eights(group), staged = opaque(end_of_staged());
    const uint32_t stage = stage_of_eights(), second = to_second();
    for (int at = first_eight(group) + threadIdx.x; at < end; at += kThreads) {
      before(at);
      visit(at, read_eight(at, staged, stage, second));
    }
  }
  template <typename visit_t>
  __device__ void for_groups(visit_t visit) const {
    const int groups = kGroups >> g_.log_blocks;
    for (int group = rank_ * groups; group < (rank_ + 1) * groups; ++group) visit(group);
  }

  template <int kSize>
  __device__ static float maximum(const float (&x)[kSize]) {  // passes over NaN
    float top[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) top[i] = x[i];
#pragma unroll
    for (int n = kSize / 2; n > 0; n /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) top[i] = fmaxf(top[i], top[i + n]);
    return top[0];
  }

  template <int kSize>
  static __device__ float add(float (&x)[kSize]) {
#pragma unroll
    for (int n = kSize / 2; n > 0; n /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
  }

  // This block's units, as far as there is room, to shared memory. In pieces, each of which can be
  // summarized as it arrives; by this thread's loads if they cannot be copied as they are.
  __device__ void stage() {
    if constexpr (kAligned) {
      if (threadIdx.x > 0) return;
      const int end = min(min(first_ + units_of_block(), units_) - first_, g_.staged);
      for (int piece = 0; piece < kPieces; ++piece) {
        const int begin = piece * g_.piece, bytes = 16 * max(min(g_.piece, end - begin), 0);
        arrive_expecting(&shared_.arrived[piece], bytes);
        if (bytes > 0)
          copy_bulk_once(reinterpret_cast<char*>(&shared_) + kSharedBytes + 16 * begin,
                         logits_ + int64_t{first_ + begin} * kUnit, bytes, &shared_.arrived[piece]);
      }
    } else {
      for_groups([&](int group) {
        const int end = min(end_of(group), first_ + g_.staged);
        constexpr int kAhead = 4;
        for (int unit = group * g_.units_per_group + threadIdx.x; unit < end;
             unit += kAhead * kThreads) {
          Unit units[kAhead];
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (unit + k * kThreads < end) units[k] = fetch(unit + k * kThreads);
#pragma unroll
          for (int k = 0; k < kAhead; ++k) {
            const int at = unit + k * kThreads;
            if (at < end)
              store_shared(stage_ + 16 * (at - first_), __builtin_bit_cast(Words, units[k]));
          }
        }
      });
    }
  }

  // What the next block in this one's place will load: memory would else be idle while this
  // one computes.
  __device__ void prefetch_next(const SampleParams& p) const {
    const int ahead = kResident >> g_.log_blocks;
    const int end = min(first_ + units_of_block(), units_);
    if (threadIdx.x > 0 || row_ + ahead >= p.batch || first_ >= end) return;
    prefetch_bulk(logits_ + ahead * p.logits_stride + int64_t{first_} * kUnit, 16 * (end - first_));
  }

  __device__ Filters filters(const SampleParams& p) const {
    const float temperature = p.temperature[row_], min_p = p.min_p[row_];
    const int top_k = p.top_k[row_];
    // Clamped so that neither 0 * infinity nor infinity * 0 can arise.
    constexpr float kSmallest = 0x1p-126f, kLargest = 0x1p126f;
    return {temperature > 0 ? fminf(fmaxf(1 / temperature, kSmallest), kLargest) : 0,
            min_p > 0 ? fminf(logf(min_p), 0.f) : -kInfinity, p.top_p[row_],
            0 < top_k && top_k < size_ ? top_k : 0};
  }

  __device__ void summarize(const SampleParams& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    stage();
    if (threadIdx.x == 0) {
      shared_.filters = filters(p);
      shared_.noise = NoiseRounds(NoiseStream(p.rng_key + 4 * row_));
    }
    if (g_.blocks > 1) wait_for_cluster();  // all blocks run
    __syncthreads();                        // the barriers are there, or what was staged by loads
    if constexpr (kAligned) {
      wait_for(&shared_.arrived[0], 0);
      prefetch_next(p);
    }
    int ready = kAligned ? (first_ + g_.piece) / kUnitsOfEight : INT_MAX, pieces = 1;  // eights
    const auto await = [&](int at) {
      while (at >= ready) {
        wait_for(&shared_.arrived[pieces], 0);
        ready = ++pieces < kPieces ? ready + g_.piece / kUnitsOfEight : INT_MAX;
      }
    };
    for_groups([&](int group) {
      Summary mine{-kInfinity, size_, 0.f};
      int highest = -1;  // the first eight with the maximum
      float from = kLowest;
      for_eights(
          group,
          [&](int at, const Eight& eight) {
            float x[8];
            eight.widen(x);
            const float top = eight.maximum();
            if (top > mine.max) highest = at;
            mine.max = fmaxf(mine.max, top);
            const float lag = mine.max - from;
            if (lag > kLag) {
              mine.sum *= exp2_fast(-lag * kLog2e);
              from = mine.max;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = exp2_fast((x[i] - from) * kLog2e);  // NaN stays
            mine.sum += add(x);
          },
          await);
      mine.sum *= exp_below(from, mine.max);
      if (highest >= 0) mine.id = read_eight(highest).find(highest, mine.max);
      highest_ = fmaxf(highest_, mine.max);
      const float of_part = max_of_lanes<1, 32 / kPartsOfWarp>(mine.max);
      mine = combine_lanes(mine, max_of_lanes<32 / kPartsOfWarp, 32>(of_part));
      const int place = group * kWarps + warp;
      using Parts = Vec<float, kPartsOfWarp>;
      Parts parts;
#pragma unroll
      for (int i = 0; i < kPartsOfWarp; ++i)
        parts.at[i] = __shfl_sync(kAll, of_part, i * (32 / kPartsOfWarp));
      if (lane < g_.blocks) {
        send(reinterpret_cast<Parts*>(shared_.part_maxima) + place, parts, lane, kSummaries);
        send(&shared_.summaries[place], mine, lane, kSummaries);
      }
    });
    receive(kSummaries, 2 * kGroups * kWarps * 16, 0);
    if (warp == 0) {
      Summary mine = shared_.summaries[lane];
#pragma unroll
      for (int i = 32; i < kGroups * kWarps; i += 32)
        mine = combine(mine, shared_.summaries[i + lane]);
      summary_ = combine_lanes(mine, max_of_lanes(mine.max));
      if (lane == 0) shared_.summary = summary_;
      const Filters& filters = shared_.filters;
      scale_ = filters.scale;
      if (scale_ > 0 && filters.top_k == 0) set_bar(-kInfinity, filters.kept_z);
    }
    __syncthreads();
    summary_ = shared_.summary;
  }

  // A logit that k tokens reach, found from the k-th highest maximum of the parts: its highest 16
  // bits, one after the other.
  __device__ float bound(int top_k) const {
    using K = Key<data_t>;
    constexpr int kRest = K::kBits - 16;
    const uint32_t key = K::of(shared_.part_maxima[threadIdx.x]) >> kRest;
    uint32_t prefix = 0;
    for (uint32_t bit = 1u << 15; bit > 0; bit /= 2)
      if (__syncthreads_count(key >= (prefix | bit)) >= top_k) prefix |= bit;
    const float value = K::value(prefix << kRest);
    return value > -kInfinity ? value : -kInfinity;  // a part of nothing but -inf gives NaN
  }

  // Sends what top-k may keep to the first block. False if that is more than fits, which does not
  // depend on the number of blocks.
  __device__ bool collect(int top_k) const {
    const int groups = kGroups >> g_.log_blocks, first_group = rank_ * groups;
    if (threadIdx.x < groups) shared_.counts[first_group + threadIdx.x] = 0;
    const float least = bound(top_k);
    for_groups([&](int group) {
      Candidate* const section = in_block(shared_.incoming, 0) + group * kRoom;
      for_units(group, [&](int begin, const float (&x)[kUnit]) {
        if (!(maximum(x) >= least)) return;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (!(x[i] >= least) || begin + i >= size_) continue;
          const uint32_t place = atomicAdd(&shared_.counts[group], 1u);
          if (place < kRoom) section[place] = {x[i], begin + i};
        }
      });
    });
    __syncthreads();
    if (threadIdx.x < kGroups) {  // a thread for each group of this block and each other block
      const int group = first_group + threadIdx.x % groups, block = threadIdx.x / groups;
      if (block != rank_) in_block(shared_.counts, block)[group] = shared_.counts[group];
    }
    sync();
    uint32_t most = 0;
    for (int group = 0; group < kGroups; ++group) most = max(most, shared_.counts[group]);
    return most <= kRoom;
  }

  // In the first block: filters the candidates and draws from them, a thread to each.
  __device__ void draw_candidate(const SampleParams& p, int top_k, float top_p,
                                 float kept_z) const {
    if (rank_ > 0) return;
    auto& candidates = shared_.candidates;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int section = threadIdx.x / kRoom;
    int count = 0, place = threadIdx.x % kRoom;
    const bool mine = place < shared_.counts[section];
    for (int group = 0; group < kGroups; ++group) {
      if (group == section) place += count;
      count += shared_.counts[group];
    }
    const auto [x, id] = shared_.incoming[threadIdx.x];
    const uint64_t mass_of_mine = mine && top_p < 1 ? mass(x) : 0;
    __syncthreads();
    if (mine) {
      candidates.x[place] = x;
      candidates.mass[place] = mass_of_mine;
    }
    __syncthreads();
    int higher = 0;
    uint64_t above = 0;
    if (mine) {
      for (int i = 0; i < count; ++i) {
        if (!(candidates.x[i] > x)) continue;
        ++higher;
        above += candidates.mass[i];
      }
    }
    bool kept = mine && higher < top_k && z(x) >= kept_z;
    if (top_p < 1) {
      uint64_t all;
      sum_before(mine && higher < top_k ? mass_of_mine : uint64_t{0}, all);
      kept = kept && above < share(top_p, all);
    }
    Best best{-kInfinity, size_, 0.f};
    if (kept) {
      best = {z(x) + noise_gumbel(noise_word(shared_.noise, id)), id, x};
    }
    best = combine_lanes(best);
    if (lane == 0) shared_.bests[warp] = best;
    __syncthreads();
    if (warp == 0) write(p, winner(kWarps));
  }

  // A histogram of the row, filled by fill(first token, its kUnit logits), and its first bin at
  // which the count from the top reaches the target. `above`: what is above the bins; above the
  // one that is found.
  template <typename fill_t>
  __device__ uint32_t find_bin(uint32_t& above, uint32_t target, fill_t fill) const {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared_.bins[i] = 0;
    __syncthreads();
    for_groups([&](int group) { for_units(group, fill); });
    sync();
    if (g_.blocks > 1) gather();
    // Thread t sums the bins from the top to those of its own.
    uint32_t own[kBinsOfThread], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      const int bin = threadIdx.x * kBinsOfThread + i;
      sum += own[i] = bin < kBins ? shared_.bins[bin] : 0;
    }
    uint32_t before = above + sum_before(sum, total);
    if (before < target && before + sum >= target) {
      int bin = 0;
#pragma unroll
      for (int i = 0; i < kBinsOfThread - 1; ++i) {
        if (bin < i || before + own[i] >= target) continue;
        before += own[i];
        ++bin;
      }
      shared_.bin = static_cast<uint32_t>(threadIdx.x * kBinsOfThread + bin);
      shared_.above = before;
    }
    __syncthreads();
    above = shared_.above;
    return shared_.bin;
  }

  // The logit such that the tokens at or above it are the fewest that number at least top_k.
  __device__ float threshold(uint32_t top_k) const {
    using K = Key<data_t>;
    uint32_t above = 0;
    // Bins of equal width, so that the lanes of a warp seldom meet; the last one has all the rest.
    const float max = summary_.max, fine = fminf(scale_ * kBinsPerUnit, 0x1p126f);
    const auto bin_of = [=](float x) {
      return static_cast<uint32_t>(fminf((max - x) * fine, kBins - 1));
    };
    const int size = size_;
    uint32_t* const bins = shared_.bins;
    const uint32_t bin = find_bin(above, top_k, [=](int begin, const float (&x)[kUnit]) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        if (begin + i < size) atomicAdd(&bins[bin_of(x[i])], 1u);
    });
    // What lies in the bin is no higher and no lower than these keys.
    const auto edge = [=](uint32_t bin, float slack) {
      const float below = bin / fine;
      return max - below + slack * (fabsf(max) + below);
    };
    constexpr float kSlack = 0x1p-20f;
    const uint32_t highest = K::of(fminf(edge(bin, kSlack), max) + 0.f);
    const uint32_t lowest = K::of(bin < kBins - 1 ? edge(bin + 1, -kSlack) : -kInfinity);
    // Digits of how many values of the type lie between a logit and the highest.
    uint32_t prefix = 0;
    for (int left = 32 - __clz(highest - min(lowest, highest)); left > 0;) {
      const int bits = min(left, kDigit), shift = left - bits;
      const auto fill = [=](int begin, const float (&x)[kUnit]) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          const uint32_t below = highest - K::of(x[i]);
          if (begin + i >= size || bin_of(x[i]) != bin) continue;
          if ((left < 32 ? below >> left : 0) != prefix) continue;
          atomicAdd(&bins[(below >> shift) & ((1u << bits) - 1)], 1u);
        }
      };
      prefix = prefix << bits | find_bin(above, top_k, fill);
      left = shift;
    }
    return K::value(highest - prefix);
  }

  // Every bin becomes its sum over the blocks. A block sums a part of the bins for all: a thread
  // for each bin and block, which reads the bin there and writes the sum there.
  __device__ void gather() const {
    uint32_t* const bins = in_block(shared_.bins, threadIdx.x & (g_.blocks - 1));
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      const int task = i * kThreads + threadIdx.x;
      if (task >= kBins) break;  // all of a warp or none
      const int bin = (rank_ * kBins + task) >> g_.log_blocks;
      uint32_t sum = bins[bin];
      for (int offset = 1; offset < g_.blocks; offset *= 2)
        sum += __shfl_xor_sync(kAll, sum, offset);
      bins[bin] = sum;
    }
    sync();
  }

  // The sum of the threads before this one, and of all.
  template <typename T>
  __device__ T sum_before(T mine, T& total) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto scan = [&](T value) {
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(kAll, value, offset);
        if (lane >= offset) value += other;
      }
      return value;
    };
    const T in_warp = scan(mine);
    if (lane == 31) shared_.of_warps[warp] = in_warp;
    __syncthreads();
    const T of_warps = scan(lane < kWarps ? static_cast<T>(shared_.of_warps[lane]) : T{0});
    total = __shfl_sync(kAll, of_warps, 31);
    const T warps_before = __shfl_sync(kAll, of_warps, max(warp - 1, 0));
    return (warp > 0 ? warps_before : T{0}) + in_warp - mine;
  }

  // What the tokens at or above a logit weigh, exp(z) each, for mass_of() after a barrier. A lane
  // adds eight weights as a tree and then its eights of the group, in float32, and all else is
  // added in float64: wrong by less than 1e-6 of the whole, and always in the same order.
  __device__ void weigh(float least) const {
    const float scale = scale_ * kLog2e;
    for_groups([&](int group) {
      const int place = group * kWarps + threadIdx.x / 32;
      float above = 0;
      if (shared_.summaries[place].max >= least)
        for_eights(group, [&](int, const Eight& eight) {
          if (eight.maximum() < least) return;
          float x[8];
          eight.widen(x);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            x[i] = exp2_fast(((x[i] < least ? -kInfinity : x[i]) - summary_.max) * scale);
          above += add(x);
        });
      put_mass(kAbove, place, above);
    });
  }
  // The same, and what the tokens at or above a second, lower one weigh.
  __device__ void weigh_both(float least, float least_of_all) const {
    const float scale = scale_ * kLog2e;
    for_groups([&](int group) {
      float above = 0, all = 0;
      for_eights(group, [&](int, const Eight& eight) {
        float x[8], weights[8];
        eight.widen(x);
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[i] = exp2_fast((x[i] - summary_.max) * scale);
        if (least_of_all > -kInfinity) {
#pragma unroll
          for (int i = 0; i < 8; ++i) weights[i] = x[i] < least_of_all ? 0.f : weights[i];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = x[i] < least ? 0.f : weights[i];
        above += add(x);
        all += add(weights);
      });
      const int place = group * kWarps + threadIdx.x / 32;
      put_mass(kAbove, place, above);
      put_mass(kOfAll, place, all);
    });
  }
  // Whether a mass is sure to be more than this share of that of all, the sum of the summary.
  __device__ bool is_enough(double mass, double share) const {
    constexpr double kSlack = 1e-4;  // over the rounding of either
    return mass > (share + kSlack) * summary_.sum;
  }
  // The mass of what the warps read that have nothing higher than a limit; for one warp.
  __device__ float below_in_summaries(float limit) const {
    float below = 0;
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32) {
      const Summary& summary = shared_.summaries[i + threadIdx.x % 32];
      if (summary.max < limit) below += summary.sum * exp_below(summary.max, summary_.max);
    }
    return sum_of_lanes(below);
  }
  // Whether what every thread has first of a group, and is below a limit, is enough. Its place is
  // free, as the mass of all is known.
  __device__ bool has_enough_below(float limit, double share) const {
    for_groups([&](int group) {
      const int at = first_eight(group) + threadIdx.x;
      float below = 0;
      if (at < end_of_eights(group)) {
        float x[8];
        read_eight(at).widen(x);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          x[i] = exp2_fast(((x[i] < limit ? x[i] : -kInfinity) - summary_.max) * kLog2e);
        below = add(x);
      }
      put_mass(kOfAll, group * kWarps + threadIdx.x / 32, below, kBelow);
    });
    receive(kBelow, kGroups * kWarps * 8, 0);
    if (threadIdx.x < 32) {
      const double below = mass_of(kOfAll);
      if (threadIdx.x == 0) shared_.has_enough = is_enough(below, share);
    }
    __syncthreads();
    return shared_.has_enough;
  }
  __device__ void put_mass(int which, int place, float of_lane, int what = kMasses) const {
    const int lane = threadIdx.x % 32;
    const double mass = sum_of_lanes(static_cast<double>(of_lane));
    if (lane < g_.blocks) send(&shared_.masses[which][place], mass, lane, what);
  }
  __device__ double mass_of(int which) const {
    double mass = 0;
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32)
      mass += shared_.masses[which][i + threadIdx.x % 32];
    return sum_of_lanes(mass);
  }

  // The best score of every warp that reaches the bar, which is set, to the first `receivers`
  // blocks, for winner().
  __device__ void draw(float kept, float kept_z, int receivers) const {
    const uint32_t reached = stage_ - kSharedBytes + static_cast<uint32_t>(offsetof(Shared, bar));
    const float highest_z = z(highest_), least_z = fmaxf(kept_z, z(kept));
    Best best{-kInfinity, size_, 0.f};
    constexpr float kSlack = 1e-3f;  // over the rounding of the bounds
    float raised;                    // by anyone, at whatever time
    uint32_t most;                   // that the high half of a word may be, and all ones below it
    // A word w may win if w + 1/2 <= 2^32 exp(z - bar) = 2^(32 + bound): the most that its high
    // half may be.
    const auto most_high_half = [&](float bound) {
      return min(__float2uint_rd(exp2_fast(bound + 16)), 0xffffu);
    };
    // With the highest z that this thread has; 32 + bound is returned.
    const auto look = [&] {
      raised = __int_as_float(load_shared_int(reached));
      const float bound = (highest_z + (kSlack + kRaised) - raised) * kLog2e;
      most = most_high_half(bound) << 16 | 0xffff;
      return bound + 32;
    };
    const bool hopeless = look() < -1 || highest_z < least_z, all = least_z == -kInfinity;
    if (__any_sync(kAll, !hopeless)) {
      const NoiseRounds noise = shared_.noise;
      for_groups([&](int group) {
        const int end = end_of_eights(group), end_of_warp = opaque(end + threadIdx.x % 32);
        for (int at = first_eight(group) + threadIdx.x; at < end_of_warp; at += kThreads) {
          if (!all && !__any_sync(kAll, z(read_eight(at).maximum()) >= least_z)) continue;
          const PhiloxBlock high = noise.block(at);
          const uint32_t least = __vminu2(__vminu2(high.a, high.b), __vminu2(high.c, high.d));
          if (!__any_sync(kAll, least <= most || least << 16 <= most)) continue;
          // Seldom run: short code that leaves the registers alone is worth more.
          look();
          const float top = z(read_eight(at).maximum());
          const uint32_t may = most_high_half((top + (kSlack + kRaised) - raised) * kLog2e);
          uint32_t hopeful = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) hopeful |= (high.half(i) <= may) << i;
          if (at >= end) hopeful = 0;
          for (; hopeful > 0; hopeful &= hopeful - 1) {
            const int i = __ffs(hopeful) - 1, id = 8 * at + i;
            const float x = logit(id), zi = z(x);
            if (x < kept || zi < kept_z) continue;
            const uint32_t first = high.half(i) << 16;
            // log2(m 2^e) >= e + (m - 1): the bits of a float, read as an integer, bound its
            // logarithm.
            const int bits = __float_as_int(noise_uniform(first)) - 0x3f800000;
            const float log_v = static_cast<float>(bits) * (0x1.62e43p-1f * 0x1p-23f);
            if (zi - log_v + (kSlack + kRaised) < raised) continue;
            const uint32_t word = first | noise.block(kLowHalves | at).half(i);
            const float score = zi + noise_gumbel(word);
            if (score > best.score) {
              best = {score, id, x};
              raise(score);
            }
          }
          __syncwarp();
        }
      });
    }
    best = combine_lanes(best);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < receivers) send(&shared_.bests[rank_ * kWarps + warp], best, lane, kBests);
  }

  // Whoever wins scores no less than any other that is kept: of the highest logits of what the
  // warps read, one a lane, the best sets the bar. The high halves of their noise are enough for
  // that: the bar is as if all below were ones.
  __device__ void set_bar(float kept, float kept_z) const {
    Candidate likely{-kInfinity, 0};
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32) {
      const Summary& summary = shared_.summaries[i + threadIdx.x % 32];
      if (summary.max > likely.x) likely = {summary.max, summary.id};
    }
    const uint32_t high = shared_.noise.block(likely.id / 8).half(likely.id % 8);
    const bool is_kept = likely.x >= kept && z(likely.x) >= kept_z;
    const float bar =
        max_of_lanes(is_kept ? z(likely.x) + noise_gumbel(high << 16 | 0xffff) : -kInfinity);
    if (threadIdx.x == 0) raise(bar);
  }

  // A score that was reached, for all of the block; only one above -kRaised counts.
  __device__ void raise(float score) const {
    if (score > -kRaised) atomicMax(&shared_.bar, __float_as_int(score + kRaised));
  }

  __device__ Best winner(int warps) const {
    Best best{-kInfinity, size_, 0.f};
    for (int i = threadIdx.x % 32; i < warps; i += 32) best = combine(best, shared_.bests[i]);
    return combine_lanes(best);
  }

  __device__ void write(const SampleParams& p, const Best& best) const {
    if (rank_ > 0 || threadIdx.x > 0) return;
    p.token[row_] = best.id;
    p.logprob[row_] = best.logit - summary_.max - logf(summary_.sum);
  }

  const Geometry& g_;
  int rank_, row_;  // this block's place in the cluster, and the cluster's row
  int size_, units_;
  int first_;  // this block's first unit
  const data_t* logits_;
  Shared& shared_;
  uint32_t stage_;
  Summary summary_;
  float highest_ = -kInfinity;  // of this thread's eights
  float scale_;
};

template <typename data_t, bool kAligned>
__global__ void __launch_bounds__(kThreads, kPerSM)
    sample_kernel(const SampleParams p, const Geometry g) {
  extern __shared__ __align__(16) char memory[];
  let_next_start();
  wait_for_inputs();
  Row<data_t, kAligned>(p, g, memory).run(p);
}

template <typename data_t>
void dispatch(const SampleParams& p, cudaStream_t stream) {
  constexpr int kUnit = 16 / sizeof(data_t);
  const auto all = reinterpret_cast<uintptr_t>(p.logits) |
                   uintptr_t(sizeof(data_t) * p.logits_stride) |
                   uintptr_t(sizeof(data_t) * p.vocabulary);
  auto* const kernel = all % 16 == 0 ? sample_kernel<data_t, true> : sample_kernel<data_t, false>;

  Geometry g{kMostBlocks, kLogMostBlocks};
  constexpr int kEights = 8 * kGroups;
  g.units_per_group =
      static_cast<int>((int64_t{p.vocabulary} + kEights - 1) / kEights * (8 / kUnit));
  const auto units = [&] { return kGroups / g.blocks * int64_t{g.units_per_group}; };
  constexpr int kMostStaged = kStageBytes / 16;
  while (g.blocks > 1 && int64_t{p.batch} * g.blocks > kResident && 2 * units() <= kMostStaged)
    g.blocks = 1 << --g.log_blocks;
  g.staged = static_cast<int>(std::min<int64_t>(units(), kMostStaged));
  g.piece = (g.staged + 2 * kPieces - 1) / (2 * kPieces) * 2;

  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       kSharedBytes + kStageBytes);
  launch_clusters(kernel, g.blocks, p.batch * g.blocks, kThreads, kSharedBytes + 16 * g.staged,
                  stream, p, g);
}

}  // namespace

void launch_sample(const SampleParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  if (p.dtype == DType::kFloat32) return dispatch<float>(p, stream);
  dispatch<__nv_bfloat16>(p, stream);
}

}  // namespace reasoners
