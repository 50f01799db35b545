// ssd_scan_backward.cu's derivative on Hopper, of 64 or 128 columns of B and C: the same chunks,
// runs and equations, by warpgroups whose tensor cores read shared memory by themselves
// (wgmma.cuh).
//
// A walk, a head's run of a sequence, has a warpgroup that multiplies for every 64 columns of B and
// C, and a block two such warpgroups and four warps that copy. Two walks of a block share nothing
// but the tensor cores and fill each other's gaps. Two warpgroups of a walk have half of the
// columns of dC, dB and dX and of a state's rows each; both find all scores, and one of them leaves
// them. States are transposed, (state_dim, head_dim): their rows are the warps', and head_dim may
// be what it is. Of a chunk on the way back, where the products of a line are under way while the
// next line is computed:
//   dS, in the data's type, to shared memory                                          -- all meet
//   C B^T, dY X^T; dY S^T         S . dS, for d log_decay
//   X dS^T                        (C B^T * L) and (dY U^T * L), to shared memory, too; what passes
//                                 between tokens
//   dC += (dY U^T * L) B          dY S^T and X dS^T weighed, and summed with C and B
//   B dS                          since C
//                                                                                     -- all meet
//   dB += (dY U^T * L)^T C, dX += (C B^T * L)^T dY, dS += (since C)^T dY       dC out
//   the next chunk's              dB and dX out
// D dY is added to dX as D on the diagonal of the scores where there is no scale. What is written
// goes through dS's place, which nobody reads after the second meeting, so that lanes write 16
// bytes and eight of them a row. Where every second state is kept, the one after it is computed
// from it once more, with the x and B of the chunk before, which are there already.
//
// Token i sees the tokens up to i alone. So that all warps have as much to weigh, warp r has the
// rows of the r-th eight tokens and of the r-th last: C and dY lie in that order.
//
// d log_decay_k is what passes from before k to k or later. Sums over eight rows are kept, of every
// column left of them, and what passes within eight; the second copying warp adds these up when the
// chunk has been left: a lane two tokens, a prefix sum over the lanes for every eight rows.
//
//   P, N                   64, 64   96, 64   128, 64   64, 128   128, 128
//   walks                     2        2         2         1          1     of a block
//   places of x, B, C, dY     2        1         1         2          2     on the way back
//   places of S               2        1         1         1          1
//   shared, kB              226      210       210       222        219     one block an SM
//   registers               216      216       224       216        224     to multiply
//
// x, B and S are free at the second meeting, C and dY at a chunk's end, and asked for again then.
//
// Gradients that heads share pass from head to head as sums, which a head reads, adds to, and
// leaves. For 64 x 128, the shape of most models whose heads share B and C in large groups, there
// is shared memory for the copy engine to do it: a walk leaves its part there and goes on; a thread
// has it added to the sums in global memory once the head before is through with its own. Who needs
// the sums, the last head and the end of a chain (PassedGradient), has them fetched by another
// thread. Half of the warps that copy suffice for the inputs then.
//
// H200, bfloat16, us; in brackets by ssd_scan_backward.cu:
//   Llamba-1B 8 x 4096    437  (681)     Llamba-3B 8 x 4096 (P 96)     542 (1037)
//             64 x 512    447  (685)               1 x 4096           373  (790)
//             1 x 2048    130  (226)     Llamba-8B 8 x 4096 (P 128)    688 (1169)
//             1 x 32768   630  (876)     24 heads of 128 x 128        1066 (1624)
//   32 heads of 64 x 64, x and B         x and B of 8 of them         1307 (2071)
//     of 8 heads, 8 x 4096   531  (802)              1 x 4096          663 (1032)
//             1 x 32768      719 (1002)  80 heads of 64 x 128, one group
//                                                    8 x 4096         2306 (4449)
//                                                    64 x 512         2567 (4507)
//                                                    1 x 4096          500 (1274)
// Bytes that move for a chunk and head of 64 x 64: 24 kB forwards, 40 kB in and 24 kB out on the
// way back, so that Llamba-1B's 8 x 4096 has 1.44 GB and can take no less than 343 us; of 128 x 128
// 208 kB, 610 us. A chunk takes 7,200 instructions of the warps that multiply where
// ssd_scan_backward.cu's takes 16,500, and 1,400 to copy and to add up.
//
// What it gave, Llamba-1B and 3B 8 x 4096: products by warpgroups, 681 to 530, 1037 to 791; rows
// written whole, no scale read where there is none, halves of 16-bit pairs by a mask, x and B asked
// for at the second meeting: 466, 569; registers for the warps that copy: 427, 534. Where heads
// share x and B: one step for both sums, 558 to 508. 128 x 128: a place of its own for S, asked for
// first, 1370 to 1280; no spilled registers where copies are asked for, 1320 to 1076. These come
// back behind the copies under way, which keeps the next ones waiting: so what is the same for all
// chunks stays in shared memory, addresses are worked out anew, and scalars come last.
//
// One group, 8 x 4096, 64 x 512, 1 x 4096: as many places for sums as heads are behind each other,
// 6730 to 3108 (4324, 725); sums by the copy engine, in chains of eight heads, 2696, 2748, 587;
// fetched by a thread of their own to a place of their own, 2436, 2690, 545; dB handed over under
// the next chunk's products, not right after dC, 2306, 2567, 500. With chains of 16, before the
// last step, 2456, 3070, 560; with one, 2470, 4440, 632.
//
// What did not: the copy engine for inputs, as in ssd_scan_wgmma.cu (432; it brings whole panels of
// 96 columns, and C and dY eight rows at a time: 732). The four rows of a lane read before they are
// written, 16 bytes each: 430 to 510, 588 to 700. The state on its way to memory under the next
// chunk's products: nothing. S, x and B at one barrier: nothing. Sums in chains whose ends read and
// leave them as all heads did: 1 x 4096 730, as now and then a head waited for twice as much.
//
// What limits, 64 x 64: of the 343 us that bytes take the rest is the chain of products and sums,
// two walks a multiprocessor; 36 % of issue slots. 128 x 128: one walk a multiprocessor, whose two
// warpgroups wait for each other; of 19,500 cycles a chunk 4,500 are forwards, 3,300 what passes
// between tokens, which both compute, and 4,900 what follows the second meeting. One group: a chunk
// takes 7.4 us; of 7.8 before the last step 6.6 were not waiting for sums. Next: two heads a walk,
// which share C B^T and add up their parts of dC and dB before they are passed on.
#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include "roles.cuh"
#include "scan.cuh"
#include "scan_backward.cuh"
#include "signal.cuh"
#include "ssd_backward_runs.cuh"
#include "ssd_chunk.cuh"
#include "ssd_scan_backward.cuh"
#include "wgmma.cuh"

namespace reasoners {
namespace {

constexpr int kGroup = 128, kGroups = 2;  // threads of a warpgroup, warpgroups that multiply
constexpr int kThreads = kGroup * (1 + kGroups), kWarps = kGroup / 32;
constexpr int kEights = kChunk / 8, kPanel = 64;  // columns

// What passes between the tokens of a chunk, for d log_decay.
template <int kParts>
struct alignas(16) Passed {
  // Sums over the rows of the r-th eight tokens, left of those; and what passes from before token i
  // to those of its eight from i on.
  float columns[kEights][kChunk], diagonal[kChunk];
  // What the state before gives to a token, a token to the state after; dscale. By the warpgroups
  // of a walk.
  float received[kParts][kChunk], given[kParts][kChunk], dscale[kParts][kChunk];
  float inner[kParts][kWarps];  // products of state and dstate
};

// Of tokens 2 lane and 2 lane + 1; and summed over the warpgroups.
__device__ inline float2 of_lane(const float* values) {
  return *reinterpret_cast<const float2*>(values + 2 * (threadIdx.x % 32));
}
template <int kParts>
__device__ float2 sum_parts(const float (&values)[kParts][kChunk]) {
  float2 sum = of_lane(values[0]);
#pragma unroll
  for (int w = 1; w < kParts; ++w) {
    const float2 more = of_lane(values[w]);
    sum = {sum.x + more.x, sum.y + more.y};
  }
  return sum;
}

// d log_decay of these tokens, by a warp.
template <int kParts>
__device__ float2 sum_passed(const Passed<kParts>& passed) {
  const int lane = threadIdx.x % 32;
  const auto sum_before = [&](float v) {  // of the lanes
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(~0u, v, offset);
      if (lane >= offset) v += before;
    }
    v = __shfl_up_sync(~0u, v, 1);
    return lane > 0 ? v : 0.f;
  };
  const int eight = lane / 4;
  float2 sum = of_lane(passed.diagonal);
#pragma unroll
  for (int later = 1; later < kEights; ++later) {
    float2 from = of_lane(passed.columns[later]);
    if (eight >= later) from = {0.f, 0.f};
    const float before = sum_before(from.x + from.y);
    if (eight < later) {
      sum.x += before;
      sum.y += before + from.x;
    }
  }
  const float2 given = sum_parts(passed.given), received = sum_parts(passed.received);
  const float before = sum_before(given.x + given.y);
  sum.x += before;
  sum.y += before + given.x;
  float after = received.x + received.y;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float later = __shfl_down_sync(~0u, after, offset);
    if (lane + offset < 32) after += later;
  }
  after = __shfl_down_sync(~0u, after, 1);
  if (lane == 31) after = 0.f;
  float inner = 0.f;
#pragma unroll
  for (int w = 0; w < kParts; ++w)
#pragma unroll
    for (int r = 0; r < kWarps; ++r) inner += passed.inner[w][r];
  sum.x += after + received.y + received.x + inner;
  sum.y += after + received.y + inner;
  return sum;
}

// Of a chunk's C B^T and dY X^T, whose rows are dealt (row_of), by a warpgroup: weighs them, to
// shared memory and the latter as the factor of a product, too, leaves what passes between tokens,
// and adds a thread's part of dD. Of the rows of one half all see a tile where the half's last tile
// is a later one; half of it where it is the last. Without a scale D is added to the diagonal.
// Where several warpgroups of a walk have all of it, one `leaves` what is for all.
template <bool kScales, typename data_t, int kParts>
__device__ void weigh_scores(
    const float2 (&c_from)[kEights], const float2 (&scale_from)[kScales ? kEights : 1],
    const float (&scores)[8][4], const float (&dscores)[8][4], const Scalars& scalars, float skip,
    const Panels<data_t, kChunk, kChunk>& to, const Panels<data_t, kChunk, kChunk>& dto,
    uint32_t (&seen)[kBlocks][4], Passed<kParts>& passed, float& dD, int r, bool leaves) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const float c_of[2] = {scalars.c[8 * r + g], scalars.c[56 - 8 * r + g]};
  float left[2] = {};  // what passes to a row from the eights before its own
  // Of seven tiles: of the second half the first four; then three, each either one of the first
  // half or, from the last on, one of the second.
  float columns[16] = {};
  float diagonal[2][2];
  const int offset = to.offset(16 * r + lane % 16, lane / 16);
  const uint32_t row = shared_address(&to) + offset, drow = shared_address(&dto) + offset;
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    uint32_t of_scores[4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int tile = 2 * k + e;
      const float2 scale_of = kScales ? scale_from[tile] : float2{};
      const auto put = [&](int half, float2 score, float2 dscore) {
        of_scores[2 * e + half] = pack<data_t>(score.x, score.y);
        seen[k][2 * e + half] = pack<data_t>(dscore.x, dscore.y);
      };
      const auto weigh = [&](int half, bool is_last) {
        float2 decay{exp2_fast(c_of[half] - c_from[tile].x),
                     exp2_fast(c_of[half] - c_from[tile].y)};
        float2 score{scores[tile][2 * half], scores[tile][2 * half + 1]},
            dscore{dscores[tile][2 * half], dscores[tile][2 * half + 1]};
        if (is_last) {
          if (2 * q == g) dD += dscore.x;
          if (2 * q + 1 == g) dD += dscore.y;
          if (2 * q > g) decay.x = 0.f;
          if (2 * q + 1 > g) decay.y = 0.f;
        }
        if (kScales) {
          dscore.x *= scale_of.x;
          dscore.y *= scale_of.y;
        }
        score.x *= decay.x;
        score.y *= decay.y;
        const float2 of{score.x * dscore.x, score.y * dscore.y};
        if (is_last && !kScales) {  // D dy, by the same product
          if (2 * q == g) score.x += skip;
          if (2 * q + 1 == g) score.y += skip;
        }
        put(half, score, {dscore.x * decay.x, dscore.y * decay.y});
        if (is_last) {
          diagonal[half][0] = 2 * q < g ? of.x : 0.f;
          diagonal[half][1] = 2 * q + 1 < g ? of.y : 0.f;
          return;
        }
        left[half] += of.x + of.y;
        const int slot = half == 0 ? 4 + tile : tile < 4 ? tile : 10 - tile;
        columns[2 * slot] = of.x;
        columns[2 * slot + 1] = of.y;
      };
      if (tile < 4) {
        weigh(1, false);
        if (tile < r)
          weigh(0, false);
        else if (tile == r)
          weigh(0, true);
        else
          put(0, {}, {});
      } else {
        put(0, {}, {});
        if (tile < 7 - r)
          weigh(1, false);
        else if (tile == 7 - r)
          weigh(1, true);
        else
          put(1, {}, {});
      }
    }
    if (!leaves) continue;
    store_matrices(row ^ 32 * k, of_scores[0], of_scores[1], of_scores[2], of_scores[3]);
    store_matrices(drow ^ 32 * k, seen[k][0], seen[k][1], seen[k][2], seen[k][3]);
  }
  if (!leaves) return;

  // The sums over eight rows of the tiles left of theirs: a lane gets two of a tile.
  using Sum = RowSums<StateRow<4 * 4, 4>, 16>;
  Sum::reduce(columns, lane);
  const int slot = Sum::first(lane) / 2;
  if (slot < 7) {
    const bool first_half = slot >= 4 && slot - 4 < r;
    const int tile = slot < 4 ? slot : first_half ? slot - 4 : 10 - slot;
    *reinterpret_cast<float2*>(&passed.columns[first_half ? r : 7 - r][8 * tile + 2 * q]) = {
        columns[0], columns[1]};
  }
  // Within eight tokens: what is left of column k, in the rows from k on.
  float sums[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float pair = diagonal[half][0] + diagonal[half][1];
    float before = __shfl_up_sync(~0u, pair, 1);
    float sum = q >= 1 ? pair + before : pair;
    before = __shfl_up_sync(~0u, sum, 2);
    if (q >= 2) sum += before;
    sum = __shfl_up_sync(~0u, sum, 1);
    sum = sum_row(left[half]) + (q >= 1 ? sum : 0.f);
    sums[half][0] = g >= 2 * q ? sum : 0.f;
    sums[half][1] = g >= 2 * q + 1 ? sum + diagonal[half][0] : 0.f;
  }
  const bool upper = lane & 16, odd = lane & 8;
  float two[2];
#pragma unroll
  for (int e = 0; e < 2; ++e)
    two[e] = (upper ? sums[1][e] : sums[0][e]) +
             __shfl_xor_sync(~0u, upper ? sums[0][e] : sums[1][e], 16);
  float one = (odd ? two[1] : two[0]) + __shfl_xor_sync(~0u, odd ? two[0] : two[1], 8);
  one += __shfl_xor_sync(~0u, one, 4);
  if (!(lane & 4)) passed.diagonal[8 * (upper ? 7 - r : r) + 2 * q + odd] = one;
}

// A walk has a warpgroup for every 64 columns of B and C.
template <typename data, int columns, int state_columns>
struct Tile {
  using data_t = data;
  static constexpr int kP = columns, kN = state_columns;
  static constexpr int kParts = kN / kPanel, kWalks = kGroups / kParts;
  static constexpr int kCopiers = kGroup / kWalks;                    // threads of a walk
  static constexpr int kWidth = (kP + kPanel - 1) / kPanel * kPanel;  // whole panels of x
  // Tiles of 8 columns of a state, and of those of dX that are a warpgroup's own.
  static constexpr int kTiles = kP / 8, kOwnTiles = kTiles / kParts;
  // Whether there are places for parts of gradients, so that the copy engine passes sums on.
  static constexpr bool kPasses = passes_by_copies(kP, kN);
  // Chunks on the way back, whose inputs come in three parts: x and B, the state before the chunk,
  // and, which are needed longer, C and dy.
  static constexpr int kStatePlaces = kWidth > kPanel || kPasses ? 1 : 2,
                       kPlaces = kParts == 1 ? kStatePlaces : 2;
  // Registers of the threads that copy and of those that multiply, of 168 at the start.
  static constexpr int kCopierRegisters = kP <= 96 ? 72 : 56,
                       kWalkerRegisters = kP <= 96 ? 216 : 224;
  using Rows = Panels<data_t, kChunk, kWidth>;
  using StateRows = Panels<data_t, kChunk, kN>;
  using States = Panels<data_t, kN, kWidth>;
  // A chunk's part of a gradient, or sums: a thread has every 256th tile.
  struct alignas(1024) Part {
    float4 at[kPanel / 8][kGroups * kGroup];
  };
  struct None {};
  struct Handed {
    std::conditional_t<kPasses, Part, None> part;
    uint64_t full, free;
  };
  struct Early {
    Rows x;
    StateRows b;
  };
  struct Late {
    Rows dy;
    StateRows c;
  };
  struct Shared {
    Early early[kPlaces];
    Late late[kPlaces];
    States state[kStatePlaces], dstate;
    Panels<data_t, kChunk, kChunk> scores, dscores;  // C B^T * L, dY U^T * L
    Scalars scalars[2];
    Passed<kParts> passed[2];
    Run run;
    int chunks;                        // of the run
    int x_column, b_column, c_column;  // where the first columns are that the head has
    Passing passing[3];                // of dC, dB and dx
    Link links[3];                     // the same, by the copy engine
    Handed own, so_far;                // the walk's part, for the copy engine; sums that it fetched
    float sums[kWarps];
    int drawn;
    uint64_t full[4][2], free[4][2];  // by Way
  };
  static constexpr int kBytes = kWalks * sizeof(Shared);
  static_assert(kBytes <= 232448);
};
enum Way { kForwards, kEarly, kState, kLate };

// Two threads pass a walk's gradients on by the copy engine: one fetches the sums so far for those
// who need them, the last head and the ends of chains; one adds the walk's own parts to sums in
// global memory. A part at a time, in the order in which the walk has them.
template <typename T>
struct Passer {
  const TileScratch& scratch;
  float* memory;
  typename T::Shared& shared;
  int walk;

  __device__ uint32_t* progress_of(int walk) const {
    return reinterpret_cast<uint32_t*>(memory + scratch.progress) + 1 +
           int64_t(walk) * kWarps * T::kParts;
  }
  // visit(n, which, turn, steps) of the parts, turns from 1 on, `steps` of them a chunk.
  template <typename Visit>
  __device__ void each_part(Visit&& visit) const {
    uint32_t order = 0;  // of the gradients that are shared, two bits each
    int steps = 0;
    for (int which : {0, 2, 1})
      if (scratch.gradient(which).count > 1) order |= which << 2 * steps++;
    uint32_t turn = 0;
    for (int n = 0; n < shared.chunks; ++n)
      for (int step = 0; step < steps; ++step)
        visit(n, static_cast<int>(order >> 2 * step & 3), ++turn, steps);
  }
  __device__ static int floats_of(int which) { return kChunk * (which < 2 ? T::kN : T::kP); }
  __device__ float* place_at(int64_t first, int places, int n, int which) const {
    return memory + first + int64_t(n < places ? n : n & (places - 1)) * floats_of(which);
  }

  __device__ void fetch_sums() const {
    int fetched = 0;
    each_part([&](int n, int which, uint32_t turn, int) {
      const Link& link = shared.links[which];
      if (!link.loads) return;
      const int bytes = floats_of(which) * sizeof(float);
      if (fetched > 0) wait_for(&shared.so_far.free, ~fetched & 1);
      ++fetched;
      wait_until(progress_of(walk - 1), turn);
      show_global_to_copies();
      arrive_expecting(&shared.so_far.full, bytes);
      copy_bulk(&shared.so_far.part, place_at(link.from, link.from_places, n, which), bytes,
                &shared.so_far.full);
    });
  }
  __device__ void add_parts() const {
    each_part([&](int n, int which, uint32_t turn, int steps) {
      const Link& link = shared.links[which];
      if (!link.is_last) {
        if (link.adds)
          wait_until(progress_of(link.other), turn);
        else if (n >= link.to_places)
          wait_until(progress_of(link.other), turn - steps * link.to_places);
        else if (link.before >= 0)
          wait_until(progress_of(link.before), kDone);
        show_global_to_copies();
      }
      wait_for(&shared.own.full, ~turn & 1);
      if (!link.is_last) {
        auto* to = place_at(link.to, link.to_places, n, which);
        auto* part = reinterpret_cast<const float*>(&shared.own.part);
        const int bytes = floats_of(which) * sizeof(float);
        link.adds ? add_bulk(to, part, bytes) : store_bulk(to, part, bytes);
        commit_bulk_stores();
        wait_bulk_stores_read();
      }
      arrive(&shared.own.free);
      if (!link.is_last) wait_bulk_stores();
      tell(progress_of(walk), turn);
    });
    tell_done(shared.chunks > 0, shared.links, walk, [&](int walk) { return progress_of(walk); });
  }
};

// 64 columns of a matrix, as a matrix.
template <typename data_t, int kRows, int kColumns>
__device__ auto& panel_of(Panels<data_t, kRows, kColumns>& m, int panel) {
  return *reinterpret_cast<Panels<data_t, kRows, kPanel>*>(reinterpret_cast<char*>(&m) +
                                                           panel * m.kPanel);
}

// kScales: there is a scale.
template <typename T, Sums kSums, bool kScales>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_scan_backward_wgmma_kernel(const SsdScanBackwardParams p, const TileScratch scratch,
                                   const int walks, const bool spread) {
#ifdef REASONERS_WGMMA
  using data_t = typename T::data_t;
  constexpr int kP = T::kP, kN = T::kN, kTiles = T::kTiles, kParts = T::kParts, kWidth = T::kWidth;
  constexpr int kWalks = T::kWalks, kWalkWarps = kWarps * kParts;
  // Whether half of the warps that copy pass sums on instead.
  constexpr bool kByCopies = kSums == Sums::kPassed && T::kPasses;
  constexpr int kCopiers = kByCopies ? T::kCopiers / 2 : T::kCopiers;
  constexpr int kPlaces = T::kPlaces, kStatePlaces = T::kStatePlaces;
  extern __shared__ __align__(1024) char shared_memory[];
  let_next_start();
  wait_for_inputs();
  const SsdScanParams& f = p.forward;
  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;
  const bool copies = warp < kWarps;
  // Of the block's walks, and of the walk's warpgroups.
  const int at = copies ? warp / (T::kCopiers / 32) : (warp / kWarps - 1) / kParts;
  const int w = copies ? 0 : (warp / kWarps - 1) % kParts, r = warp % kWarps;
  auto& shared = reinterpret_cast<typename T::Shared*>(shared_memory)[at];
  // Where all walks run at a time they are spread. Else walks wait for walks before them alone,
  // which have begun: so blocks take their places in the order in which they begin.
  const auto walk_of = [&](int block) {
    return spread ? block + at * static_cast<int>(gridDim.x) : block * kWalks + at;
  };
  int walk = walk_of(blockIdx.x);
  if (kSums == Sums::kPassed) {
    auto* counts = reinterpret_cast<uint32_t*>(p.scratch + scratch.progress);
    if (threadIdx.x == 0) shared.drawn = static_cast<int>(atomicAdd(counts, 1u));
    __syncthreads();
    walk = walk_of(same_in_warp(reinterpret_cast<typename T::Shared*>(shared_memory)->drawn));
  }
  // Of a walk's warp like this one.
  const auto progress_of = [&](int64_t walk) {
    return reinterpret_cast<uint32_t*>(p.scratch + scratch.progress) + 1 + walk * kWalkWarps +
           w * kWarps + r;
  };
  if (copies && walk < walks) {
    const Run run(f, scratch, walk);
    if (threadIdx.x % T::kCopiers == 0) {
      const auto column_of = [&](int sharing, int width) {
        return run.head / (f.heads / sharing) * width;
      };
      shared.run = run;
      shared.chunks = run.last_chunk - run.first_chunk;
      shared.x_column = column_of(f.x_heads, f.head_dim);
      shared.b_column = column_of(f.b_groups, f.state_dim);
      shared.c_column = column_of(f.c_groups, f.state_dim);
    }
  }
  if (copies && threadIdx.x % T::kCopiers == 0) {
    for (int way = 0; way < 4; ++way)
      for (int place = 0; place < 2; ++place) {
        init_barrier(&shared.full[way][place], kCopiers + (way == kState ? 0 : 2));
        init_barrier(&shared.free[way][place], kWalkWarps);
      }
    if (kByCopies) {
      init_barrier(&shared.own.full, kWalkWarps);
      init_barrier(&shared.own.free, 1);
      init_barrier(&shared.so_far.full, 1);
      init_barrier(&shared.so_far.free, kWalkWarps);
      show_barriers();
    }
    if (kSums == Sums::kPassed && !kByCopies && walk < walks) {
      for (int which = 0; which < 3; ++which)
        shared.passing[which] = scratch.gradient(which).passing_of(walk, f.heads);
    }
  }
  if (kByCopies && walk < walks && threadIdx.x < 3)
    shared.links[threadIdx.x] =
        scratch.gradient(threadIdx.x).link_of(walk, f.heads, kChunk * (threadIdx.x < 2 ? kN : kP));
  __syncthreads();
  const Run& run = shared.run;
  // By reference: read from shared memory where they are needed, as there are few registers.
  const int &head = run.head, &batch = run.batch, &begin = run.begin, &length = run.length,
            &first_chunk = run.first_chunk, &chunks = shared.chunks;
  const bool is_empty = walk >= walks || (!run.first && chunks == 0);  // there is no such run
  const int every = kParts > 1 ? scratch.kept.every : 1;
  const int steps = chunks > 0 ? (chunks - 1) / every * every : 0;  // forwards
  // On the way forwards two chunks of x and B have places, where there is one of the way back those
  // of dy and C, too.
  const auto place_of_x = [&](int n) -> typename T::Rows& {
    return kPlaces == 2 ? shared.early[n & 1].x : n & 1 ? shared.late[0].dy : shared.early[0].x;
  };
  const auto place_of_b = [&](int n) -> typename T::StateRows& {
    return kPlaces == 2 ? shared.early[n & 1].b : n & 1 ? shared.late[0].c : shared.early[0].b;
  };
  // Where 64 rows and columns of the state before a chunk are kept.
  struct Kept {
    data_t* data;
    int64_t stride;
  };
  const auto kept_at = [&](int chunk, int part, int panel) {
    const KeptStates& kept = scratch.kept;
    const int block = kParts > 1 ? part : panel;  // of 64 rows there
    const OwnRows& rows = kept.rows[every == 1 ? block : 0];
    const int t = (chunk - every) * kChunk + (every == 1 ? 0 : block * kChunk);
    const bool beside = kParts > 1 && every == 1 && kept.rows[0].data == kept.rows[1].data;
    const int column = kParts > 1 ? (panel + (beside ? part : 0)) * kPanel : 0;
    const int64_t token = opaque(batch) * f.length + opaque(begin + t);
    return Kept{static_cast<data_t*>(rows.data) + (token * f.heads + head) * rows.width + column,
                int64_t(f.heads) * rows.width};
  };

  if (copies) {
    keep_registers<T::kCopierRegisters>();
    const int thread = threadIdx.x % T::kCopiers;
    if constexpr (kByCopies)
      if (walk < walks) {
        const Passer<T> passer{scratch, p.scratch, shared, walk};
        if (thread == kCopiers) passer.add_parts();
        if (thread == kCopiers + 32) passer.fetch_sums();
      }
    if (is_empty || thread >= kCopiers) return;
    // ---- The warps that copy: the first makes the scalars, the second adds up d log_decay.
    // racecheck follows what they tell if all lanes of a warp arrive, not one for all.
    const bool is_first = thread < 32, is_second = thread / 32 == 1;
    const auto tell_full = [&](Way way, int place) {
      __syncwarp();
      if (lane == 0 && (is_first || is_second)) arrive(&shared.full[way][place]);
    };
    // Of the tokens from `t` on, of which `left` are there, the columns up to `width`. `place` says
    // in which row a token's lie. `wait`, if any, is for the place; addresses are there before.
    const auto copy_rows = [&](auto& to, int columns, const data_t* from, int64_t stride, int width,
                               int left, auto&& place, auto&&... wait) {
      constexpr int kRuns = 8, kStep = kCopiers / kRuns;
      // Whether registers are too few to keep what all copies need: spilled ones come back behind
      // the copies under way.
      constexpr bool kAnew = kWidth > kPanel || kParts > 1;
      const int run = thread % kRuns;
      int row = thread / kRuns;
      if constexpr (kAnew) {
        row = opaque(row);
        stride = opaque(stride);
      }
      const uint32_t target = shared_address(&to) + to.offset(row % 8, run);
      from += row * stride + run * 8;
      (wait(), ...);
#pragma unroll
      for (int panel = 0; panel < int(sizeof(to.at)) / to.kPanel; ++panel) {
        const int column = panel * kPanel + run * 8;
        if (column >= columns) continue;
        int there = column < width ? left - row : 0;
        if constexpr (kAnew) there = opaque(there);
        const data_t* at = from + panel * kPanel;
#pragma unroll
        for (int u = 0; u < kChunk / kStep; ++u, at += kStep * stride) {
          const int first = kStep == 8 || row < 8 ? place(u * kStep) : place(u * kStep + 8);
          copy_async_once(target + panel * to.kPanel + first * 128, at, there > u * kStep ? 16 : 0);
        }
      }
    };
    const auto in_order = [](int i) { return i; };
    const auto copy = [&](auto& to, int columns, const void* data, TokenStrides strides, int offset,
                          int width, int t, auto&&... how) {
      copy_rows(to, columns,
                static_cast<const data_t*>(data) + opaque(batch) * strides.batch +
                    opaque(begin + t) * strides.token + opaque(offset),
                strides.token, width, length - t, how...);
    };
    float next_decay[2], next_scale[2];  // of tokens 2 lane and 2 lane + 1
    const auto read_scalars = [&](int chunk) {
      if (!is_first) return;
      const int t = chunk * kChunk + 2 * lane;
      const auto read = [&](float (&to)[2], const float* data, TokenStrides strides,
                            float without) {
        const float* from =
            data + opaque(batch) * strides.batch + opaque(begin + t) * strides.token + head;
        to[0] = t < length ? from[0] : without;
        to[1] = t + 1 < length ? from[strides.token] : without;
      };
      read(next_decay, f.log_decay, f.log_decay_strides, 0.f);
      next_scale[0] = next_scale[1] = 1.f;
      if (kScales) read(next_scale, f.scale, f.scale_strides, 1.f);
    };

    const auto wait_for_place = [&](Way way, int n, int places) {
      return [=, &shared] {
        if (n >= places) wait_for(&shared.free[way][n % places], (n / places - 1) & 1);
      };
    };

    // Forwards.
    if (chunks > 0) read_scalars(first_chunk);
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      const int t = (first_chunk + n) * kChunk;
      wait_for_place(kForwards, n, 2)();
      copy(place_of_x(n), kP, f.x, f.x_strides, shared.x_column, f.head_dim, t, in_order);
      copy(place_of_b(n), kN, f.B, f.b_strides, shared.b_column, f.state_dim, t, in_order);
      arrive_after_copies(&shared.full[kForwards][n & 1]);
      if (is_first) put_scalars(shared.scalars[n & 1], next_decay, next_scale);
      tell_full(kForwards, n & 1);
      read_scalars(n + 1 < steps ? first_chunk + n + 1 : run.last_chunk - 1);
    }
    if (steps == 0 && chunks > 0) read_scalars(run.last_chunk - 1);
    for (int n = max(steps - 2, 0); n < steps; ++n)
      wait_for(&shared.free[kForwards][n & 1], n / 2 & 1);

    // d log_decay of a chunk, and dscale, a lane those of two tokens.
    const auto finish = [&](int n) {
      wait_for(&shared.free[kLate][n % kPlaces], n / kPlaces & 1);
      const auto& passed = shared.passed[n & 1];
      const float2 sum = sum_passed(passed);
      const float2 dscale = kScales ? sum_parts(passed.dscale) : float2{};
      const int t = (run.last_chunk - 1 - n) * kChunk + 2 * lane;
      const int64_t at = (int64_t(batch) * f.length + begin + t) * f.heads + head;
      if (t < length) {
        p.dlog_decay[at] = sum.x;
        if (kScales) p.dscale[at] = dscale.x;
      }
      if (t + 1 < length) {
        p.dlog_decay[at + f.heads] = sum.y;
        if (kScales) p.dscale[at + f.heads] = dscale.y;
      }
      __syncwarp();
    };

    // Backwards.
    const auto request_early = [&](int n) {
      const int t = (run.last_chunk - 1 - n) * kChunk;
      auto& to = shared.early[n % kPlaces];
      copy(to.b, kN, f.B, f.b_strides, shared.b_column, f.state_dim, t, in_order,
           wait_for_place(kEarly, n, kPlaces));
      copy(to.x, kP, f.x, f.x_strides, shared.x_column, f.head_dim, t, in_order);
      arrive_after_copies(&shared.full[kEarly][n % kPlaces]);
    };
    // The last one that is kept before the chunk or at it.
    const auto request_state = [&](int n) {
      const int chunk = (run.last_chunk - 1 - n - first_chunk) / every * every + first_chunk;
      wait_for_place(kState, n, kStatePlaces)();
      if (chunk > first_chunk)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int panel = 0; panel < kWidth / kPanel; ++panel) {
            const Kept kept = kept_at(chunk, part, panel);
            auto& rows = *reinterpret_cast<Panels<data_t, kPanel, kPanel>*>(
                reinterpret_cast<char*>(&panel_of(shared.state[n % kStatePlaces], panel)) +
                part * kPanel * 128);
            copy_rows(rows, kP - panel * kPanel, kept.data, kept.stride,
                      f.head_dim - panel * kPanel, kChunk, in_order);
          }
      arrive_after_copies(&shared.full[kState][n % kStatePlaces]);
    };
    const auto request_late = [&](int n) {
      const int chunk = run.last_chunk - 1 - n, t = chunk * kChunk, place = n % kPlaces;
      auto& to = shared.late[place];
      copy(to.c, kN, f.C, f.c_strides, shared.c_column, f.state_dim, t, row_of,
           wait_for_place(kLate, n, kPlaces));
      copy(to.dy, kP, p.dy, p.dy_strides, head * f.head_dim, f.head_dim, t, row_of);
      arrive_after_copies(&shared.full[kLate][place]);
      if (is_first) put_scalars(shared.scalars[n & 1], next_decay, next_scale);
      tell_full(kEarly, place);
      if (n + 1 < chunks) read_scalars(chunk - 1);
      // What `passed` had is to be read before it is written anew.
      if (kPlaces == 2 && is_second && n >= 2) finish(n - 2);
      tell_full(kLate, place);
      if (kPlaces == 1 && is_second && n >= 1) finish(n - 1);
    };
    // In the order in which places become free, first what is needed first.
#pragma unroll 1
    for (int n = -2; n < chunks; ++n) {
      const auto request = [&](int n, auto&& part) {
        if (n >= 0 && n < chunks) part(n);
      };
      if (kPlaces == 2) request(n + kStatePlaces, request_state);
      request(n + kPlaces, request_early);
      if (kPlaces == 1) request(n + kStatePlaces, request_state);
      request(n + kPlaces, request_late);
    }
    if (is_second)
#pragma unroll 1
      for (int n = max(chunks - kPlaces, 0); n < chunks; ++n) finish(n);
    wait_copies();
    return;
  }

  // ---- The warps that multiply.
  take_registers<T::kWalkerRegisters>();
  if (is_empty) {
    if (walk >= walks) return;
    if (kSums == Sums::kPassed && !kByCopies && lane == 0)
      tell_done(false, shared.passing, walk, progress_of);
    if (p.dD && w == 0 && r == 0 && lane == 0) p.scratch[scratch.dD + walk] = 0.f;
    return;
  }
  const int g = lane / 4, q = lane % 4;
  const float skip = f.D ? f.D[head] : 0.f;
  const auto meet = [&] { wait_at<kGroup * kParts>(1 + at); };
  const int n_part = w * kPanel, own_panel = kP > kPanel ? w : 0,
            p_part = w * (kP / kParts);  // the first of its columns of B, panel and column of dX
  using State = float[kTiles][4];
  // visit(value, offset) of what a thread has of a state tensor, (head_dim, state_dim).
  const auto each_value = [&](State& state, auto&& visit) {
    const int row = n_part + 16 * r + g;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int column = 8 * m + 2 * q + v % 2;
        visit(state[m][v], column < f.head_dim ? column * kN + row + v / 2 * 8 : -1);
      }
  };
  const auto read_state = [&](const float* data, State& to) {
    each_value(to, [&](float& value, int offset) {
      value = data != nullptr && offset >= 0 ? data[offset] : 0.f;
    });
  };
  const auto at_border = [&](int64_t states, int border) {
    return p.scratch + states + int64_t(border) * f.head_dim * kN;
  };
  const int64_t home = (int64_t(run.index) * f.heads + head) * f.head_dim * kN;
  const auto begin_of_run = [&]() -> const float* {
    if (!run.first) return at_border(scratch.border_states, run.border - f.heads);
    return f.initial_state ? f.initial_state + home : nullptr;
  };
  // The warp's 16 rows of a matrix, of fp32 as the products leave them, or packed.
  const auto pair_of = [](const auto& d, int n, int half) {
    if constexpr (std::is_same_v<std::decay_t<decltype(d[0][0])>, float>)
      return pack<data_t>(d[n][2 * half], d[n][2 * half + 1]);
    else
      return d[n][half];
  };
  // The warp's own rows of a state.
  const int own_row = n_part + 16 * r + lane % 16;
  const auto put_rows = [&](const auto& to, const auto& d) {
    store_rows<sizeof(d) / sizeof(d[0])>(to, n_part + 16 * r,
                                         [&](int n, int half) { return pair_of(d, n, half); });
  };
  // Rows of a panel or two to global memory, by the warp's rows of a state that nobody else reads
  // then, so that lanes write 16 bytes, and eight of them a row. Of the rows the first eight go to
  // those from `first` on of `to(panel)`, the others to those from `second` on, as far as there are
  // `count`; of columns there are `width`.
  const auto write_rows = [&](const auto& d, auto&& to, int64_t stride, int width, int first,
                              int second, int count, const typename T::States& by) {
    __syncwarp();
    put_rows(by, d);
    __syncwarp();
    const int row = lane / 8, run = lane % 8;
    constexpr int kCount = sizeof(d) / sizeof(d[0]);
#pragma unroll
    for (int panel = 0; panel < (kCount + 7) / 8; ++panel) {
      if (panel * kPanel + run * 8 >= min(width, kCount * 8)) continue;
      data_t* target = to(panel) + run * 8;
#pragma unroll
      for (int u = 0; u < 16; u += 4) {
        const int i = (u < 8 ? first + u : second + u - 8) + row;
        if (i < count)
          *reinterpret_cast<uint4*>(target + i * stride) = *reinterpret_cast<const uint4*>(
              reinterpret_cast<const char*>(&by) + by.offset(n_part + 16 * r + u + row, run) +
              panel * by.kPanel);
      }
    }
  };
  // visit(tile, half, pair) of 16 rows of a matrix, of which each lane names one, twice over.
  const auto each_pair = [&](const auto& from, int row_of_lane, int first, auto tiles,
                             auto&& visit) {
    const uint32_t row = shared_address(&from) + from.offset(row_of_lane, lane / 16);
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      uint32_t pairs[4];
      const int at = first + n;  // a tile
      load_matrices(pairs, (row ^ at % 8 * 16) + at / 8 * from.kPanel);
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          visit(n + e, half, unpack<data_t>(pairs[2 * e + half]));
    }
  };
  constexpr std::integral_constant<int, kPanel / 8> kPanelTiles{};
  constexpr std::integral_constant<int, kTiles> kAllTiles{};
  constexpr std::integral_constant<int, T::kOwnTiles> kOwnTiles{};
  const int chunk_row = 16 * r + lane % 16;  // one of the warp's 16 tokens
  // A state's rows that are the warpgroup's, as the columns of a product's B; and of a matrix those
  // columns that are its own of dX, as a tall one's.
  const auto own_rows_of = [&](const typename T::States& states) {
    return describe(states) + n_part * 128 / 16;
  };
  const auto own_columns_of = [&](auto& m) {
    return describe_tall(m) + (own_panel * m.kPanel + (p_part - own_panel * kPanel) * 2) / 16;
  };
  // state = whole state + (gain B)^T x, of the warpgroup's columns of B.
  const auto advance = [&](State& state, const Scalars& scalars, const typename T::Rows& x,
                           const typename T::StateRows& b) {
    uint32_t gained[kBlocks][4];
    load_weighed(gained, b, n_part + 16 * r, [&](int row) { return &scalars.gain[row]; });
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int v = 0; v < 4; ++v) state[m][v] *= scalars.whole;
    settle(state);
    settle(gained);
    begin_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      multiply_tall<data_t>(state, gained[k], describe_tall(x) + tall_step(k));
    commit_products();
    wait_for_products<0>();
    settle(state);
  };

  // Forwards over all chunks but the last one or two, leaving the states between them.
  {
    State state;
    read_state(begin_of_run(), state);
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      wait_for(&shared.full[kForwards][n & 1], n / 2 & 1);
      show_to_copies();
      advance(state, shared.scalars[n & 1], place_of_x(n), place_of_b(n));
      if ((n + 1) % every == 0)
        write_rows(
            state, [&](int panel) { return kept_at(first_chunk + n + 1, w, panel).data; },
            kept_at(first_chunk + n + 1, w, 0).stride, f.head_dim, 16 * r, 16 * r + 8, kChunk,
            shared.dstate);
      __syncwarp();
      if (lane == 0) arrive(&shared.free[kForwards][n & 1]);
    }
  }

  // ---- The way back.
  State dstate;
  read_state(run.last_chunk < run.chunks ? at_border(scratch.border_dstates, run.border)
                                         : p.dfinal_state + home,
             dstate);
  constexpr int kThreadsHere = kGroup * kParts;
  constexpr int kSteps = 2;  // of a chunk, in which sums are passed
  // Whether no later head has a part in a gradient.
  const auto is_last = [&](const PassedGradient& gradient, int which) {
    if (kSums != Sums::kPassed || gradient.count == 1) return true;
    return kByCopies ? shared.links[which].is_last
                     : shared.passing[which].member + 1 == gradient.count;
  };
  // Of a chunk whose first token is `t` the columns from `column` on of a head's.
  const auto write_gradient = [&](const auto& d, const PartedGradient& gradient, void* sum,
                                  int offset, int column, int t, int first, int second,
                                  const typename T::States& by) {
    const int64_t token = int64_t(batch) * f.length + begin + t;
    const int64_t stride = gradient.groups * gradient.width;
    write_rows(
        d,
        [&](int panel) {
          return static_cast<data_t*>(sum) + token * stride + offset + column + panel * kPanel;
        },
        stride, gradient.width - column, first, second, min(kChunk, length - t), by);
  };
  float dD = 0.f;
  // Hands a part over to the copy engine. Who needs the sums so far adds them; the last head keeps
  // what it has then, for `write`, which has the part's place to do it by.
  int handed = 0, fetched = 0;
  const auto hand_over = [&](auto& d, int which, auto&&... write) {
    if constexpr (kByCopies) {
      const Link& link = shared.links[which];
      constexpr int kCount = sizeof(d) / sizeof(d[0]);
      const int at = w * kGroup + threadIdx.x % kGroup;
      if (link.loads) {
        wait_for(&shared.so_far.full, fetched & 1);
        ++fetched;
#pragma unroll
        for (int m = 0; m < kCount; ++m) add_tile(d[m], shared.so_far.part.at[m][at]);
        __syncwarp();
        if (lane == 0) arrive(&shared.so_far.free);
      }
      if (handed > 0) wait_for(&shared.own.free, ~handed & 1);
      ++handed;
      if (!link.is_last)
#pragma unroll
        for (int m = 0; m < kCount; ++m)
          shared.own.part.at[m][at] = {d[m][0], d[m][1], d[m][2], d[m][3]};
      else
        (write(reinterpret_cast<const typename T::States&>(shared.own.part)), ...);
      show_to_copies();
      __syncwarp();
      if (lane == 0) arrive(&shared.own.full);
    }
  };
  // dB is handed over when the next chunk's first products are under way: right after dC it would
  // have to wait for the place.
  const bool hands_dB = kByCopies && scratch.dB.count > 1;
  float dB_before[kByCopies ? 8 : 1][4];  // of the chunk before
  const auto hand_dB = [&](int n) {
    if constexpr (kByCopies)
      hand_over(dB_before, 1, [&](const typename T::States& by) {
        write_gradient(dB_before, scratch.dB, p.dB, shared.b_column, n_part,
                       (run.last_chunk - 1 - n) * kChunk, 16 * r, 16 * r + 8, by);
      });
  };
  // Whether there are registers for the state's part of dC.
  constexpr bool kAhead = kP == 64 && kParts == 1;
  const int tokens[2] = {8 * r + g, 56 - 8 * r + g};  // of the rows of C and dy
#pragma unroll 1
  for (int n = 0; n < chunks; ++n) {
    const int chunk = run.last_chunk - 1 - n, t = chunk * kChunk;
    const int place = n % kPlaces, state_place = n % kStatePlaces;
    auto& early = shared.early[place];
    auto& late = shared.late[place];
    auto& before = shared.state[state_place];
    const Scalars& scalars = shared.scalars[n & 1];
    auto& passed = shared.passed[n & 1];
    // Gradients that heads share are added up: the sums of the heads so far pass from block to
    // block, warp to warp and thread to thread, those of dC in the first step of a chunk and the
    // others' in the second. A head waits, adds, leaves what it has, and tells; the last one writes
    // the gradient instead of leaving it. Or the copy engine passes them on (Passer).
    uint32_t* progress = progress_of(walk);
    const auto is_shared = [&](const PassedGradient& gradient) {
      return kSums == Sums::kPassed && gradient.count > 1;
    };
    const auto sums_of = [&](const PassedGradient& gradient, auto& d, int which) {
      const int place = n < gradient.places ? n : n & (gradient.places - 1);
      return reinterpret_cast<float4*>(p.scratch + gradient.parts) +
             int64_t(shared.passing[which].place + place) *
                 (sizeof(d) / sizeof(d[0]) * kThreadsHere) +
             w * kGroup + threadIdx.x % kGroup;
    };
    const auto wait_for_before = [&](const PassedGradient& gradient, int which, int step) {
      const Passing& passing = shared.passing[which];
      if (passing.member > 0)
        wait_until(progress - kWalkWarps, kSteps * n + step);
      else if (n >= gradient.places)
        wait_until(progress + (gradient.count - 1) * kWalkWarps,
                   kSteps * (n - gradient.places) + step);
      else if (passing.before >= 0)
        wait_until(progress_of(passing.before), kDone);
    };
    const auto add_before = [&](const PassedGradient& gradient, auto& d, int which) {
      if (shared.passing[which].member == 0) return;
      add_sums<kThreadsHere>(d, sums_of(gradient, d, which));
    };
    const auto leave = [&](const PassedGradient& gradient, auto& d, int which) {
      if (!is_last(gradient, which)) leave_sums<kThreadsHere>(d, sums_of(gradient, d, which));
    };
    const auto tell_step = [&](int step) {
      __syncwarp();
      if (lane == 0) tell(progress, kSteps * n + step);
    };

    // The gradient of the state after the chunk, for the products with it.
    __syncwarp();
    put_rows(shared.dstate, dstate);
    wait_for(&shared.full[kEarly][place], n / kPlaces & 1);
    wait_for(&shared.full[kState][state_place], n / kStatePlaces & 1);
    const int past = kParts > 1 ? (chunk - first_chunk) % every : 0;  // chunks since a kept state
    if (chunk - past == first_chunk || past > 0) {
      State state;
      if (chunk - past == first_chunk)
        read_state(begin_of_run(), state);
      else
        each_pair(before, own_row, 0, kAllTiles, [&](int m, int half, float2 pair) {
          state[m][2 * half] = pair.x;
          state[m][2 * half + 1] = pair.y;
        });
      if constexpr (kParts > 1)
        if (past > 0) {
          wait_for(&shared.full[kEarly][place ^ 1], (n + 1) / kPlaces & 1);
          show_to_copies();
          advance(state, shared.scalars[(n + 1) & 1], shared.early[place ^ 1].x,
                  shared.early[place ^ 1].b);
        }
      put_rows(before, state);
      __syncwarp();
    }
    wait_for(&shared.full[kLate][place], n / kPlaces & 1);
    show_to_copies();
    meet();

    float scores[8][4], dscores[8][4], dc[8][4];
    const auto begin_dc = [&] {
#pragma unroll
      for (int k = 0; k < kP / 16; ++k)
        multiply_shared<data_t>(dc, describe(late.dy) + depth_step<kChunk>(k),
                                own_rows_of(before) + depth_step<kN>(k), k > 0);
      commit_products();
    };
    begin_products();
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
      multiply_shared<data_t>(scores, describe(late.c) + depth_step<kChunk>(k),
                              describe(early.b) + depth_step<kChunk>(k), k > 0);
#pragma unroll
    for (int k = 0; k < kP / 16; ++k)
      multiply_shared<data_t>(dscores, describe(late.dy) + depth_step<kChunk>(k),
                              describe(early.x) + depth_step<kChunk>(k), k > 0);
    commit_products();
    if (kAhead) begin_dc();
    if (hands_dB && n > 0) hand_dB(n - 1);
    {
      float parts[4] = {};
      each_pair(before, own_row, 0, kAllTiles, [&](int m, int half, float2 state) {
        parts[2 * half] = fmaf(state.x, dstate[m][2 * half], parts[2 * half]);
        parts[2 * half + 1] = fmaf(state.y, dstate[m][2 * half + 1], parts[2 * half + 1]);
      });
      const float inner = sum_warp((parts[0] + parts[1]) + (parts[2] + parts[3]));
      if (lane == 0) passed.inner[w][r] = inner * scalars.whole;
    }
    // What the tokens are weighed with that are seen.
    float2 c_from[kEights], scale_from[kScales ? kEights : 1];
#pragma unroll
    for (int tile = 0; tile < kEights; ++tile) {
      c_from[tile] = *reinterpret_cast<const float2*>(&scalars.c[8 * tile + 2 * q]);
      if constexpr (kScales)
        scale_from[tile] = *reinterpret_cast<const float2*>(&scalars.scale[8 * tile + 2 * q]);
    }
    wait_for_products<kAhead ? 1 : 0>();
    settle(scores);
    settle(dscores);

    uint32_t seen[kBlocks][4];  // (dY U^T * L) as the factor of a product
    weigh_scores<kScales>(c_from, scale_from, scores, dscores, scalars, skip, shared.scores,
                          shared.dscores, seen, passed, dD, r, kParts == 1 || w == 0);

    // dC and dB: the part of the state's, weighed and summed with the other factor, then the part
    // of the chunk's tokens. `of` are the rows' tokens.
    const auto weigh = [&](auto& d, const float* weight, const int (&of)[2], const auto& factor,
                           float* sums) {
      const float weights[2] = {weight[of[0]], weight[of[1]]};
      float dots[2] = {};
      each_pair(factor, chunk_row, n_part / 8, kPanelTiles, [&](int m, int half, float2 pair) {
        d[m][2 * half] *= weights[half];
        d[m][2 * half + 1] *= weights[half];
        dots[half] = fmaf(d[m][2 * half], pair.x, dots[half]);
        dots[half] = fmaf(d[m][2 * half + 1], pair.y, dots[half]);
      });
      dots[0] = sum_row(dots[0]);
      dots[1] = sum_row(dots[1]);
      if (q < 2) sums[q == 0 ? of[0] : of[1]] = q == 0 ? dots[0] : dots[1];
    };
    const int rows[2] = {16 * r + g, 16 * r + g + 8};
    float db[8][4];
    begin_products();
    if (!kAhead) begin_dc();
#pragma unroll
    for (int k = 0; k < kP / 16; ++k)
      multiply_shared<data_t>(db, describe(early.x) + depth_step<kChunk>(k),
                              own_rows_of(shared.dstate) + depth_step<kN>(k), k > 0);
    commit_products();
    wait_for_products<1>();
    settle(dc);
    weigh(dc, scalars.since, tokens, late.c, passed.received[w]);
    settle(dc);
    settle(seen);
    begin_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      multiply_tall<data_t>(dc, seen[k], describe_tall(panel_of(early.b, w)) + tall_step(k));
    commit_products();
    wait_for_products<1>();
    settle(db);
    weigh(db, scalars.gain, rows, early.b, passed.given[w]);
    wait_for_products<0>();
    settle(dc);

    if (kByCopies && is_shared(scratch.dC)) {
      hand_over(dc, 0);
    } else if (is_shared(scratch.dC)) {
      wait_for_before(scratch.dC, 0, 1);
      add_before(scratch.dC, dc, 0);
      leave(scratch.dC, dc, 0);
      tell_step(1);
    }
    uint32_t packed[8][2];  // dC
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) packed[m][half] = pair_of(dc, m, half);
    float du[T::kOwnTiles][4];  // of the warpgroup's columns
    begin_products();
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
      multiply_shared<data_t, false, true>(du, describe(early.b) + depth_step<kChunk>(k),
                                           own_columns_of(shared.dstate) + tall_step(k), k > 0);
    commit_products();
    uint32_t weighed[kBlocks][4];
    load_weighed(weighed, late.c, n_part + 16 * r,
                 [&](int row) { return &scalars.since[token_of(row)]; });
    wait_for_products<0>();
    settle(du);
    {
      const float until[2] = {scalars.until[rows[0]], scalars.until[rows[1]]};
#pragma unroll
      for (int m = 0; m < T::kOwnTiles; ++m)
#pragma unroll
        for (int v = 0; v < 4; ++v) du[m][v] *= until[v / 2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int v = 0; v < 4; ++v) dstate[m][v] *= scalars.whole;
    }
    // Now all scores are there, and nobody reads dstate any more.
    show_to_copies();
    meet();
    if (lane == 0) {
      if (!kScales) arrive(&shared.free[kEarly][place]);
      arrive(&shared.free[kState][state_place]);
    }
    settle(db);
    settle(du);
    settle(dstate);
    settle(weighed);
    begin_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      multiply_shared<data_t, true, true>(db, describe_tall(shared.dscores) + tall_step(k),
                                          describe_tall(panel_of(late.c, w)) + tall_step(k), true);
    commit_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      multiply_shared<data_t, true, true>(du, describe_tall(shared.scores) + tall_step(k),
                                          own_columns_of(late.dy) + tall_step(k), true);
    commit_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      multiply_tall<data_t>(dstate, weighed[k], describe_tall(late.dy) + tall_step(k));
    commit_products();

    if (is_last(scratch.dC, 0))
      write_gradient(packed, scratch.dC, p.dC, shared.c_column, n_part, t, tokens[0] - g,
                     tokens[1] - g, shared.dstate);
    wait_for_products<2>();
    settle(db);
    if (kSums == Sums::kNone)
      write_gradient(db, scratch.dB, p.dB, shared.b_column, n_part, t, 16 * r, 16 * r + 8,
                     shared.dstate);
    wait_for_products<0>();
    settle(du);
    settle(dstate);
    if constexpr (kScales) {
      // dX from dU, and dscale.
      float dscale[2] = {};
      each_pair(early.x, chunk_row, p_part / 8, kOwnTiles, [&](int m, int half, float2 x) {
        dscale[half] = fmaf(du[m][2 * half], x.x, fmaf(du[m][2 * half + 1], x.y, dscale[half]));
      });
      dscale[0] = sum_row(dscale[0]);
      dscale[1] = sum_row(dscale[1]);
      if (q < 2) passed.dscale[w][rows[0] + 8 * q] = q == 0 ? dscale[0] : dscale[1];
      const float scale_of[2] = {scalars.scale[rows[0]], scalars.scale[rows[1]]};
      each_pair(late.dy, row_of(chunk_row), p_part / 8, kOwnTiles, [&](int m, int half, float2 dy) {
        float& low = du[m][2 * half];
        float& high = du[m][2 * half + 1];
        low = fmaf(scale_of[half], low, skip * dy.x);
        high = fmaf(scale_of[half], high, skip * dy.y);
      });
    }
    __syncwarp();
    if (lane == 0) {
      if (kScales) arrive(&shared.free[kEarly][place]);
      arrive(&shared.free[kLate][place]);
    }
    if (kSums == Sums::kPassed) {
      const bool shares_dB = is_shared(scratch.dB), shares_dx = is_shared(scratch.dx);
      if constexpr (kByCopies) {
        if (shares_dx) hand_over(du, 2);
#pragma unroll
        for (int m = 0; m < 8; ++m)
#pragma unroll
          for (int v = 0; v < 4; ++v) dB_before[m][v] = db[m][v];
      } else {
        if (shares_dB) wait_for_before(scratch.dB, 1, 2);
        // One wait does where the same heads share both.
        if (shares_dx && !(shares_dB && scratch.dB.count == scratch.dx.count))
          wait_for_before(scratch.dx, 2, 2);
        if (shares_dB) add_before(scratch.dB, db, 1);
        if (shares_dx) add_before(scratch.dx, du, 2);
        if (shares_dB) leave(scratch.dB, db, 1);
        if (shares_dx) leave(scratch.dx, du, 2);
        if (shares_dB || shares_dx) tell_step(2);
      }
      if (!hands_dB && is_last(scratch.dB, 1))
        write_gradient(db, scratch.dB, p.dB, shared.b_column, n_part, t, 16 * r, 16 * r + 8,
                       shared.dstate);
    }
    if (is_last(scratch.dx, 2))
      write_gradient(du, scratch.dx, p.dx, shared.x_column, p_part, t, 16 * r, 16 * r + 8,
                     shared.dstate);
  }
  if (hands_dB && chunks > 0) hand_dB(chunks - 1);

  if (kSums == Sums::kPassed && !kByCopies && lane == 0)
    tell_done(chunks > 0, shared.passing, walk, progress_of);
  if (p.dinitial_state && run.first)
    each_value(dstate, [&](float& value, int offset) {
      if (offset >= 0) p.dinitial_state[home + offset] = value;
    });
  if (p.dD) {
    dD = sum_warp(dD);
    if (lane == 0 && w == 0) shared.sums[r] = dD;
    meet();
    if (w == 0 && r == 0 && lane == 0)
      p.scratch[scratch.dD + walk] =
          shared.sums[0] + shared.sums[1] + shared.sums[2] + shared.sums[3];
  }
#endif
}

template <typename Use>
void with_tile(const SsdScanParams& f, const Use& use) {
  const auto of = [&](auto zero) {
    using data_t = decltype(zero);
    if (f.state_dim > kPanel)
      return f.head_dim <= 64 ? use(Tile<data_t, 64, 128>()) : use(Tile<data_t, 128, 128>());
    if (f.head_dim <= 64) return use(Tile<data_t, 64, 64>());
    if (f.head_dim <= 96) return use(Tile<data_t, 96, 64>());
    use(Tile<data_t, 128, 64>());
  };
  f.dtype == DType::kBFloat16 ? of(__nv_bfloat16()) : of(__half());
}

}  // namespace

int count_ssd_scan_backward_wgmma_walks(const SsdScanParams& f, const KeptStates& kept) {
  if (f.state_dim != 64 && f.state_dim != 128) return 0;
  int walks = 0;
  with_tile(f, [&](auto tile) {
    using T = decltype(tile);
    // Whether states lie in whole rows, 64 columns or two chunks of head_dim at a time.
    bool fits;
    const bool same = kept.rows[0].where == kept.rows[1].where;
    const int width = std::min(kept.rows[0].width, kept.rows[1].width);
    if (T::kParts == 1)
      fits = kept.every == 1 && width == kPanel;
    else if (kept.every == 2)
      fits = width >= f.head_dim;
    else
      fits = width >= (same ? 2 * kPanel : f.head_dim);
    if (fits) walks = T::kWalks;
  });
  const bool runs =
      runs_here(ssd_scan_backward_wgmma_kernel<Tile<__half, 64, 64>, Sums::kNone, false>);
  return runs ? walks : 0;
}

void launch_ssd_scan_backward_wgmma(const SsdScanBackwardParams& p, const TileScratch& scratch,
                                    int walks, cudaStream_t stream) {
  with_tile(p.forward, [&](auto tile) {
    using T = decltype(tile);
    const auto launch = [&](auto scales) {
      const auto kernel = scratch.counts > 0
                              ? ssd_scan_backward_wgmma_kernel<T, Sums::kPassed, scales()>
                              : ssd_scan_backward_wgmma_kernel<T, Sums::kNone, scales()>;
      const int processors = count_processors();
      // Where sums are passed neighbours are better off in a block.
      const bool spread = walks <= processors * (scratch.counts > 0 ? 1 : T::kWalks);
      const int blocks = spread ? std::min(walks, processors) : (walks + T::kWalks - 1) / T::kWalks;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBytes);
      launch_overlapping(kernel, blocks, kThreads, T::kBytes, stream, p, scratch, walks, spread);
    };
    p.forward.scale ? launch(std::true_type()) : launch(std::false_type());
  });
}

}  // namespace reasoners
