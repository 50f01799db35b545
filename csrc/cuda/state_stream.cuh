// The body of state_step.cuh for many rows: blocks that stay, and a producer that runs ahead of
// them.
//
// A block serves one head. Its last warp fetches: the (P, N) state by one bulk copy, the recent
// tokens, the convolution's ring and the projected inputs by 16-byte asynchronous copies, all of
// one row into one stage of shared memory, two or three rows ahead; an mbarrier a stage says when
// it is there, another when it may be filled again. The other 2 P threads compute as in
// state_step.cuh, a few values at a time, so that registers do not limit the blocks on a
// multiprocessor. What a head keeps for all rows (taps, biases) stays in registers.
//
// Each block's first rows are dealt; the others are drawn, by a ticket, from a list in
// which rows whose states are written come first, for they take twice as long. While the kernel
// before still runs, the first rows' states are fetched into the second-level cache.
//
// H200, Llamba-1B, batch 512, us, and the share of a copy's rate: bf16 bare 72, 91 %, written late
// 59, 72 %; fp32 written late 86, 90 %; the mixer, bf16, 88, 82 %, written late 78, 62 %, fp32 113,
// 74 %; 24 heads of 128 x 128, bf16, written late 125, 89 %. Before sums over lanes were exchanged
// and 16-bit products left to the tensor cores, written late: 60, 92, 82, 116 and 131. With rows
// dealt in advance and no early fetch, the first ones 81, 71 and 116.
// What limits 16-bit states written late is not known: a third fewer instructions gave 2 %; rows
// that all have 0, 3 or 6 recent tokens, and are read alone, take 49, 59 and 62 us where the bytes
// need 34, 37 and 40, and rows that all write 88. At 16 KB a state the same rate of rows is enough.
//
// Why: one block a (row, head) reached 96 % of a copy's rate with 16 KB of state but 79 % with 8 KB
// and 40 to 64 % with deferred writes or a convolution in front (H100, batch 512), for it lives
// through slot -> state -> sums -> y alone and has loads in flight for a fraction of that time.
// Rows all dealt in advance, by their bytes, left some blocks done when half of the time was gone
// (equal bytes take some multiprocessors longer), and a tenth of it went by with few at work.
#pragma once

#include <type_traits>

#include "state_step.cuh"

namespace reasoners {

// Rows under way to a block. Two, of larger states, where three would leave a multiprocessor two
// blocks (H100, 32 kB written late: 168 us and 226).
constexpr int kMaxStages = 3;
constexpr int kFewStagesState = 24 << 10;
// Bytes of a head's state above which blocks of one head do as well (H100, batch 512): 16 kB of
// fp32 bare, 188 us there and 196 here; 64 kB with a convolution or recent tokens beside it.
constexpr int kMaxBareState = 8 << 10;
constexpr int kMaxStreamedState = 32 << 10;
constexpr int kConstantTurns = 2;  // values of a token whose constants a thread keeps
constexpr int kMaxConsumerWarps = 2 * kMaxHeadDim / 32;

// The stages, and byte offsets within one, from shapes alone.
struct StageLayout {
  int stages, recent, ring, inputs, bytes;
};

// The stage at hand, and the parity of how often all of them have been.
struct Turn {
  int stage = 0, parity = 0;
  __device__ void move_on(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

struct StageFacts {
  int row, slot, pending;  // row < 0: there are no more
  float log_decay, scale;
  void* newest;  // of the convolution's ring, the entry that takes the inputs
  float decays[kMaxRecent], gains[kMaxRecent];
};

template <typename data_t, int kStateDim>
struct StreamShared {
  uint64_t full[kMaxStages], empty[kMaxStages];
  StageFacts facts[kMaxStages];
  // Of the row at hand and, since some threads may be done with it before others, the next.
  alignas(32) data_t values[2][HeadToken<data_t, kStateDim>::kCount];
  float y[2][kMaxHeadDim];
  float weight[2][kMaxRecent + 1], coefficient[2][kMaxRecent + 1], kept[2];
  float partial[2][8];
  int writing[kMaxConsumerWarps];
};

// Of the threads that compute; the producer takes no part.
struct ConsumersSync {
  int threads;
  __device__ void operator()() const { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
  // The producer waits until all of them have told.
  __device__ void tell_producer() const {
    asm volatile("bar.arrive 2, %0;" ::"r"(threads + 32) : "memory");
  }
  __device__ void wait_as_producer() const {
    asm volatile("bar.sync 2, %0;" ::"r"(threads + 32) : "memory");
  }
};

// How the rows of a head come to its blocks.
struct Draw {
  int walkers, walker;  // blocks of the head, and this one
  int dealt;            // rows, as many to each block as it has stages; the others are drawn

  template <typename Params>
  __device__ Draw(const Params& p, int stages)
      : walkers(gridDim.x / p.heads),
        walker(blockIdx.x / p.heads),
        dealt(min(p.batch, stages * walkers)) {}
  __device__ int row(int turn) const { return walker + turn * walkers; }
};

// A row on the list of those that are drawn.
struct Listed {
  int slot;
  uint16_t row, pending;
};
constexpr int kPendingBits = 4;
static_assert(kMaxRecent < 1 << kPendingBits);
constexpr int kMaxEach = 64 / kPendingBits;  // that a thread puts there

// The list, rows that write first, is made by the threads that compute; all blocks of a head make
// the same.
template <typename Params>
__device__ bool lists_rows(const Params& p, const Draw& draw) {
  return p.recent.pending && draw.dealt < p.batch;
}
template <typename Params, typename Shared>
__device__ void list_rows(const Params& p, const Draw& draw, Shared& shared, Listed* list,
                          const ConsumersSync& sync) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rows = p.batch - draw.dealt, each = (rows + sync.threads - 1) / sync.threads;
  const int begin = min(thread * each, rows), count = min(each, rows - begin);
  const auto writes = [&](int pending) { return pending + 1 >= p.recent.period; };
  uint64_t all_pending = 0;
  int own = 0;
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    const int slot = p.slots[draw.dealt + begin + k];
    const int pending = slot < 0 ? 0 : p.recent.pending[slot];
    all_pending |= uint64_t(pending) << k * kPendingBits;
    own += writes(pending);
  }
  int before = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) shared.writing[warp] = before;
  before -= own;
  sync();
  int total = 0;
  for (int w = 0; w < sync.threads / 32; ++w) {
    if (w < warp) before += shared.writing[w];
    total += shared.writing[w];
  }
  for (int k = 0; k < count; ++k) {
    const int i = begin + k;
    const int pending = all_pending >> k * kPendingBits & ((1 << kPendingBits) - 1);
    const int place = writes(pending) ? before : total + i - before, row = draw.dealt + i;
    list[place] = {p.slots[row], uint16_t(row), uint16_t(pending)};
    before += writes(pending);
  }
}

// The states and recent tokens of a block's first rows, to be in the second-level cache when they
// are fetched, while the kernel before still runs: what is read of slots and pending may be changed
// by it, and then lines were fetched in vain. The first-level cache, which would keep it, is passed
// by.
template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__device__ void prefetch_early(const Mixer& mixer, const StageLayout& layout,
                               const HeadPlace& place) {
  const auto& p = mixer.p;
  const Draw draw(p, layout.stages);
  const int lane = threadIdx.x % 32;
  int slot = -1, pending = 0;
  if (lane < layout.stages && draw.row(lane) < p.batch) {
    slot = guess_slot(p, draw.row(lane));
    if (slot >= 0) {
      const int64_t head = int64_t(slot) * p.heads + place.head;
      prefetch_bulk(static_cast<const state_t*>(p.state) + head * p.head_dim * kStateDim,
                    p.head_dim * kStateDim * sizeof(state_t));
      if (p.recent.pending) pending = min(__ldcg(&p.recent.pending[slot]), p.recent.capacity);
    }
  }
  const int b_at = p.x_heads * p.head_dim;
  for (int k = 0; k < layout.stages; ++k) {
    const int64_t first = int64_t(__shfl_sync(~0u, slot, k)) * p.recent.capacity + lane;
    if (lane >= __shfl_sync(~0u, pending, k)) continue;
    const auto* token =
        static_cast<const data_t*>(p.recent.tokens) + first * (b_at + p.b_groups * kStateDim);
    prefetch_bulk(token + place.x * p.head_dim, p.head_dim * sizeof(data_t));
    prefetch_bulk(token + b_at + place.b * kStateDim, kStateDim * sizeof(data_t));
  }
}

// What the producer must know of a row before it can fetch it.
struct RowFacts {
  int row, slot = -1, pending = 0, length = 0;
  float log_decay = 0.f, scale = 0.f;

  __device__ RowFacts of_lane(int lane) const {
    const auto take = [&](auto v) { return __shfl_sync(~0u, v, lane); };
    return {take(row), take(slot), take(pending), take(length), take(log_decay), take(scale)};
  }
};

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__device__ void produce(const Mixer& mixer, StreamShared<data_t, kStateDim>& shared, char* stages,
                        const StageLayout& layout, const Listed* list, const HeadPlace& place) {
  constexpr int kChunk = 16 / sizeof(data_t), kStateChunks = kStateDim / kChunk;
  constexpr int kTurns = (kMaxHeadDim + 2 * kStateDim + 32 * kChunk - 1) / (32 * kChunk);
  const auto& p = mixer.p;
  const int head = place.head;
  const int lane = threadIdx.x % 32;
  const int x_chunks = p.head_dim / kChunk;
  const int row_size = p.x_heads * p.head_dim + p.b_groups * kStateDim;
  const int token_chunks = x_chunks + kStateChunks, input_chunks = token_chunks + kStateChunks;
  const int state_bytes = p.head_dim * kStateDim * sizeof(state_t);

  // Where this lane's chunks are, in a recent token and in the rings, is the same for all rows.
  const int token_place =
      lane < x_chunks ? place.x * p.head_dim + lane * kChunk
                      : p.x_heads * p.head_dim + place.b * kStateDim + (lane - x_chunks) * kChunk;
  int channels[kTurns];
#pragma unroll
  for (int t = 0; t < kTurns; ++t) channels[t] = mixer.channel(place, (lane + 32 * t) * kChunk);

  const auto look_at = [&](int row, int slot, int pending) {
    RowFacts facts{row, slot, pending};
    if (row < p.batch) {
      facts.length = mixer.length(row);
      facts.log_decay = mixer.log_decay(row, head);
      facts.scale = mixer.scale(row, head);
    }
    return facts;
  };
  const Draw draw(p, layout.stages);
  // Of the dealt row of each turn, a lane's, so that all of them are asked for at once.
  RowFacts dealt;
  {
    const int row = lane < layout.stages ? draw.row(lane) : p.batch;
    const int slot = row < p.batch ? p.slots[row] : -1;
    dealt = look_at(row, slot, slot >= 0 && p.recent.pending ? p.recent.pending[slot] : 0);
  }
  // One ticket is drawn ahead.
  const int drawn = p.batch - draw.dealt;
  const ConsumersSync sync{static_cast<int>(blockDim.x) - 32};
  const auto draw_next = [&] {
    return lane == 0 ? draw_ticket(&p.tickets[head], drawn, draw.walkers) : 0;
  };
  int ticket = 0;
  RowFacts next;
  Turn at;
  for (int turn = 0;; ++turn) {
    const int stage = at.stage;
    const RowFacts now = turn < layout.stages ? dealt.of_lane(turn) : next;
    if (turn >= layout.stages) wait_for(&shared.empty[stage], at.parity ^ 1);
    at.move_on(layout.stages);

    char* base = stages + stage * layout.bytes;
    auto& facts = shared.facts[stage];
    const int64_t slot = now.slot;
    data_t* newest = nullptr;
    if (slot >= 0) {
      if (lane == 0)
        copy_bulk_once(base,
                       static_cast<const state_t*>(p.state) +
                           (slot * p.heads + head) * int64_t(p.head_dim) * kStateDim,
                       state_bytes, &shared.full[stage]);
      auto* inputs = reinterpret_cast<data_t*>(base + layout.inputs);
#pragma unroll
      for (int t = 0; t < kTurns; ++t) {
        const int i = lane + 32 * t;
        const data_t* from = mixer.C(now.row, place) + (i - token_chunks) * kChunk;
        if (i < x_chunks)
          from = mixer.x(now.row, place) + i * kChunk;
        else if (i < token_chunks)
          from = mixer.B(now.row, place) + (i - x_chunks) * kChunk;
        if (i < input_chunks) copy_async_16(inputs + i * kChunk, from);
      }
      if constexpr (Mixer::kGates)
        if (lane < x_chunks)
          copy_async_16(inputs + (input_chunks + lane) * kChunk,
                        mixer.z(now.row, head) + lane * kChunk);
      if constexpr (Mixer::kConvolves) {
        auto* past = reinterpret_cast<data_t*>(base + layout.ring) + lane * kChunk;
        const data_t* ring = mixer.ring(slot);
        int entry = now.length % p.width;
        for (int w = 0; w < p.width - 1; ++w) {
#pragma unroll
          for (int t = 0; t < kTurns; ++t)
            if (lane + 32 * t < input_chunks)
              copy_async_16(past + (w * input_chunks + 32 * t) * kChunk,
                            ring + entry * mixer.channels() + channels[t]);
          entry = entry + 1 == p.width ? 0 : entry + 1;
        }
        newest = mixer.newest(slot, entry);
      }
      if (now.pending > 0) {
        const int64_t first = slot * p.recent.capacity;
        const data_t* token =
            static_cast<const data_t*>(p.recent.tokens) + first * row_size + token_place;
        auto* recent = reinterpret_cast<data_t*>(base + layout.recent) + lane * kChunk;
        if (lane < token_chunks)
          for (int j = 0; j < now.pending; ++j)
            copy_async_16(recent + j * token_chunks * kChunk, token + int64_t(j) * row_size);
        if (lane < now.pending) {
          const float* decays = p.recent.decays + (first + lane) * 2 * p.heads + head;
          copy_async_4(&facts.decays[lane], decays);
          copy_async_4(&facts.gains[lane], decays + p.heads);
        }
      }
    }
    if (lane == 0) {
      facts.row = now.row < p.batch ? now.row : -1;
      facts.slot = slot;
      facts.pending = now.pending;
      facts.newest = newest;
      facts.log_decay = now.log_decay;
      facts.scale = now.scale;
      arrive_expecting(&shared.full[stage], slot >= 0 ? state_bytes : 0);
    } else {
      arrive(&shared.full[stage]);
    }
    arrive_after_copies(&shared.full[stage]);
    if (now.row >= p.batch) return;
    if (turn + 1 < layout.stages) continue;
    if (drawn > 0 && turn + 1 == layout.stages) {
      ticket = draw_next();
      if (lists_rows(p, draw)) sync.wait_as_producer();
    }
    const int i = __shfl_sync(~0u, ticket, 0);
    if (i >= drawn) {
      next = look_at(p.batch, -1, 0);
      continue;
    }
    if (p.recent.pending) {
      const auto [slot, row, pending] = list[i];
      next = look_at(row, slot, pending);
    } else {
      const int row = draw.dealt + i;
      next = look_at(row, p.slots[row], 0);
    }
    ticket = draw_next();
  }
}

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__device__ void consume(const Mixer& mixer, StreamShared<data_t, kStateDim>& shared, char* stages,
                        const StageLayout& layout, Listed* list, const HeadPlace& place) {
  constexpr int kVec = 16 / sizeof(state_t);
  const auto& p = mixer.p;
  const int head = place.head;
  const int threads = blockDim.x - 32, thread = threadIdx.x, P = p.head_dim;
  const int count = P + 2 * kStateDim;
  const ConsumersSync sync{threads};
  const Draw draw(p, layout.stages);
  if (lists_rows(p, draw)) {
    list_rows(p, draw, shared, list, sync);
    sync.tell_producer();
  }
  const float skip = mixer.skip(head);
  const auto output_constants = mixer.output_constants(head, min(thread, P - 1));
  typename Mixer::Constants constants[kConstantTurns];
#pragma unroll
  for (int t = 0; t < kConstantTurns; ++t)
    if (thread + t * threads < count) constants[t] = mixer.constants(place, thread + t * threads);

  int live = 0;  // rows so far that are no padding
  for (Turn at;; at.move_on(layout.stages)) {
    const int stage = at.stage;
    wait_for(&shared.full[stage], at.parity);
    const auto& facts = shared.facts[stage];
    const int row = facts.row;
    if (row < 0) return;
    const int64_t slot = facts.slot;
    if (slot < 0) {
      if (thread < P) mixer.store(row, head, thread, 0.f);
      __syncwarp();
      if (thread % 32 == 0) arrive(&shared.empty[stage]);
      continue;
    }
    const char* base = stages + stage * layout.bytes;
    const auto* inputs = reinterpret_cast<const data_t*>(base + layout.inputs);
    const auto* past = reinterpret_cast<const data_t*>(base + layout.ring);
    const int parity = live++ % 2, pending = facts.pending;
    const HeadToken<data_t, kStateDim> token{shared.values[parity],
                                             reinterpret_cast<const data_t*>(base + layout.recent),
                                             shared.y[parity],
                                             shared.weight[parity],
                                             shared.coefficient[parity],
                                             &shared.kept[parity],
                                             P,
                                             pending,
                                             threads,
                                             facts.scale};
    auto* newest = static_cast<data_t*>(facts.newest);
    const auto put = [&](const typename Mixer::Constants& constants, int i) {
      token.value(i) = mixer.value(constants, inputs[i], mixer.past_of(past + i, count), newest);
    };
#pragma unroll
    for (int t = 0; t < kConstantTurns; ++t)
      if (const int i = thread + t * threads; i < count) put(constants[t], i);
    if constexpr (!Mixer::kConvolves)
      for (int i = thread + kConstantTurns * threads; i < count; i += threads) put({}, i);
    if (thread >= threads - 32) {
      const int j = min(thread % 32, kMaxRecent - 1);
      weigh(token, facts.decays[j], facts.gains[j], facts.log_decay);
    }
    sync();

    const auto* from = reinterpret_cast<const uint4*>(base);
    const bool writes = p.recent.pending == nullptr || pending + 1 >= p.recent.period;
    if (writes) {
      auto* to = static_cast<state_t*>(p.state) + (slot * p.heads + head) * int64_t(P) * kStateDim;
      const StateShare<state_t, kStateDim, false> share{thread, threads};
      write_state<state_t, false>(
          token, [&](int pass) { return from[share.place(pass)]; },
          [&](int pass, const Floats<kVec>& s) {
            store_state(to + share.place(pass) * kVec, narrow(s, state_t{}));
          });
    } else {
      const StateShare<state_t, kStateDim, kByFragments<state_t, data_t, kStateDim>> share{thread,
                                                                                           threads};
      read_state<state_t>(token, [&](int pass) { return from[share.place(pass)]; });
      find_coefficients(token);
      keep(token, p, slot, place, 0, facts.log_decay);
    }
    sync();

    const float y = finished(token, writes, skip);
    float z = 0.f;
    if constexpr (Mixer::kGates)
      if (thread < P) z = to_float(inputs[count + thread]);
    __syncwarp();
    if (thread % 32 == 0) arrive(&shared.empty[stage]);
    mixer.finish(shared.partial[parity], sync, output_constants, row, head, thread, thread < P, y,
                 z);
  }
}

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__global__ void __launch_bounds__(2 * kMaxHeadDim + 32, 2)
    state_stream_kernel(const Mixer mixer, const StageLayout layout) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<StreamShared<data_t, kStateDim>*>(memory);
  char* stages = memory + (sizeof(shared) + 127) / 128 * 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < layout.stages; ++stage) {
      init_barrier(&shared.full[stage], 64);  // every lane of the producer, twice
      init_barrier(&shared.empty[stage], blockDim.x / 32 - 1);
    }
    show_barriers();
  }
  const HeadPlace place = place_of(mixer.p, blockIdx.x % mixer.p.heads);
  const bool produces = threadIdx.x >= blockDim.x - 32;
  let_next_start();
  if (produces) prefetch_early<Mixer, data_t, state_t, kStateDim>(mixer, layout, place);
  wait_for_inputs();
  __syncthreads();
  auto* list = reinterpret_cast<Listed*>(stages + layout.stages * layout.bytes);
  if (produces)
    produce<Mixer, data_t, state_t, kStateDim>(mixer, shared, stages, layout, list, place);
  else
    consume<Mixer, data_t, state_t, kStateDim>(mixer, shared, stages, layout, list, place);
}

// False if the rows would not fill the blocks more than once or are too many for a list, if
// something is not where 16-byte copies want it, if a head is narrow beside its convolved B and C,
// or if states are rounded at random, whose Philox rounds cost this body its registers:
// state_step.cuh serves these.
template <typename Mixer, typename data_t, typename state_t, int kStateDim>
bool launch_state_stream(const Mixer& mixer, cudaStream_t stream) {
  const auto& p = mixer.p;
  const int threads = 2 * p.head_dim + 32;
  if (p.head_dim > kMaxHeadDim || p.head_dim % 16 != 0 || p.rng_key || !mixer.aligned())
    return false;
  StageLayout layout;
  const auto place = [](int& at, int bytes) {
    const int here = at;
    at += (bytes + 15) / 16 * 16;
    return here;
  };
  const int inputs = p.head_dim + 2 * kStateDim;
  if (Mixer::kConvolves && inputs > kConstantTurns * (threads - 32)) return false;
  int at = p.head_dim * kStateDim * sizeof(state_t);
  const bool bare = !Mixer::kConvolves && p.recent.pending == nullptr;
  if (at > (bare && sizeof(state_t) == 4 ? kMaxBareState : kMaxStreamedState)) return false;
  layout.recent = place(at, p.recent.capacity * (p.head_dim + kStateDim) * sizeof(data_t));
  layout.ring = place(at, Mixer::kConvolves ? Mixer::kMaxPast * inputs * sizeof(data_t) : 0);
  layout.inputs = place(at, (inputs + (Mixer::kGates ? p.head_dim : 0)) * sizeof(data_t));
  layout.bytes = (at + 127) / 128 * 128;
  layout.stages = p.head_dim * kStateDim * sizeof(state_t) > kFewStagesState ? 2 : kMaxStages;
  const bool lists = p.recent.pending != nullptr;
  if (lists && p.batch > min(1 << 16, kMaxEach * (threads - 32))) return false;
  const int bytes = (sizeof(StreamShared<data_t, kStateDim>) + 127) / 128 * 128 +
                    layout.stages * layout.bytes + (lists ? p.batch * sizeof(Listed) : 0);
  const auto kernel = state_stream_kernel<Mixer, data_t, state_t, kStateDim>;
  static const int limit = [] {
    int device, bytes;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
  }();
  if (bytes > limit) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  const int processors = count_processors();
  int per_processor = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, bytes);
  const int rows_at_once = processors * per_processor / p.heads;
  if (rows_at_once < 1 || p.batch < 2 * rows_at_once) return false;
  launch_overlapping(kernel, rows_at_once * p.heads, threads, bytes, stream, mixer, layout);
  return true;
}

// False for a state dimension that neither body takes.
template <typename Mixer, typename data_t, typename state_t>
bool launch_state(const Mixer& mixer, cudaStream_t stream) {
  const auto step = [&](auto state_dim) {
    launch_state_step<Mixer, data_t, state_t, decltype(state_dim)::value>(mixer, stream);
    return true;
  };
  const auto stream_or_step = [&](auto state_dim) {
    if constexpr (sizeof(data_t) == 2)
      if (launch_state_stream<Mixer, data_t, state_t, decltype(state_dim)::value>(mixer, stream))
        return true;
    return step(state_dim);
  };
  switch (mixer.p.state_dim) {
    case 16:
      return step(std::integral_constant<int, 16>{});
    case 32:
      return step(std::integral_constant<int, 32>{});
    case 64:
      return stream_or_step(std::integral_constant<int, 64>{});
    case 128:
      return stream_or_step(std::integral_constant<int, 128>{});
    default:
      return false;
  }
}

}  // namespace reasoners
