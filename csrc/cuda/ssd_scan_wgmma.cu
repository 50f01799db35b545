// ssd_scan.cu's recurrence on Hopper: the same chunks, segments and products, by warpgroups whose
// tensor cores read shared memory by themselves (wgmma.cuh).
//
// A block has two warpgroups that multiply and one that copies. Of head_dim above 64 the two share
// a head, each with up to 64 of its columns of x; of more than 64 columns of B and C each has a
// head, and the two heads lie in the same groups. So a chunk's B and C are copied once for both.
// Smaller heads are walked by one warpgroup each, with chunks, and half of the threads that copy,
// of its own. Where larger heads that share B and C do not come in pairs, ssd_walk.cuh serves.
//
// Of a chunk, where the products of a line are under way while the next line is computed:
//   scores = C B^T               the state's copy in the data's type, to shared memory
//   y = C S^T                    mask and weigh scores; gain x
//   y weighed, y += scores x     S = whole S
//   S += (gain x)^T B            y out, by the free one of the state's copies
// D x is added to y as D on the diagonal of the scores. The warpgroups read nothing of each other,
// do not meet, and fill each other's gaps. Of up to 64 columns of B and C, whose state leaves
// registers for it, a chunk's scores are found while the y before is on its way out, with C, the
// factor of both of its products, in registers. Copies wait for nothing but a free place among
// three: they tell by themselves that a chunk is here (`full`). Of 64 columns of B and C the copy
// engine brings tiles, unless sequences are packed.
//
// Token i sees the tokens up to i alone. So that all warps have as much to weigh, warp r has the
// rows of the r-th eight tokens and of the r-th last: C lies in that order, and so does y at first.
//
// A head's row of x is 128 bytes, and so are those of B and C: memory is fast where what is read
// at a time lies side by side, which is what neighbouring heads of the same tokens read. So walks
// that run at a time have neighbouring heads, begin and end together, and are kept together. Where
// sequences and heads are more than what is walked at a time, Runs says how. Where they are few,
// segments are dealt as in ssd_scan.cu. Neither changes a bit.
//
// Of a thread's 232 registers, N 128: 128 for the state, carried and local, 32 for y, 32 for scores
// or the state's copy on its way.
//
//   P, N           64, 64   128, 64   64, 128   128, 128
//   walks               2         1         1          1     of a block
//   shared, kB        190       136       221        218     one block a multiprocessor
//
// H200, bfloat16, us, and the share of a copy's 4.25 TB/s that the necessary bytes reach; in
// brackets, of another run, this version and the one before it in turn, whose runs ended between
// segments and whose threads copied everything:
//   Llamba-1B 8 x 4096    138  92 %   (139, 154)  Llamba-3B 8 x 4096     187  64 %  (182, 193)
//             64 x 512    155  82 %   (155, 162)            1 x 4096      47  32 %    (46, 47)
//             512 x 512  1156  88 % (1290, 1354)  Llamba-8B 8 x 4096     254  75 %  (254, 264)
//             1 x 2048   23.4  34 %    (24, 23)   24 heads of 128 x 128  287  66 %  (305, 305)
//             1 x 32768   209  61 %   (209, 220)    x and B of 8 heads   274  46 %  (271, 271)
//             1 x 131072  833  61 %   (821, 921)  80 of 64 x 128, one    446  37 %  (461, 469)
//   32 of 64 x 64, x and B of 8 heads    126  63 %  (138, 156)  group, 64 x 512  512  (498, 481)
//             1 x 32768                  197  41 %  (175, 198)
// Devices differ, and one that has been busy for long takes up to 10 % more: at 700 W its clocks
// fall. So versions are to be timed in turn (bench/versions.py).
//
// What limits, by leaving parts out before most of what follows was done: nothing but copies,
// copies and y, all but copies, all. 64 x 64, 8 x 4096: 96, 133, 110, 134, so it is memory; 64 x
// 512, heads one after the other: 121, 169, 121, 171, so it was the order in which memory is read.
// 96 x 64: 114, 161, 169, 198. One group: 243, 330, 380, 436: B and C for 40 pairs of heads are 1
// GB out of the second-level cache. In these it is the chunk loop, 3,000 cycles and more a chunk at
// 42 % of issue slots and 62 to 71 % of shared memory's rate, behind which copies do not quite
// hide. Where a sequence is long x and B are read twice, which cannot take less than 192 of 1 x
// 32768's 204.
//
// What helped, in this order: neighbouring heads at a time (64 x 512 13 %, one group 5 to 9 %); the
// chunks' scalars by the copying warps in turn, of which one used to wait for decays a third of its
// time (96 x 64 6 %); few segments where they are dealt (1 x 32768 15 %); C out of registers, no
// scale read where there is none (2 to 4 %); runs that end between any two chunks, for which a walk
// leaves what is local, too (64 x 64 3 to 8 %); tiles of 64 columns by the copy engine (2 to 5 %;
// of 128 columns 7 % slower, as C comes eight rows at a time). What did not: y's way out, and the
// state's, under the next chunk's products (96 x 64 14 % slower, one group 6 %); scores weighed
// without branches; three places more for what segments add (memory is read further apart: 3 %
// slower); lines of 256 bytes asked for; y past the cache. One C B^T for both heads of a group
// would move as many bytes in shared memory as it spares; scores ahead at N 128 spill.
//
// A long sequence in one kernel has been tried three times (1 x 2048, 32768, 131072):
//   segments of x, B and C kept in shared memory between what they add to y and their walk, states
//     handed on by tickets: 24, 365, 1454. Two segments a multiprocessor leave each step bare.
//   the same in clusters of 4 or 7 blocks for a head: 26, 289, 1096. A round of seven segments of
//     32 heads takes 15 us, of which its bytes need 7.
//   all blocks at once, each walk finding what its next segment adds before it walks this one, so
//     that x and B are read again out of the second-level cache, while four more warps a block
//     carry states from segment to segment: 23, 295, 1124.
//
// Next: B and C of one group for several blocks of a cluster at once; whole chunks of packed
// sequences by the copy engine.
#include <algorithm>
#include <climits>
#include <numeric>
#include <type_traits>

#include "async_copy.cuh"
#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include "roles.cuh"
#include "scan.cuh"
#include "signal.cuh"
#include "ssd_chunk.cuh"
#include "ssd_deal.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace reasoners {
namespace {

constexpr int kGroup = 128, kGroups = 2, kWidth = 64;  // threads, warpgroups, columns of x of each
constexpr int kThreads = kGroup * (1 + kGroups);
constexpr int kStages = 3;
// Registers of the threads that copy and of those that multiply, of 168 at the start.
constexpr int kCopierRegisters = 40, kWalkerRegisters = 232;

// Segments of a sequence. What so many add a walk reads sooner than carry_kernel starts, and makes
// of it the state before its first one by itself.
constexpr int kMostFolded = 8;

// A ticket is left as it was found.
__device__ inline void put_ticket(uint32_t* ticket) { tell(ticket, 1); }
__device__ inline void take_ticket(uint32_t* ticket) {
  wait_until(ticket, 1);
  *ticket = 0;
}

// What is walked without a break: some chunks of a sequence, for the walk's heads.
struct Piece {
  Sequence sequence;
  int index, first_head;  // `index` of the sequence
  int first_chunk, last_chunk;
  Segments segments;
  int x_column[kGroups], b_column, c_column;  // where the first columns are that a head has

  __device__ int length() const { return static_cast<int>(sequence.end - sequence.begin); }
  __device__ int chunks() const { return (length() + kChunk - 1) / kChunk; }
};

// How sequences of one length are dealt where those of all heads are more than what is walked at a
// time: to `count` runs, each of `whole` and `more` / `count` of them, so that nobody waits for a
// last, half empty wave. Of a run comes
//   first the beginning of a sequence of which the next run has the rest,
//   then whole ones, which are dealt in the order in which runs come to them,
//   last the rest of a sequence, whose beginning the run before left long ago.
// So all runs begin and end together, and those that are at the same tokens have neighbouring
// heads. Every `period` runs one ends with a sequence.
struct Runs {
  int count, whole, more, period;
};

// How many walks there are without runs, of so many blocks a sequence if it is dealt.
template <int kHeads>
__device__ __host__ int64_t count_walks(const SsdScanParams& p, int blocks = 0) {
  return p.sequences * (p.heads / kHeads) * (blocks > 0 ? blocks : 1);
}

// The pieces of a walk. Without runs there is one at most, as `deal` says.
template <int kHeads>
struct Pieces {
  int walk, count;
  int begun, left;  // with runs: chunks of the sequence begun first, and of that begun before

  __device__ Pieces(const SsdScanParams& p, const Deal& deal, const Runs& runs, int walk)
      : walk(walk), count(0) {
    if (runs.count > 0) {
      const int64_t chunks = (p.length + kChunk - 1) / kChunk;
      begun = static_cast<int>(chunks * after(runs, walk) / runs.count);
      left = static_cast<int>(chunks * after(runs, walk - 1) / runs.count);
      count =
          (begun > 0) + runs.whole - (after(runs, walk) > runs.more) + (after(runs, walk - 1) > 0);
    } else if (walk < count_walks<kHeads>(p, deal.blocks)) {
      const Piece piece = at(0, p, deal, runs);
      count = deal.blocks == 0 || piece.first_chunk == 0 || piece.first_chunk < piece.last_chunk;
    }
  }
  // What a run has after the last sequence that it ends, in parts of which a sequence has `count`.
  __device__ static int after(const Runs& runs, int walk) {
    return (walk + 1) * runs.more % runs.count;
  }
  __device__ Piece at(int k, const SsdScanParams& p, const Deal& deal, const Runs& runs) const {
    const int units = p.heads / kHeads;
    int whole, first = 0, last = INT_MAX;  // `whole`: the heads of a sequence
    if (runs.count > 0) {
      const int periods = walk / runs.period, shared = walk - periods;
      if (k == 0 && begun > 0) {
        whole = shared;
        last = begun;
      } else if (k == count - 1 && after(runs, walk - 1) > 0) {
        whole = shared - 1;
        first = left;
      } else {
        whole = runs.count - runs.count / runs.period + (k - (begun > 0)) * runs.count +
                after(runs, walk) + periods;
      }
    } else {
      const int blocks = max(deal.blocks, 1), place = walk / units;
      whole = place / blocks * units + walk % units;
    }
    Piece piece;
    piece.index = whole / units;
    piece.first_head = whole % units * kHeads;
    piece.sequence = sequence_at(p.cu_seqlens, p.length, piece.index);
    piece.segments = Segments(deal.most, piece.length());
    if (deal.blocks > 0) {
      const int segment = walk / units % deal.blocks * deal.each;
      first = piece.segments.first_chunk(segment);
      last = piece.segments.first_chunk(segment + deal.each);
    }
    piece.first_chunk = first;
    piece.last_chunk = min(last, piece.chunks());
    const auto column_of = [&](int head, int sharing, int row_size) {
      return head / (p.heads / sharing) * row_size;
    };
    for (int h = 0; h < kHeads; ++h)
      piece.x_column[h] = column_of(piece.first_head + h, p.x_heads, p.head_dim);
    piece.b_column = column_of(piece.first_head, p.b_groups, p.state_dim);
    piece.c_column = column_of(piece.first_head, p.c_groups, p.state_dim);
    return piece;
  }
};

// What is walked in a block: kWalks walks by as many warpgroups each as that leaves, of kHeads
// heads, 1 or as many.
template <typename data, int columns, int walks, int heads>
struct Tile {
  using data_t = data;
  static constexpr int kN = columns, kWalks = walks, kHeads = heads;
  static constexpr int kTogether = kGroups / kWalks;  // warpgroups of a walk
  static constexpr int kCopiers = kGroup / kWalks;    // threads
  static_assert(kHeads == 1 || kHeads == kTogether);
  static constexpr bool kEngine = kN == kTileColumns;  // whether the copy engine is faster

  struct Stage {
    Panels<data_t, kChunk, kWidth> x[kTogether];
    Panels<data_t, kChunk, kN> b, c;
  };
  struct Walk {
    Stage stages[kStages];
    Panels<data_t, kWidth, kN> states[kTogether][2];  // one in use while the next is written
    Scalars scalars[kStages][kHeads];
    Pieces<kHeads> pieces;
    // The one under way, and those before whose last chunks are, one after the other.
    Piece piece[kStages + 1];
    uint64_t full[kStages], free[kStages];
  };
};

// Where the copy engine brings tiles, if Tile::kEngine: `there` unless sequences are packed, whose
// neighbours it would bring, or B and C have less than a tile's columns. Columns of x past a head's
// are of no consequence.
struct Maps {
  TensorMap x, b, c;
  bool there;
};

// kAdds: leaves what each segment adds, and no y. kScales: there is a scale. `folds`: no
// carry_kernel came between.
template <typename T, bool kAdds, bool kScales>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_scan_wgmma_kernel(const SsdScanParams p, const Deal deal, const Runs runs, const bool folds,
                          const __grid_constant__ Maps maps) {
#ifdef REASONERS_WGMMA
  using data_t = typename T::data_t;
  constexpr int kN = T::kN, kWalks = T::kWalks, kHeads = T::kHeads, kTogether = T::kTogether,
                kCopiers = T::kCopiers;
  extern __shared__ __align__(1024) char shared_memory[];
  // Where the kernel before is of this scan, the inputs were there before it let this one start:
  // copies begin at once, past the first-level cache, which may have what was there before.
  if (!kAdds) let_next_start();
  if (kAdds || deal.blocks == 0 || p.cu_seqlens != nullptr) wait_for_inputs();
  if (kAdds) let_next_start();

  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;
  constexpr int kPart = kHeads < kTogether ? kWidth : 0;  // of a head's x, from group to group
  const bool copies = warp < kGroup / 32;
  const int at = kWalks == 1 ? 0 : copies ? warp / (kCopiers / 32) : warp / 4 - 1;  // of kWalks
  auto& shared = reinterpret_cast<typename T::Walk*>(shared_memory)[at];
  if (copies && threadIdx.x % kCopiers == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.full[s], (T::kEngine && maps.there ? 1 : kCopiers) + kHeads);
      init_barrier(&shared.free[s], kTogether * kGroup / 32);
    }
    show_barriers();
    // A block has neighbours, which are mostly as long, unless that left multiprocessors without a
    // walk. A run waits for the one before it, which is no later block's.
    const int walk = count_walks<kHeads>(p, deal.blocks) > gridDim.x
                         ? static_cast<int>(blockIdx.x) * kWalks + at
                         : static_cast<int>(blockIdx.x + at * gridDim.x);
    shared.pieces = Pieces<kHeads>(p, deal, runs, walk);
    if (shared.pieces.count > 0) shared.piece[0] = shared.pieces.at(0, p, deal, runs);
  }
  __syncthreads();
  if (copies) {
    keep_registers<kCopierRegisters>();
    const int thread = threadIdx.x % kCopiers;
    // The warps have the scalars of a head and a chunk in turn, and ask for its decays `kEarly`
    // chunks before: long before, but where memory limits walks. Those of neighbouring heads lie in
    // a line: who is ahead waits for memory, who follows finds it in the cache, so that they stay
    // together, and what they read does, too.
    constexpr int kTurns = kCopiers / 32 / kHeads, kEarly = kWalks == 2 && !kAdds ? 1 : kTurns;
    const int scalars_of = thread / 32 % kHeads, turn = thread / 32 / kHeads;
    float next_decay[2], next_scale[2];  // of tokens 2 lane and 2 lane + 1
    int n = 0;                           // chunks so far
    const auto wait_for_place = [&](int n) {
      if (n >= kStages) wait_for(&shared.free[n % kStages], (n / kStages - 1) & 1);
    };
#pragma unroll 1
    for (int k = 0; k < shared.pieces.count; ++k) {
      if (k > 0) {
        // The one that had this place has been left, as each has a chunk at least.
        wait_for_place(n);
        if (thread == 0) shared.piece[k % (kStages + 1)] = shared.pieces.at(k, p, deal, runs);
        wait_at<kCopiers>(1 + kGroups + at);
      }
      const Piece& piece = shared.piece[k % (kStages + 1)];
      // All from shared memory anew for each chunk: there are few registers.
      const auto first_of = [&](const auto* data, TokenStrides strides, int64_t token, int column) {
        return data + piece.sequence.batch * strides.batch +
               (piece.sequence.begin + token) * strides.token + column;
      };
      // Of the tokens from `t` on, the columns from `column` on, of which `width` are there.
      // `place` says in which row a token's lie.
      const auto copy_rows = [&](auto& to, const void* data, TokenStrides strides, int column,
                                 int width, int t, auto&& place) {
        constexpr int kRuns = sizeof(to.at) / sizeof(data_t) / kChunk / 8, kStep = kCopiers / kRuns;
        static_assert(kStep % 8 == 0);
        const int row = thread / kRuns, run = thread % kRuns;
        const uint32_t target = shared_address(&to) + to.offset(row % 8, run) - row % 8 * 128;
        const data_t* from =
            first_of(static_cast<const data_t*>(data), strides, t + row, column + run * 8);
        const int left = run * 8 < width ? piece.length() - t - row : 0;
#pragma unroll
        for (int u = 0; u < kChunk / kStep; ++u, from += kStep * strides.token)
          copy_async_once(target + place(row + u * kStep) * 128, from, left > u * kStep ? 16 : 0);
      };
      const auto in_order = [](int i) { return i; };
      const auto read_scalars = [&](int t) {
        const int head = piece.first_head + scalars_of, left = piece.length() - t - 2 * lane;
        const auto read = [&](float (&to)[2], const float* data, TokenStrides strides,
                              float without) {
          const float* from = first_of(data, strides, t + 2 * lane, head);
          to[0] = left > 0 ? __ldcg(from) : without;
          to[1] = left > 1 ? __ldcg(from + strides.token) : without;
        };
        read(next_decay, p.log_decay, p.log_decay_strides, 0.f);
        next_scale[0] = next_scale[1] = 1.f;
        if (p.scale) read(next_scale, p.scale, p.scale_strides, 1.f);
      };
      int t = same_in_warp(piece.first_chunk) * kChunk;
      const int first_turn = (turn - n % kTurns + kTurns) % kTurns;
      if (first_turn < kEarly) read_scalars(t + first_turn * kChunk);
#pragma unroll 1
      for (; t < piece.last_chunk * kChunk; ++n) {
        const int stage = n % kStages;
        wait_for_place(n);
        auto& to = shared.stages[stage];
        if (T::kEngine && maps.there) {
          if (thread == 0) {
            const auto copy = [&](void* to, const TensorMap& map, int column, int token) {
              copy_tile(to, map, column, token, static_cast<int>(piece.sequence.batch),
                        &shared.full[stage]);
            };
            arrive_expecting(&shared.full[stage], kAdds ? sizeof(to.x) + sizeof(to.b) : sizeof(to));
#pragma unroll
            for (int w = 0; w < kTogether; ++w)
              copy(&to.x[w], maps.x, piece.x_column[kHeads == 1 ? 0 : w] + w * kPart, t);
            copy(&to.b, maps.b, piece.b_column, t);
            if (!kAdds)
#pragma unroll
              for (int i = 0; i < kChunk; i += 8)
                copy(to.c.at + row_of(i) * kTileColumns, maps.c, piece.c_column, t + i);
          }
        } else {
#pragma unroll
          for (int w = 0; w < kTogether; ++w)
            copy_rows(to.x[w], p.x, p.x_strides, piece.x_column[kHeads == 1 ? 0 : w] + w * kPart,
                      p.head_dim - w * kPart, t, in_order);
          copy_rows(to.b, p.B, p.b_strides, piece.b_column, p.state_dim, t, in_order);
          if (!kAdds) copy_rows(to.c, p.C, p.c_strides, piece.c_column, p.state_dim, t, row_of);
          arrive_after_copies(&shared.full[stage]);
        }
        t += kChunk;
        if (n % kTurns == turn) {
          put_scalars(shared.scalars[stage][scalars_of], next_decay, next_scale);
          __syncwarp();
          if (lane == 0) arrive(&shared.full[stage]);
        }
        if ((n + kEarly) % kTurns == turn) read_scalars(t + (kEarly - 1) * kChunk);
      }
    }
    wait_copies();
    return;
  }
  take_registers<kWalkerRegisters>();
  if (!kAdds && deal.blocks > 0) wait_for_inputs();
  const int w = warp / 4 - 1 - at * kTogether;  // the warpgroup in its walk
  const int r = warp % 4, g = lane / 4, q = lane % 4;
  const int h = kHeads == 1 ? 0 : w, p_part = w * kPart;  // its head, first column of x

  const auto meet = [&] { wait_at<kGroup>(warp / 4); };  // the warpgroup's threads

  // ---- The state in registers, shared and global memory.
  constexpr int kTiles = kN / 8;
  using State = float[kTiles][4];
  State carried = {}, local;
  float since = 1.f;  // decay from the segment's start
  // visit(values, offset) of the neighbours that a thread has of a state tensor.
  const auto each_pair = [&](State& state, auto&& visit) {
    const int row = opaque(p_part + 16 * r + g), column = opaque(2 * q);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + half * 8, j = 8 * n + column;
        visit(&state[n][2 * half], i < p.head_dim && j < p.state_dim ? i * p.state_dim + j : -1);
      }
  };
  const auto read_state = [&](const float* data, State& to) {
    each_pair(to, [&](float* values, int offset) {
      const bool in = data != nullptr && offset >= 0;
      const float2 pair =
          in ? __ldcg(reinterpret_cast<const float2*>(data + offset)) : float2{0.f, 0.f};
      values[0] = pair.x;
      values[1] = pair.y;
    });
  };
  const auto write_state = [&](State& from, float* data) {
    each_pair(from, [&](const float* values, int offset) {
      if (offset >= 0) *reinterpret_cast<float2*>(data + offset) = {values[0], values[1]};
    });
  };
  const auto begin_segment = [&] {
    since = 1.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) local[n][v] = 0.f;
  };
  const auto whole_state = [&](int n, int v) { return fmaf(since, carried[n][v], local[n][v]); };
  // The state as the products read it, pairs of rows g and g + 8 in turn.
  const auto pack_state = [&](uint32_t (&pairs)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        pairs[n][half] = pack<data_t>(whole_state(n, 2 * half), whole_state(n, 2 * half + 1));
  };
  // The warp's 16 rows. And once the warpgroup's threads have met nobody reads the other copy.
  using Rows = Panels<data_t, kWidth, kN>;
  const auto put_rows = [&](const Rows& to, const auto& pairs) {
    store_rows<sizeof(pairs) / sizeof(pairs[0])>(to, 16 * r,
                                                 [&](int n, int half) { return pairs[n][half]; });
  };
  // Whether registers suffice to read shared memory, which is slow to answer, before it is needed.
  constexpr bool kEager = kHeads == 1;
  // The chunk's first token to `to`, of which `left` are there, a thread its column of four rows.
  // Through a panel, of which nobody else touches these rows, so that lanes write 16 bytes, and
  // eight of them a row.
  const int y_stride = p.heads * p.head_dim, y_column = p_part + lane % 8 * 8, y_row = lane / 8;
  const auto write_y = [&](const Rows& by, const float (&y)[8][4], data_t* to, int left) {
    uint32_t pairs[8][2];
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        pairs[m][half] = pack<data_t>(y[m][2 * half], y[m][2 * half + 1]);
    put_rows(by, pairs);
    __syncwarp();
    const auto row_of_lane = [&](int u) {
      return *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(&by) +
                                             by.offset(16 * r + u + y_row, lane % 8));
    };
    uint4 rows[4];
    if (kEager)
#pragma unroll
      for (int u = 0; u < 16; u += 4) rows[u / 4] = row_of_lane(u);
#pragma unroll
    for (int u = 0; u < 16; u += 4) {
      const int i = token_of(u) + (u < 8 ? 8 * r : -8 * r) + y_row;
      if (i < left)
        *reinterpret_cast<uint4*>(to + int64_t(i) * y_stride) =
            kEager ? rows[u / 4] : row_of_lane(u);
    }
  };

  // ---- The walk.
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const auto wait_for_chunk = [&](int n) {
    wait_for(&shared.full[n % kStages], n / kStages & 1);
    show_to_copies();  // what other threads' copies brought
  };
  const int count = same_in_warp(shared.pieces.count);
  int n = 0;  // chunks so far
  // Where registers suffice the scores of a chunk are found by the end of the one before.
  constexpr bool kAhead = kN <= 64 && !kAdds;
  float scores[8][4];
  // The chunk's C, as the factor of both of its products, or where registers are too few in shared
  // memory.
  uint32_t held[kAhead ? kN / 16 : 1][4];
  const auto begin_scores = [&](int n) {
    const auto& in = shared.stages[n % kStages];
    const uint64_t c = describe(in.c), b = describe(in.b);
    if constexpr (kAhead) {
#pragma unroll
      for (int k = 0; k < kN / 16; ++k)
        load_matrices(held[k], reinterpret_cast<const char*>(&in.c) +
                                   in.c.offset(16 * r + lane % 16, 2 * k + lane / 16));
      settle(held);
    }
    begin_products();
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
      if constexpr (kAhead)
        multiply_held<data_t>(scores, held[k], b + depth_step<kChunk>(k), k > 0);
      else
        multiply_shared<data_t>(scores, c + depth_step<kChunk>(k), b + depth_step<kChunk>(k),
                                k > 0);
    commit_products();
  };
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    if (k > 0) wait_for_chunk(n);
    const Piece& piece = shared.piece[k % (kStages + 1)];
    const int head = piece.first_head + h;
    const float skip = p.D ? p.D[head] : 0.f;
    const Places places(p, piece.sequence, piece.index, piece.segments, head);
    const int64_t home = (int64_t(piece.index) * p.heads + head) * size;  // in a state tensor
    // Where the walk with this number leaves the state in the middle of a sequence, and says so.
    const int walk = shared.pieces.walk;
    const auto passed = [&](int walk) {
      return p.scratch + (int64_t(walk) * kHeads + h) * (2 * size + kGroups);
    };
    const auto ticket = [&](int walk) { return p.tickets + walk * kTogether + w; };
    const auto added = [&](int segment) {
      return p.scratch + deal.states + places.of(segment) * size;
    };
    const int first_chunk = same_in_warp(piece.first_chunk),
              last_chunk = same_in_warp(piece.last_chunk), chunks = same_in_warp(piece.chunks()),
              segment_chunks = same_in_warp(piece.segments.chunks);
    const int first = first_chunk / segment_chunks;  // segment
    const bool resumes = deal.blocks == 0 && first_chunk > 0;
    const float* from = deal.blocks > 0 && !folds ? added(first)
                        : resumes                 ? passed(walk - 1)
                        : p.initial_state         ? p.initial_state + home
                                                  : nullptr;
    if (resumes) {
      if (threadIdx.x % kGroup == 0) take_ticket(ticket(walk - 1));
      meet();
    }
    read_state(kAdds ? nullptr : from, carried);
    if (!kAdds && folds)
#pragma unroll 2
      for (int s = 0; s < first; ++s) {
        read_state(added(s), local);
        const float decay = __ldcg(&p.scratch[deal.decays + places.of(s)]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int v = 0; v < 4; ++v) carried[m][v] = fmaf(decay, carried[m][v], local[m][v]);
      }
    begin_segment();
    if (!kAdds && resumes) {
      read_state(from + size, local);
      since = __ldcg(from + 2 * size + w);
    }
    int segment_end = (first + 1) * segment_chunks;
    if (kAhead && first_chunk < last_chunk) {
      wait_for_chunk(n);
      begin_scores(n);
      wait_for_products<0>();
      settle(scores);
    }
    data_t* y_at = nullptr;  // of the chunk
    int left = 0;
    if (!kAdds) {
      const int t = first_chunk * kChunk;
      const int64_t token = piece.sequence.batch * p.length + piece.sequence.begin + t;
      y_at = static_cast<data_t*>(p.y) + token * y_stride + head * p.head_dim + y_column;
      left = y_column < p.head_dim ? piece.length() - t : 0;
    }
#pragma unroll 1
    for (int chunk = first_chunk; chunk < last_chunk; ++chunk, ++n) {
      const int stage = n % kStages;
      const auto& in = shared.stages[stage];
      const Scalars& scalars = shared.scalars[stage][h];
      if (!kAhead) wait_for_chunk(n);
      // (gain x)^T, the factors of what the chunk adds to the state.
      uint32_t gained[kBlocks][4];
      const auto put_gained = [&] {
        load_weighed(gained, in.x[w], 16 * r, [&](int row) { return &scalars.gain[row]; });
      };
      float y[8][4];
      if constexpr (!kAdds) {
        uint32_t pairs[kTiles][2];
        pack_state(pairs);
        const uint64_t c = describe(in.c), s = describe(shared.states[w][n & 1]);
        if (!kAhead) begin_scores(n);
        put_rows(shared.states[w][n & 1], pairs);
        // What the tokens that are seen are weighed with.
        float2 c_from[8], scale_of[8];
        const auto read_weights = [&](int tile) {
          const int j0 = tile * 8 + 2 * q;
          c_from[tile] = *reinterpret_cast<const float2*>(&scalars.c[j0]);
          if (kScales) scale_of[tile] = *reinterpret_cast<const float2*>(&scalars.scale[j0]);
        };
        if (kAhead)
#pragma unroll
          for (int tile = 0; tile < 8; ++tile) read_weights(tile);
        const int tokens[2] = {8 * r + g, 56 - 8 * r + g};  // of the rows of a thread
        const float since_of[2] = {scalars.since[tokens[0]], scalars.since[tokens[1]]},
                    c_of[2] = {scalars.c[tokens[0]], scalars.c[tokens[1]]};
        show_to_copies();
        meet();
        begin_products();
#pragma unroll
        for (int k = 0; k < kN / 16; ++k)
          if constexpr (kAhead)
            multiply_held<data_t>(y, held[k], s + depth_step<kWidth>(k), k > 0);
          else
            multiply_shared<data_t>(y, c + depth_step<kChunk>(k), s + depth_step<kWidth>(k), k > 0);
        commit_products();
        if (!kAhead) wait_for_products<1>();
        settle(scores);
        uint32_t a[4][4];
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {  // of eight tokens that are seen
          auto& pairs = a[tile / 2];
          pairs[tile % 2 * 2] = pairs[tile % 2 * 2 + 1] = 0;
          // Of the rows of one half all see the tile where the half's last tile is a later one;
          // half of it where it is the last; the others all see it, or none does.
          const int half = tile / 4, last_tile = half == 0 ? r : 7 - r;
          if (half == 1 && tile > last_tile) continue;
          if (!kAhead) read_weights(tile);
          const auto weigh = [&](int half, bool is_last) {
            float weights[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float passes = exp2_fast(c_of[half] - (e ? c_from[tile].y : c_from[tile].x));
              const float weight =
                  kScales ? passes * (e ? scale_of[tile].y : scale_of[tile].x) : passes;
              weights[e] = scores[tile][2 * half + e] * weight;
              if (is_last)
                weights[e] = 2 * q + e > g ? 0.f : weights[e] + (2 * q + e == g ? skip : 0.f);
            }
            pairs[tile % 2 * 2 + half] = pack<data_t>(weights[0], weights[1]);
          };
          if (half == 0) weigh(1, false);
          if (tile <= last_tile) weigh(half, tile == last_tile);
        }
        put_gained();
        wait_for_products<0>();
        settle(y);
#pragma unroll
        for (int m = 0; m < 8; ++m)
#pragma unroll
          for (int v = 0; v < 4; ++v) y[m][v] *= since_of[v / 2];
        const uint64_t x = describe_tall(in.x[w]);
        settle(y);
        settle(a);
        begin_products();
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) multiply_tall<data_t>(y, a[k], x + tall_step(k));
        commit_products();
      }

      // local = whole local + (gain x)^T B, summed over the chunk's tokens.
      if (kAdds) put_gained();
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int v = 0; v < 4; ++v) local[m][v] *= scalars.whole;
      since *= scalars.whole;
      const uint64_t b = describe_tall(in.b);
      settle(local);
      begin_products();
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) multiply_tall<data_t>(local, gained[k], b + tall_step(k));
      commit_products();

      if constexpr (!kAdds) {
        if (kAhead && chunk + 1 < last_chunk) {
          wait_for_chunk(n + 1);
          begin_scores(n + 1);
          wait_for_products<2>();
        } else {
          wait_for_products<1>();
        }
        settle(y);
        write_y(shared.states[w][~n & 1], y, y_at, left);
        y_at += int64_t(kChunk) * y_stride;
        left -= kChunk;
      }
      wait_for_products<0>();
      settle(local);
      if (kAhead) settle(scores);
      __syncwarp();
      if (lane == 0) arrive(&shared.free[stage]);
      if (chunk + 1 == chunks || chunk + 1 == segment_end) {
        segment_end += segment_chunks;
        if (kAdds) {
          const int64_t place = places.of(piece.segments.of(chunk));
          write_state(local, p.scratch + deal.states + place * size);
          if (threadIdx.x % kGroup == 0 && p_part == 0) p.scratch[deal.decays + place] = since;
        } else {
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int v = 0; v < 4; ++v) carried[m][v] = whole_state(m, v);
        }
        begin_segment();
      }
    }
    if (kAdds) continue;
    const bool ends = last_chunk == chunks;
    if (ends && (deal.blocks == 0 || folds)) write_state(carried, p.final_state + home);
    if (!ends && deal.blocks == 0) {
      write_state(carried, passed(walk));
      write_state(local, passed(walk) + size);
      if (threadIdx.x % kGroup == 0) passed(walk)[2 * size + w] = since;
      meet();
      if (threadIdx.x % kGroup == 0) put_ticket(ticket(walk));
    }
  }
#endif
}

template <typename T>
Runs make_runs(const SsdScanParams& p) {
  constexpr int kMost = kProcessors * T::kWalks;
  static_assert(kMost * T::kTogether <= kSsdScanTickets);
  const int64_t walks = count_walks<T::kHeads>(p);
  if (p.cu_seqlens != nullptr || p.length == 0 || walks <= kMost || walks > INT_MAX) return {};
  const int whole = static_cast<int>(walks / kMost), more = static_cast<int>(walks % kMost);
  return {kMost, whole, more, kMost / std::gcd(kMost, more)};
}

template <typename T>
void launch(const SsdScanParams& p, cudaStream_t stream) {
  const Deal deal = make_deal(p, T::kWalks, T::kHeads);
  const Runs runs = make_runs<T>(p);
  const bool folds = deal.blocks > 0 && count_segments(p, deal) <= kMostFolded;
  const int64_t walks = runs.count > 0 ? runs.count : count_walks<T::kHeads>(p, deal.blocks);
  const auto blocks =
      static_cast<unsigned>(walks > kProcessors ? (walks + T::kWalks - 1) / T::kWalks : walks);
  Maps maps{};
  const auto describe = [&](TensorMap& map, const void* data, int columns, TokenStrides strides,
                            int tokens) {
    return describe_tensor(map, data, p.dtype, p.batch, p.length, columns, strides, tokens);
  };
  maps.there = T::kEngine && p.cu_seqlens == nullptr && p.length > 0 && p.batch > 0 &&
               p.state_dim == kTileColumns &&
               describe(maps.x, p.x, p.x_heads * p.head_dim, p.x_strides, kChunk) &&
               describe(maps.b, p.B, p.b_groups * p.state_dim, p.b_strides, kChunk) &&
               describe(maps.c, p.C, p.c_groups * p.state_dim, p.c_strides, 8);
  const auto run = [&](auto adds) {
    constexpr bool kAdds = decltype(adds)::value;
    constexpr int kBytes = T::kWalks * sizeof(typename T::Walk);
    static_assert(kBytes <= 232448);
    const auto kernel = p.scale && !kAdds ? ssd_scan_wgmma_kernel<T, kAdds, !kAdds>
                                          : ssd_scan_wgmma_kernel<T, kAdds, false>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    launch_overlapping(kernel, blocks, kThreads, kBytes, stream, p, deal, runs, folds, maps);
  };
  if (deal.blocks > 0) {
    run(std::true_type());
    if (!folds) launch_carry(p, deal, stream);
  }
  run(std::false_type());
}

// use(a Tile).
template <typename data_t, typename Use>
auto with_tile(const SsdScanParams& p, const Use& use) {
  if (p.head_dim <= 64)
    return p.state_dim <= 64 ? use(Tile<data_t, 64, 2, 1>()) : use(Tile<data_t, 128, 1, 2>());
  return p.state_dim <= 64 ? use(Tile<data_t, 64, 1, 1>()) : use(Tile<data_t, 128, 1, 1>());
}

}  // namespace

bool suits_ssd_scan_wgmma(const SsdScanParams& p) {
  if (!on_tensor_cores(p)) return false;
  const bool pairs = p.heads / p.b_groups % 2 == 0 && p.heads / p.c_groups % 2 == 0;
  return (p.head_dim > 64 || p.state_dim <= 64 || pairs) &&
         runs_here(ssd_scan_wgmma_kernel<Tile<__half, 64, 1, 1>, false, false>);
}

int64_t count_ssd_scan_wgmma_scratch(const SsdScanParams& p) {
  return with_tile<__half>(p, [&](auto tile) {
    using T = decltype(tile);
    const Deal deal = make_deal(p, T::kWalks, T::kHeads);
    const int64_t runs = make_runs<T>(p).count;
    const int64_t passed = 2 * p.head_dim * p.state_dim + kGroups;  // by a run, of a head
    return std::max(runs * T::kHeads * passed, deal.size);
  });
}

void launch_ssd_scan_wgmma(const SsdScanParams& p, cudaStream_t stream) {
  const auto run = [&](auto tile) { launch<decltype(tile)>(p, stream); };
  p.dtype == DType::kBFloat16 ? with_tile<__nv_bfloat16>(p, run) : with_tile<__half>(p, run);
}

}  // namespace reasoners
