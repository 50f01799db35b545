// From logits to a token: temperature, top-k, top-p, min-p, and Gumbel-max over what is kept.
//
// A cluster of 1 to 8 blocks serves a row: many for a few rows, few for many rows, but enough that
// the row stays in their shared memory and is read from global memory once. One block a row took
// 66 us for a row of 128,256 bfloat16 (92 with top-k 50 and top-p 0.95), and 240 (332) for 512 of
// them, of which every pass came from cache again, where 44 is the time to read them.
//   1. As a block's part comes in: log-sum-exp of the raw logits, the maximum and its lowest id.
//      What the next block in its place will load is meanwhile sent for, to the L2 cache.
//   2. The winner of z + Gumbel noise. Noise belongs to the token (philox.h), so that no order of
//      evaluation can change the choice. It is drawn four tokens at a time, and only where the
//      largest possible noise could win. As -log(-log(1 - v)) <= -log(v), the least of the four
//      uniforms tells by one exponential whether any of them can win; logarithms are taken only
//      then. Greedy rows are done after 1.
// Filters:
//   top-k. A row has 512 disjoint parts. k of them have a maximum as high as the k-th highest one,
//      so that what top-k keeps is no lower: little more than k candidates, which one block ranks,
//      filters and draws from, a thread to each. For a large k, or more ties than threads, a
//      threshold on the logit: a histogram of all logits, in bins of 1/64 of the temperature, is
//      summed from the top until k are above; within the bin that this finds, the threshold is
//      found digit by digit (11 bits, highest first) on how many values of the type lie between a
//      logit and the bin's highest.
//   top-p, without candidates. Draw first, ask afterwards: the winner is in the nucleus if less
//      than top_p of the mass is above it. Then it wins there too. If not, nothing that is no
//      higher is in the nucleus either, and it is drawn again from what is higher. 1 / top_p draws
//      or fewer are to be expected, mostly one; a refusal about halves the mass that is left.
// Neither token nor log-probability depends on the number of blocks: maxima and counts have no
// order, candidates weigh in fixed point, and what else is added are always the same lanes of
// kGroups parts of the row, in the same order.
// 384 threads let three blocks be on a multiprocessor. H100, rows of 128,256, us:
//                       greedy   no filter   top-k 50   and top-p 0.95, min-p 0.05   top-p 0.95
//   1, float32            5.2       10.6         9.6             10.0                    14.6
//   512, float32        119        200         165              167                     280
//   512, bfloat16        71        155         106              109                     224
//   512, two blocks     122        223         184              191                     318
//   (float32)
// Before, 161 greedy and 222 unfiltered, with log-sum-exp in step 2 and nothing sent for ahead; 765
// with top-p 0.95, by a histogram of masses. Without a filter Philox and its comparison are the
// limit, 44 instructions a logit of random ones, nearly all of which could win.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cluster.cuh"
#include "convert.cuh"
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
constexpr int kDigit = 10;
constexpr int kBins = 1 << kDigit;
constexpr float kBinsPerUnit = 64;  // of z
constexpr int kBinsOfThread = (kBins + kThreads - 1) / kThreads;
constexpr unsigned kAll = ~0u;
constexpr float kInfinity = INFINITY;
constexpr float kLowest = -0x1.fffffep+127f;
constexpr float kLog2E = 0x1.715476p+0f;
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

// 2^x to about 2 ulp; below 2^-126 it is 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x - max) of an x that is no higher; 0 where both are -inf.
__device__ inline float exp_below(float x, float max) {
  return exp2_fast((x - fmaxf(max, kLowest)) * kLog2E);
}

__device__ inline Summary combine(const Summary& a, const Summary& b) {
  const int id = a.max > b.max ? a.id : a.max < b.max ? b.id : min(a.id, b.id);
  const bool first = a.max >= b.max;
  const float max = fmaxf(a.max, b.max), down = exp_below(fminf(a.max, b.max), max);
  return {max, id, (first ? b.sum : a.sum) * down + (first ? a.sum : b.sum)};
}
__device__ inline Summary from_lane(const Summary& a, int offset) {
  return {__shfl_xor_sync(kAll, a.max, offset), __shfl_xor_sync(kAll, a.id, offset),
          __shfl_xor_sync(kAll, a.sum, offset)};
}

__device__ inline Best combine(const Best& a, const Best& b) {
  const bool first = a.score > b.score || (a.score == b.score && a.id < b.id);
  return first ? a : b;
}
__device__ inline Best from_lane(const Best& a, int offset) {
  return {__shfl_xor_sync(kAll, a.score, offset), __shfl_xor_sync(kAll, a.id, offset),
          __shfl_xor_sync(kAll, a.logit, offset)};
}

__device__ inline double combine(double a, double b) { return a + b; }
__device__ inline double from_lane(double a, int offset) {
  return __shfl_xor_sync(kAll, a, offset);
}

// The combination over lanes that differ in the bits [kFrom, kTo), the same bits in each of them.
template <int kFrom = 1, int kTo = 32, typename T>
__device__ T combine_lanes(T mine) {
#pragma unroll
  for (int offset = kFrom; offset < kTo; offset *= 2) mine = combine(mine, from_lane(mine, offset));
  return mine;
}

// Addresses in shared memory. Through a shuffle, as the compiler would work them out anew for every
// access, from the block's number in the cluster.
__device__ inline uint32_t shared_address(const void* p) {
  return __shfl_sync(kAll, static_cast<uint32_t>(__cvta_generic_to_shared(p)), 0);
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
// 16 bytes from global to shared memory; who asked for them may read them after await_copies.
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Asks for memory to come to the L2 cache.
__device__ inline void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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
  NoiseStream noise;
  uint32_t above;  // tokens above the chosen bin
  uint32_t bin;    // the chosen one
  int bar;         // bits of a score that was reached; none that is negative is told
};
constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kStageBytes = (233472 / kPerSM - 1024 - kSharedBytes) / 16 * 16;

struct Geometry {
  int blocks;  // of a row's cluster
  int log_blocks;
  int units_per_group;  // units of 16 bytes
  int staged;           // units that a block keeps in shared memory
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
        stage_(shared_address(memory + kSharedBytes)) {}

  __device__ void run(const SampleParams& p) {
    if (threadIdx.x == 0) shared_.bar = __float_as_int(-kInfinity);
    if (g_.blocks > 1) begin_in_cluster();
    const float temperature = p.temperature[row_], top_p = p.top_p[row_], min_p = p.min_p[row_];
    const int top_k = p.top_k[row_];
    summarize(p);
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
    // Whoever wins scores no less than the most probable token, so that one sets the bar.
    const PhiloxBlock words = shared_.noise.block(summary_.id / 4);
    const float bar = noise_gumbel(choose(words.a, words.b, words.c, words.d, summary_.id % 4));
    // The winner is in the nucleus if less than top_p of the mass is above it. If not, nor is
    // anything that is no higher than it.
    for (bool first = true;; first = false) {
      draw(kept, kept_z, bar);
      if (!(top_p < 1)) break;
      const float higher = nextafterf(winner(g_.blocks * kWarps).logit, kInfinity);
      if (first)
        weigh<true>(kept, higher);
      else
        weigh<false>(kept, higher);
      if (threadIdx.x == 0) shared_.bar = __float_as_int(-kInfinity);
      sync();
      const double above = mass_of(kAbove);
      if (above == 0 || above < top_p * mass_of(kOfAll)) break;
      kept = higher;
    }
    if (rank_ == 0 && threadIdx.x < 32) write(p, winner(g_.blocks * kWarps));
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

  // Calls visit(first token, its kUnit logits) on this thread's units of a group, in rising order,
  // kAhead of them loaded together. A thread's units are always the same, so that it need not wait
  // for others to read what it has staged.
  template <int kAhead, bool kStage = false, typename visit_t>
  __device__ void for_units(int group, visit_t visit) const {
    const int end = min((group + 1) * g_.units_per_group, units_);
    for (int unit = group * g_.units_per_group + threadIdx.x; unit < end;
         unit += kAhead * kThreads) {
      Unit units[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = unit + k * kThreads;
        if (at >= end) break;
        units[k] = kStage ? fetch(at) : read(at);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = unit + k * kThreads;
        if (at >= end) break;
        if (kStage && at - first_ < g_.staged)
          store_shared(stage_ + 16 * (at - first_), __builtin_bit_cast(uint4, units[k]));
        float x[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) x[i] = to_float(units[k].at[i]);
        visit(at * kUnit, x);
      }
    }
  }
  template <typename visit_t>
  __device__ void for_groups(visit_t visit) const {
    const int groups = kGroups >> g_.log_blocks;
    for (int group = rank_ * groups; group < (rank_ + 1) * groups; ++group) visit(group);
  }

  __device__ static float maximum(const float (&x)[kUnit]) {  // passes over NaN
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kUnit; ++i) top = fmaxf(top, x[i]);
    return top;
  }

  static __device__ float add(float (&x)[kUnit]) {
#pragma unroll
    for (int n = kUnit / 2; n > 0; n /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
  }

  // What the next block in this one's place will load: memory would else be idle while this
  // one computes.
  __device__ void prefetch_next(const SampleParams& p) const {
    const int ahead = kResident >> g_.log_blocks;
    const int end = min(first_ + (kGroups >> g_.log_blocks) * g_.units_per_group, units_);
    if (threadIdx.x > 0 || row_ + ahead >= p.batch || first_ >= end) return;
    prefetch(logits_ + ahead * p.logits_stride + int64_t{first_} * kUnit, 16 * (end - first_));
  }

  __device__ void summarize(const SampleParams& p) {
    const int64_t* const rng_key = p.rng_key + 4 * row_;
    const int64_t key[] = {rng_key[0], rng_key[1], rng_key[2], rng_key[3]};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (kAligned) {  // all that fits is asked for at once
      for_groups([&](int group) {
        const int end = min(min((group + 1) * g_.units_per_group, units_), first_ + g_.staged);
        for (int unit = group * g_.units_per_group + threadIdx.x; unit < end; unit += kThreads)
          copy_async(stage_ + 16 * (unit - first_), logits_ + int64_t{unit} * kUnit);
      });
    }
    if (threadIdx.x == 0) shared_.noise = NoiseStream(key);
    if (g_.blocks > 1) wait_for_cluster();  // all blocks run
    if constexpr (kAligned) {
      await_copies();
      prefetch_next(p);
    }
    for_groups([&](int group) {
      Summary mine{-kInfinity, size_, 0.f};
      for_units<kAligned ? 1 : 4, !kAligned>(group, [&](int begin, const float (&x)[kUnit]) {
        const float top = maximum(x), max = fmaxf(mine.max, top);
        float each[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) each[i] = exp_below(x[i], max);  // NaN stays
        mine.sum = mine.sum * exp_below(mine.max, max) + add(each);
        if (top > mine.max) mine.id = begin;
        mine.max = max;
      });
      if (mine.id < size_) {  // so far the first of the unit's ids
        const Unit unit = read(mine.id / kUnit);
        const int begin = mine.id;
#pragma unroll
        for (int i = kUnit - 1; i >= 0; --i)
          if (to_float(unit.at[i]) == mine.max) mine.id = begin + i;
      }
      mine = combine_lanes<1, 32 / kPartsOfWarp>(mine);
      const int place = group * kWarps + warp, part = lane % kPartsOfWarp;
      const float part_max = __shfl_sync(kAll, mine.max, part * (32 / kPartsOfWarp));
      mine = combine_lanes<32 / kPartsOfWarp, 32>(mine);
      const int other = lane / kPartsOfWarp;
      if (other < g_.blocks)
        in_block(shared_.part_maxima, other)[place * kPartsOfWarp + part] = part_max;
      if (lane < g_.blocks) *in_block(&shared_.summaries[place], lane) = mine;
    });
    sync();
    Summary all{-kInfinity, size_, 0.f};
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32) all = combine(all, shared_.summaries[i + lane]);
    summary_ = combine_lanes(all);
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
      for_units<1>(group, [&](int begin, const float (&x)[kUnit]) {
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
    if (threadIdx.x < kGroups) {  // a thread for each group of this block and each block
      const int group = first_group + threadIdx.x % groups;
      in_block(shared_.counts, threadIdx.x / groups)[group] = shared_.counts[group];
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
      const PhiloxBlock words = shared_.noise.block(id / 4);
      best = {z(x) + noise_gumbel(choose(words.a, words.b, words.c, words.d, id % 4)), id, x};
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
    for_groups([&](int group) { for_units<1>(group, fill); });
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

  // What the tokens at or above a logit weigh, exp(z) each, for mass_of() after a barrier; kOfAll:
  // those from `kept` on too. A lane adds a unit's weights as a tree and then its units of the
  // group, a dozen additions in float32, and all else is added in float64: wrong by less than 1e-6
  // of the whole, and always in the same order.
  template <bool kOfAllToo>
  __device__ void weigh(float kept, float higher) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float scale = scale_ * kLog2E, least = kOfAllToo ? kept : higher;
    for_groups([&](int group) {
      float of_all = 0, above = 0;
      for_units<1>(group, [&](int, const float (&x)[kUnit]) {
        if (maximum(x) < least) return;
        float each[kUnit], high[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          each[i] = x[i] < least ? 0.f : exp2_fast((x[i] - summary_.max) * scale);
          high[i] = kOfAllToo && x[i] < higher ? 0.f : each[i];
        }
        above += add(high);
        if (kOfAllToo) of_all += add(each);
      });
      const int place = group * kWarps + warp;
      const auto put = [&](int which, float sum) {
        const double mass = combine_lanes(static_cast<double>(sum));
        if (lane < g_.blocks) *in_block(&shared_.masses[which][place], lane) = mass;
      };
      if (kOfAllToo) put(kOfAll, of_all);
      put(kAbove, above);
    });
  }
  __device__ double mass_of(int which) const {
    double mass = 0;
#pragma unroll
    for (int i = 0; i < kGroups * kWarps; i += 32)
      mass += shared_.masses[which][i + threadIdx.x % 32];
    return combine_lanes(mass);
  }

  // The best score of every warp that reaches the bar, for winner().
  __device__ void draw(float kept, float kept_z, float bar) const {
    const NoiseStream noise = shared_.noise;
    constexpr float kSlack = 1e-3f;  // over the rounding of the bounds
    const uint32_t reached = stage_ - kSharedBytes + static_cast<uint32_t>(offsetof(Shared, bar));
    Best best{-kInfinity, size_, 0.f};
    const auto visit = [&](int begin, const float (&x)[kUnit]) {
      bar = fmaxf(bar, __int_as_float(load_shared_int(reached)));  // anyone's, at whatever time
#pragma unroll
      for (int quad = 0; quad < kUnit; quad += 4) {
        const float top = fmaxf(fmaxf(x[quad], x[quad + 1]), fmaxf(x[quad + 2], x[quad + 3]));
        const float lead = z(top) - bar;
        if (top < kept || z(top) < kept_z || lead + (kMaxGumbel + kSlack) < 0) continue;
        const PhiloxBlock words = noise.block((begin + quad) / 4);
        const uint32_t least = min(min(words.a, words.b), min(words.c, words.d));
        if (noise_uniform(least) > exp2_fast((lead + kSlack) * kLog2E)) continue;
#pragma unroll 1  // seldom run: short code is worth more
        for (int i = 0; i < 4; ++i) {
          const uint32_t word = choose(words.a, words.b, words.c, words.d, i);
          const float at = choose(x[quad], x[quad + 1], x[quad + 2], x[quad + 3], i), zi = z(at);
          if (at < kept || zi < kept_z) continue;
          // log2(m 2^e) >= e + (m - 1): the bits of a float, read as an integer, bound its
          // logarithm.
          const int bits = __float_as_int(noise_uniform(word)) - 0x3f800000;
          const float log_v = static_cast<float>(bits) * (0x1.62e43p-1f * 0x1p-23f);
          if (zi - log_v + kSlack < bar) continue;
          const float score = zi + noise_gumbel(word);
          if (score > best.score) {
            best = {score, begin + quad + i, at};
            if (score > bar) {
              bar = score;
              if (score > 0) atomicMax(&shared_.bar, __float_as_int(score));
            }
          }
        }
      }
    };
    for_groups([&](int group) { for_units<1>(group, visit); });
    best = combine_lanes(best);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < g_.blocks) *in_block(&shared_.bests[rank_ * kWarps + warp], lane) = best;
    sync();
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
