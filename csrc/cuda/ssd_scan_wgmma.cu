// ssd_scan.cu's recurrence for large heads on Hopper: the same chunks, segments and products, by
// warpgroups whose tensor cores read shared memory by themselves (wgmma.cuh).
//
// A block has two warpgroups that multiply and one that copies. Of head_dim above 64 the two share
// a head, each with up to 64 of its columns of x; otherwise each has a head, and the two heads lie
// in the same groups of B and C. So a chunk's B and C are copied once for both. Where heads that
// share B and C do not come in pairs, ssd_walk.cuh serves.
//
// Of a chunk, where the products of a line are under way while the next line is computed:
//   scores = C B^T               the state's copy in the data's type, to shared memory
//   y = C S^T                    mask and weigh scores; gain x
//   y weighed, y += scores x     S = whole S
//   S += (gain x)^T B            y out
// D x is added to y as D on the diagonal of the scores. The warpgroups read nothing of each other,
// do not meet, and fill each other's gaps. What is copied is ahead by up to three chunks:
//   copies: free | x, B, C of chunk k on their way; of chunk k - 1 here | full, with its scalars
//
// Where sequences and heads are more than blocks that run at a time, 132 blocks walk equal runs of
// all their segments, so that none waits for a last, half empty wave; see Pieces. Where they are
// few, segments are dealt as in ssd_scan.cu. Neither changes a bit.
//
// Of a thread's 232 registers, N 128: 128 for the state, carried and local, 32 for y, 32 for scores
// or the state's copy on its way.
//
//   N                  64      128
//   shared, kB        139      221       one block a multiprocessor
#include <algorithm>
#include <climits>
#include <type_traits>

#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include "roles.cuh"
#include "scan.cuh"
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

// One thread tells another of what it, and those it met, wrote to global memory.
__device__ inline void put_ticket(uint32_t* ticket) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(ticket) : "memory");
}
// Waits for it, and leaves it as it was found.
__device__ inline void take_ticket(uint32_t* ticket) {
  uint32_t there;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(ticket) : "memory");
  while (there == 0);
  *ticket = 0;
}

// The same number, which the compiler now knows to be the same for all lanes.
__device__ inline int same_in_warp(int v) { return __shfl_sync(~0u, v, 0); }

__device__ __host__ constexpr int count_segments(int64_t length) {
  constexpr int kTokens = kSegment * kChunk;
  return static_cast<int>((length + kTokens - 1) / kTokens);
}

// What a block walks without a break: some segments of a sequence, for its heads.
struct Piece {
  Sequence sequence;
  int index, first_head;  // `index` of the sequence
  int first, last, segments;

  __device__ int length() const { return static_cast<int>(sequence.end - sequence.begin); }
  __device__ int first_chunk() const { return first * kSegment; }
  __device__ int last_chunk() const {
    return min(last * kSegment, (length() + kChunk - 1) / kChunk);
  }
};

// The pieces of a block. Without `runs` there is one at most, as `deal` says. With it all sequences
// have the same length, and their segments, head after head of sequence after sequence, lie in a
// row that is cut into as many equal runs. Of a run the last piece, whose end another block has,
// comes first, and the first one, which begins with what another block left, last: so that was
// left long ago.
template <int kHeads>
struct Pieces {
  int count;
  int begin, end, most;  // of the run, and segments of a sequence

  __device__ Pieces(const SsdScanParams& p, const Deal& deal, int runs) : count(1) {
    if (runs > 0) {
      most = count_segments(p.length);
      const int64_t total = p.sequences * (p.heads / kHeads) * most;
      begin = static_cast<int>(total * blockIdx.x / runs);
      end = static_cast<int>(total * (blockIdx.x + 1) / runs);
      count = (end + most - 1) / most - begin / most;
    } else if (deal.blocks > 0) {
      const Piece piece = at(0, p, deal, runs);
      count = piece.first < piece.last;
    }
  }
  __device__ Piece at(int k, const SsdScanParams& p, const Deal& deal, int runs) const {
    const int units = p.heads / kHeads;
    int walk, first = 0, last;
    if (runs > 0) {
      const int unfinished = end % most > 0;
      walk = k < unfinished                       ? end / most
             : begin % most > 0 && k == count - 1 ? begin / most
                                                  : (begin + most - 1) / most + k - unfinished;
      first = max(begin - walk * most, 0);
      last = end - walk * most;
    } else {
      const int blocks = max(deal.blocks, 1), place = blockIdx.x / units;
      walk = place / blocks * units + blockIdx.x % units;
      first = place % blocks * deal.each;
      last = deal.blocks > 0 ? first + deal.each : INT_MAX;
    }
    Piece piece;
    piece.index = walk / units;
    piece.first_head = walk % units * kHeads;
    piece.sequence = sequence_at(p.cu_seqlens, p.length, piece.index);
    piece.segments = count_segments(piece.length());
    piece.first = first;
    piece.last = min(last, piece.segments);
    return piece;
  }
};

// kHeads: of a block, 1 or 2.
template <typename data_t, int kN, int kHeads>
struct Shared {
  struct Stage {
    Panels<data_t, kChunk, kWidth> x[kGroups];
    Panels<data_t, kChunk, kN> b, c;
  } stages[kStages];
  Panels<data_t, kWidth, kN> states[kGroups][2];  // one in use while the next is written
  Scalars scalars[kStages][kHeads];
  Pieces<kHeads> pieces;
  // The one under way, and those before whose last chunks are, one after the other.
  Piece piece[kStages + 1];
  uint64_t full[kStages], free[kStages];
};

// kAdds: leaves what each segment adds, and no y.
template <typename data_t, int kN, int kHeads, bool kAdds>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_scan_wgmma_kernel(const SsdScanParams p, const Deal deal, const int runs) {
#ifdef REASONERS_WGMMA
  extern __shared__ __align__(1024) char shared_memory[];
  auto& shared = *reinterpret_cast<Shared<data_t, kN, kHeads>*>(shared_memory);
  let_next_start();
  wait_for_inputs();

  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.full[s], kGroup);
      init_barrier(&shared.free[s], kGroups * kGroup / 32);
    }
    shared.pieces = Pieces<kHeads>(p, deal, runs);
    shared.piece[0] = shared.pieces.at(0, p, deal, runs);
  }
  __syncthreads();
  const auto meet = [&] { wait_at<kGroup>(1 + warp / 4); };  // the warpgroup's threads
  if (warp < kGroup / 32) {                                  // copies
    keep_registers<kCopierRegisters>();
    float next_decay[2], next_scale[2];  // of tokens 2 lane and 2 lane + 1
    int n = 0;                           // chunks so far
    const auto wait_for_place = [&](int n) {
      if (n >= kStages) wait_for(&shared.free[n % kStages], (n / kStages - 1) & 1);
    };
    const int count = same_in_warp(shared.pieces.count);
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      if (k > 0) {
        // The one that had this place has been left, as each has a chunk at least.
        wait_for_place(n);
        if (threadIdx.x == 0) shared.piece[k % (kStages + 1)] = shared.pieces.at(k, p, deal, runs);
        meet();
      }
      const Piece& piece = shared.piece[k % (kStages + 1)];
      const int length = piece.length(), head = piece.first_head;
      const int first_token = same_in_warp(piece.first_chunk()) * kChunk;
      // What this thread copies first of some rows of the chunk that is next, of runs of 8 columns.
      const auto first_run = [&](int runs, const void* data, TokenStrides strides, int column) {
        return static_cast<const data_t*>(data) + piece.sequence.batch * strides.batch +
               (piece.sequence.begin + first_token + threadIdx.x / runs) * strides.token + column +
               threadIdx.x % runs * 8;
      };
      const auto part_of = [&](int head, int sharing, int row_size) {
        return head / (p.heads / sharing) * row_size;
      };
      constexpr int kRunsOfX = kWidth / 8, kRunsOfB = kN / 8;
      const data_t* next_x[kGroups];
#pragma unroll
      for (int w = 0; w < kGroups; ++w)
        next_x[w] = first_run(kRunsOfX, p.x, p.x_strides,
                              kHeads == 1 ? part_of(head, p.x_heads, p.head_dim) + w * kWidth
                                          : part_of(head + w, p.x_heads, p.head_dim));
      const data_t* next_b =
          first_run(kRunsOfB, p.B, p.b_strides, part_of(head, p.b_groups, p.state_dim));
      const data_t* next_c =
          first_run(kRunsOfB, p.C, p.c_strides, part_of(head, p.c_groups, p.state_dim));
      // Of rows that hold `width` columns more; `next` goes on to the chunk after this one.
      const auto copy_rows = [&](auto& to, const data_t*& next, int64_t stride, int width, int t) {
        constexpr int kRuns = sizeof(to.at) / sizeof(data_t) / kChunk / 8, kStep = kGroup / kRuns;
        const int row = threadIdx.x / kRuns, run = threadIdx.x % kRuns;
        const uint32_t target = shared_address(&to) + to.offset(row, run);
        const int left = run * 8 < width ? length - t - row : 0;
#pragma unroll
        for (int u = 0; u < kChunk / kStep; ++u, next += kStep * stride)
          copy_async_once(target + u * kStep * 128, next, left > u * kStep ? 16 : 0);
      };
      const auto first_scalar = [&](const float* values, TokenStrides strides) {
        return values + piece.sequence.batch * strides.batch +
               (piece.sequence.begin + first_token + 2 * lane) * strides.token + head + warp;
      };
      const float* decay = first_scalar(p.log_decay, p.log_decay_strides);
      const float* scale = p.scale ? first_scalar(p.scale, p.scale_strides) : nullptr;
      const auto read_scalars = [&](int t) {
        if (warp >= kHeads) return;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool there = t + 2 * lane + e < length;
          next_decay[e] = there ? decay[e * p.log_decay_strides.token] : 0.f;
          next_scale[e] = there && scale ? scale[e * p.scale_strides.token] : 1.f;
        }
        decay += kChunk * p.log_decay_strides.token;
        if (scale) scale += kChunk * p.scale_strides.token;
      };
#pragma unroll 1
      for (int chunk = same_in_warp(piece.first_chunk()),
               last_chunk = same_in_warp(piece.last_chunk());
           chunk < last_chunk; ++chunk, ++n) {
        const int stage = n % kStages, before = (n + kStages - 1) % kStages, t = chunk * kChunk;
        if (n > 0 && warp < kHeads)
          put_scalars(shared.scalars[before][warp], next_decay, next_scale);
        read_scalars(t);
        wait_for_place(n);
        auto& to = shared.stages[stage];
#pragma unroll
        for (int w = 0; w < kGroups; ++w)
          copy_rows(to.x[w], next_x[w], p.x_strides.token,
                    kHeads == 1 ? p.head_dim - w * kWidth : p.head_dim, t);
        copy_rows(to.b, next_b, p.b_strides.token, p.state_dim, t);
        if (!kAdds) copy_rows(to.c, next_c, p.c_strides.token, p.state_dim, t);
        commit_copies();
        if (n > 0) {
          wait_for_copies<1>();
          show_to_copies();
          arrive(&shared.full[before]);
        }
      }
    }
    if (n > 0) {
      const int before = (n + kStages - 1) % kStages;
      if (warp < kHeads) put_scalars(shared.scalars[before][warp], next_decay, next_scale);
      wait_for_copies<0>();
      show_to_copies();
      arrive(&shared.full[before]);
    }
    return;
  }
  take_registers<kWalkerRegisters>();
  const int w = warp / 4 - 1, r = warp % 4, g = lane / 4, q = lane % 4;
  const int p_part = kHeads == 1 ? w * kWidth : 0;  // of x's columns
  const int i0 = 16 * r + g;  // and i0 + 8 are the rows, of y and of the state, of this thread

  // ---- The state in registers, shared and global memory.
  constexpr int kTiles = kN / 8;
  using State = float[kTiles][4];
  State carried = {}, local;
  float since = 1.f;  // decay from the segment's start
  // visit(values, offset) of the neighbours that a thread has of a state tensor.
  const auto each_pair = [&](State& state, auto&& visit) {
    const int row = static_cast<int>(opaque(p_part + i0)), column = static_cast<int>(opaque(2 * q));
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
  // And then the warpgroup's threads meet: so nobody reads the other copy any more either.
  const auto put_state = [&](const Panels<data_t, kWidth, kN>& to,
                             const uint32_t (&pairs)[kTiles][2]) {
    const uint32_t row = shared_address(&to) + to.offset(16 * r + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2)
      store_matrices((row ^ n % 8 * 16) + n / 8 * to.kPanel, pairs[n][0], pairs[n][1],
                     pairs[n + 1][0], pairs[n + 1][1]);
    show_to_copies();
    meet();
  };

  // ---- The walk.
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const auto wait_for_chunk = [&](int n) { wait_for(&shared.full[n % kStages], n / kStages & 1); };
  const int count = same_in_warp(shared.pieces.count);
  int n = 0;  // chunks so far
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    if (k > 0) wait_for_chunk(n);
    const Piece& piece = shared.piece[k % (kStages + 1)];
    const int head = kHeads == 1 ? piece.first_head : piece.first_head + w, length = piece.length();
    const float skip = p.D ? p.D[head] : 0.f;
    const Places places(p, piece.sequence, piece.index, head);
    const int64_t home = (int64_t(piece.index) * p.heads + head) * size;  // in a state tensor
    // Where the block with this number leaves the state in the middle of a sequence, and says so.
    const auto passed = [&](int block) {
      return p.scratch + (int64_t(block) * kHeads + (kHeads == 1 ? 0 : w)) * size;
    };
    const auto ticket = [&](int block) { return p.tickets + block * kGroups + w; };
    const float* from = deal.blocks > 0   ? p.scratch + deal.states + places.of(piece.first) * size
                        : piece.first > 0 ? passed(blockIdx.x - 1)
                        : p.initial_state ? p.initial_state + home
                                          : nullptr;
    if (deal.blocks == 0 && piece.first > 0) {
      if (threadIdx.x % kGroup == 0) take_ticket(ticket(blockIdx.x - 1));
      meet();
    }
    read_state(kAdds ? nullptr : from, carried);
    begin_segment();
    const int last_chunk = same_in_warp(piece.last_chunk());
#pragma unroll 1
    for (int chunk = same_in_warp(piece.first_chunk()); chunk < last_chunk; ++chunk, ++n) {
      const int stage = n % kStages, t = chunk * kChunk;
      const auto& in = shared.stages[stage];
      const Scalars& scalars = shared.scalars[stage][kHeads == 1 ? 0 : w];
      wait_for_chunk(n);
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
        float scores[8][4];
        const uint64_t c = describe(in.c), b = describe(in.b),
                       s = describe(shared.states[w][n & 1]);
        begin_products();
#pragma unroll
        for (int k = 0; k < kN / 16; ++k)
          multiply_shared<data_t>(scores, c + depth_step<kChunk>(k), b + depth_step<kChunk>(k),
                                  k > 0);
        commit_products();
        put_state(shared.states[w][n & 1], pairs);
        begin_products();
#pragma unroll
        for (int k = 0; k < kN / 16; ++k)
          multiply_shared<data_t>(y, c + depth_step<kChunk>(k), s + depth_step<kWidth>(k), k > 0);
        commit_products();
        const float since_of[2] = {scalars.since[i0], scalars.since[i0 + 8]},
                    c_of[2] = {scalars.c[i0], scalars.c[i0 + 8]};
        wait_for_products<1>();
        settle(scores);
        uint32_t a[4][4];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
          for (int v = 0; v < 4; ++v) a[block][v] = 0;
          if (block > r) continue;
          // Of the two 8 x 8 tiles on the diagonal half is seen, of the one above them nothing.
          const bool is_last = block == r;
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            const int j0 = block * kBlock + tile * 8 + 2 * q;
            const float2 c_from = *reinterpret_cast<const float2*>(&scalars.c[j0]),
                         scale_of = *reinterpret_cast<const float2*>(&scalars.scale[j0]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (is_last && tile > half) continue;
              float weights[2];
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float passes = exp2_fast(c_of[half] - (e ? c_from.y : c_from.x));
                weights[e] = scores[2 * block + tile][2 * half + e] *
                             (passes * (e ? scale_of.y : scale_of.x));
                if (is_last && tile == half)
                  weights[e] = 2 * q + e > g ? 0.f : weights[e] + (2 * q + e == g ? skip : 0.f);
              }
              a[block][2 * tile + half] = pack<data_t>(weights[0], weights[1]);
            }
          }
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
        wait_for_products<1>();
        settle(y);
        // Lanes trade halves of tiles so that each writes 8 bytes and four write a whole sector.
        auto* to =
            static_cast<data_t*>(p.y) +
            ((piece.sequence.batch * p.length + piece.sequence.begin + t + i0) * p.heads + head) *
                int64_t(p.head_dim);
        const bool odd = q & 1;
#pragma unroll
        for (int m = 0; m < 8; m += 2)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t mine[2];
#pragma unroll
            for (int e = 0; e < 2; ++e)
              mine[e] = pack<data_t>(y[m + e][2 * half], y[m + e][2 * half + 1]);
            const uint32_t theirs = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
            const int column = p_part + m * 8 + (odd ? 8 + 2 * (q - 1) : 2 * q);
            if (t + i0 + half * 8 < length && column < p.head_dim)
              *reinterpret_cast<uint2*>(to + int64_t(half * 8) * p.heads * p.head_dim + column) =
                  odd ? uint2{theirs, mine[1]} : uint2{mine[0], theirs};
          }
      }
      wait_for_products<0>();
      settle(local);
      __syncwarp();
      if (lane == 0) arrive(&shared.free[stage]);
      if (chunk + 1 == last_chunk || (chunk + 1) % kSegment == 0) {
        if (kAdds) {
          const int64_t place = places.of(chunk / kSegment);
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
      const bool ends = piece.last == piece.segments;
      write_state(carried, ends ? p.final_state + home : passed(blockIdx.x));
      if (!ends) {
        meet();
        if (threadIdx.x % kGroup == 0) put_ticket(ticket(blockIdx.x));
      }
    }
  }
#endif
}

// Into how many runs the segments of all sequences are cut, where these are more than blocks can be
// at a time.
int count_runs(const SsdScanParams& p, int together) {
  const int64_t walks = p.sequences * p.heads / together;
  const bool fits = walks * count_segments(p.length) < INT_MAX;
  return p.cu_seqlens == nullptr && p.length > 0 && walks > kProcessors && fits ? kProcessors : 0;
}

template <typename data_t, int kN, int kHeads>
void launch(const SsdScanParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<data_t, kN, kHeads>);
  static_assert(kBytes <= 232448);
  const auto scan = ssd_scan_wgmma_kernel<data_t, kN, kHeads, false>;
  cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const Deal deal = make_deal(p, 1, kHeads);
  const int runs = count_runs(p, kHeads);
  const auto blocks = static_cast<unsigned>(
      runs > 0 ? runs : p.sequences * p.heads / kHeads * std::max(deal.blocks, 1));
  if (deal.blocks > 0) {
    const auto add = ssd_scan_wgmma_kernel<data_t, kN, kHeads, true>;
    cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    launch_overlapping(add, blocks, kThreads, kBytes, stream, p, deal, runs);
    launch_carry(p, deal, stream);
  }
  launch_overlapping(scan, blocks, kThreads, kBytes, stream, p, deal, runs);
}

// use(N, heads of a block) as constants.
template <typename Use>
auto with_tile(const SsdScanParams& p, const Use& use) {
  using One = std::integral_constant<int, 1>;
  if (p.head_dim <= 64)
    return use(std::integral_constant<int, 128>(), std::integral_constant<int, 2>());
  if (p.state_dim <= 64) return use(std::integral_constant<int, 64>(), One());
  return use(std::integral_constant<int, 128>(), One());
}

// Not where this is compiled for other machines: the kernel is empty then, and has few registers.
bool runs_here() {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, ssd_scan_wgmma_kernel<__half, 64, 1, false>);
  return attributes.numRegs > 64;
}

}  // namespace

bool suits_ssd_scan_wgmma(const SsdScanParams& p) {
  if (!on_tensor_cores(p)) return false;
  const bool pairs = p.heads / p.b_groups % 2 == 0 && p.heads / p.c_groups % 2 == 0;
  return (p.head_dim > 64 || (p.state_dim > 64 && pairs)) && runs_here();
}

int64_t count_ssd_scan_wgmma_scratch(const SsdScanParams& p) {
  return with_tile(p, [&](auto, auto heads) {
    const int64_t passed = int64_t(count_runs(p, heads())) * heads() * p.head_dim * p.state_dim;
    return std::max(passed, make_deal(p, 1, heads()).size);
  });
}

void launch_ssd_scan_wgmma(const SsdScanParams& p, cudaStream_t stream) {
  with_tile(p, [&](auto columns, auto heads) {
    if (p.dtype == DType::kBFloat16)
      launch<__nv_bfloat16, columns(), heads()>(p, stream);
    else
      launch<__half, columns(), heads()>(p, stream);
  });
}

}  // namespace reasoners
