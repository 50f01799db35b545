// Causal attention of each row's last tokens over the row's pages.
//
// A thread block serves one (token, kv head) and up to 8 of the query heads that share it (4
// outside of the tensor core path): they all use one read of K and V, and that read is the floor.
// The row, the query's position and the pages are found on the device, and the launch depends on
// shapes alone. Positions past the query are not read: their scores are -inf.
// The bits of a row depend neither on the batch nor on its pages' numbers.
//
// tensor: bfloat16 and float16 with head_dim 64, 96 or 128; attention_block.cuh says in which order
//   a row is summed. Its splits of 256 positions are walked by one thread block that folds them as
//   it goes, or, where the batch alone would not fill the machine, dealt to as many as run at once,
//   that leave them in memory for combine_kernel: two floats and D more for 256 positions of K and
//   V. A warp has 16 to 24 KB of K and V on their way, also from one split into the next.
// prefix: rows that share their first pages. A thread block takes 16 columns, that is rows' query
//   heads, over a split of the shared pages, so that K and V are read once for all of them. What it
//   finds waits in memory until the rows' own thread blocks, which have begun with their own
//   positions meanwhile, come to it: whole splits, and the whole blocks of the split in which the
//   rows part.
// plain: everything else. Positions are dealt out in turn to walkers of kLanes threads, each of
//   which holds kVec x kChunks channels; the walkers are merged at the end.
//
// Prefill goes the same way, a query at a time: right, and as slow as that sounds.
//
// With two steps on their way, in registers, none of them beyond a split, 5 or 6 loads waited for
// before the first of K, and prefix_kernel alone before tensor_kernel, an H100 took (us; bfloat16,
// pages of 16; Llama-3.2-1B, Llama-3.2-3B):
//   1 x 2048              9.0   12.6      128 x 1024                      99   188
//   1 x 32768            37.9   66.9      512 x 1024                     376   732
//   16 x 2048            35.4   62.1      256 x 768, 512 of them shared   83.5 145

#include <algorithm>

#include "async_copy.cuh"
#include "attention_block.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rows.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == kWalkers);

// What a block works on.
struct Work {
  int token, kv_head;
  int first_head, heads;  // of the query heads
};

// group: query heads of a kv head. Divisions are slow, and most groups are not cut.
template <int kHeads>
__device__ inline Work find_work(const PagedAttentionParams& p, int group) {
  const unsigned slices = (group + kHeads - 1) / kHeads, kv_heads = p.kv_heads;
  const unsigned unit = slices == 1 ? blockIdx.x : blockIdx.x / slices;
  const int slice = blockIdx.x - unit * slices;
  Work work;
  work.token = unit / kv_heads;
  work.kv_head = unit - work.token * kv_heads;
  work.first_head = work.kv_head * group + slice * kHeads;
  work.heads = min(kHeads, group - slice * kHeads);
  return work;
}

// Where a position of a row is in the caches, counted in vectors: 2^31 of them are more than fit.
__device__ inline int locate_vector(const PagedAttentionParams& p, const PageSize& pages, int row,
                                    int kv_head, int position) {
  const int turn = pages.page(position);
  const int page = p.page_table[row * p.table_stride + turn];
  return (page * p.kv_heads + kv_head) * p.page_size + (position - turn * p.page_size);
}

// Past the first-level cache: what is read before wait_for_inputs.
template <typename chunk_t>
__device__ inline chunk_t read_past_l1(const void* from) {
  static_assert(sizeof(chunk_t) == sizeof(uint4));
  const uint4 bits = __ldcg(static_cast<const uint4*>(from));
  chunk_t chunk;
  memcpy(&chunk, &bits, sizeof(bits));
  return chunk;
}

template <typename data_t>
__device__ void write_zeros(data_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = from_float<data_t>(0.f);
}

// ---- plain

// kWhole: head_dim is kLanes * kVec * kChunks; otherwise it is less.
template <typename data_t, int kLanes, int kVec, int kChunks, bool kWhole, int kHeads, int kUnroll>
__global__ void __launch_bounds__(kThreads, 1)
    plain_kernel(const PagedAttentionParams p, const PageSize pages) {
  static_assert(kWhole || kVec == 1);
  constexpr int kWalkers = kThreads / kLanes, kDim = kLanes * kVec * kChunks;
  using Chunk = Vec<data_t, kVec>;
  let_next_start();
  wait_for_inputs();
  const Work work = find_work<kHeads>(p, p.heads / p.kv_heads);
  const RowPosition at = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, work.token);
  const int visible = at.position + 1;  // the query sees positions below it; padding: none
  const int head_dim = kWhole ? kDim : p.head_dim;
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * head_dim;
  if (visible <= 0) return write_zeros(out, work.heads * head_dim);
  const int lane = threadIdx.x % kLanes, walker = threadIdx.x / kLanes;
  const auto read = [&](const data_t* vector, int chunk) {
    const int channel = (chunk * kLanes + lane) * kVec;
    Chunk values{};
    if (kWhole || channel < head_dim) values = *reinterpret_cast<const Chunk*>(vector + channel);
    return values;
  };

  float q[kHeads][kChunks][kVec], values[kHeads][kChunks][kVec], max[kHeads], sum[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    // Heads past the group repeat its last one and are dropped in the end.
    const auto* from = static_cast<const data_t*>(p.q) + work.token * p.q_stride +
                       int64_t(work.first_head + min(h, work.heads - 1)) * head_dim;
    max[h] = kMinusInfinity, sum[h] = 0.f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Chunk chunk = read(from, c);
#pragma unroll
      for (int i = 0; i < kVec; ++i) q[h][c][i] = to_float(chunk.at[i]), values[h][c][i] = 0.f;
    }
  }

  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  // Every thread takes the same number of turns: shuffles need whole warps.
  for (int begin = 0; begin < visible; begin += kWalkers * kUnroll) {
    Chunk k[kUnroll][kChunks], v[kUnroll][kChunks];
    bool valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = begin + u * kWalkers + walker;
      valid[u] = position < visible;
      const int64_t offset =
          valid[u] ? int64_t(locate_vector(p, pages, at.row, work.kv_head, position)) * head_dim
                   : 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        k[u][c] = valid[u] ? read(k_cache + offset, c) : Chunk{};
        v[u][c] = valid[u] ? read(v_cache + offset, c) : Chunk{};
      }
    }
    float score[kUnroll][kHeads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int i = 0; i < kVec; ++i) dot += q[h][c][i] * to_float(k[u][c].at[i]);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2)
          dot += __shfl_xor_sync(kAll, dot, offset);
        score[u][h] = valid[u] ? dot * (p.scale * kLog2E) : kMinusInfinity;
      }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = max[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) top = fmaxf(top, score[u][h]);
      const float fade = weight(max[h], top);
      max[h] = top;
      sum[h] *= fade;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec; ++i) values[h][c][i] *= fade;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float w = weight(score[u][h], top);
        sum[h] += w;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int i = 0; i < kVec; ++i) values[h][c][i] += w * to_float(v[u][c].at[i]);
      }
    }
  }

  __shared__ Partials<kWalkers, kHeads, kDim> partials;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) partials.max[walker][h] = max[h], partials.sum[walker][h] = sum[h];
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        partials.values[walker][h][(c * kLanes + lane) * kVec + i] = values[h][c][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < work.heads * head_dim; i += kThreads) {
    const auto row = partials.template merged<1>(i / head_dim, i % head_dim);
    out[i] = from_float<data_t>(row.values.at[0] / row.sum);
  }
}

// ---- tensor

// As many thread blocks as run on a multiprocessor at a time: so many registers and so much shared
// memory (228 KB, of which each takes 1 KB more than it asks for) have they.
__host__ __device__ constexpr int residents(int head_dim) { return head_dim == 64 ? 3 : 2; }
template <typename Shared>
constexpr bool fits(int blocks) {
  return (sizeof(Shared) + 1024) * blocks <= 228 * 1024;
}

// How the tensor path is dealt out, by shapes alone.
struct Plan {
  int group;          // query heads of a kv head
  int deals;          // thread blocks that walk the splits of one (token, kv head)
  int splits;         // of a (token, head) that have room in memory
  int shared_blocks;  // of a row that are read with its group at most
  int slots;          // splits, then the shared blocks of the split in which the rows part
};

// Results that wait in memory, plan.slots for each (token, head).
template <int kDim>
struct Slots {
  float* values;  // (tokens * heads, slots, kDim)
  float2* stats;  // (tokens * heads, slots): maximum, sum
  int heads, slots;

  __device__ Slots(const PagedAttentionParams& p, const Plan& plan)
      : values(p.scratch),
        stats(
            reinterpret_cast<float2*>(p.scratch + int64_t(p.tokens) * p.heads * plan.slots * kDim)),
        heads(p.heads),
        slots(plan.slots) {}
  __device__ int64_t at(int token, int head, int slot) const {
    return (int64_t(token) * heads + head) * slots + slot;
  }
  __device__ Part<4> read(int64_t at, int channel) const {
    return {stats[at].x, stats[at].y, load_vector<4>(values + at * kDim + channel)};
  }
  __device__ void write(int64_t at, int channel, const Part<4>& part) const {
    store_vector<4>(values + at * kDim + channel, part.values);
    if (channel == 0) stats[at] = make_float2(part.max, part.sum);
  }
};

// Of a row's first blocks, how many prefix_kernel reads.
__device__ inline int count_shared_blocks(const PagedAttentionParams& p, const Plan& plan,
                                          int row) {
  return p.shared ? min(__ldcg(&p.shared[2 * row + 1]) / kBlock, plan.shared_blocks) : 0;
}

// Lane i finds the places of positions begin + i and begin + 32 + i. Any entry of the table may be
// read, also before the row's length is known and past it; what is found there is not used.
struct Places {
  int place[2];  // at first the pages alone

  __device__ int of(int position) const { return position < 32 ? place[0] : place[1]; }

  __device__ static int position(int begin, int r) {
    return begin + 32 * r + int(threadIdx.x % 32);
  }
  __device__ void look_up(const PagedAttentionParams& p, const PageSize& pages, int row,
                          int begin) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int turn = min(pages.page(position(begin, r)), p.max_pages - 1);
      place[r] = __ldcg(&p.page_table[row * p.table_stride + turn]);
    }
  }
  __device__ void settle(const PagedAttentionParams& p, const PageSize& pages, int kv_head,
                         int begin) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned slot = position(begin, r) - pages.page(position(begin, r)) * p.page_size;
      place[r] = (unsigned(place[r]) * p.kv_heads + kv_head) * p.page_size + slot;
    }
  }
};

template <int kDim>
constexpr int kStages = kDim == 128 ? 3 : 4;  // steps on their way to a warp: as many as fit
template <typename data_t, int kDim>
struct TensorShared {
  Ring<data_t, kDim, kStages<kDim>> rings[kWalkers];
  Partials<kWalkers, kTileHeads, kDim> partials;
};

template <typename data_t, int kDim>
__global__ void __launch_bounds__(kThreads, residents(kDim))
    tensor_kernel(const PagedAttentionParams p, const PageSize pages, const Plan plan) {
  using KChunk = typename Fragments<kDim>::KChunk;
  static_assert(fits<TensorShared<data_t, kDim>>(residents(kDim)));
  constexpr int kChunks = Fragments<kDim>::kChunks, kSteps = kBlock / kStep;
  extern __shared__ float4 tensor_memory[];
  auto& shared = *reinterpret_cast<TensorShared<data_t, kDim>*>(tensor_memory);
  auto& partials = shared.partials;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& ring = shared.rings[warp];
  const Work work = find_work<kTileHeads>(p, plan.group);
  // prefix_kernel lets this one start when it has its own inputs, which are those of this kernel,
  // too: what prefix_kernel finds itself is waited for later. Until then the first-level cache is
  // passed by, which may be older; copies of 8 bytes cannot do that.
  if (plan.shared_blocks == 0 || Fragments<kDim>::kWide < 8) wait_for_inputs();
  let_next_start();

  // The chain of what waits for memory is kept short: the row's pages are looked up before it is
  // known that the token has that row, and how long the row is.
  const auto begin_of = [&](int split) { return split * kSplit + warp * kBlock; };
  const int shared_blocks = count_shared_blocks(p, plan, work.token);
  const int first = shared_blocks / kWalkers, deals = gridDim.y;
  int split = first + blockIdx.y;
  const bool guessed = work.token < p.rows && p.max_pages > 0;
  Places places;
  if (guessed) places.look_up(p, pages, work.token, begin_of(split));
  const RowPosition at = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, work.token);
  const int visible = at.position + 1;  // the query sees positions below it; padding: none
  const int end = (visible + kSplit - 1) / kSplit;
  const bool alone = deals == 1;  // otherwise combine_kernel writes the result
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * kDim;
  if (split >= end) {
    wait_for_inputs();  // or this kernel could end before prefix_kernel
    if (alone) write_zeros(out, work.heads * kDim);
    return;
  }
  if (!guessed || at.row != work.token) places.look_up(p, pages, at.row, begin_of(split));

  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  const auto is_parting = [&](int split) { return warp < shared_blocks - split * kWalkers; };
  int turn = 0;  // of the ring, at the split's first step
  const auto slot_of = [&](int begin) { return (turn + begin / kStep) % kStages<kDim>; };
  const auto copy = [&](int slot, const Places& places, int split, int begin) {
    const int seen = visible - begin_of(split) - begin;
    if (seen > 0 && !is_parting(split))
      ring.copy(slot, k_cache, v_cache, places.of(begin), begin % 32, seen);
    commit_copies();
  };
  places.settle(p, pages, work.kv_head, begin_of(split));
#pragma unroll
  for (int begin = 0; begin < kStages<kDim> * kStep; begin += kStep)
    copy(slot_of(begin), places, split, begin);
  Places ahead;
  ahead.look_up(p, pages, at.row, begin_of(split + deals));
  KChunk query[kChunks];  // of column g, in K's order of channels
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    query[c] = {};  // heads past the group
    if (g < work.heads)
      query[c] = read_past_l1<KChunk>(static_cast<const data_t*>(p.q) + work.token * p.q_stride +
                                      (work.first_head + g) * kDim + c * 32 + t * 8);
  }

  const Slots<kDim> slots(p, plan);
  constexpr int kVectors = (kTileHeads * kDim + kThreads * 4 - 1) / (kThreads * 4);
  Part<4> folded[kVectors];
  const auto each_vector = [&](const auto& f) {  // f(folded, head, channel)
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (const int i = (j * kThreads + threadIdx.x) * 4; i < work.heads * kDim)
        f(folded[j], i / kDim, i % kDim);
  };
  for (bool begun = false;; begun = true) {
    const int next = split + deals;
    Places later;
    later.look_up(p, pages, at.row, begin_of(next + deals));
    ahead.settle(p, pages, work.kv_head, begin_of(next));
    const bool parting = is_parting(split);
    BlockTile<data_t, kDim> tile;
    tile.clear();
#pragma unroll
    for (int begin = 0; begin < kBlock; begin += kStep) {
      const int slot = slot_of(begin), seen = visible - begin_of(split) - begin;
      wait_for_copies<kStages<kDim> - 1>();
      if (seen > 0 && !parting)
        tile.take(StepFragments<data_t, kDim>(ring.read(slot)), seen, p.scale * kLog2E,
                  [&](int c) { return query[c]; });
      const int to = begin + kStages<kDim> * kStep;  // as many steps on
      to < kBlock ? copy(slot, places, split, to) : copy(slot, ahead, next, to - kBlock);
    }
    places = ahead, ahead = later;
    if constexpr (kSteps % kStages<kDim> != 0) turn = (turn + kSteps) % kStages<kDim>;

    if (!begun) {
      wait_for_inputs();  // what prefix_kernel found
      each_vector([&](Part<4>& all, int head, int channel) {
        const int64_t at = slots.at(work.token, work.first_head + head, 0);
        all = nothing<4>();
        if (alone)
#pragma unroll 2
          for (int i = 0; i < first; ++i) fold(all, slots.read(at + i, channel));
      });
    }
    if (parting) {
#pragma unroll 1
      for (int i = lane * 4; i < work.heads * kDim; i += 32 * 4) {
        const int head = i / kDim, channel = i % kDim;
        const int64_t at = slots.at(work.token, work.first_head + head, plan.splits + warp);
        partials.write(warp, head, channel, slots.read(at, channel));
      }
    } else {
      tile.store(partials, warp);
    }
    __syncthreads();
    each_vector([&](Part<4>& all, int head, int channel) {
      const auto part = partials.template merged<4>(head, channel);
      if (alone) {
        fold(all, part);
      } else {
        slots.write(slots.at(work.token, work.first_head + head, split), channel, part);
      }
    });
    split = next;
    if (split >= end) break;
    __syncthreads();
  }
  if (alone)
    each_vector([&](const Part<4>& row, int head, int channel) {
      const float inverse = 1.f / row.sum;
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        *reinterpret_cast<uint32_t*>(out + head * kDim + channel + i) = pack<data_t>(
            __fmul_rn(row.values.at[i], inverse), __fmul_rn(row.values.at[i + 1], inverse));
    });
}

// Folds the splits of one (token, head), as tensor_kernel does when it walks alone. How much each
// step of the fold keeps and takes is known beforehand, so that the chain is short.
constexpr int kCombineThreads = 256;

template <typename data_t, int kDim>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const PagedAttentionParams p, const Plan plan) {
  constexpr int kBatch = 8192 / kDim;  // splits in shared memory
  static_assert(kBatch <= kCombineThreads);
  __shared__ float4 values[kBatch * kDim / 4];
  __shared__ float4 folds[kBatch];  // keep, take, sum of the split, maximum so far
  __shared__ float max[kBatch];
  let_next_start();
  const int head = blockIdx.x % p.heads, token = blockIdx.x / p.heads, thread = threadIdx.x;
  auto* out = static_cast<data_t*>(p.out) + (int64_t(token) * p.heads + head) * kDim;
  // Before the wait: tensor_kernel let this one start when its inputs were there.
  const int visible = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, token).position + 1;
  wait_for_inputs();
  if (visible <= 0) return write_zeros(out, kDim);
  const int end = (visible + kSplit - 1) / kSplit;
  const Slots<kDim> slots(p, plan);
  const int64_t at = slots.at(token, head, 0);
  float top = kMinusInfinity, sum = 0.f, value = 0.f;
  for (int begin = 0; begin < end; begin += kBatch) {
    const int count = min(kBatch, end - begin);
    const auto* stored = reinterpret_cast<const float4*>(slots.values + (at + begin) * kDim);
    for (int i = thread; i < count * kDim / 4; i += kCombineThreads)
      copy_async_16(&values[i], stored + i);
    float2 stats{};
    if (thread < count) {
      stats = slots.stats[at + begin + thread];
      max[thread] = stats.x;
    }
    __syncthreads();
    if (thread < count) {
      float before = top;
#pragma unroll 8
      for (int i = 0; i < thread; ++i) before = fmaxf(before, max[i]);
      const float now = fmaxf(before, stats.x);
      folds[thread] = make_float4(weight(before, now), weight(stats.x, now), stats.y, now);
    }
    wait_copies();
    __syncthreads();
    if (thread < kDim)
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const auto [keep, take, part, now] = folds[i];
        sum = fold(sum, keep, part, take);
        value = fold(value, keep, reinterpret_cast<const float*>(values)[i * kDim + thread], take);
      }
    top = folds[count - 1].w;
    __syncthreads();
  }
  if (thread < kDim) out[thread] = from_float<data_t>(__fmul_rn(value, 1.f / sum));
}

// ---- prefix

constexpr int kTiles = 2;  // of eight columns, of a warp: as registers hold
constexpr int kColumns = kTiles * kTileHeads;
static_assert(kColumns <= 32);  // bits of a mask, lanes of a warp

template <typename data_t, int kDim>
struct PrefixShared {
  static constexpr int kStages = kDim == 128 ? 2 : 4;  // whole numbers of them make a block
  static_assert(kBlock / kStep % kStages == 0);
  Ring<data_t, kDim, kStages> rings[kWalkers];
  Partials<kWalkers, kTileHeads, kDim> partials;
  alignas(16) data_t queries[kColumns][kDim + 8];  // padded, or columns share banks
};

template <typename data_t, int kDim>
__global__ void __launch_bounds__(kThreads, residents(kDim))
    prefix_kernel(const PagedAttentionParams p, const PageSize pages, const Plan plan) {
  using KChunk = typename Fragments<kDim>::KChunk;
  using Shared = PrefixShared<data_t, kDim>;
  static_assert(fits<Shared>(residents(kDim)));
  extern __shared__ float4 prefix_memory[];
  auto& shared = *reinterpret_cast<Shared*>(prefix_memory);
  auto& partials = shared.partials;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& ring = shared.rings[warp];
  const int group = plan.group, kv_head = blockIdx.x % p.kv_heads;
  const int first_column = blockIdx.x / p.kv_heads * kColumns;
  const auto row_of = [&](int column) { return (first_column + column) / group; };
  const auto head_of = [&](int column) {
    return kv_head * group + (first_column + column) % group;
  };
  wait_for_inputs();
  let_next_start();  // tensor_kernel counts on it that this kernel's inputs are there

  // Lane i knows column i: its group, and what the group shares. Every warp does the same.
  int leader = -1, blocks = 0;
  bool live = false;
  if (const int row = row_of(lane); lane < kColumns && row < p.rows) {
    leader = p.shared[2 * row];
    blocks = count_shared_blocks(p, plan, row);
    const int length = p.kv_lengths[row];
    live = (blocks > 0) & (length > 0);
  }
  const unsigned wanted = __ballot_sync(kAll, live);
  const int before = __shfl_up_sync(kAll, leader, 1);
  const unsigned starts = __ballot_sync(kAll, lane == 0 || leader != before);
  if (!wanted) return;
  constexpr int kVectors = kDim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kColumns * kVectors; i += kThreads) {
    const int column = i / kVectors, channel = i % kVectors * 8;
    const bool there = wanted >> column & 1;
    const auto* from = static_cast<const data_t*>(p.q);
    if (there) from += row_of(column) * p.q_stride + head_of(column) * kDim + channel;
    copy_async_16_once(&shared.queries[column][channel], from, there);
  }
  commit_copies();

  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  const Slots<kDim> slots(p, plan);
  BlockTile<data_t, kDim> tiles[kTiles];
  const auto begin_of = [&](int split) { return split * kSplit + warp * kBlock; };
  const int deals = gridDim.y;
  int turn = 0;  // of the splits of all groups
  for (unsigned rest = starts; rest; rest &= rest - 1) {
    // The columns of one group, from one start to the next.
    const unsigned later = rest & (rest - 1);
    const unsigned mine = wanted & ((later & -later) - 1) & ~((rest ^ later) - 1);
    if (!mine) continue;
    const int first = __ffs(rest) - 1;
    const int row = __shfl_sync(kAll, leader, first);
    const int shared_blocks = __shfl_sync(kAll, blocks, first);
    const int splits = (shared_blocks + kWalkers - 1) / kWalkers;
    const auto columns_of = [&](int tile) { return mine >> tile * kTileHeads & 0xff; };
    int split = (blockIdx.y + deals - turn % deals) % deals;
    turn += splits;
    if (split >= splits) continue;

    const auto copy = [&](int slot, const Places& places, int split, int begin) {
      if (split * kWalkers + warp < shared_blocks)
        ring.copy(slot, k_cache, v_cache, places.of(begin), begin % 32, kStep);
      commit_copies();
    };
    Places places, ahead;
    places.look_up(p, pages, row, begin_of(split));
    ahead.look_up(p, pages, row, begin_of(split + deals));
    places.settle(p, pages, kv_head, begin_of(split));
#pragma unroll
    for (int i = 0; i < Shared::kStages; ++i) copy(i, places, split, i * kStep);
    while (true) {
      const int next = split + deals, count = min(kWalkers, shared_blocks - split * kWalkers);
      Places later;
      later.look_up(p, pages, row, begin_of(next + deals));
      ahead.settle(p, pages, kv_head, begin_of(next));
      wait_for_copies<Shared::kStages>();
      __syncthreads();  // the queries are there, and partials were read
#pragma unroll
      for (int i = 0; i < kTiles; ++i) tiles[i].clear();
#pragma unroll
      for (int begin = 0; begin < kBlock; begin += kStep) {
        const int slot = begin / kStep % Shared::kStages;
        wait_for_copies<Shared::kStages - 1>();
        if (warp < count) {
          const StepFragments<data_t, kDim> step(ring.read(slot));
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            if (columns_of(i))
              tiles[i].take(step, kStep, p.scale * kLog2E, [&](int c) {
                return *reinterpret_cast<const KChunk*>(
                    &shared.queries[i * kTileHeads + g][c * 32 + t * 8]);
              });
        }
        const int to = begin + Shared::kStages * kStep;  // as many steps on
        to < kBlock ? copy(slot, places, split, to) : copy(slot, ahead, next, to - kBlock);
      }
      places = ahead, ahead = later;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (!columns_of(i)) continue;
        if (warp < count) tiles[i].store(partials, warp);
        __syncthreads();
        for (int j = threadIdx.x * 4; j < kTileHeads * kDim; j += kThreads * 4) {
          const int head = j / kDim, channel = j % kDim;
          if (!(columns_of(i) >> head & 1)) continue;
          const int column = i * kTileHeads + head;
          const int64_t at = slots.at(row_of(column), head_of(column), 0);
          if (count == kWalkers) {
            slots.write(at + split, channel, partials.template merged<4>(head, channel));
          } else {
            for (int w = 0; w < count; ++w)
              slots.write(at + plan.splits + w, channel,
                          partials.template read<4>(w, head, channel));
          }
        }
        if (i + 1 < kTiles) __syncthreads();
      }
      split = next;
      if (split >= splits) break;
    }
    __syncthreads();
  }
}

// ---- launch

template <int kHeads>
int num_blocks(const PagedAttentionParams& p) {
  const int group = p.heads / p.kv_heads;
  return p.tokens * p.kv_heads * ((group + kHeads - 1) / kHeads);
}

template <typename data_t, int kLanes, int kVec, int kChunks, bool kWhole, int kHeads>
void launch_plain(const PagedAttentionParams& p, cudaStream_t stream) {
  launch_overlapping(plain_kernel<data_t, kLanes, kVec, kChunks, kWhole, kHeads, 2>,
                     num_blocks<kHeads>(p), kThreads, 0, stream, p, PageSize(p.page_size));
}

template <typename data_t, int kLanes, int kVec, int kChunks, bool kWhole>
void dispatch_group(const PagedAttentionParams& p, cudaStream_t stream) {
  switch (p.heads / p.kv_heads) {
    case 1:
      return launch_plain<data_t, kLanes, kVec, kChunks, kWhole, 1>(p, stream);
    case 2:
      return launch_plain<data_t, kLanes, kVec, kChunks, kWhole, 2>(p, stream);
    default:
      return launch_plain<data_t, kLanes, kVec, kChunks, kWhole, 4>(p, stream);
  }
}

// Whether all vectors are read in 16 bytes at a time.
bool is_vectorised(const PagedAttentionParams& p) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto all = address(p.q) | address(p.k_cache) | address(p.v_cache) |
                   uintptr_t(bytes * p.head_dim) | uintptr_t(bytes * p.q_stride);
  return all % 16 == 0 && (p.head_dim == 64 || p.head_dim == 96 || p.head_dim == 128);
}

constexpr int kFull = 128;                        // thread blocks that keep the memory busy
constexpr int kProcessors = 132;                  // of an H100
constexpr int kPrefixWave = 528;                  // thread blocks of prefix_kernel that it likes
constexpr int64_t kMostScratchBytes = 128 << 20;  // results that wait

int divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan make_plan(const PagedAttentionParams& p) {
  const int blocks = num_blocks<kTileHeads>(p);
  const int most_splits = divide_up(int64_t(p.max_pages) * p.page_size, kSplit);
  const int64_t room =
      kMostScratchBytes / (int64_t(p.tokens) * p.heads * (p.head_dim + 2) * sizeof(float));
  Plan plan{p.heads / p.kv_heads, 1, 0, 0, 0};
  if (blocks < kFull && most_splits > 1 && most_splits + kWalkers <= room) {
    // All of them run at once: then none begins when others end.
    plan.deals = std::clamp(kProcessors * residents(p.head_dim) / blocks, 1, most_splits);
    plan.splits = most_splits;
  }
  if (p.shared) {
    // Alone, only what is shared waits; what has no room is read by every row for itself.
    if (plan.splits == 0) plan.splits = std::min<int64_t>(most_splits, room - kWalkers);
    plan.splits = std::max(plan.splits, 0);
    plan.shared_blocks = plan.splits * kWalkers;
  }
  plan.slots = plan.splits == 0 ? 0 : plan.splits + (p.shared ? kWalkers - 1 : 0);
  return plan;
}

template <typename data_t, int kDim>
void launch_tensor(const PagedAttentionParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
  const PageSize pages(p.page_size);
  const auto launch_with = [&](auto* kernel, dim3 grid, int bytes) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    launch_overlapping(kernel, grid, kThreads, bytes, stream, p, pages, plan);
  };
  if (plan.shared_blocks > 0) {
    const int64_t columns = int64_t(p.rows) * (p.heads / p.kv_heads);
    const int blocks = divide_up(columns, kColumns) * p.kv_heads;
    const dim3 grid(blocks, std::clamp(kPrefixWave / blocks, 1, plan.splits));
    launch_with(prefix_kernel<data_t, kDim>, grid, sizeof(PrefixShared<data_t, kDim>));
  }
  const dim3 grid(num_blocks<kTileHeads>(p), plan.deals);
  launch_with(tensor_kernel<data_t, kDim>, grid, sizeof(TensorShared<data_t, kDim>));
  if (plan.deals > 1)
    launch_overlapping(combine_kernel<data_t, kDim>, p.tokens * p.heads, kCombineThreads, 0, stream,
                       p, plan);
}

template <typename data_t>
void dispatch(const PagedAttentionParams& p, cudaStream_t stream) {
  if (is_vectorised(p)) {
    if constexpr (sizeof(data_t) == 2) {
      if (p.head_dim == 64) return launch_tensor<data_t, 64>(p, stream);
      if (p.head_dim == 96) return launch_tensor<data_t, 96>(p, stream);
      return launch_tensor<data_t, 128>(p, stream);
    } else {
      if (p.head_dim == 64) return dispatch_group<data_t, 8, 4, 2, true>(p, stream);
      if (p.head_dim == 96) return dispatch_group<data_t, 8, 4, 3, true>(p, stream);
      return dispatch_group<data_t, 16, 4, 2, true>(p, stream);
    }
  }
  dispatch_group<data_t, 32, 1, 8, false>(p, stream);
}

}  // namespace

int64_t count_paged_attention_scratch(const PagedAttentionParams& p) {
  if (p.tokens == 0 || p.heads == 0 || p.dtype == DType::kFloat32 || !is_vectorised(p)) return 0;
  return int64_t(p.tokens) * p.heads * make_plan(p).slots * (p.head_dim + 2);
}

void launch_paged_attention(const PagedAttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0 || p.head_dim == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch<float>(p, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch<__half>(p, stream);
  }
}

}  // namespace reasoners
