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
//   it goes, or, where the batch alone would not fill the machine, dealt to several that leave them
//   in memory: two floats and D more for 256 positions of K and V. They are folded by whichever of
//   them comes last, or, where they may be many, by combine_kernel.
// prefix: rows that share their first pages. A thread block takes 64 columns, that is rows' query
//   heads, over splits of the shared pages: K and V of 64 positions lie in shared memory for all of
//   its warps, which have 16 of the columns each. What it finds waits in memory until the rows' own
//   thread blocks come to it: whole splits, and the whole blocks of the split in which the rows
//   part.
// plain: everything else. Positions are dealt out in turn to walkers of kLanes threads, each of
//   which holds kVec x kChunks channels; the walkers are merged at the end.
//
// More queries a row go to paged_prefill.cu where its kernels take them, and otherwise to plain,
// one at a time: right, and as slow as that sounds. Which of the two is said and not found from
// shapes.
//
// H200, us (bfloat16, pages of 16; Llama-3.2-1B with 8 kv heads of 64, Llama-3.2-3B with 8 of 128):
//   1 x 2048              6.4    9.3      128 x 1024                      71   133
//   1 x 32768            26.0   44.5      512 x 1024                     261   512
//   16 x 2048            23.0   41.3      256 x 768, 512 of them shared   57    95, else 78  146
// Of 1 x 32768, tensor_kernel takes 22.2 and 40.4, combine_kernel the rest: 4 us to begin, and then
// 88 % of a copy's rate.
// With positions as the rows of the products and a softmax every 16 positions, 133 instructions for
// them instead of 88 (199 instead of 129 with heads of 128): 7.0, 32.6, 28.0, 80, 284 and 72.6. One
// split for each thread block, four times as many as are on the machine at once: 1 x 32768 26.4 and
// 45.5, 16 x 2048 25.0 and 43.9; as many as are, without asking ahead, 28.9 and 51.0, 24.3 and
// 42.4; with the next split's K and V on their way to the second-level cache instead 30.5 and 47.9,
// 28.4 and 46.2. Asking ahead where each has one split: 1 x 2048 7.5 and 10.5, and where thread
// blocks come as others leave: 128 x 1024 77 and 133 instead of 70 and 131, 512 x 1024 278 and 505
// instead of 257 and 501.
// Tried on an H100 (1 x 2048 9.0 and 12.6, 16 x 2048 35.4 and 62.1, 512 x 1024 376 and 732): K and
// V through a ring of asynchronous copies in shared memory, 16 to 24 kB a warp and on across
// splits, a prologue of fewer loads, own positions beside prefix_kernel's: 1 x 2048 in 6.8 and 8.9,
// 16 x 2048 in 30.7 and 56.7, but 512 x 1024 in 410 and 802 and the shared row in 97 and 159: what
// goes through shared memory takes more instructions than a warp has time for. Clusters whose first
// block folds what the others have in shared memory, instead of combine_kernel: 1 x 2048 in 9.5
// and 11.1, 16 x 2048 in 37.7 and 67.2, a decode step of Llama-3.2-1B 1 % slower.

#include <algorithm>
#include <climits>
#include <type_traits>

#include "async_copy.cuh"
#include "attention_block.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "matrix.cuh"
#include "rows.cuh"
#include "signal.cuh"

namespace reasoners {
namespace {

__host__ __device__ constexpr int divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == kWalkers);

// What a block works on.
struct Work {
  int token, kv_head;
  int first_head, heads;       // of the query heads
  int row = -1, visible = -1;  // the query sees positions below `visible`; padding: none
};

template <int kHeads>
__device__ inline Work work_of_block(const PagedAttentionParams& p) {
  const int group = p.heads / p.kv_heads;
  const int slices = (group + kHeads - 1) / kHeads;
  const int slice = blockIdx.x % slices;
  Work work;
  work.kv_head = blockIdx.x / slices % p.kv_heads;
  work.token = blockIdx.x / slices / p.kv_heads;
  work.first_head = work.kv_head * group + slice * kHeads;
  work.heads = min(kHeads, group - slice * kHeads);
  return work;
}
__device__ inline void find_row(const PagedAttentionParams& p, Work& work) {
  const RowPosition at = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, work.token);
  work.row = at.row;
  work.visible = at.position + 1;
}

// Where a position of a row is in the caches, counted in vectors: 2^31 of them are more than fit.
// The first-level cache is passed by, for those that come here before wait_for_inputs.
__device__ inline int locate_vector(const PagedAttentionParams& p, const PageSize& pages, int row,
                                    int kv_head, int position) {
  const int turn = pages.page(position);
  const int page = __ldcg(&p.page_table[row * p.table_stride + turn]);
  return (page * p.kv_heads + kv_head) * p.page_size + (position - turn * p.page_size);
}

template <typename data_t>
__device__ void write_zeros(data_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = from_float<data_t>(0.f);
}
// The log-sum-exp of a token's query head, where it is asked for.
__device__ inline void write_lse(const PagedAttentionParams& p, int64_t token, int head,
                                 float value) {
  if (p.lse != nullptr) p.lse[token * p.heads + head] = value;
}
// What padding gets.
template <typename data_t>
__device__ void write_nothing(const PagedAttentionParams& p, const Work& work, data_t* out,
                              int head_dim) {
  write_zeros(out, work.heads * head_dim);
  if (threadIdx.x < work.heads)
    write_lse(p, work.token, work.first_head + threadIdx.x, kMinusInfinity);
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
  Work work = work_of_block<kHeads>(p);
  find_row(p, work);
  const int head_dim = kWhole ? kDim : p.head_dim;
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * head_dim;
  if (work.visible <= 0) return write_nothing(p, work, out, head_dim);
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
  for (int begin = 0; begin < work.visible; begin += kWalkers * kUnroll) {
    Chunk k[kUnroll][kChunks], v[kUnroll][kChunks];
    bool valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = begin + u * kWalkers + walker;
      valid[u] = position < work.visible;
      const int64_t offset =
          valid[u] ? int64_t(locate_vector(p, pages, work.row, work.kv_head, position)) * head_dim
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
        score[u][h] = valid[u] ? dot * (p.scale * kLog2e) : kMinusInfinity;
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
    const int head = i / head_dim, channel = i % head_dim;
    const auto row = partials.template merged<1>(head, channel);
    out[i] = from_float<data_t>(row.values.at[0] / row.sum);
    if (channel == 0)
      write_lse(p, work.token, work.first_head + head, log_sum_exp(row.max, row.sum));
  }
}

// ---- tensor

// How the tensor path is dealt out, by shapes alone.
struct Plan {
  int deals;          // thread blocks that walk the splits of one (token, kv head)
  int each;           // how many of them each walks at most
  int splits;         // of a (token, head) that have room in memory
  int shared_blocks;  // of a row that are read with its group at most
  int slots;          // splits, then the shared blocks of the split in which the rows part
  bool at_once;       // all thread blocks are on the machine together
  bool combines;      // combine_kernel folds the splits of every row
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
    // Past the first-level cache: other multiprocessors may have written it just now.
    const float2 max_sum = __ldcg(stats + at);
    const float4 four = __ldcg(reinterpret_cast<const float4*>(values + at * kDim + channel));
    return {max_sum.x, max_sum.y, {four.x, four.y, four.z, four.w}};
  }
  __device__ void write(int64_t at, int channel, const Part<4>& part) const {
    store_vector<4>(values + at * kDim + channel, part.values);
    if (channel == 0) stats[at] = make_float2(part.max, part.sum);
  }
};

// Of a row's first blocks, how many prefix_kernel reads.
__device__ inline int count_shared_blocks(const PagedAttentionParams& p, const Plan& plan,
                                          int row) {
  return p.shared ? min(p.shared[2 * row + 1] / kBlock, plan.shared_blocks) : 0;
}

// Lane i finds the places of positions begin + i and begin + 32 + i. The last position stands in
// for those past the end, so that loads need no conditions: they wait for nothing and for nobody.
struct Places {
  int place[2];

  __device__ int of(int position) const { return position < 32 ? place[0] : place[1]; }

  __device__ void look_up(const PagedAttentionParams& p, const PageSize& pages, int row,
                          int kv_head, int begin, int end) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = min(begin + 32 * r + int(threadIdx.x % 32), end - 1);
      place[r] = locate_vector(p, pages, row, kv_head, position);
    }
  }
  // In two steps, so that it can begin before it is known where the row ends: of a row's first
  // max_pages pages, and then those past the end become the last.
  __device__ void guess(const PagedAttentionParams& p, const PageSize& pages, int row, int kv_head,
                        int begin) {
    look_up(p, pages, row, kv_head, begin, p.max_pages * p.page_size);
  }
  __device__ void end_at(int count) {  // positions from `begin` on, at least one
    const int lane = threadIdx.x % 32;
    const int last = __shfl_sync(kAll, of(count - 1), (count - 1) % 32);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (32 * r + lane >= count) place[r] = last;
  }
};

// Four channels of the result; zeros for padding.
template <typename data_t>
__device__ inline void write_row(data_t* out, const Part<4>& row, bool is_row) {
  const float inverse = 1.f / row.sum;
#pragma unroll
  for (int i = 0; i < 4; i += 2)
    *reinterpret_cast<uint32_t*>(out + i) =
        is_row ? pack<data_t>(__fmul_rn(row.values.at[i], inverse),
                              __fmul_rn(row.values.at[i + 1], inverse))
               : 0;
}

// The splits folded so far. What changes is written beside what is still read.
template <int kDim>
struct Folded {
  float max[2][kTileHeads], sum[2][kTileHeads];
  alignas(16) float values[kTileHeads][kDim];

  __device__ Part<4> read(int turn, int head, int channel) const {
    return {max[turn][head], sum[turn][head], load_vector<4>(&values[head][channel])};
  }
  __device__ void write(int turn, int head, int channel, const Part<4>& part) {
    store_vector<4>(&values[head][channel], part.values);
    if (channel == 0) max[turn][head] = part.max, sum[turn][head] = part.sum;
  }
};

// The lines of K and V that a warp reads first, to be in the second-level cache when it does: found
// before wait_for_inputs, when rows, pages and lengths may still change, and then fetched in vain.
template <typename data_t, int kDim>
__device__ void prefetch_early(const PagedAttentionParams& p, const PageSize& pages, Work work,
                               int begin) {
  find_row(p, work);
  if (work.visible <= begin || work.visible > p.max_pages * p.page_size) return;
  Places places;
  places.look_up(p, pages, work.row, work.kv_head, begin, work.visible);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (places.place[r] < 0 || places.place[r] >= p.num_pages * p.kv_heads * p.page_size) continue;
    const int64_t at = int64_t(places.place[r]) * kDim;
#pragma unroll
    for (int channel = 0; channel < kDim; channel += 128 / sizeof(data_t)) {
      prefetch(static_cast<const data_t*>(p.k_cache) + at + channel);
      prefetch(static_cast<const data_t*>(p.v_cache) + at + channel);
    }
  }
}

// How a thread block walks splits of its (token, kv head).
enum class Walk {
  kAlone,     // all of them; thread blocks come as others leave
  kOneSplit,  // one; all thread blocks are on the machine together
  kOn         // several; the same. Thread blocks begin together, so a warp asks for its next block
              // while it has this one, or memory would idle when all of them fold. Where they come
              // as others leave, that takes instructions and gives nothing.
};

template <typename data_t, int kDim, Walk kWalk>
__global__ void __launch_bounds__(kThreads, kDim == 64 && kWalk == Walk::kAlone ? 3 : 2)
    tensor_kernel(const PagedAttentionParams p, const PageSize pages, const Plan plan) {
  constexpr bool kAtOnce = kWalk != Walk::kAlone, kOn = kWalk == Walk::kOn;
  using KChunk = typename Fragments<kDim>::KChunk;
  constexpr int kVectors = kDim / 8;
  // As registers hold: a block's loads are eight, of kDim / 4 registers.
  constexpr int kAhead = kDim > 64 ? 4 : kAtOnce ? 8 : 5;
  __shared__ Partials<kWalkers, kTileHeads, kDim> partials;
  __shared__ Folded<kDim> folded;
  __shared__ TileQueries<kDim> queries;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto begin_of = [&](int split) { return split * kSplit + warp * kBlock; };
  let_next_start();
  Work work = work_of_block<kTileHeads>(p);
  if (kAtOnce) prefetch_early<data_t, kDim>(p, pages, work, begin_of(blockIdx.y));
  // prefix_kernel let this one start when all that both read was there; what it leaves is waited
  // for where it is read.
  const bool beside_prefix = plan.shared_blocks > 0;
  if (!beside_prefix) wait_for_inputs();

  // The places of K and V, the queries and where the row ends are asked for at the same time, as a
  // token of decode is in the row of its number.
  const int row = min(work.token, p.rows - 1);
  Places next;
  if (!p.shared) next.guess(p, pages, row, work.kv_head, begin_of(blockIdx.y));
  static_assert(kTileHeads * kVectors <= kThreads);
  const int head = threadIdx.x / kVectors, channel = threadIdx.x % kVectors * 8;
  KChunk q{};  // heads past the group
  if (head < work.heads)
    q = *reinterpret_cast<const KChunk*>(static_cast<const data_t*>(p.q) + work.token * p.q_stride +
                                         (work.first_head + head) * kDim + channel);
  // Rows with `shared` have one token each.
  const int shared_blocks = count_shared_blocks(p, plan, row);
  find_row(p, work);
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * kDim;
  if (work.visible <= 0) {
    if (blockIdx.y == 0 && !plan.combines) write_nothing(p, work, out, kDim);
    return;
  }
  // Splits from `first` on are the row's own; where a thread block has them all it folds as it
  // goes.
  const int first = shared_blocks / kWalkers, end = (work.visible + kSplit - 1) / kSplit;
  const int dealt_to = kAtOnce ? gridDim.y : 1;
  const int shares = min(dealt_to, end - first);
  if (blockIdx.y >= shares) return;
  const bool alone = !kAtOnce || (shares == 1 && !plan.combines);
  int split = first + blockIdx.y;
  const auto look_up = [&](Places& places, int split) {
    places.look_up(p, pages, work.row, work.kv_head, begin_of(split), work.visible);
  };
  if (p.shared || work.row != row)
    look_up(next, split);
  else if (work.visible > begin_of(split))
    next.end_at(min(work.visible - begin_of(split), kBlock));
  if (head < kTileHeads) queries.put(head, channel, q, p.scale);
  __syncthreads();
  const Slots<kDim> slots(p, plan);
  const auto each_vector = [&](const auto& f) {  // always the same thread's
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < work.heads * kDim; i += kThreads * 4) f(i / kDim, i % kDim);
  };
  const auto slots_of = [&](int head) { return slots.at(work.token, work.first_head + head, 0); };
  // All splits up to `count`, several on their way at a time.
  const auto fold_slots = [&](Part<4>& all, int head, int channel, int count, auto together) {
    constexpr int kTogether = together;
    for (int begin = 0; begin < count; begin += kTogether) {
      Part<4> parts[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        parts[i] = slots.read(slots_of(head) + min(begin + i, count - 1), channel);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (begin + i < count) fold(all, parts[i]);
    }
  };
  const auto write = [&](int head, int channel, const Part<4>& row) {
    write_row<data_t>(out + head * kDim + channel, row, true);
    if (channel == 0)
      write_lse(p, work.token, work.first_head + head, log_sum_exp(row.max, row.sum));
  };

  const float scale = positive_scale(p.scale);
  int turn = 0;
  BlockLoads<data_t, kDim, kAhead> loads;
  loads.k_cache = static_cast<const data_t*>(p.k_cache);
  loads.v_cache = static_cast<const data_t*>(p.v_cache);
  const auto reads_prefix = [&](int split) { return warp < shared_blocks - split * kWalkers; };
  const int first_own = split;
  Places after;
  if (kOn) {
    look_up(after, split + dealt_to);
    if (work.visible > begin_of(split) && !reads_prefix(split)) loads.begin(next);
  }
  do {
    const Places places = next;
    if (kOn) {
      next = after;
      look_up(after, split + 2 * dealt_to);
    } else if (kWalk == Walk::kAlone) {
      look_up(next, split + dealt_to);
    }
    if (reads_prefix(split)) {
      wait_for_inputs();
#pragma unroll 1
      for (int i = lane * 4; i < work.heads * kDim; i += 32 * 4) {
        const int head = i / kDim, channel = i % kDim;
        partials.write(warp, head, channel,
                       slots.read(slots_of(head) + plan.splits + warp, channel));
      }
      if (kOn) loads.begin(next);
    } else {
      BlockTile<data_t, kDim> tile;
      tile.clear();
      if (const int visible = work.visible - begin_of(split); visible > 0) {
        if (!kOn) loads.begin(places);
        tile.template take<kOn>(loads, places, next, visible, scale, queries);
      }
      tile.store(partials, warp);
    }
    if (beside_prefix) wait_for_inputs();
    __syncthreads();
    each_vector([&](int head, int channel) {
      const auto part = partials.template folded<4>(head, channel);
      if (!alone) return slots.write(slots_of(head) + split, channel, part);
      auto all = nothing<4>();
      if (split > first_own)
        all = folded.read(turn, head, channel);
      else
        fold_slots(all, head, channel, first, std::integral_constant<int, 1>{});
      fold(all, part);
      folded.write(turn ^ 1, head, channel, all);
    });
    turn ^= 1;
    split += dealt_to;
    __syncthreads();
  } while (kWalk != Walk::kOneSplit && split < end);
  if (alone)
    return each_vector(
        [&](int head, int channel) { write(head, channel, folded.read(turn, head, channel)); });
  if (plan.combines) return;
  // All splits of the row, by the thread block that comes last.
  __shared__ bool is_last;
  if (threadIdx.x == 0) is_last = comes_last(&p.tickets[blockIdx.x], shares);
  __syncthreads();
  if (!is_last) return;
  each_vector([&](int head, int channel) {
    auto all = nothing<4>();
    fold_slots(all, head, channel, end, std::integral_constant<int, 8>{});
    write(head, channel, all);
  });
}

// combine_kernel folds the splits of a (token, head) as tensor_kernel does when it walks alone.
// Splits are asked for before it is known how many the row has; those past its end are not folded.
// kParts blocks have the channels. How much each step of the fold keeps and takes is known
// beforehand, so that the chain is short.
constexpr int kCombineThreads = 128;

template <typename data_t, int kDim, int kParts>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const PagedAttentionParams p, const Plan plan) {
  constexpr int kChannels = kDim / kParts;
  constexpr int kTurn = 8;  // splits of which registers hold what is folded, and as many are read
  constexpr int kBatch =    // splits in shared memory
      kParts == 1 ? 8192 / kDim / (2 * kTurn) * (2 * kTurn) : kCombineThreads;
  constexpr int kEarly = kBatch / 4;  // that are asked for before it is known how many there are
  static_assert(kBatch <= kCombineThreads && kChannels <= kCombineThreads && kChannels % 4 == 0);
  static_assert(kBatch % (2 * kTurn) == 0);
  __shared__ float4 values[kBatch * kChannels / 4];
  __shared__ float4 folds[kBatch];  // keep, take, what the split's sum adds, maximum so far
  __shared__ float max[kCombineThreads / 32];
  const int first = blockIdx.x % kParts * kChannels, index = blockIdx.x / kParts;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Slots<kDim> slots(p, plan);
  const int64_t at = int64_t(index) * plan.slots;
  const auto request = [&](int begin, int from, int to) {
    for (int i = from * kChannels / 4 + thread; i < to * kChannels / 4; i += kCombineThreads) {
      const int split = begin + i / (kChannels / 4), channel = first + i % (kChannels / 4) * 4;
      copy_async_16(&values[i], slots.values + (at + split) * kDim + channel);
    }
  };
  let_next_start();
  wait_for_inputs();
  const int early = min(plan.splits, kEarly);
  request(0, 0, early);
  float2 stats = thread < min(plan.splits, kBatch) ? slots.stats[at + thread] : float2{};
  auto* out = static_cast<data_t*>(p.out) + int64_t(index) * kDim + first;
  const int token = index / p.heads;
  const int visible = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, token).position + 1;
  if (visible <= 0) {
    wait_copies();
    if (first + thread == 0) write_lse(p, 0, index, kMinusInfinity);
    return write_zeros(out, kChannels);
  }
  const int end = (visible + kSplit - 1) / kSplit;
  float top = kMinusInfinity, sum = 0.f, value = 0.f;
  for (int begin = 0; begin < end; begin += kBatch) {
    const int count = min(kBatch, end - begin);
    request(begin, begin == 0 ? early : 0, count);
    if (begin > 0 && thread < count) stats = slots.stats[at + begin + thread];
    // The largest maximum before each split, of its warp and then of the warps before.
    float largest = thread < count ? stats.x : kMinusInfinity;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float other = __shfl_up_sync(kAll, largest, offset);
      if (lane >= offset) largest = fmaxf(largest, other);
    }
    if (lane == 31) max[warp] = largest;
    float before = __shfl_up_sync(kAll, largest, 1);
    before = lane == 0 ? top : fmaxf(top, before);
    __syncthreads();
    if (thread < count) {
      for (int w = 0; w < warp; ++w) before = fmaxf(before, max[w]);
      const float now = fmaxf(before, stats.x);
      const float take = weight(stats.x, now);
      folds[thread] = make_float4(weight(before, now), take, __fmul_rn(take, stats.y), now);
    } else if (thread < kBatch) {
      folds[thread] = make_float4(1.f, 0.f, -0.f, 0.f);
    }
    wait_copies();
    // The last turns are filled up with what adds nothing, not even to -0; by the threads that have
    // asked for what it replaces.
    const int last = count * (kChannels / 4);
    for (int i = last - last % kCombineThreads + thread;
         i < divide_up(count, 2 * kTurn) * (2 * kTurn) * (kChannels / 4); i += kCombineThreads)
      if (i >= last) values[i] = make_float4(-0.f, -0.f, -0.f, -0.f);
    __syncthreads();
    if (thread < kChannels) {
      // Shared memory is read a turn ahead, or every split would wait for it.
      float4 steps[2][kTurn];
      float parts[2][kTurn];
      const auto read = [&](int half, int turn) {
#pragma unroll
        for (int i = 0; i < kTurn; ++i) {
          steps[half][i] = folds[turn + i];
          parts[half][i] = reinterpret_cast<const float*>(values)[(turn + i) * kChannels + thread];
        }
      };
      const auto take_turn = [&](int half) {
#pragma unroll
        for (int i = 0; i < kTurn; ++i) {
          const auto [keep, take, more, now] = steps[half][i];
          sum = __fmaf_rn(keep, sum, more);
          value = fold(value, keep, parts[half][i], take);
        }
      };
      read(0, 0);
      for (int turn = 0; turn < count; turn += 2 * kTurn) {
        read(1, turn + kTurn);
        take_turn(0);
        read(0, min(turn + 2 * kTurn, kBatch - kTurn));
        take_turn(1);
      }
    }
    top = folds[count - 1].w;
    __syncthreads();
  }
  if (thread >= kChannels) return;
  out[thread] = from_float<data_t>(__fmul_rn(value, 1.f / sum));
  if (first + thread == 0) write_lse(p, 0, index, log_sum_exp(top, sum));
}

// ---- prefix

constexpr int kColumns = 16 * kWarps;  // of a thread block: a product's rows for each warp
static_assert(kColumns == 64);         // bits of a mask, two for each lane

// K and V of a block. Two rows of K are 64 bytes apart modulo 128, as eight lanes read 64 bytes of
// both at once.
template <typename data_t, int kDim>
struct PrefixStage {
  data_t k[kBlock][kDim % 64 == 0 ? kDim + 32 : kDim];
  Matrix<data_t, kBlock, kDim> v;
};
template <int kDim>
constexpr int kPrefixStages = kDim == 64 ? 3 : 2;  // as two thread blocks on a multiprocessor hold

// The columns of a thread block. Lane i knows columns i and 32 + i: the first row of their group,
// and how many blocks it shares. Every warp does the same.
struct PrefixColumns {
  int leader[2], blocks[2];
  uint64_t wanted, starts;  // columns that need what is shared, and those that begin a group

  __device__ PrefixColumns(const PagedAttentionParams& p, const Plan& plan, int first, int group)
      : wanted(0), starts(0) {
    const int lane = threadIdx.x % 32;
    int last = -1;  // leader of the column before
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool live = false;
      leader[half] = -1, blocks[half] = 0;
      if (const int row = (first + 32 * half + lane) / group; row < p.rows) {
        leader[half] = p.shared[2 * row];
        blocks[half] = count_shared_blocks(p, plan, row);
        live = blocks[half] > 0 && p.kv_lengths[row] > 0;
      }
      int before = __shfl_up_sync(kAll, leader[half], 1);
      if (lane == 0) before = last;
      const bool begins = (half == 0 && lane == 0) || leader[half] != before;
      wanted |= uint64_t(__ballot_sync(kAll, live)) << 32 * half;
      starts |= uint64_t(__ballot_sync(kAll, begins)) << 32 * half;
      last = __shfl_sync(kAll, leader[half], 31);
    }
  }
  __device__ int of(const int (&known)[2], int column) const {
    return __shfl_sync(kAll, column < 32 ? known[0] : known[1], column % 32);
  }
};

// The blocks that a thread block takes, one after the other: of all splits that the groups of its
// columns share, every gridDim.y-th.
struct PrefixWalk {
  uint64_t rest, mine;  // groups from this one on, by their first column; the columns of this one
  int row, blocks;      // that has the pages, that it shares
  int split, block;     // of this group, of this split

  __device__ explicit PrefixWalk(const PrefixColumns& columns)
      : rest(columns.starts), mine(0), row(0), blocks(0), split(blockIdx.y), block(0) {
    seek(columns);
  }
  __device__ bool is_over() const { return rest == 0; }
  __device__ int count() const { return min(kWalkers, blocks - split * kWalkers); }
  __device__ int begin() const { return split * kSplit + block * kBlock; }
  __device__ void advance(const PrefixColumns& columns) {
    if (is_over() || ++block < count()) return;
    block = 0;
    split += gridDim.y;
    seek(columns);
  }
  // `split` counts from the first of group `rest`.
  __device__ void seek(const PrefixColumns& columns) {
    for (; rest; rest &= rest - 1) {
      const uint64_t later = rest & (rest - 1);
      mine = columns.wanted & ((later & -later) - 1) & ~((rest ^ later) - 1);
      if (!mine) continue;
      const int first = __ffsll(rest) - 1;
      row = columns.of(columns.leader, first);
      blocks = columns.of(columns.blocks, first);
      const int splits = (blocks + kWalkers - 1) / kWalkers;
      if (split < splits) return;
      split -= splits;
    }
  }
};

template <typename data_t, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 3 : 2)
    prefix_kernel(const PagedAttentionParams p, const PageSize pages, const Plan plan) {
  using Chunk = Vec<uint32_t, 4>;
  constexpr int kStages = kPrefixStages<kDim>;
  constexpr int kVectors = kDim / 8, kLines = 32 / kVectors;  // a warp copies kLines at once
  constexpr int kWarpPositions = kBlock / kWarps;
  constexpr int kPart = 32;  // channels that are multiplied at a time
  extern __shared__ __align__(16) char memory[];
  auto* stages = reinterpret_cast<PrefixStage<data_t, kDim>*>(memory);
  wait_for_inputs();
  let_next_start();  // what tensor_kernel reads is there, too
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = p.heads / p.kv_heads, kv_head = blockIdx.x % p.kv_heads;
  const int first_column = blockIdx.x / p.kv_heads * kColumns;
  const PrefixColumns columns(p, plan, first_column, group);
  PrefixWalk now(columns);
  if (now.is_over()) return;

  // A warp copies 16 of a block's positions, and its lane i knows where position i % 16 is, counted
  // in vectors; -1: there is no such block.
  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  const int line = lane / kVectors, channel = lane % kVectors * 8;
  PrefixWalk ahead = now;
  const auto look_up = [&] {
    int place = -1;
    if (!ahead.is_over())
      place = locate_vector(p, pages, ahead.row, kv_head,
                            ahead.begin() + warp * kWarpPositions + lane % kWarpPositions);
    ahead.advance(columns);
    return place;
  };
  const auto request = [&](int stage, int place) {
#pragma unroll
    for (int i = 0; i < kWarpPositions; i += kLines) {
      const int64_t from = int64_t(__shfl_sync(kAll, place, i + line)) * kDim + channel;
      const int to = warp * kWarpPositions + i + line;
      if (from >= 0 && line < kLines) {
        copy_async_16_once(&stages[stage].k[to][channel], k_cache + from, true);
        copy_async_16_once(&stages[stage].v.at[to][channel], v_cache + from, true);
      }
    }
    commit_copies();
  };
  int place = look_up();
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    request(stage, place);
    place = look_up();
  }

  // Columns g and g + 8 of the warp: their queries in K's order of channels, and their results.
  const Slots<kDim> slots(p, plan);
  uint32_t queries[kDim / 16][4];
  int slot[2];  // the first of them: there is memory for fewer than 2^31
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int column = warp * 16 + g + 8 * r;
    const int row = (first_column + column) / group;
    const int head = kv_head * group + (first_column + column) % group;
    const bool live = columns.wanted >> column & 1;
    slot[r] = live ? int(slots.at(row, head, 0)) : 0;
    const data_t* from = static_cast<const data_t*>(p.q) + row * p.q_stride + head * kDim + t * 8;
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      Chunk q{};
      if (live) q = *reinterpret_cast<const Chunk*>(from + c * 32);
      take_sign(q, p.scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) queries[2 * c + i / 2][i % 2 * 2 + r] = q.at[i];
    }
  }
  const float scale = positive_scale(p.scale);
  float max[2], sum[2], all[2][kDim / 8][2];
  const auto clear = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = kMinusInfinity, sum[r] = 0.f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) all[r][n][0] = all[r][n][1] = 0.f;
    }
  };
  clear();

  for (int stage = 0; !now.is_over();
       now.advance(columns), stage = stage + 1 < kStages ? stage + 1 : 0) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all copies of this block are there, and nobody reads the one before it
    request(stage > 0 ? stage - 1 : kStages - 1, place);
    place = look_up();
    if (!(now.mine >> warp * 16 & 0xffff)) continue;
    const auto& k = stages[stage].k;
    const auto& v = stages[stage].v;

    Scores scores = {};
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c)
#pragma unroll
      for (int first = 0; first < kBlock / 8; first += 4) {
        Chunk chunks[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          chunks[n] = *reinterpret_cast<const Chunk*>(&k[8 * (first + n) + g][32 * c + 8 * t]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int n = 0; n < 4; ++n)
            multiply_add<data_t>(scores[first + n], queries[2 * c + i], chunks[n].at[2 * i],
                                 chunks[n].at[2 * i + 1]);
      }

    Weights weights[2];
    float keep[2], take[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[r] = weigh<data_t>(scores, r, scale);
      const float top = fmaxf(max[r], weights[r].max);
      keep[r] = weight(max[r], top), take[r] = weight(weights[r].max, top);
      max[r] = top;
      sum[r] = fold(sum[r], keep[r], weights[r].sum, take[r]);
    }
#pragma unroll
    for (int part = 0; part < kDim; part += kPart) {
      float values[2][kPart / 8][4] = {};
#pragma unroll
      for (int step = 0; step < kBlockSteps; ++step)
#pragma unroll
        for (int n = 0; n < kPart / 8; n += 2) {
          uint32_t b[4];
          v.load_b(b, kStep * step, part + 8 * n);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            multiply_add<data_t>(values[r][n], weights[r].at[step], b[0], b[1]);
            multiply_add<data_t>(values[r][n + 1], weights[r].at[step], b[2], b[3]);
          }
        }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < kPart / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& value = all[r][part / 8 + n][i];
            value = fold(value, keep[r], __fadd_rn(values[r][n][i], values[r][n][2 + i]), take[r]);
          }
    }

    // The blocks of a whole split are folded, those of the one in which the rows part wait alone.
    const bool whole = now.count() == kWalkers;
    if (whole && now.block + 1 < kWalkers) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!(now.mine >> (warp * 16 + g + 8 * r) & 1)) continue;
      const int64_t at = int64_t(slot[r]) + (whole ? now.split : plan.splits + now.block);
      if (t == 0) slots.stats[at] = make_float2(max[r], sum[r]);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        *reinterpret_cast<float2*>(slots.values + at * kDim + 8 * n + 2 * t) =
            make_float2(all[r][n][0], all[r][n][1]);
    }
    clear();
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

constexpr int kFew = 264;                         // thread blocks, two on a multiprocessor
constexpr int kFull = 352;                        // thread blocks that keep the memory busy
constexpr int kFewSplits = 16;                    // that a thread block folds as soon
constexpr int kPrefixWave = 528;                  // of prefix_kernel
constexpr int64_t kMostScratchBytes = 128 << 20;  // results that wait

// How many splits a thread block walks: in as few rounds of kFew thread blocks as is best, where to
// begin takes as long as another split.
int share_splits(int blocks, int splits) {
  int best = 1, least = INT_MAX;
  for (int rounds = 1; rounds <= 4; ++rounds) {
    const int deals = rounds * kFew / blocks;
    if (deals == 0) continue;
    const int each = divide_up(splits, deals), time = rounds * (each + 1);
    if (time < least) best = each, least = time;
  }
  return best;
}

Plan make_plan(const PagedAttentionParams& p) {
  const int blocks = num_blocks<kTileHeads>(p);
  const int most_splits = divide_up(int64_t(p.max_pages) * p.page_size, kSplit);
  const int64_t room =
      kMostScratchBytes / (int64_t(p.tokens) * p.heads * (p.head_dim + 2) * sizeof(float));
  Plan plan{1, most_splits, 0, 0, 0, false, false};
  if (blocks < kFull && most_splits > 1 && most_splits + kWalkers <= room) {
    plan.each = share_splits(blocks, most_splits);
    plan.deals = divide_up(most_splits, plan.each);
    plan.splits = most_splits;
  }
  if (p.shared) {
    // Alone, only what is shared waits; what has no room is read by every row for itself.
    if (plan.splits == 0) plan.splits = std::min<int64_t>(most_splits, room - kWalkers);
    plan.splits = std::max(plan.splits, 0);
    plan.shared_blocks = plan.splits * kWalkers;
  }
  plan.at_once = plan.deals > 1 || blocks <= kFew;
  plan.combines = plan.deals > 1 && plan.splits > kFewSplits;
  plan.slots = plan.splits == 0 ? 0 : plan.splits + (p.shared ? kWalkers - 1 : 0);
  return plan;
}

template <typename data_t, int kDim>
void launch_tensor(const PagedAttentionParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
  const PageSize pages(p.page_size);
  if (plan.shared_blocks > 0) {
    const int64_t columns = int64_t(p.rows) * (p.heads / p.kv_heads);
    const int blocks = divide_up(columns, kColumns) * p.kv_heads;
    const dim3 grid(blocks, std::clamp(kPrefixWave / blocks, 1, plan.splits));
    constexpr int kBytes = kPrefixStages<kDim> * sizeof(PrefixStage<data_t, kDim>);
    const auto kernel = prefix_kernel<data_t, kDim>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    launch_overlapping(kernel, grid, kThreads, kBytes, stream, p, pages, plan);
  }
  const dim3 grid(num_blocks<kTileHeads>(p), plan.deals);
  const auto kernel = !plan.at_once    ? tensor_kernel<data_t, kDim, Walk::kAlone>
                      : plan.each == 1 ? tensor_kernel<data_t, kDim, Walk::kOneSplit>
                                       : tensor_kernel<data_t, kDim, Walk::kOn>;
  launch_overlapping(kernel, grid, kThreads, 0, stream, p, pages, plan);
  if (!plan.combines) return;
  const int rows = p.tokens * p.heads;
  if (rows < kFew)
    launch_overlapping(combine_kernel<data_t, kDim, 4>, 4 * rows, kCombineThreads, 0, stream, p,
                       plan);
  else
    launch_overlapping(combine_kernel<data_t, kDim, 1>, rows, kCombineThreads, 0, stream, p, plan);
}

template <typename data_t>
void dispatch(const PagedAttentionParams& p, cudaStream_t stream) {
  if (is_vectorised(p)) {
    if constexpr (sizeof(data_t) == 2) {
      if (!p.decode) return launch_paged_prefill(p, stream);
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

bool runs_on_tensor_cores(const PagedAttentionParams& p) {
  return p.tokens > 0 && p.heads > 0 && p.dtype != DType::kFloat32 && is_vectorised(p);
}

}  // namespace

int64_t count_paged_attention_scratch(const PagedAttentionParams& p) {
  if (!runs_on_tensor_cores(p) || !p.decode) return 0;
  return int64_t(p.tokens) * p.heads * make_plan(p).slots * (p.head_dim + 2);
}

int64_t count_paged_attention_tickets(const PagedAttentionParams& p) {
  if (!runs_on_tensor_cores(p)) return 0;
  if (!p.decode) return runs_paged_prefill_wgmma() ? kPagedPrefillTickets : 0;
  const Plan plan = make_plan(p);
  return plan.deals > 1 && !plan.combines ? num_blocks<kTileHeads>(p) : 0;
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
