// The derivative of ssd_scan on tensor cores, for 16-bit data; ssd_scan_backward_rows.cu serves the
// rest. On Hopper ssd_scan_backward_wgmma.cu does the walks of 64 or 128 columns of B and C, where
// states have rows to be kept in.
//
// A block walks one head of one sequence, kChunk tokens at a time. Within a chunk, where
// c_i = log_decay_0 + ... + log_decay_i, L_ij = exp(c_i - c_j) for j <= i and 0 elsewhere,
// since_i = exp(c_i), until_j = exp(c_last - c_j), U = scale X, S is the state before the chunk and
// dS the gradient of the state after it:
//   dC = since (dY S) + (dY U^T * L) B             dU = until (B dS^T) + (C B^T * L)^T dY
//   dB = until (U dS) + (dY U^T * L)^T C           dX = scale dU + D dY,  dscale = dU . X
//   dS before the chunk = since_last dS + (since dY)^T C
// and d log_decay_i is all that passes from before token i to i or later: from the state before to
// tokens, between tokens (C B^T * L * dY U^T), from tokens to the state after, from state to state.
// All of it comes from the fp32 sums of the products, and as plain sums, never as a difference of
// larger ones: a decay of 0 passes on exactly nothing.
//
// The way there: forwards over the chunks, leaving the state before each in global memory, rounded
// to the data's type; then backwards with dS in fp32 registers. The states take no memory of their
// own: the state before a chunk lies in the rows of the chunk before it of gradients that are this
// head's alone, which are written later. Where these are too few, every second state is kept, and
// the one after it computed from it once more. What is read for the next step is on its way while
// one is computed. Nothing quadratic in the chunk leaves the multiprocessor.
//
// A long sequence is dealt to several blocks, a run of chunks each, whose two walks begin at the
// state before the run and at the gradient of the state after it: a kernel finds what each run adds
// to both, from zeros, another carries them from run to run. Where the cuts are depends on the
// shape and the sequence's length alone, so that its gradients are the same bits in any company.
//
// A gradient that heads share is summed in fp32, in the order of the heads, by the blocks of a
// group: each waits until the block of the head before it has left a chunk's sums in global memory,
// adds its own and lets the next one go on; the last writes the gradient. There are places for the
// sums of some chunks, and for as many groups as run at a time, so the first of a group waits until
// the last has read what was in its place. The blocks are numbered as they begin: a group's are
// neighbours, so of all that have begun only the newest group can be without its last, and those
// before it go on. On Hopper the copy engine passes on the sums of some tiles, in chains of heads
// (ssd_scan_backward_wgmma.cu).
//
// Eight warps: warp (r, h) has the tokens 16 r to 16 r + 15 and half h of the columns of what is
// computed for tokens, and the rows 16 r (and 16 r + 64) of a state and half h of its columns. Only
// the lower triangle of 16 x 16 blocks is computed for (C B^T * L) and (dY U^T * L); through shared
// memory they turn from the rows of one warp into the columns of another. Warps with many blocks on
// or left of the diagonal have few below it.
//
//   P, N         64, 64   96, 64   128, 64   64, 128   128, 128      the next larger serves others
//   buffers         2        1        1         1          2         of x, B, C, dy
//   shared, kB     112       93      110       108        229
//   blocks per SM   2        2        2         2          1
//
// Bytes that must move (P = N = 64, no sharing), a head and token: 512 in for x, B, C and dy, 384
// out for their gradients but dy's, 16 for scalars; this kernel moves 256 more, for x and B of the
// first walk, and 256 for states, part of them in the second-level cache. Sums that pass from block
// to block come to 8 bytes an element and head more, in that cache: the blocks of a group are a few
// microseconds apart. Their places take 2 to 8 % of the input's bytes where four heads share x and
// B of 64 x 64, states between runs 2 to 4 % without sharing and up to 8 % with it. With places for
// the sums of all chunks (64 %) the former took 5 % longer.
//
// H200, bfloat16, us, by this kernel alone; in brackets with states kept every 256 tokens and those
// between them computed again in a second walk forwards (9 to 25 % of the input's bytes, and the
// instructions of three walks instead of two), and all parts of shared gradients kept in fp32 and
// summed afterwards:
//   Llamba-1B 8 x 4096    681  (862)     Llamba-3B 8 x 4096 (P 96)          1037 (1244)
//             64 x 512    685  (828)     Llamba-8B 8 x 4096 (P 128)         1169 (1469)
//             1 x 2048    226  (320)     24 heads of 128 x 128, 8 x 4096    1629 (1748)
//             1 x 32768   876 (1085)
//   32 heads of 64 x 64, x and B of 8 heads, 8 x 4096    802; 64 x 512 812; 1 x 32768 1002
//   80 heads of 64 x 128, one group, 8 x 4096           4489 (5339)
// What limits, by a profile of Llamba-1B's 8 x 4096, a third of the bandwidth: a chunk of a head
// takes 16,500 instructions of warps, of which 1,040 are products, and 5,300 turns of shared
// memory, of which 60 % read factors into registers (copies 16 %). 42 % of issue slots and 73 % of
// that memory's rate are used; warps spend a quarter of their time at barriers and a quarter
// waiting for shared memory. With all inputs in the second-level cache it still takes 654 of 681
// us. Products of warpgroups, which read shared memory by themselves, halve the instructions.

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "roles.cuh"
#include "scan.cuh"
#include "scan_backward.cuh"
#include "signal.cuh"
#include "ssd_backward_runs.cuh"
#include "ssd_chunk.cuh"
#include "ssd_scan_backward.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

constexpr int kWarps = kBlocks * kHalves, kThreads = 32 * kWarps;

// The blocks on and below the diagonal of a (kChunk, kChunk) matrix. The two halves of a row change
// places every four rows, for the banks.
template <typename data_t>
struct Triangle {
  data_t at[kBlocks * (kBlocks + 1) / 2][kBlock][kBlock];

  __device__ static int block(int i, int j) { return i * (i + 1) / 2 + j; }
  __device__ const data_t* half_row(int i, int j, int row, int half) const {
    return &at[block(i, j)][row][(half ^ (row >> 2 & 1)) * 8];
  }
  __device__ void load_a(uint32_t (&a)[4], int i, int j) const {
    const int l = threadIdx.x % 32;
    load_matrices(a, half_row(i, j, l % 16, l / 16));
  }
  // Of block (j, i) transposed: rows are the columns of block column `j`.
  __device__ void load_a_transposed(uint32_t (&a)[4], int i, int j) const {
    const int l = threadIdx.x % 32;
    load_matrices_transposed(a, half_row(i, j, l % 8 + l / 16 * 8, l / 8 % 2));
  }
  __device__ void put_pair(int i, int j, int row, int column, uint32_t value) {
    auto* half = const_cast<data_t*>(half_row(i, j, row, column / 8));
    *reinterpret_cast<uint32_t*>(half + column % 8) = value;
  }
};

template <typename data_t, int kP, int kN>
struct Tile {
  struct Inputs {
    Matrix<data_t, kChunk, kP> x, dy;
    Matrix<data_t, kChunk, kN> b, c;
  };
  struct Rest {
    Matrix<data_t, kP, kN> state, dstate;
    Triangle<data_t> scores, dscores;  // C B^T * L, dY U^T * L
    Scalars scalars[2];
    // What passes between tokens: sums over the columns of blocks left of the diagonal, by half;
    // over the rows of every block below it; the blocks on the diagonal.
    alignas(16) float row_sums[kHalves][kChunk], column_sums[kBlocks][kChunk];
    float diagonal[kBlocks][kBlock][kBlock + 1];
    // What the state before gives to a token, a token to the state after; dscale. By half.
    float received[kHalves][kChunk], given[kHalves][kChunk], dscale[kHalves][kChunk];
    float inner[2][kWarps];  // products of state and dstate
    Passing passing[3];      // of dC, dB and dx
  };
  static constexpr int kPerSM = 233472;  // bytes of a multiprocessor, 1024 of them for each block
  static constexpr int kWanted = kP * kN <= 128 * 64 ? 2 : 1;  // blocks per multiprocessor
  static constexpr int kBuffers =
      kWanted * (2 * sizeof(Inputs) + sizeof(Rest) + 1024) <= kPerSM ? 2 : 1;
  struct Shared {
    Inputs inputs[kBuffers];
    Rest rest;
  };
  static_assert(kWanted * (sizeof(Shared) + 1024) <= kPerSM);
  static constexpr int kRows = kP, kColumns = kN;
  // A state in registers: rows 16 (r + 4 m), columns 8 n of the warp's half.
  static constexpr int kRowTiles = (kP / 16 + kBlocks - 1) / kBlocks;
  static constexpr int kColumnTiles = kN / 8 / kHalves;
};

// Of neighbours in two tiles of D, left and right, the lanes of a row trade some: those that are
// even get four neighbours of the left tile and the odd ones of the right tile, to move 8 bytes
// each and a whole sector together. Twice is as before.
__device__ inline uint2 trade(uint2 mine) {
  const bool odd = threadIdx.x & 1;
  const uint32_t theirs = __shfl_xor_sync(~0u, odd ? mine.x : mine.y, 1);
  return odd ? uint2{theirs, mine.y} : uint2{mine.x, theirs};
}
// The first column of what a lane has then.
__device__ inline int traded_column() {
  const int q = threadIdx.x % 4;
  return q % 2 * 8 + q / 2 * 4;
}

// Where the rows of a chunk's gradient go.
template <typename data_t>
struct GradientRows {
  data_t* data;
  int token;  // values of one, all groups

  // `offset`: of the head's group within a token; `first`: the chunk's first token.
  __device__ GradientRows(const PartedGradient& gradient, void* all, int offset, int64_t first)
      : token(gradient.groups * gradient.width) {
    data = static_cast<data_t*>(all) + first * token + offset;
  }
  // Two tiles of D with the rows row + g and row + g + 8 and the columns from `column` on.
  __device__ void store(int count, int row, int column, int width, const float (&left)[4],
                        const float (&right)[4]) const {
    const int g = threadIdx.x % 32 / 4, at = column + traded_column();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float *l = left + half * 2, *r = right + half * 2;
      const uint2 traded = trade({pack<data_t>(l[0], l[1]), pack<data_t>(r[0], r[1])});
      const int i = row + g + half * 8;
      if (i < count && at < width)
        *reinterpret_cast<uint2*>(data + int64_t(i) * token + at) = traded;
    }
  }
};

template <typename data_t, int kP, int kN, Sums kSums>
__global__ void __launch_bounds__(kThreads, Tile<data_t, kP, kN>::kWanted)
    ssd_scan_backward_kernel(const SsdScanBackwardParams p, const TileScratch scratch) {
  using T = Tile<data_t, kP, kN>;
  constexpr int kRowTiles = T::kRowTiles, kColumnTiles = T::kColumnTiles;
  using State = float[kRowTiles][kColumnTiles][4];
  extern __shared__ float4 shared_memory[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(shared_memory);
  auto& rest = shared.rest;

  let_next_start();
  wait_for_inputs();
  const SsdScanParams& f = p.forward;
  // Blocks wait for blocks before them alone, which have begun: so they take their places in the
  // order in which they begin.
  int block = blockIdx.x;
  if (kSums == Sums::kPassed) {
    auto* counts = reinterpret_cast<uint32_t*>(p.scratch + scratch.progress);
    int* drawn = reinterpret_cast<int*>(&rest.inner[0][0]);
    if (threadIdx.x == 0) *drawn = static_cast<int>(atomicAdd(counts, 1u));
    __syncthreads();
    block = __shfl_sync(~0u, *drawn, 0);
    if (threadIdx.x < 3)
      rest.passing[threadIdx.x] = scratch.gradient(threadIdx.x).passing_of(block, f.heads);
    __syncthreads();
  }
  // Where the block is; offsets follow from it, in 64 bits, where they are needed.
  const Run run(f, scratch, block);
  const int head = run.head, batch = run.batch, begin = run.begin, length = run.length;
  // Of a block's warp, where sums are passed.
  const auto progress_of = [&](int64_t block, int warp) {
    return reinterpret_cast<uint32_t*>(p.scratch + scratch.progress) + 1 + block * kWarps + warp;
  };
  const auto tell_all_done = [&](int warp) {
    tell_done(run.first_chunk < run.last_chunk, rest.passing, block,
              [&](int64_t block) { return progress_of(block, warp); });
  };
  if (!run.first && run.first_chunk == run.last_chunk) {  // there is no such run
    if (kSums == Sums::kPassed && threadIdx.x < kWarps) tell_all_done(threadIdx.x);
    if (p.dD && threadIdx.x == 0) p.scratch[scratch.dD + block] = 0.f;
    return;
  }
  const int x_offset = head / (f.heads / f.x_heads) * f.head_dim,
            b_offset = head / (f.heads / f.b_groups) * f.state_dim,
            c_offset = head / (f.heads / f.c_groups) * f.state_dim;
  const float skip = f.D ? f.D[head] : 0.f;

  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int r = warp % kBlocks, h = warp / kBlocks;
  const int first_token = r * kBlock, n_half = h * (kN / kHalves), p_half = h * (kP / kHalves);

  // ---- What the next step reads, on its way.
  int buffer = 0, next_buffer = 0, parity = 1;
  float next_decay[2],
      next_scale[2];  // of tokens 2 lane and 2 lane + 1, in the warp that sums them
  constexpr int kScalarWarp = 2;
  const auto copy_rows = [&](auto& to, const void* data, TokenStrides strides, int offset, int t,
                             int width) {
    constexpr int kVectors = sizeof(to.at[0]) / 16 - 1, kCopies = kChunk * kVectors / kThreads;
    const auto* from = static_cast<const data_t*>(data) + opaque(batch) * strides.batch +
                       opaque(begin + t) * strides.token + offset;
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int v = threadIdx.x + u * kThreads, i = v / kVectors, column = v % kVectors * 8;
      const bool there = t + i < length && column < width;
      copy_async_16_once(&to.at[i][column], there ? from + i * strides.token + column : from,
                         there);
    }
  };
  const auto request = [&](int chunk, bool back) {
    const int t = chunk * kChunk;
    auto& in = shared.inputs[next_buffer];
    next_buffer = (next_buffer + 1) % T::kBuffers;
    copy_rows(in.x, f.x, f.x_strides, x_offset, t, f.head_dim);
    copy_rows(in.b, f.B, f.b_strides, b_offset, t, f.state_dim);
    if (back) {
      copy_rows(in.c, f.C, f.c_strides, c_offset, t, f.state_dim);
      copy_rows(in.dy, p.dy, p.dy_strides, head * f.head_dim, t, f.head_dim);
    }
    commit_copies();
    if (warp != kScalarWarp) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = t + 2 * lane + k;
      const auto read = [&](const float* data, TokenStrides strides) {
        return data[opaque(batch) * strides.batch + opaque(begin + i) * strides.token + head];
      };
      next_decay[k] = i < length ? read(f.log_decay, f.log_decay_strides) : 0.f;
      next_scale[k] = i < length && f.scale ? read(f.scale, f.scale_strides) : 1.f;
    }
  };
  // Of the chunk requested last; a barrier makes them visible.
  const auto put_scalars = [&] {
    parity ^= 1;
    if (warp != kScalarWarp) return;
    reasoners::put_scalars(rest.scalars[parity], next_decay, next_scale);
  };

  // ---- States in registers, shared and global memory.
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) visit(m, n, 16 * (r + kBlocks * m), n_half + 8 * n);
  };
  const auto read_state = [&](const float* data, State& to) {
    each([&](int m, int n, int first_row, int first_column) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int i = first_row + g + v / 2 * 8, j = first_column + 2 * q + v % 2;
        const bool in = data != nullptr && i < f.head_dim && j < f.state_dim;
        to[m][n][v] = in ? data[int64_t(i) * f.state_dim + j] : 0.f;
      }
    });
  };
  const auto at_border = [&](int64_t states, int border) {
    return p.scratch + states + int64_t(border) * f.head_dim * f.state_dim;
  };
  const auto home = [&] {  // in a state tensor
    return (int64_t(run.index) * f.heads + head) * f.head_dim * f.state_dim;
  };
  const auto begin_of_run = [&]() -> const float* {
    if (!run.first) return at_border(scratch.border_states, run.border - f.heads);
    return f.initial_state ? f.initial_state + home() : nullptr;
  };
  // to = whole to + (weight rows)^T columns, summed over the chunk's tokens.
  const auto advance = [&](State& to, float whole, const auto& rows, const float* weight,
                           const auto& columns) {
    each([&](int m, int n, int, int) {
#pragma unroll
      for (int v = 0; v < 4; ++v) to[m][n][v] *= whole;
    });
    add_outer_products<data_t, kP>(to, rows, weight, columns, r, n_half);
  };
  const auto put_state = [&](Matrix<data_t, kP, kN>& to, const State& state) {
    each([&](int m, int n, int first_row, int first_column) {
      if (first_row >= kP) return;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to.put_pair(first_row + g + half * 8, first_column + 2 * q,
                    pack<data_t>(state[m][n][2 * half], state[m][n][2 * half + 1]));
    });
  };
  // A state as it is kept: its lanes have traded. Who keeps a part of it recalls that part.
  using Kept = uint2[kRowTiles][kColumnTiles / 2][2];
  const auto fold = [&](const State& state, Kept& to) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float *l = state[m][2 * n] + 2 * half, *r = state[m][2 * n + 1] + 2 * half;
          to[m][n][half] = trade({pack<data_t>(l[0], l[1]), pack<data_t>(r[0], r[1])});
        }
  };
  const auto unfold = [&](const Kept& data, State& to) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 pairs = trade(data[m][n][half]);
          const float2 left = unpack<data_t>(pairs.x), right = unpack<data_t>(pairs.y);
          to[m][2 * n][2 * half] = left.x;
          to[m][2 * n][2 * half + 1] = left.y;
          to[m][2 * n + 1][2 * half] = right.x;
          to[m][2 * n + 1][2 * half + 1] = right.y;
        }
  };
  const int every = scratch.kept.every;
  // Visits what the thread has of the state before a chunk, and where it is kept.
  const auto each_kept = [&](int chunk, auto&& visit) {
    const KeptStates& kept = scratch.kept;
    const int column = n_half + traded_column();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int before = every == 1 ? 1 : 1 + (kept.halves ? h : m);  // chunks
      const int64_t row = int64_t(f.heads) * kept.rows[m].width;
      const int64_t token =
          opaque(batch) * f.length + opaque(begin + (chunk - before) * kChunk + first_token + g);
      data_t* data = static_cast<data_t*>(kept.rows[m].data) + token * row +
                     head * kept.rows[m].width + column - (kept.halves ? n_half : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kColumnTiles / 2; ++n)
          visit(m, n, half, reinterpret_cast<uint2*>(data + half * 8 * row + n * 16),
                m * kChunk + first_token + g + half * 8 < f.head_dim &&
                    column + n * 16 < f.state_dim);
    }
  };
  const auto keep = [&](int chunk, const Kept& state) {
    each_kept(chunk, [&](int m, int n, int half, uint2* there, bool in) {
      if (in) *there = state[m][n][half];
    });
  };
  // The state before the run is where it came from.
  const auto recall = [&](int chunk, Kept& to) {
    if (chunk == run.first_chunk) {
      State state;
      read_state(begin_of_run(), state);
      fold(state, to);
      return;
    }
    each_kept(chunk, [&](int m, int n, int half, const uint2* there, bool in) {
      to[m][n][half] = in ? *there : uint2{};
    });
  };

  // ---- The walks.
  // One step forwards; `request_next` asks for what the step after this one reads.
  const auto step_forwards = [&](State& state, auto&& request_next) {
    put_scalars();
    wait_copies();
    __syncthreads();
    const auto& in = shared.inputs[buffer];
    buffer = (buffer + 1) % T::kBuffers;
    const auto& scalars = rest.scalars[parity];
    if (T::kBuffers == 2) request_next();
    advance(state, scalars.whole, in.x, scalars.gain, in.b);
    if (T::kBuffers == 1) {
      __syncthreads();
      request_next();
    }
  };

  const int chunks = run.last_chunk;
  const int last_kept = run.first_chunk + max(chunks - run.first_chunk - 1, 0) / every * every;
  {
    State state;
    read_state(begin_of_run(), state);
    // Where this walk ends the other begins, backwards if that is the last chunk.
    if (run.first_chunk < chunks) request(run.first_chunk, run.first_chunk + 1 == chunks);
#pragma unroll 1
    for (int chunk = run.first_chunk; chunk < last_kept;) {
      step_forwards(state, [&] { request(chunk + 1, chunk + 2 == chunks); });
      ++chunk;
      if (chunk % every > 0) continue;
      Kept kept;
      fold(state, kept);
      keep(chunk, kept);
    }
  }

  State dstate;
  read_state(run.last_chunk < run.chunks ? at_border(scratch.border_dstates, run.border)
                                         : p.dfinal_state + home(),
             dstate);
  float dD = 0.f;
  Kept before;
  recall(last_kept, before);
#pragma unroll 1
  for (int first = last_kept; first >= run.first_chunk; first -= every) {
    const int count_of_chunks = min(every, chunks - first);
    if (count_of_chunks > 1) {
      State state;
      unfold(before, state);
      step_forwards(state, [&] { request(first + 1, true); });
      fold(state, before);
    }
    for (int k = count_of_chunks - 1; k >= 0; --k) {
      const int t = (first + k) * kChunk, count = min(kChunk, length - t);
      // The chunk's rows of a gradient.
      const auto rows_of = [&](const PartedGradient& gradient, void* sum, int offset) {
        const int64_t first = opaque(batch) * f.length + opaque(begin + t);
        return GradientRows<data_t>(gradient, sum, offset, first);
      };
      // Adds up a gradient that heads share: the sums of the heads so far pass from block to block,
      // warp to warp and thread to thread. False for all but the last head, who writes them.
      const auto add_up = [&](const PassedGradient& gradient, auto& d, int which) {
        if (kSums != Sums::kPassed || gradient.count == 1) return true;
        constexpr int kTiles = sizeof(d) / sizeof(d[0]);
        const Passing& passing = rest.passing[which];
        const int turn = chunks - 1 - (first + k), member = passing.member;
        const uint32_t step = 3 * turn + which + 1;
        uint32_t* progress = progress_of(opaque(block), warp);
        const int place =
            passing.place + (turn < gradient.places ? turn : turn & (gradient.places - 1));
        auto* sums = reinterpret_cast<float4*>(p.scratch + gradient.parts) +
                     int64_t(place) * (kTiles * kThreads) + threadIdx.x;
        if (member > 0) {
          wait_until(progress - kWarps, step);
          add_sums<kThreads>(d, sums);
        } else if (turn >= gradient.places) {
          wait_until(progress + (gradient.count - 1) * kWarps, step - 3 * gradient.places);
        } else if (passing.before >= 0) {
          wait_until(progress_of(passing.before, warp), kDone);
        }
        if (member + 1 == gradient.count) {
          __syncwarp();
          if (lane == 0) tell(progress, step);
          return true;
        }
        leave_sums<kThreads>(d, sums);
        __syncwarp();
        if (lane == 0) tell(progress, step);
        return false;
      };
      const auto request_next = [&] {
        // From the first of two chunks, whose second is computed from it, on to the first of the
        // two before.
        const int here = first + k;
        if (here > run.first_chunk) request(k > 0 ? here - 1 : here - every, k > 0 || every == 1);
      };

      // The states on both sides of the chunk, for the products with them.
      {
        State state;
        unfold(before, state);
        put_state(rest.state, state);
        put_state(rest.dstate, dstate);
        float inner = 0.f;
        each([&](int m, int n, int first_row, int) {
          if (first_row >= kP) return;
#pragma unroll
          for (int v = 0; v < 4; ++v) inner = fmaf(state[m][n][v], dstate[m][n][v], inner);
        });
        inner = sum_warp(inner);
        if (lane == 0) rest.inner[parity ^ 1][warp] = inner;
      }
      put_scalars();
      wait_copies();
      __syncthreads();
      const auto& in = shared.inputs[buffer];
      buffer = (buffer + 1) % T::kBuffers;
      const Scalars& scalars = rest.scalars[parity];
      if (T::kBuffers == 2) request_next();

      // (C B^T * L) and (dY U^T * L), and what passes between tokens.
      {
        const int i0 = first_token + g;
        const float c_of[2] = {scalars.c[i0], scalars.c[i0 + 8]};
        float row_sums[2] = {};
        // Read once where there are registers for it.
        constexpr bool kOnce = kP * kN == 64 * 64 || T::kWanted == 1;
        uint32_t c_rows[kN / 16][4], dy_rows[kP / 16][4];
        const auto read_rows = [&] {
#pragma unroll
          for (int d = 0; d < kN / 16; ++d) in.c.load_a(c_rows[d], first_token, d * 16);
#pragma unroll
          for (int d = 0; d < kP / 16; ++d) in.dy.load_a(dy_rows[d], first_token, d * 16);
        };
        if (kOnce) read_rows();
#pragma unroll 1
        for (int block = 0; block <= r; ++block) {
          const int j0 = block * kBlock + h * 8;  // a tile of 8 columns
          float score[4] = {}, dscore[4] = {};
          if (!kOnce) read_rows();
#pragma unroll
          for (int d = 0; d < kN; d += 32) {
            uint32_t tall[4];
            in.b.load_b_transposed_tall(tall, d, j0);
            multiply_add<data_t>(score, c_rows[d / 16], tall[0], tall[1]);
            multiply_add<data_t>(score, c_rows[d / 16 + 1], tall[2], tall[3]);
          }
#pragma unroll
          for (int d = 0; d < kP; d += 32) {
            uint32_t tall[4];
            in.x.load_b_transposed_tall(tall, d, j0);
            multiply_add<data_t>(dscore, dy_rows[d / 16], tall[0], tall[1]);
            multiply_add<data_t>(dscore, dy_rows[d / 16 + 1], tall[2], tall[3]);
          }
          const float2 c_from = *reinterpret_cast<const float2*>(&scalars.c[j0 + 2 * q]),
                       scale_of = *reinterpret_cast<const float2*>(&scalars.scale[j0 + 2 * q]);
          float passed[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const int i = i0 + v / 2 * 8, j = j0 + 2 * q + v % 2;
            const float decay =
                j <= i ? exp2_fast(c_of[v / 2] - (v % 2 ? c_from.y : c_from.x)) : 0.f;
            dscore[v] *= v % 2 ? scale_of.y : scale_of.x;
            score[v] *= decay;
            passed[v] = score[v] * dscore[v];
            dscore[v] *= decay;
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = g + half * 8, j = h * 8 + 2 * q;
            rest.scores.put_pair(r, block, i, j,
                                 pack<data_t>(score[2 * half], score[2 * half + 1]));
            rest.dscores.put_pair(r, block, i, j,
                                  pack<data_t>(dscore[2 * half], dscore[2 * half + 1]));
          }
          if (block == r) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const int i = g + v / 2 * 8, j = h * 8 + 2 * q + v % 2;
              rest.diagonal[r][i][j] = j < i ? passed[v] : 0.f;
            }
            continue;
          }
          row_sums[0] += passed[0] + passed[1];
          row_sums[1] += passed[2] + passed[3];
          float columns[2] = {passed[0] + passed[2], passed[1] + passed[3]};
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2) {
            columns[0] += __shfl_xor_sync(~0u, columns[0], offset);
            columns[1] += __shfl_xor_sync(~0u, columns[1], offset);
          }
          if (g == 0)
            *reinterpret_cast<float2*>(&rest.column_sums[r][j0 + 2 * q]) = {columns[0], columns[1]};
        }
        row_sums[0] = sum_row(row_sums[0]);
        row_sums[1] = sum_row(row_sums[1]);
        if (q < 2) rest.row_sums[h][i0 + q * 8] = q == 0 ? row_sums[0] : row_sums[1];
      }
      __syncthreads();

      // dC and dB: the part of the state's, weighed and summed with the other factor, then the part
      // of the chunk's tokens.
      const auto weigh = [&](auto& d, const float* weight, const auto& factor, float* sums) {
        const float weights[2] = {weight[first_token + g], weight[first_token + g + 8]};
        float dots[2] = {};
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 pair =
                unpack<data_t>(factor.pair(first_token + g + half * 8, n_half + n * 8 + 2 * q));
            d[n][2 * half] *= weights[half];
            d[n][2 * half + 1] *= weights[half];
            dots[half] = fmaf(d[n][2 * half], pair.x, dots[half]);
            dots[half] = fmaf(d[n][2 * half + 1], pair.y, dots[half]);
          }
        dots[0] = sum_row(dots[0]);
        dots[1] = sum_row(dots[1]);
        if (q < 2) sums[first_token + g + q * 8] = q == 0 ? dots[0] : dots[1];
      };
      {
        float d[kColumnTiles][4] = {};
        multiply<data_t, kP>(d, in.dy, first_token, rest.state, n_half);
        weigh(d, scalars.since, in.c, rest.received[h]);
#pragma unroll 1
        for (int block = 0; block <= r; ++block) {
          uint32_t a[4];
          rest.dscores.load_a(a, r, block);
          multiply_block<data_t>(d, a, in.b, block * kBlock, n_half);
        }
        if (add_up(scratch.dC, d, 0)) {
          const auto dC = rows_of(scratch.dC, p.dC, c_offset);
#pragma unroll
          for (int n = 0; n < kColumnTiles; n += 2)
            dC.store(count, first_token, n_half + n * 8, f.state_dim, d[n], d[n + 1]);
        }
      }
      {
        float d[kColumnTiles][4] = {};
        multiply<data_t, kP>(d, in.x, first_token, rest.dstate, n_half);
        weigh(d, scalars.gain, in.b, rest.given[h]);
#pragma unroll 1
        for (int block = r; block < kBlocks; ++block) {
          uint32_t a[4];
          rest.dscores.load_a_transposed(a, block, r);
          multiply_block<data_t>(d, a, in.c, block * kBlock, n_half);
        }
        if (add_up(scratch.dB, d, 1)) {
          const auto dB = rows_of(scratch.dB, p.dB, b_offset);
#pragma unroll
          for (int n = 0; n < kColumnTiles; n += 2)
            dB.store(count, first_token, n_half + n * 8, f.state_dim, d[n], d[n + 1]);
        }
      }
      // dU, and from it dX and dscale.
      {
        constexpr int kTiles = kP / 8 / kHalves;
        float d[kTiles][4] = {};
        multiply_by_transposed<data_t, kN>(d, in.b, first_token, rest.dstate, p_half);
        const int j0 = first_token + g;
        const float until[2] = {scalars.until[j0], scalars.until[j0 + 8]};
        const float scale_of[2] = {scalars.scale[j0], scalars.scale[j0 + 8]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int v = 0; v < 4; ++v) d[n][v] *= until[v / 2];
#pragma unroll 1
        for (int block = r; block < kBlocks; ++block) {
          uint32_t a[4];
          rest.scores.load_a_transposed(a, block, r);
          multiply_block<data_t>(d, a, in.dy, block * kBlock, p_half);
        }
        float dscale[2] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = p_half + n * 8 + 2 * q;
            const float2 input = unpack<data_t>(in.x.pair(j0 + half * 8, column)),
                         gradient = unpack<data_t>(in.dy.pair(j0 + half * 8, column));
            float& low = d[n][2 * half];
            float& high = d[n][2 * half + 1];
            dscale[half] = fmaf(low, input.x, fmaf(high, input.y, dscale[half]));
            dD = fmaf(gradient.x, input.x, fmaf(gradient.y, input.y, dD));
            low = fmaf(scale_of[half], low, skip * gradient.x);
            high = fmaf(scale_of[half], high, skip * gradient.y);
          }
        dscale[0] = sum_row(dscale[0]);
        dscale[1] = sum_row(dscale[1]);
        if (q < 2) rest.dscale[h][j0 + q * 8] = q == 0 ? dscale[0] : dscale[1];
        if (add_up(scratch.dx, d, 2)) {
          const auto dx = rows_of(scratch.dx, p.dx, x_offset);
#pragma unroll
          for (int n = 0; n < kTiles; n += 2)
            dx.store(count, first_token, p_half + n * 8, f.head_dim, d[n], d[n + 1]);
        }
      }
      if (first + k > run.first_chunk) recall(k > 0 ? first : first - every, before);
      advance(dstate, scalars.whole, in.dy, scalars.since, in.c);
      __syncthreads();
      if (T::kBuffers == 1) request_next();

      // d log_decay, by two warps with a token each, while the others begin the next chunk.
      if (threadIdx.x < kChunk) {
        const int i = threadIdx.x, e = i % kBlock, block = i / kBlock;
        // Between blocks: tokens of this block before i to later blocks, earlier blocks to tokens
        // of this one from i on, and past the block altogether.
        float from_here = 0.f;
#pragma unroll
        for (int later = 1; later < kBlocks; ++later)
          if (later > block) from_here += rest.column_sums[later][i];
        float to_here = block > 0 ? rest.row_sums[0][i] + rest.row_sums[1][i] : 0.f;
#pragma unroll
        for (int offset = 1; offset < kBlock; offset *= 2) {
          const float before_here = __shfl_up_sync(~0u, from_here, offset),
                      after_here = __shfl_down_sync(~0u, to_here, offset);
          if (e >= offset) from_here += before_here;
          if (e + offset < kBlock) to_here += after_here;
        }
        const float earlier = __shfl_up_sync(~0u, from_here, 1);
        float sum = to_here + (e > 0 ? earlier : 0.f);
        float past = warp == 0
                         ? (lane < 16 ? rest.column_sums[2][lane] + rest.column_sums[3][lane] : 0.f)
                         : rest.column_sums[3][lane];
        past = sum_warp(past);
        if (block == 1 || block == 2) sum += past;
        // Within the block: rows summed up to each column, then columns from row i on.
        float* diagonal = rest.diagonal[block][e];
        float up_to = 0.f;
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          const float value = diagonal[j];
          diagonal[j] = up_to;
          up_to += value;
        }
        __syncwarp();
#pragma unroll
        for (int l = 0; l < kBlock; ++l)
          if (l >= e) sum += rest.diagonal[block][l][e];
        // From the state before to tokens from i on, from tokens before i to the state after.
        const int other = i ^ 32;
        float received = rest.received[0][i] + rest.received[1][i];
        float given = rest.given[0][i] + rest.given[1][i];
        const float rest_received = sum_warp(rest.received[0][other] + rest.received[1][other]);
        const float rest_given = sum_warp(rest.given[0][other] + rest.given[1][other]);
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const float after_here = __shfl_down_sync(~0u, received, offset),
                      before_here = __shfl_up_sync(~0u, given, offset);
          if (lane + offset < 32) received += after_here;
          if (lane >= offset) given += before_here;
        }
        const float given_before = __shfl_up_sync(~0u, given, 1);
        sum += warp == 0 ? received + rest_received : received;
        sum += (lane > 0 ? given_before : 0.f) + (warp == 1 ? rest_given : 0.f);
        float inner = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) inner += rest.inner[parity][w];
        sum = fmaf(scalars.whole, inner, sum);
        const int64_t at = (batch * f.length + begin + t + i) * f.heads + head;
        if (i < count) {
          p.dlog_decay[at] = sum;
          if (p.dscale) p.dscale[at] = rest.dscale[0][i] + rest.dscale[1][i];
        }
      }
    }
  }

  if (kSums == Sums::kPassed && lane == 0) tell_all_done(warp);
  if (p.dinitial_state && run.first) {
    each([&](int m, int n, int first_row, int first_column) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int i = first_row + g + v / 2 * 8, j = first_column + 2 * q + v % 2;
        if (i < f.head_dim && j < f.state_dim)
          p.dinitial_state[home() + int64_t(i) * f.state_dim + j] = dstate[m][n][v];
      }
    });
  }
  if (p.dD) {
    dD = sum_warp(dD);
    __syncthreads();
    if (lane == 0) rest.inner[0][warp] = dD;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kWarps; ++w) dD += rest.inner[0][w];
    p.scratch[scratch.dD + block] = dD;
  }
}

// ---- Dealt sequences

// Leaves what a run adds to the state, or (odd blocks) to the gradient of the state before it; and
// its decay. Warps as above.
template <typename data_t, int kP, int kN>
struct AddTile {
  struct Inputs {
    Matrix<data_t, kChunk, kP> rows;     // x or dy
    Matrix<data_t, kChunk, kN> columns;  // B or C
  };
  struct Shared {
    Inputs inputs[2];
    Scalars scalars[2];
  };
};

template <typename data_t, int kP, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    add_kernel(const SsdScanBackwardParams p, const TileScratch scratch) {
  using T = Tile<data_t, kP, kN>;
  constexpr int kRowTiles = T::kRowTiles, kColumnTiles = T::kColumnTiles;
  extern __shared__ float4 shared_memory[];
  auto& shared = *reinterpret_cast<typename AddTile<data_t, kP, kN>::Shared*>(shared_memory);
  let_next_start();
  wait_for_inputs();
  const SsdScanParams& f = p.forward;
  const bool back = blockIdx.x % 2;
  const Run run(f, scratch, blockIdx.x / 2);
  const int count = run.last_chunk - run.first_chunk;
  // Nothing is carried past the ends of a sequence.
  if (run.runs == 1 || count <= 0 || (back ? run.first : run.last_chunk == run.chunks)) return;
  const int64_t border = run.border - (back ? f.heads : 0);
  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int r = warp % kBlocks, n_half = warp / kBlocks * (kN / kHalves);

  const auto chunk_at = [&](int step) {
    return back ? run.last_chunk - 1 - step : run.first_chunk + step;
  };
  const auto copy_rows = [&](auto& to, const void* data, TokenStrides strides, int offset, int t,
                             int width) {
    constexpr int kVectors = sizeof(to.at[0]) / 16 - 1, kCopies = kChunk * kVectors / kThreads;
    const auto* from = static_cast<const data_t*>(data) + run.batch * strides.batch +
                       int64_t(run.begin + t) * strides.token + offset;
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int v = threadIdx.x + u * kThreads, i = v / kVectors, column = v % kVectors * 8;
      const bool there = t + i < run.length && column < width;
      copy_async_16_once(&to.at[i][column], there ? from + i * strides.token + column : from,
                         there);
    }
  };
  float next_decay[2], next_scale[2];  // of tokens 2 lane and 2 lane + 1, in the first warp
  const auto request = [&](int step) {
    const int t = chunk_at(step) * kChunk;
    auto& in = shared.inputs[step % 2];
    const int b_group = run.head / (f.heads / f.b_groups),
              c_group = run.head / (f.heads / f.c_groups);
    if (back) {
      copy_rows(in.rows, p.dy, p.dy_strides, run.head * f.head_dim, t, f.head_dim);
      copy_rows(in.columns, f.C, f.c_strides, c_group * f.state_dim, t, f.state_dim);
    } else {
      const int x_head = run.head / (f.heads / f.x_heads);
      copy_rows(in.rows, f.x, f.x_strides, x_head * f.head_dim, t, f.head_dim);
      copy_rows(in.columns, f.B, f.b_strides, b_group * f.state_dim, t, f.state_dim);
    }
    if (warp > 0) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = t + 2 * lane + k;
      const auto read = [&](const float* data, TokenStrides strides) {
        return data[run.batch * strides.batch + int64_t(run.begin + i) * strides.token + run.head];
      };
      next_decay[k] = i < run.length ? read(f.log_decay, f.log_decay_strides) : 0.f;
      next_scale[k] = i < run.length && f.scale ? read(f.scale, f.scale_strides) : 1.f;
    }
  };
  float state[kRowTiles][kColumnTiles][4] = {}, decay = 1.f;
  request(0);
#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    Scalars& scalars = shared.scalars[step % 2];
    if (warp == 0) put_scalars(scalars, next_decay, next_scale);
    wait_copies();
    __syncthreads();
    const auto& in = shared.inputs[step % 2];
    if (step + 1 < count) request(step + 1);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int v = 0; v < 4; ++v) state[m][n][v] *= scalars.whole;
    add_outer_products<data_t, kP>(state, in.rows, back ? scalars.since : scalars.gain, in.columns,
                                   r, n_half);
    decay *= scalars.whole;
  }
  float* to = p.scratch + (back ? scratch.border_dstates : scratch.border_states) +
              border * f.head_dim * f.state_dim;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * (r + kBlocks * m) + g + half * 8, j = n_half + 8 * n + 2 * q;
        if (i < f.head_dim && j < f.state_dim)
          *reinterpret_cast<float2*>(to + i * f.state_dim + j) = {state[m][n][2 * half],
                                                                  state[m][n][2 * half + 1]};
      }
  if (threadIdx.x == 0)
    p.scratch[(back ? scratch.border_ddecays : scratch.border_decays) + border] = decay;
}

// What runs add becomes the states between them and their gradients.
constexpr int kCarryThreads = 128;

__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(const SsdScanBackwardParams p, const TileScratch scratch) {
  let_next_start();
  wait_for_inputs();
  const SsdScanParams& f = p.forward;
  const int64_t size = int64_t(f.head_dim) * f.state_dim;
  const int64_t element = int64_t(blockIdx.y) * kCarryThreads + threadIdx.x;
  const int head = blockIdx.x % f.heads, index = blockIdx.x / f.heads;
  const Run first(f, scratch, index, head, 0);
  if (first.runs == 1 || 4 * element >= size) return;
  const auto vector = [&](const float* data, int64_t entry) {
    return reinterpret_cast<float4*>(const_cast<float*>(data) + entry * size) + element;
  };
  const auto carry = [&](float4& state, int64_t states, int64_t decays, int border) {
    const int64_t place = first.border + int64_t(border) * f.heads;
    float4* here = vector(p.scratch + states, place);
    const float4 added = *here;
    const float decay = p.scratch[decays + place];
    state = {fmaf(decay, state.x, added.x), fmaf(decay, state.y, added.y),
             fmaf(decay, state.z, added.z), fmaf(decay, state.w, added.w)};
    *here = state;
  };
  const int64_t home = int64_t(index) * f.heads + head;
  float4 state{}, dstate = *vector(p.dfinal_state, home);
  if (f.initial_state) state = *vector(f.initial_state, home);
  const int borders = first.runs - 1;
  for (int border = 0; border < borders; ++border) {
    carry(state, scratch.border_states, scratch.border_decays, border);
    carry(dstate, scratch.border_dstates, scratch.border_ddecays, borders - 1 - border);
  }
}

// ---- Launch

__global__ void __launch_bounds__(kThreads) clear_kernel(float* counts, int64_t count) {
  let_next_start();
  wait_for_inputs();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) counts[i] = 0.f;
}

// What a shape runs on; the two uses are the launch and the size of its scratch memory.
template <typename Use>
void with_tile(const SsdScanParams& f, const Use& use) {
  using Of64 = std::integral_constant<int, 64>;
  using Of96 = std::integral_constant<int, 96>;
  using Of128 = std::integral_constant<int, 128>;
  if (f.state_dim <= 64) {
    if (f.head_dim <= 64) return use(Of64(), Of64());
    if (f.head_dim <= 96) return use(Of96(), Of64());
    return use(Of128(), Of64());
  }
  if (f.head_dim <= 64) return use(Of64(), Of128());
  use(Of128(), Of128());
}

// How many heads of so many that share a gradient are a chain (PassedGradient): the fewest one
// after the other, a chain, the ends of all others and the last chain. By nothing else, as sums
// depend on it.
int heads_of_chain(int heads) {
  int best = heads, least = heads;
  for (int chain = 2; heads >= 32 && 2 * chain <= heads; ++chain)
    if (heads % chain == 0 && 2 * chain + heads / chain <= least) {
      best = chain;
      least = 2 * chain + heads / chain;
    }
  return best;
}

template <typename T>
TileScratch scratch_of(const SsdScanParams& f) {
  TileScratch scratch{};
  scratch.kept = KeptStates::of(f, T::kColumns);
  // Where no gradient has rows that are a head's own.
  const bool none = scratch.kept.rows[0].where == OwnRows::kScratch;
  scratch.walks = count_ssd_scan_backward_wgmma_walks(f, scratch.kept);
  scratch.states = scratch.take(none ? f.batch * f.length * f.heads * f.state_dim / 2 : 0);
  scratch.run_chunks = longest_run(f);
  const int64_t longest = scratch.run_chunks * kChunk, runs = count_runs(f, longest),
                blocks = runs * f.heads, borders = count_borders(f, longest) * f.heads;
  scratch.border_states = scratch.take(borders * f.head_dim * f.state_dim);
  scratch.border_dstates = scratch.take(borders * f.head_dim * f.state_dim);
  scratch.border_decays = scratch.take(borders);
  scratch.border_ddecays = scratch.take(borders);
  scratch.dD = scratch.take(f.D ? blocks : 0);
  // Of a gradient that heads share the sums in fp32, chunk by chunk as the tile has them.
  const int64_t begin = scratch.size;
  const int shared = (f.x_heads < f.heads) + (f.b_groups < f.heads) + (f.c_groups < f.heads);
  const auto take_sums = [&](int groups, int width, int columns) {
    PassedGradient gradient{{0, f.heads / groups, groups, width}};
    const int64_t all = runs * groups;
    if (gradient.count == 1 || all == 0) return gradient;
    const int processors = count_processors();
    const int walks = scratch.walks > 0 ? scratch.walks : T::kWanted;
    const int64_t at_once = int64_t(processors) * walks / gradient.count + 2;
    gradient.slots = static_cast<int>(std::min(at_once, all));
    // All places and the states between runs take a twelfth of the bytes of the inputs at most, as
    // long as each group has a place. But a group that is not on the device as a whole must not
    // wait for its last.
    const bool waits = f.heads <= processors;
    const int64_t chunks =
        std::clamp<int64_t>((f.length + kChunk - 1) / kChunk, 1, scratch.run_chunks);
    const int64_t floats = f.batch * f.length * bytes_of_token(f) / sizeof(float) / 12 - begin;
    const int64_t share = floats / (shared * kChunk * columns);
    const bool by_copies = scratch.walks > 0 && passes_by_copies(T::kRows, T::kColumns);
    gradient.chain = by_copies && waits ? heads_of_chain(gradient.count) : gradient.count;
    const int64_t chains = gradient.count / gradient.chain;
    // As many at least as a run has, whose groups may wait for each other both ways where gradients
    // are shared out of step.
    if (by_copies && waits)
      gradient.slots = std::clamp<int64_t>(share / chains, groups, gradient.slots);
    // A power of two, or all.
    const auto count_places = [&](int64_t wanted, int64_t most) {
      int64_t places = 1;
      while (places < std::min(chunks, wanted) && (!waits || 2 * places <= most)) places *= 2;
      return static_cast<int>(std::min(places, chunks));
    };
    const auto take = [&](int64_t places) {
      return scratch.take(gradient.slots * places * kChunk * columns);
    };
    int64_t most = share / gradient.slots;
    if (chains > 1) {
      gradient.chain_places = count_places(gradient.chain, (most - 1) / (chains - 1));
      gradient.chain_parts = take((chains - 1) * gradient.chain_places);
      most -= (chains - 1) * gradient.chain_places;
    }
    // A block is half a chunk or less behind the one before it; a group's first blocks shall not
    // wait for those that begin later.
    const int64_t wanted = by_copies || !waits ? chunks : std::max(gradient.count / 2, 2);
    gradient.places = count_places(wanted, most);
    gradient.parts = take(gradient.places);
    return gradient;
  };
  scratch.dx = take_sums(f.x_heads, f.head_dim, T::kRows);
  scratch.dB = take_sums(f.b_groups, f.state_dim, T::kColumns);
  scratch.dC = take_sums(f.c_groups, f.state_dim, T::kColumns);
  scratch.counts = scratch.size > begin ? 1 + blocks * kWarps : 0;
  scratch.progress = scratch.take(scratch.counts);
  return scratch;
}

template <typename data_t>
void launch(const SsdScanBackwardParams& p, cudaStream_t stream) {
  const SsdScanParams& f = p.forward;
  with_tile(f, [&](auto rows, auto columns) {
    constexpr int kP = rows(), kN = columns();
    using T = Tile<data_t, kP, kN>;
    constexpr int kBytes = sizeof(typename T::Shared);
    TileScratch scratch = scratch_of<T>(f);
    for (OwnRows& rows : scratch.kept.rows)
      rows.data = rows.where == OwnRows::kdX   ? p.dx
                  : rows.where == OwnRows::kdB ? p.dB
                  : rows.where == OwnRows::kdC ? p.dC
                                               : p.scratch + scratch.states;
    const int64_t longest = scratch.run_chunks * kChunk,
                  runs = f.sequences > 0 ? count_runs(f, longest) : 0;
    const auto blocks = static_cast<unsigned>(runs * f.heads);
    if (blocks > 0 && scratch.counts > 0) {
      const auto clearing = static_cast<unsigned>((scratch.counts + kThreads - 1) / kThreads);
      launch_overlapping(clear_kernel, clearing, kThreads, 0, stream, p.scratch + scratch.progress,
                         scratch.counts);
    }
    if (blocks > 0 && count_borders(f, longest) > 0) {
      const auto add = add_kernel<data_t, kP, kN>;
      constexpr int kAddBytes = sizeof(typename AddTile<data_t, kP, kN>::Shared);
      cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, kAddBytes);
      launch_overlapping(add, 2 * blocks, kThreads, kAddBytes, stream, p, scratch);
      const int vectors = f.head_dim * f.state_dim / 4;
      const auto walks = static_cast<unsigned>(f.sequences * f.heads);
      const dim3 grid(walks, (vectors + kCarryThreads - 1) / kCarryThreads);
      launch_overlapping(carry_kernel, grid, kCarryThreads, 0, stream, p, scratch);
    }
    const auto walk = [&](auto kernel) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (blocks > 0) launch_overlapping(kernel, blocks, kThreads, kBytes, stream, p, scratch);
    };
    if (scratch.walks > 0) {
      if (blocks > 0) launch_ssd_scan_backward_wgmma(p, scratch, static_cast<int>(blocks), stream);
    } else if (scratch.counts > 0) {
      walk(ssd_scan_backward_kernel<data_t, kP, kN, Sums::kPassed>);
    } else {
      walk(ssd_scan_backward_kernel<data_t, kP, kN, Sums::kNone>);
    }
    if (p.dD != nullptr) sum_partials(p.scratch + scratch.dD, f.heads, runs, f.heads, p.dD, stream);
  });
}

template <typename data_t>
int64_t count(const SsdScanParams& f) {
  int64_t floats = 0;
  with_tile(f, [&](auto rows, auto columns) {
    floats = scratch_of<Tile<data_t, rows(), columns()>>(f).size;
  });
  return floats;
}

}  // namespace

int64_t count_ssd_scan_backward_scratch(const SsdScanParams& f) {
  if (f.heads == 0 || f.head_dim == 0) return 0;
  if (!on_tensor_cores(f)) return count_ssd_scan_rows_scratch(f);
  return f.dtype == DType::kBFloat16 ? count<__nv_bfloat16>(f) : count<__half>(f);
}

void launch_ssd_scan_backward(const SsdScanBackwardParams& p, cudaStream_t stream) {
  if (p.forward.heads == 0 || p.forward.head_dim == 0) return;
  if (!on_tensor_cores(p.forward)) return launch_ssd_scan_rows_backward(p, stream);
  p.forward.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                      : launch<__half>(p, stream);
}

}  // namespace reasoners
