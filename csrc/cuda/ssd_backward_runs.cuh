// What the two tensor-core kernels of ssd_scan's derivative share, ssd_scan_backward.cu's and
// ssd_scan_backward_wgmma.cu's: how sequences are dealt in runs, where states are kept, whose turn
// it is where the sums of gradients that heads share pass from block to block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "scan.cuh"
#include "signal.cuh"
#include "ssd_chunk.cuh"
#include "ssd_scan_backward.cuh"

namespace reasoners {

constexpr int kHalves = 2;  // of the columns of a state, where two warps have its rows

// A block's part in passing on the sums of a gradient.
struct Passing {
  int member;  // of its group
  int place;   // the group's first
  int before;  // the last block of the group that had its places before, or -1
};

// Of x, B, C and scalars.
inline int64_t bytes_of_token(const SsdScanParams& f) {
  const int64_t data = f.x_heads * f.head_dim + (f.b_groups + f.c_groups) * f.state_dim;
  return 2 * data + f.heads * (f.scale ? 2 : 1) * sizeof(float);
}

// The longest run: 4,352 tokens, so that 32,768 tokens of 32 heads are 256 blocks, in one sequence
// or in eight, and a few tokens more make no more of them. With shorter ones more would be read
// twice. But a state and its gradient, kept in fp32 between runs, shall take a twelfth at most of
// the bytes of a run's inputs: where heads share these, runs are up to 6,144 tokens, which is
// enough where any input is each head's own. An even number of chunks, for KeptStates.
inline int longest_run(const SsdScanParams& f) {
  constexpr int64_t kLeast = 68, kMost = 96, kTimes = 12;
  const int64_t border = int64_t(f.heads) * f.head_dim * f.state_dim * 2 * sizeof(float);
  const int64_t pair = 2 * kChunk * bytes_of_token(f), pairs = (kTimes * border + pair - 1) / pair;
  return static_cast<int>(std::clamp(2 * pairs, kLeast, kMost));
}

// Rows of 64 tokens that are a head's own, and not yet written: of a gradient, or scratch memory.
struct OwnRows {
  enum Where { kdX, kdB, kdC, kScratch } where;
  void* data;
  int width;  // values of a row; a token has one for each head
};

// Where the state before a chunk is kept on the way forwards, as the way back wants it: its rows 0
// to 63 and 64 to 127 in rows of the chunk before it, or of the two before it, or the halves of its
// columns in those.
struct KeptStates {
  OwnRows rows[2];
  int every;  // chunks from one kept state to the next
  bool halves;

  // With `columns` the tile's. Rows of dB or dC are as long as a state's; those of dx may do.
  static KeptStates of(const SsdScanParams& f, int columns) {
    const bool tall = f.head_dim > 64;
    const auto same = [&](OwnRows::Where where, int width) {
      const OwnRows rows{where, nullptr, width};
      return KeptStates{{rows, rows}, tall ? 2 : 1, false};
    };
    if (f.b_groups == f.heads && f.c_groups == f.heads) {
      const OwnRows b{OwnRows::kdB, nullptr, f.state_dim}, c{OwnRows::kdC, nullptr, f.state_dim};
      return {{b, c}, 1, false};
    }
    if (f.c_groups == f.heads) return same(OwnRows::kdC, f.state_dim);
    if (f.b_groups == f.heads) return same(OwnRows::kdB, f.state_dim);
    if (f.x_heads == f.heads) {
      if (f.state_dim <= f.head_dim) return same(OwnRows::kdX, f.head_dim);
      if (!tall && columns / kHalves <= f.head_dim) {
        KeptStates kept = same(OwnRows::kdX, f.head_dim);
        kept.every = 2;
        kept.halves = true;
        return kept;
      }
    }
    return same(OwnRows::kScratch, f.state_dim);
  }
};

// A head's part where sums pass by the copy engine: where they come from and where they go to.
struct Link {
  bool is_last;      // of its group, who gets the sums
  bool loads, adds;  // the sums so far come here; what is here is added to those there
  // The first of the places it loads from and of those it leaves sums in, one a chunk.
  int64_t from, to;
  int from_places, to_places;
  // Who is to be as far before it adds, or, if it does not add, to have read what was in its place;
  // and the last block that had its places before, or -1.
  int other, before;
};

// A gradient whose sums pass from block to block: how many groups have places for them at a time,
// and each for how many chunks, a power of two or all chunks of a run.
//
// By the copy engine they pass in chains of neighbours, so that a large group's last head is not
// behind the first by all others. Each chain but the last has places of its own; the ends of these
// chains leave their sums one after the other in the last chain's places, whose heads add theirs.
struct PassedGradient : PartedGradient {
  int slots, places;
  int chain, chain_places;  // heads of a chain
  int64_t chain_parts;

  __device__ Passing passing_of(int block, int heads) const {
    if (count == 1) return {0, 0, -1};
    const int run = block / heads, head = block % heads;
    const int group = run * groups + head / count, before = group - slots;
    return {head % count, group % slots * places,
            before < 0 ? -1 : before / groups * heads + (before % groups + 1) * count - 1};
  }
  __device__ Link link_of(int block, int heads, int floats) const {
    Link link{};
    link.before = -1;
    if (count == 1) return link;
    const Passing passing = passing_of(block, heads);
    const int slot = passing.place / places, last = block - passing.member + count - 1;
    const int chains = count / chain, at = passing.member / chain, member = passing.member % chain;
    const bool in_last = at + 1 == chains, is_end = !in_last && member + 1 == chain;
    const int64_t sums = parts + int64_t(passing.place) * floats;
    const int64_t own =
        in_last ? sums : chain_parts + int64_t(slot * (chains - 1) + at) * chain_places * floats;
    link.is_last = block == last;
    link.loads = link.is_last || is_end;
    link.adds = is_end ? at > 0 : member > 0 || (in_last && at > 0);
    link.from = own;
    link.from_places = in_last ? places : chain_places;
    link.to = is_end ? sums : own;
    link.to_places = is_end || in_last ? places : chain_places;
    // The last to read from places: of the group, or of the chain.
    const int reader = is_end || in_last ? last : block - member + chain - 1;
    link.other = !link.adds ? reader : is_end ? block - chain : block - 1;
    link.before = passing.before < 0 ? -1 : passing.before - (last - reader);
    return link;
  }
};

struct TileScratch : SsdScanScratch {
  KeptStates kept;
  int run_chunks;  // of the longest run
  PassedGradient dx, dB, dC;
  // For every border between runs of dealt sequences: the state, its gradient; and before they are
  // carried what the run before or after it adds to them, and that run's decay.
  int64_t border_states, border_dstates, border_decays, border_ddecays;
  // Where heads share: how many blocks have begun, then how far every warp of every block is. All
  // counts, of 32 bits, and zero at the start.
  int64_t progress, counts;
  int walks;  // of a multiprocessor by ssd_scan_backward_wgmma.cu, or 0: it does not suit

  // Of dC, dB and dx.
  __device__ const PassedGradient& gradient(int which) const {
    return which == 0 ? dC : which == 1 ? dB : dx;
  }
};

// Of a sequence. The runs have as many chunks each, but for the last, which may have fewer.
__device__ __host__ inline int64_t runs_of(int64_t tokens, int64_t longest) {
  return tokens > longest ? (tokens + longest - 1) / longest : 1;
}
// Runs have places by the lengths of sequences where all have the same, and else as checkpoints
// have, so that few blocks have none.
inline int64_t count_runs(const SsdScanParams& f, int64_t longest) {
  if (f.cu_seqlens == nullptr) return f.sequences * runs_of(f.length, longest);
  return count_checkpoints(f.batch * f.length, f.sequences, longest);
}
// Borders between runs. Those of a packed sequence of n tokens, (n - 1) / longest, fit in before
// those of the next one where every sequence has its places from its first token / longest on.
inline int64_t count_borders(const SsdScanParams& f, int64_t longest) {
  return f.batch * (runs_of(f.length, longest) - 1);
}

// A head's run of a sequence.
struct Run {
  Sequence sequence;
  int head, index, batch, begin, length;
  int chunks, runs;             // of the sequence
  int first_chunk, last_chunk;  // of the run, and one past it
  bool first;                   // of the sequence
  int border;                   // the place of the one after the run

  __device__ Run(const SsdScanParams& f, const TileScratch& scratch, int block)
      : head(block % f.heads) {
    const int64_t at = block / f.heads, longest = scratch.run_chunks * kChunk;
    if (f.cu_seqlens == nullptr) {
      const int64_t each = runs_of(f.length, longest);
      set(f, scratch, at / each, static_cast<int>(at % each));
      return;
    }
    const auto first_of = [&](int64_t index) {
      return first_checkpoint(sequence_at(f.cu_seqlens, f.length, index), f.length, index, longest);
    };
    // By shuffles, so that the compiler knows them to be the same for all lanes.
    const int of =
        __shfl_sync(~0u, static_cast<int>(sequence_at_place(f.sequences, at, first_of)), 0);
    set(f, scratch, of, __shfl_sync(~0u, static_cast<int>(at - first_of(of)), 0));
  }
  __device__ Run(const SsdScanParams& f, const TileScratch& scratch, int64_t index, int head,
                 int run)
      : head(head) {
    set(f, scratch, index, run);
  }

  __device__ void set(const SsdScanParams& f, const TileScratch& scratch, int64_t of, int run) {
    index = static_cast<int>(of);
    sequence = sequence_at(f.cu_seqlens, f.length, of);
    batch = static_cast<int>(sequence.batch);
    begin = static_cast<int>(sequence.begin);
    length = static_cast<int>(sequence.end - sequence.begin);
    const int longest = scratch.run_chunks * kChunk, every = scratch.kept.every;
    chunks = (length + kChunk - 1) / kChunk;
    runs = static_cast<int>(runs_of(length, longest));
    const int each = (chunks + runs * every - 1) / (runs * every) * every;
    first_chunk = min(run * each, chunks);
    last_chunk = min(first_chunk + each, chunks);
    first = run == 0;
    const int before = batch * (runs - 1) + begin / longest;
    border = (before + run) * f.heads + head;
  }
};

// Sum over the four lanes that hold a row of D.
__device__ inline float sum_row(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
__device__ inline float sum_warp(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Whether sums of gradients that heads share pass from block to block.
enum class Sums { kNone, kPassed };
// Whether they do so by the copy engine, for which there is shared memory beside some tiles alone.
constexpr bool passes_by_copies(int rows, int columns) { return rows == 64 && columns == 128; }
// What a block tells of its progress when it is through.
constexpr uint32_t kDone = UINT32_MAX;

// Tells that a walk is through. Who has places of sums after it waits for it alone: so a walk
// without chunks waits for those that had them before.
template <typename Part, typename ProgressOf>  // Passing or Link
__device__ void tell_done(bool has_chunks, const Part (&parts)[3], int walk,
                          ProgressOf&& progress_of) {
  if (!has_chunks)
    for (const Part& part : parts)
      if (part.before >= 0) wait_until(progress_of(part.before), kDone);
  tell(progress_of(walk), kDone);
}

// To a thread's part of a tile.
__device__ inline void add_tile(float (&d)[4], float4 tile) {
  d[0] += tile.x;
  d[1] += tile.y;
  d[2] += tile.z;
  d[3] += tile.w;
}
// The sums of a chunk in global memory, of which a thread has every kThreads-th tile from `sums`
// on.
template <int kThreads, int kTiles>
__device__ void add_sums(float (&d)[kTiles][4], const float4* sums) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) add_tile(d[n], __ldcg(sums + n * kThreads));
}
template <int kThreads, int kTiles>
__device__ void leave_sums(const float (&d)[kTiles][4], float4* sums) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    __stcg(sums + n * kThreads, float4{d[n][0], d[n][1], d[n][2], d[n][3]});
}

// The walks of all runs; see ssd_scan_backward_wgmma.cu. How many a multiprocessor has, 0 where it
// does not suit.
int count_ssd_scan_backward_wgmma_walks(const SsdScanParams& forward, const KeptStates& kept);
void launch_ssd_scan_backward_wgmma(const SsdScanBackwardParams& params, const TileScratch& scratch,
                                    int walks, cudaStream_t stream);

}  // namespace reasoners
