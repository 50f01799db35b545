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
// registers for it, a chunk's scores are found while the y before is on its way out. Copies wait
// for nothing but a free place among three: they tell by themselves that a chunk is here (`full`).
//
// Token i sees the tokens up to i alone. So that all warps have as much to weigh, warp r has the
// rows of the r-th eight tokens and of the r-th last: C lies in that order, and so does y at first.
//
// Where sequences and heads are more than what is walked at a time, equal runs of all their
// segments are walked, so that nobody waits for a last, half empty wave; see Pieces. Where they are
// few, segments are dealt as in ssd_scan.cu. Neither changes a bit.
//
// Of a thread's 232 registers, N 128: 128 for the state, carried and local, 32 for y, 32 for scores
// or the state's copy on its way.
//
//   P, N           64, 64   128, 64   64, 128   128, 128
//   walks               2         1         1          1     of a block
//   shared, kB        190       136       221        218     one block a multiprocessor
//
// H200, bfloat16, us, and the share of a copy's 4.25 TB/s that the necessary bytes reach; in
// brackets ssd_walk.cuh, of the larger ones on an H100:
//   Llamba-1B 8 x 4096    144  88 % (235)     Llamba-3B 8 x 4096 (P 96)         202  59 %  (317)
//             64 x 512    176  73 % (196)     Llamba-8B 8 x 4096 (P 128)        276  69 %  (388)
//             512 x 512  1418  72 % (1519)    24 heads of 128 x 128, 8 x 4096   302  63 %  (542)
//             1 x 2048   23.5  34 % (31)      80 heads of 64 x 128, one group   475  35 % (1071)
//             1 x 32768   245  52 % (318)     Llamba-1B 1 x 131072              949  54 % (1227)
// One machine differs from the next by 3 %, and the forms with N 128 by 5 % from run to run.
//
// What limits, by profiles: with x, B and C all in the second-level cache Llamba-1B's 8 x 4096
// still takes 126, at 48 % of issue slots, 67 % of shared memory's rate. A warpgroup needs 3,500
// cycles a chunk, a third of them for weighing scores, a quarter for writing y, and two of them a
// multiprocessor do not fill each other's gaps. Of the 1,090 turns that shared memory has of a
// chunk products take 384, copies 192, what scores are weighed with 185, y 142, x^T 64, the
// state 64. Asking for four rows of y, or for what scores are weighed with, before they are needed
// spared 6 % at 64 x 64. At 64 x 128 with one group the memory is at 45 %, shared memory at 71 %.
// Where a sequence is long x and B are read twice, and three kernels follow each other. One C B^T
// for both heads of a group would move as many bytes in shared memory as it spares; scores ahead at
// N 128 spill.
//
// A long sequence in one kernel has been tried three times (1 x 2048, 32768, 131072):
//   segments of x, B and C kept in shared memory between what they add to y and their walk, states
//     handed on by tickets: 24, 365, 1454. Two segments a multiprocessor leave each step bare.
//   the same in clusters of 4 or 7 blocks for a head: 26, 289, 1096. A round of seven segments of
//     32 heads takes 15 us, of which its bytes need 7.
//   all blocks at once, each walk finding what its next segment adds before it walks this one, so
//     that x and B are read again out of the second-level cache, while four more warps a block
//     carry states from segment to segment: 23, 295, 1124. Nobody waits for states, nor do bytes
//     matter (hints to the cache change nothing): of 25,000 cycles a round a walk takes 15,900,
//     which is what limits 8 x 4096 too, what the next adds 4,800, and passing states and pieces on
//     4,000.
// So what is next is a chunk that takes less: C as a factor out of registers for both of its
// products, nothing read or multiplied for a scale that is not there; then the third way, with a
// warpgroup of its own for what segments add.
#include <algorithm>
#include <climits>
#include <iterator>

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
#include "wgmma.cuh"

namespace reasoners {
namespace {

constexpr int kGroup = 128, kGroups = 2, kWidth = 64;  // threads, warpgroups, columns of x of each
constexpr int kThreads = kGroup * (1 + kGroups);
constexpr int kStages = 3;
// Registers of the threads that copy and of those that multiply, of 168 at the start.
constexpr int kCopierRegisters = 40, kWalkerRegisters = 232;

// Where token `i` of a chunk has its row of C, and what row m's token is. Either has i % 8 == m
// % 8.
__device__ constexpr int row_of(int i) {
  return i < 32 ? i / 8 * 16 + i % 8 : 120 - i / 8 * 16 + i % 8;
}
__device__ constexpr int token_of(int m) {
  return m % 16 < 8 ? m / 16 * 8 + m % 8 : 56 - m / 16 * 8 + m % 8;
}

// A ticket is left as it was found.
__device__ inline void put_ticket(uint32_t* ticket) { tell(ticket, 1); }
__device__ inline void take_ticket(uint32_t* ticket) {
  wait_until(ticket, 1);
  *ticket = 0;
}

// What is walked without a break: some segments of a sequence, for the walk's heads.
struct Piece {
  Sequence sequence;
  int index, first_head;  // `index` of the sequence
  int first, last;
  Segments segments;
  int x_column[kGroups], b_column, c_column;  // where the first columns are that a head has

  __device__ int length() const { return static_cast<int>(sequence.end - sequence.begin); }
  __device__ int first_chunk() const { return segments.first_chunk(first); }
  __device__ int last_chunk() const {
    return min(segments.first_chunk(last), (length() + kChunk - 1) / kChunk);
  }
};

// The pieces of a walk. Without `runs` there is one at most, as `deal` says. With it all sequences
// have the same length, and their segments, head after head of sequence after sequence, lie in a
// row that is cut into as many equal runs, none shorter than a sequence. Of a run the last piece,
// whose end another walk has, comes first, and the first one, which begins with what another walk
// left, last: so that was left long ago.
template <int kHeads>
struct Pieces {
  int walk, count;
  int begin, end, most;  // of the run, and segments of a sequence

  __device__ Pieces(const SsdScanParams& p, const Deal& deal, int runs, int walk)
      : walk(walk), count(0) {
    const int64_t walks = p.sequences * (p.heads / kHeads);
    if (runs > 0) {
      most = Segments(deal.most_bits, p.length).count;
      begin = static_cast<int>(walks * most * walk / runs);
      end = static_cast<int>(walks * most * (walk + 1) / runs);
      count = (end + most - 1) / most - begin / most;
    } else if (walk < walks * max(deal.blocks, 1)) {
      const Piece piece = at(0, p, deal, runs);
      count = deal.blocks == 0 || piece.first < piece.last;
    }
  }
  __device__ Piece at(int k, const SsdScanParams& p, const Deal& deal, int runs) const {
    const int units = p.heads / kHeads;
    int whole, first = 0, last;  // `whole`: the heads of a sequence
    if (runs > 0) {
      const int unfinished = end % most > 0;
      whole = k < unfinished                       ? end / most
              : begin % most > 0 && k == count - 1 ? begin / most
                                                   : (begin + most - 1) / most + k - unfinished;
      first = max(begin - whole * most, 0);
      last = end - whole * most;
    } else {
      const int blocks = max(deal.blocks, 1), place = walk / units;
      whole = place / blocks * units + walk % units;
      first = place % blocks * deal.each;
      last = deal.blocks > 0 ? first + deal.each : INT_MAX;
    }
    Piece piece;
    piece.index = whole / units;
    piece.first_head = whole % units * kHeads;
    piece.sequence = sequence_at(p.cu_seqlens, p.length, piece.index);
    piece.segments = Segments(deal.most_bits, piece.length());
    piece.first = first;
    piece.last = min(last, piece.segments.count);
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

// kAdds: leaves what each segment adds, and no y.
template <typename T, bool kAdds>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_scan_wgmma_kernel(const SsdScanParams p, const Deal deal, const int runs) {
#ifdef REASONERS_WGMMA
  using data_t = typename T::data_t;
  constexpr int kN = T::kN, kWalks = T::kWalks, kHeads = T::kHeads, kTogether = T::kTogether,
                kCopiers = T::kCopiers;
  extern __shared__ __align__(1024) char shared_memory[];
  let_next_start();
  wait_for_inputs();

  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;
  constexpr int kPart = kHeads < kTogether ? kWidth : 0;  // of a head's x, from group to group
  const bool copies = warp < kGroup / 32;
  const int at = kWalks == 1 ? 0 : copies ? warp / (kCopiers / 32) : warp / 4 - 1;  // of kWalks
  auto& shared = reinterpret_cast<typename T::Walk*>(shared_memory)[at];
  if (copies && threadIdx.x % kCopiers == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.full[s], kCopiers + kHeads);
      init_barrier(&shared.free[s], kTogether * kGroup / 32);
    }
    // A block has neighbours, which are mostly as long, unless that left multiprocessors without a
    // walk. A run waits for the one before it, which is no later block's.
    const int walk = gridDim.x > kProcessors || runs > 0
                         ? static_cast<int>(blockIdx.x) * kWalks + at
                         : static_cast<int>(blockIdx.x + at * gridDim.x);
    shared.pieces = Pieces<kHeads>(p, deal, runs, walk);
    if (shared.pieces.count > 0) shared.piece[0] = shared.pieces.at(0, p, deal, runs);
  }
  __syncthreads();
  if (copies) {
    keep_registers<kCopierRegisters>();
    const int thread = threadIdx.x % kCopiers, scalars_of = thread / 32;  // a head
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
        if (scalars_of >= kHeads) return;
        const int head = piece.first_head + scalars_of, left = piece.length() - t - 2 * lane;
        const auto read = [&](float (&to)[2], const float* data, TokenStrides strides,
                              float without) {
          const float* from = first_of(data, strides, t + 2 * lane, head);
          to[0] = left > 0 ? from[0] : without;
          to[1] = left > 1 ? from[strides.token] : without;
        };
        read(next_decay, p.log_decay, p.log_decay_strides, 0.f);
        next_scale[0] = next_scale[1] = 1.f;
        if (p.scale) read(next_scale, p.scale, p.scale_strides, 1.f);
      };
      int t = same_in_warp(piece.first_chunk()) * kChunk;
      read_scalars(t);
#pragma unroll 1
      for (; t < piece.last_chunk() * kChunk; ++n) {
        const int stage = n % kStages;
        wait_for_place(n);
        auto& to = shared.stages[stage];
#pragma unroll
        for (int w = 0; w < kTogether; ++w)
          copy_rows(to.x[w], p.x, p.x_strides, piece.x_column[kHeads == 1 ? 0 : w] + w * kPart,
                    p.head_dim - w * kPart, t, in_order);
        copy_rows(to.b, p.B, p.b_strides, piece.b_column, p.state_dim, t, in_order);
        if (!kAdds) copy_rows(to.c, p.C, p.c_strides, piece.c_column, p.state_dim, t, row_of);
        arrive_after_copies(&shared.full[stage]);
        t += kChunk;
        if (scalars_of >= kHeads) continue;
        put_scalars(shared.scalars[stage][scalars_of], next_decay, next_scale);
        __syncwarp();
        if (lane == 0) arrive(&shared.full[stage]);
        read_scalars(t);  // of the next chunk, or of none
      }
    }
    wait_copies();
    return;
  }
  take_registers<kWalkerRegisters>();
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
    const int row = static_cast<int>(opaque(p_part + 16 * r + g)),
              column = static_cast<int>(opaque(2 * q));
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
    const uint32_t row = shared_address(&to) + to.offset(16 * r + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < static_cast<int>(std::size(pairs)); n += 2)
      store_matrices((row ^ n % 8 * 16) + n / 8 * to.kPanel, pairs[n][0], pairs[n][1],
                     pairs[n + 1][0], pairs[n + 1][1]);
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
  const auto begin_scores = [&](int n) {
    const auto& in = shared.stages[n % kStages];
    const uint64_t c = describe(in.c), b = describe(in.b);
    begin_products();
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
      multiply_shared<data_t>(scores, c + depth_step<kChunk>(k), b + depth_step<kChunk>(k), k > 0);
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
    const auto passed = [&](int walk) { return p.scratch + (int64_t(walk) * kHeads + h) * size; };
    const auto ticket = [&](int walk) { return p.tickets + walk * kTogether + w; };
    const float* from = deal.blocks > 0   ? p.scratch + deal.states + places.of(piece.first) * size
                        : piece.first > 0 ? passed(walk - 1)
                        : p.initial_state ? p.initial_state + home
                                          : nullptr;
    if (deal.blocks == 0 && piece.first > 0) {
      if (threadIdx.x % kGroup == 0) take_ticket(ticket(walk - 1));
      meet();
    }
    read_state(kAdds ? nullptr : from, carried);
    begin_segment();
    const int first_chunk = same_in_warp(piece.first_chunk()),
              last_chunk = same_in_warp(piece.last_chunk());
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
        const uint32_t x_rows = shared_address(&in.x[w]) +
                                in.x[w].offset(lane % 8 + lane / 16 * 8, 2 * r + lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          const float2 low = *reinterpret_cast<const float2*>(&scalars.gain[16 * k + 2 * q]),
                       high = *reinterpret_cast<const float2*>(&scalars.gain[16 * k + 2 * q + 8]);
          load_matrices_transposed(gained[k], x_rows + k * 16 * 128);
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float2 pair = unpack<data_t>(gained[k][v]), weight = v < 2 ? low : high;
            gained[k][v] = pack<data_t>(pair.x * weight.x, pair.y * weight.y);
          }
        }
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
          scale_of[tile] = *reinterpret_cast<const float2*>(&scalars.scale[j0]);
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
              weights[e] =
                  scores[tile][2 * half + e] * (passes * (e ? scale_of[tile].y : scale_of[tile].x));
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
      if (chunk + 1 == last_chunk || piece.segments.end_with(chunk)) {
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
    if (!kAdds && deal.blocks == 0) {
      const bool ends = piece.last == piece.segments.count;
      write_state(carried, ends ? p.final_state + home : passed(walk));
      if (!ends) {
        meet();
        if (threadIdx.x % kGroup == 0) put_ticket(ticket(walk));
      }
    }
  }
#endif
}

// Into how many runs the segments of all sequences are cut, where these are more than what can be
// walked at a time.
template <typename T>
int count_runs(const SsdScanParams& p, const Deal& deal) {
  constexpr int kMost = kProcessors * T::kWalks;
  static_assert(kMost * T::kTogether <= kSsdScanTickets);
  const int64_t walks = p.sequences * p.heads / T::kHeads;
  const bool fits = walks * count_segments(p, deal) < INT_MAX;
  return p.cu_seqlens == nullptr && p.length > 0 && walks > kMost && fits ? kMost : 0;
}

template <typename T>
void launch(const SsdScanParams& p, cudaStream_t stream) {
  constexpr int kBytes = T::kWalks * sizeof(typename T::Walk);
  static_assert(kBytes <= 232448);
  const auto scan = ssd_scan_wgmma_kernel<T, false>;
  cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const Deal deal = make_deal(p, T::kWalks, T::kHeads);
  const int runs = count_runs<T>(p, deal);
  const int64_t walks =
      runs > 0 ? runs : p.sequences * p.heads / T::kHeads * std::max(deal.blocks, 1);
  const auto blocks = static_cast<unsigned>(
      std::max((walks + T::kWalks - 1) / T::kWalks, std::min<int64_t>(walks, kProcessors)));
  if (deal.blocks > 0) {
    const auto add = ssd_scan_wgmma_kernel<T, true>;
    cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    launch_overlapping(add, blocks, kThreads, kBytes, stream, p, deal, runs);
    launch_carry(p, deal, stream);
  }
  launch_overlapping(scan, blocks, kThreads, kBytes, stream, p, deal, runs);
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
         runs_here(ssd_scan_wgmma_kernel<Tile<__half, 64, 1, 1>, false>);
}

int64_t count_ssd_scan_wgmma_scratch(const SsdScanParams& p) {
  return with_tile<__half>(p, [&](auto tile) {
    using T = decltype(tile);
    const Deal deal = make_deal(p, T::kWalks, T::kHeads);
    const int64_t runs = count_runs<T>(p, deal);
    return std::max(runs * T::kHeads * p.head_dim * p.state_dim, deal.size);
  });
}

void launch_ssd_scan_wgmma(const SsdScanParams& p, cudaStream_t stream) {
  const auto run = [&](auto tile) { launch<decltype(tile)>(p, stream); };
  p.dtype == DType::kBFloat16 ? with_tile<__nv_bfloat16>(p, run) : with_tile<__half>(p, run);
}

}  // namespace reasoners
