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
//      evaluation can change the choice. It is drawn for eight tokens at a time, and only where the
//      largest possible noise could win. As -log(-log(1 - v)) <= -log(v), the least of the eight
//      uniforms tells by one exponential whether any of them can win; logarithms are taken only
//      then. The bar to reach is first the best score among the maxima of what the warps read,
//      then the best that the block has found. Greedy rows are done after 1.
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
//      With temperature 1 the mass of all is known from step 1, and what a fifth of the row has
//      below the winner is mostly more than the share that top-p drops: then it is in. Only
//      otherwise the row is read again for what is above the winner, by the warps that have read
//      something higher; with other temperatures by all, for the mass of all, too.
// Neither token nor log-probability depends on the number of blocks: maxima and counts have no
// order, candidates weigh in fixed point, and what else is added are always the same lanes of
// kGroups parts of the row, in the same order.
// 384 threads let three blocks be on a multiprocessor. H200, rows of 128,256, us:
//                       greedy   no filter   top-k 50   and top-p 0.95, min-p 0.05   top-p 0.95
//   1, float32            4.3        9.7         8.8              9.2                    11.4
//   512, float32         89        171         134              136                     206
//   512, bfloat16        54        127          91               93                     159
// Nearly all that is not reading is instructions: of random logits nearly all could win, so that
// Philox runs for each. A warp's instructions for eight logits a lane, before eight were taken at a
// time and now (integer ones, at half rate, in brackets):
//   log-sum-exp   74 -> 67, and 80 -> 72 cycles of exponentials
//   draw         156 (72) -> 114 (60)    of which 75 (38) are Philox
//   top-p        118 -> 41 in the draw, and 25 to 41 for what is above (225 and 182 us); now 70
//                for both without the draw, and with temperature 1 about 60 for a fifth of the
//                row, and 25 to 41 for the quarter of random rows that this does not settle
// and of a block that reads 10 units a thread about 600 -> 300 besides. By these counts no filter
// was to take 140 and 105, top-p alone 175 and 140: a wide product, of which Philox has most, costs
// more than the two cycles that were assumed.
// Tried: 256 threads, of which nearly all have something to do in every step: the same to 2 %. An
// H100, before: 119 greedy, 200 unfiltered, 167 all, 280 top-p alone; and 161 and 222 with
// log-sum-exp in step 2 and nothing sent for ahead; 765 with top-p 0.95, by a histogram of masses.

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "philox.h"

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
constexpr float kRaised = 4;
constexpr float kMostBelow = 0.125f;  // of the mass, that a fifth of the row is likely to have
constexpr float kInfinity = INFINITY;
constexpr float kLowest = -0x1.fffffep+127f;
static_assert(kBins % 32 == 0 && kWarps <= 32 && kThreads % kMostBlocks == 0);
static_assert(kParts == kThreads && kMostBlocks * kPartsOfWarp <= 32);
static_assert(kGroups * kWarps % 32 == 0);

// A part of the row: its maximum, the lowest id there, and the sum of exp(x - maximum).
struct Summary {
  float max;
  int id;
  float sum;
};

// The best score of a part of the row, its lowest id, and the logit there.
struct Best {
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
__device__ inline uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from));
  return v;
}
__device__ inline int load_shared_int(uint32_t from) {
  int v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}
__device__ inline void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
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
  float part_maxima[kParts];
  uint32_t counts[kGroups];  // of candidates
  Summary summaries[kGroups * kWarps];
  Best bests[kMostBlocks * kWarps];
  double masses[2][kGroups * kWarps];  // kOfAll that is kept; kAbove the winner
  uint64_t of_warps[kWarps];
  uint64_t arrived[kPieces];  // mbarriers: what is staged
  Summary summary;            // of the row
  alignas(16) NoiseRounds noise;
  uint32_t above;  // tokens above the chosen bin
  uint32_t bin;    // the chosen one
  float higher;    // than the winner's logit, the next one
  bool in_nucleus;
  int bar;  // bits of a score that was reached, more than 0 by kRaised
};
constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kStageBytes = (233472 / kPerSM - 1024 - kSharedBytes) / 16 * 16;

struct Geometry {
  int blocks;  // of a row's cluster
  int log_blocks;
  int units_per_group;  // units of 16 bytes
  int staged;           // units that a block keeps in shared memory
  int piece;            // units of them that arrive together
};

template <typename data_t, bool kAligned>
class Row {
 public:
  static constexpr int kUnit = 16 / sizeof(data_t);

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
      if constexpr (kAligned) {
        for (uint64_t& arrived : shared_.arrived) init_barrier(&arrived, 1);
        show_barriers();
        show_to_copies();
      }
    }
    if (g_.blocks > 1) begin_in_cluster();
    summarize(p);
    const float temperature = p.temperature[row_], top_p = p.top_p[row_], min_p = p.min_p[row_];
    const int top_k = p.top_k[row_];
    if (!(fabsf(summary_.max) < kInfinity) || isnan(summary_.sum)) return write(p, {0.f, -1, NAN});
    if (!(temperature > 0)) return write(p, {0.f, summary_.id, summary_.max});

    // Clamped so that neither 0 * infinity nor infinity * 0 can arise.
    constexpr float kSmallest = 0x1p-126f, kLargest = 0x1p126f;
    scale_ = fminf(fmaxf(1 / temperature, kSmallest), kLargest);
    const float kept_z = min_p > 0 ? fminf(logf(min_p), 0.f) : -kInfinity;
    float kept = -kInfinity;
    if (top_k > 0 && top_k < size_) {
      if (top_k <= kCandidates / 2 && collect(top_k))
        return draw_candidate(p, top_k, top_p, kept_z);
      kept = threshold(top_k);
    }
    // The winner is in the nucleus if less than top_p of the mass is above it. If not, nor is
    // anything that is no higher than it.
    const bool sum_is_mass = scale_ == 1 && kept == -kInfinity;
    const float least = kept;
    Best best{};
    for (bool first = true;; first = false) {
      draw(kept, kept_z);
      if (threadIdx.x < 32) {
        best = winner(g_.blocks * kWarps);
        if (threadIdx.x == 0) shared_.higher = nextafterf(best.logit, kInfinity);
      }
      if (!(top_p < 1)) break;
      __syncthreads();
      kept = shared_.higher;
      if (first && sum_is_mass && 1 - top_p < kMostBelow && has_enough_below(kept, 1 - top_p))
        break;
      if (first && !sum_is_mass)
        weigh_both(kept, least);
      else
        weigh(kept);
      sync();
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
    if (place < g_.staged * kUnit) {
      const char* const stage = reinterpret_cast<const char*>(&shared_) + kSharedBytes;
      return to_float(reinterpret_cast<const data_t*>(stage)[place]);
    }
    return id < size_ ? to_float(logits_[id]) : -kInfinity;
  }

  // Calls visit(first token, its kUnit logits) on this thread's units of a group, in rising order.
  // A thread's units are always the same, so that it need not wait for others to read what it has
  // staged.
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
  // Eight logits that a thread takes at once: a unit, or two that are kThreads apart.
  struct Eight {
    Unit units[8 / kUnit];
    __device__ float operator[](int i) const { return to_float(units[i / kUnit].at[i % kUnit]); }
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
        const auto pair = [&](int i) {
          return __halves2bfloat162(units[0].at[i], units[0].at[i + 1]);
        };
        const auto top = __hmax2(__hmax2(pair(0), pair(2)), __hmax2(pair(4), pair(6)));
        return fmaxf(__low2float(top), __high2float(top));
      }
    }
    // The blocks of noise for the first and the other four.
    __device__ static uint32_t noise_block(int first_unit, int k) {
      return kUnit == 4 ? first_unit + k * kThreads : 2 * first_unit + k;
    }
  };
  // -inf from a group's end on.
  __device__ Eight read_eight(int unit, int end) const {
    Eight eight;
    if (unit + (8 / kUnit - 1) * kThreads < min(end, first_ + g_.staged)) {
#pragma unroll
      for (int k = 0; k < 8 / kUnit; ++k)
        eight.units[k] = __builtin_bit_cast(
            Unit, load_shared(stage_ + 16 * (unit - first_) + 16 * kThreads * k));
      return eight;
    }
#pragma unroll
    for (int k = 0; k < 8 / kUnit; ++k) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) eight.units[k].at[i] = from_float<data_t>(-kInfinity);
      if (unit + k * kThreads < end) eight.units[k] = read(unit + k * kThreads);
    }
    return eight;
  }
  struct Now {
    __device__ void operator()(int) const {}
  };
  // The same by eights: visit(first unit, its logits), after before(first unit).
  template <typename visit_t, typename before_t = Now>
  __device__ void for_eights(int group, visit_t visit, before_t before = {}) const {
    const int end = end_of(group);
    for (int unit = group * g_.units_per_group + threadIdx.x; unit < end;
         unit += 8 / kUnit * kThreads) {
      before(unit);
      visit(unit, read_eight(unit, end));
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
              store_shared(stage_ + 16 * (at - first_), __builtin_bit_cast(uint4, units[k]));
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

  __device__ void summarize(const SampleParams& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    stage();
    if (threadIdx.x == 0) shared_.noise = NoiseRounds(NoiseStream(p.rng_key + 4 * row_));
    if (g_.blocks > 1) wait_for_cluster();  // all blocks run
    if constexpr (kAligned) {
      __syncthreads();  // the barriers are there
      wait_for(&shared_.arrived[0], 0);
      prefetch_next(p);
    }
    int ready = kAligned ? g_.piece : g_.staged, pieces = 1;
    const auto await = [&](int unit) {
      const int last = min(unit - first_ + (8 / kUnit - 1) * kThreads, g_.staged - 1);
      for (; ready <= last; ready += g_.piece) wait_for(&shared_.arrived[pieces++], 0);
    };
    for_groups([&](int group) {
      Summary mine{-kInfinity, size_, 0.f};
      int highest = -1;  // the first unit of the eight with the maximum
      for_eights(
          group,
          [&](int unit, const Eight& eight) {
            float x[8];
            eight.widen(x);
            const float top = maximum(x), max = fmaxf(mine.max, top);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = exp_below(x[i], max);  // NaN stays
            mine.sum = mine.sum * exp_below(mine.max, max) + add(x);
            if (top > mine.max) highest = unit;
            mine.max = max;
          },
          await);
      if (highest >= 0) {
        const Eight eight = read_eight(highest, end_of(group));
#pragma unroll
        for (int i = 7; i >= 0; --i)
          if (eight[i] == mine.max) mine.id = 4 * Eight::noise_block(highest, i / 4) + i % 4;
      }
      const float of_part = max_of_lanes<1, 32 / kPartsOfWarp>(mine.max);
      mine = combine_lanes(mine, max_of_lanes<32 / kPartsOfWarp, 32>(of_part));
      const int place = group * kWarps + warp, part = lane % kPartsOfWarp;
      const float part_max = __shfl_sync(kAll, of_part, part * (32 / kPartsOfWarp));
      const int other = lane / kPartsOfWarp;
      if (other < g_.blocks)
        in_block(shared_.part_maxima, other)[place * kPartsOfWarp + part] = part_max;
      if (lane < g_.blocks) *in_block(&shared_.summaries[place], lane) = mine;
    });
    sync();
    if (warp == 0) {
      Summary mine = shared_.summaries[lane];
#pragma unroll
      for (int i = 32; i < kGroups * kWarps; i += 32)
        mine = combine(mine, shared_.summaries[i + lane]);
      mine = combine_lanes(mine, max_of_lanes(mine.max));
      if (lane == 0) shared_.summary = mine;
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
      best = {z(x) + noise_gumbel(noise_word(id)), id, x};
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

  // One of four, without an array that would live in memory.
  template <typename T>
  __device__ static T choose(T a, T b, T c, T d, int i) {
    return i < 2 ? (i == 0 ? a : b) : (i == 2 ? c : d);
  }

  __device__ uint32_t noise_word(int id) const {
    const PhiloxBlock words = shared_.noise.block(id / 4);
    return choose(words.a, words.b, words.c, words.d, id % 4);
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
            x[i] = x[i] < least ? 0.f : exp2_fast((x[i] - summary_.max) * scale);
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
  // Whether what every thread has first of a group, and is below a logit, is sure to be more than
  // this share of the mass of all, which is the sum of the summary: its place is free, so.
  __device__ bool has_enough_below(float limit, double share) const {
    constexpr double kSlack = 1e-4;  // over the rounding of either
    for_groups([&](int group) {
      const int unit = group * g_.units_per_group + threadIdx.x, end = end_of(group);
      float below = 0;
      if (unit < end) {
        float x[8];
        read_eight(unit, end).widen(x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = x[i] < limit ? exp_below(x[i], summary_.max) : 0.f;
        below = add(x);
      }
      put_mass(kOfAll, group * kWarps + threadIdx.x / 32, below);
    });
    sync();
    if (threadIdx.x < 32) {
      const double below = mass_of(kOfAll);
      if (threadIdx.x == 0) shared_.in_nucleus = below > (share + kSlack) * summary_.sum;
    }
    __syncthreads();
    return shared_.in_nucleus;
  }
  __device__ void put_mass(int which, int place, float of_lane) const {
    const int lane = threadIdx.x % 32;
    const double mass = sum_of_lanes(static_cast<double>(of_lane));
    if (lane < g_.blocks) *in_block(&shared_.masses[which][place], lane) = mass;
  }
  __device__ double mass_of(int which) const {
    double mass = 0;
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32)
      mass += shared_.masses[which][i + threadIdx.x % 32];
    return sum_of_lanes(mass);
  }

  // The best score of every warp that reaches the bar, for winner().
  __device__ void draw(float kept, float kept_z) const {
    if (threadIdx.x < 32) set_bar(kept, kept_z);
    __syncthreads();
    const NoiseRounds noise = shared_.noise;
    constexpr float kSlack = 1e-3f;  // over the rounding of the bounds
    const uint32_t reached = stage_ - kSharedBytes + static_cast<uint32_t>(offsetof(Shared, bar));
    const float scale = scale_ * kLog2e, least_z = fmaxf(kept_z, z(kept));
    Best best{-kInfinity, size_, 0.f};
    const auto visit = [&](int unit, const Eight& eight) {
      const float raised = __int_as_float(load_shared_int(reached));  // by anyone, at whatever time
      const float top = eight.maximum() - summary_.max, top_z = top * scale_;
      // A word w may win if w + 1/2 <= 2^32 exp(z - bar): of eight, the least and the highest z.
      const float most = top * scale + (32 + (kSlack + kRaised) * kLog2e - raised * kLog2e);
      if (top_z < least_z || most < -1) return;
      const uint32_t least = min(noise.block(Eight::noise_block(unit, 0)).least(),
                                 noise.block(Eight::noise_block(unit, 1)).least());
      if (static_cast<float>(least) > exp2_fast(most)) return;
      // Seldom run: short code that leaves the registers alone is worth more.
#pragma unroll 1
      for (int k = 0; k < 2; ++k) {
        const uint32_t block = Eight::noise_block(unit, k);
        const PhiloxBlock words = noise.block(block);
        if (static_cast<float>(words.least()) > exp2_fast(most)) continue;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int id = 4 * block + i;
          const float x = logit(id), zi = z(x);
          if (x < kept || zi < kept_z) continue;
          const uint32_t word = choose(words.a, words.b, words.c, words.d, i);
          // log2(m 2^e) >= e + (m - 1): the bits of a float, read as an integer, bound its
          // logarithm.
          const int bits = __float_as_int(noise_uniform(word)) - 0x3f800000;
          const float log_v = static_cast<float>(bits) * (0x1.62e43p-1f * 0x1p-23f);
          if (zi - log_v + (kSlack + kRaised) < raised) continue;
          const float score = zi + noise_gumbel(word);
          if (score > best.score) {
            best = {score, id, x};
            raise(score);
          }
        }
      }
    };
    for_groups([&](int group) { for_eights(group, visit); });
    best = combine_lanes(best);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < g_.blocks) *in_block(&shared_.bests[rank_ * kWarps + warp], lane) = best;
    sync();
  }

  // Whoever wins scores no less than any other that is kept: of the highest logits of what the
  // warps read, one a lane, the best sets the bar.
  __device__ void set_bar(float kept, float kept_z) const {
    Candidate likely{-kInfinity, 0};
#pragma unroll
    for (int i = threadIdx.x; i < kGroups * kWarps; i += 32) {
      const Summary& summary = shared_.summaries[i];
      if (summary.max > likely.x) likely = {summary.max, summary.id};
    }
    const uint32_t word = noise_word(likely.id);
    const bool is_kept = likely.x >= kept && z(likely.x) >= kept_z;
    const float bar = max_of_lanes(is_kept ? z(likely.x) + noise_gumbel(word) : -kInfinity);
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
  g.units_per_group =
      static_cast<int>((int64_t{p.vocabulary} + kGroups * kUnit - 1) / (kGroups * kUnit));
  const auto units = [&] { return kGroups / g.blocks * int64_t{g.units_per_group}; };
  constexpr int kMostStaged = kStageBytes / 16;
  while (g.blocks > 1 && int64_t{p.batch} * g.blocks > kResident && 2 * units() <= kMostStaged)
    g.blocks = 1 << --g.log_blocks;
  g.staged = static_cast<int>(std::min<int64_t>(units(), kMostStaged));
  g.piece = (g.staged + kPieces - 1) / kPieces;

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
