// The body of state_step.cuh for many rows: blocks that stay, and a producer that runs ahead of
// them.
//
// A block takes one head and as many rows in a row as make its share of the bytes: a state that is
// written moves twice those of one that is only read. Its last warp fetches: the (P, N) state by
// one bulk copy, the recent tokens, the convolution's ring and the projected inputs by 16-byte
// asynchronous copies, all of one row into one stage of shared memory, kStages rows ahead; an
// mbarrier a stage says when it is there, another when it may be filled again. The other 2 P
// threads compute as in state_step.cuh, a few values at a time, so that registers do not limit the
// blocks on a multiprocessor. What a head keeps for all rows (taps, biases) stays in registers.
//
// Why: one block a (row, head) reached 96 % of a copy's rate with 16 KB of state but 79 % with 8 KB
// and 40 to 64 % with deferred writes or a convolution in front (H100, batch 512), for it lives
// through slot -> state -> sums -> y alone and has loads in flight for a fraction of that time.
#pragma once

#include <type_traits>

#include "state_step.cuh"

namespace reasoners {

constexpr int kStages = 3;
// Bytes of a head's state above which blocks of one head do as well (H100, batch 512): 16 kB of
// fp32 bare, 188 us there and 196 here; 64 kB with a convolution or recent tokens beside it.
constexpr int kMaxBareState = 8 << 10;
constexpr int kMaxStreamedState = 32 << 10;
constexpr int kMaxStreamWarps = 2 * kMaxHeadDim / 32 + 1;

// Byte offsets within a stage, from shapes alone.
struct StageLayout {
  int recent, ring, inputs, bytes;
};

struct StageFacts {
  int slot, pending, entry;
  float log_decay, scale;
  float decays[kMaxRecent], gains[kMaxRecent];
};

template <int kStateDim>
struct StreamShared {
  uint64_t full[kStages], empty[kStages];
  StageFacts facts[kStages];
  // Of the row at hand and, since some threads may be done with it before others, the next.
  alignas(16) float values[2][kMaxHeadDim + 2 * kStateDim];  // x, B, C
  float y[2][kMaxHeadDim];
  float weight[2][kMaxRecent + 1], coefficient[2][kMaxRecent + 1], kept[2];
  float partial[2][8];
  int first, last;  // the block's rows
  int costs[kMaxStreamWarps];
};

// Of the threads that compute; the producer takes no part.
struct ConsumersSync {
  int threads;
  __device__ void operator()() const { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
};

// Deals the rows to the blocks of a head, one after the other, by what they cost. Rows that write
// are at any place, and a tenth of the time went by at the end, when few blocks were still at it
// (H100, 512 rows, an eighth of them written).
template <typename Params, typename Shared>
__device__ void deal_rows(const Params& p, Shared& shared) {
  const int walkers = gridDim.x / p.heads, walker = blockIdx.x / p.heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int each = (p.batch + blockDim.x - 1) / blockDim.x;
  if (p.recent.pending == nullptr || each > 32) {  // all cost the same, or are too many to look at
    shared.first = int64_t(p.batch) * walker / walkers;
    shared.last = int64_t(p.batch) * (walker + 1) / walkers;
    return;
  }
  if (thread == 0) shared.first = 0;  // of the first walker
  const int begin = min(thread * each, p.batch), count = min(each, p.batch - begin);
  uint32_t real = 0, writes = 0;
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    const int slot = p.slots[begin + k];
    if (slot < 0) continue;
    real |= 1u << k;
    if (p.recent.pending[slot] + 1 >= p.recent.period) writes |= 1u << k;
  }
  const auto cost = [&](int k) { return 1 + 15 * (real >> k & 1) + 16 * (writes >> k & 1); };
  int sum = count + 15 * __popc(real) + 16 * __popc(writes);
  const int own = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) shared.costs[warp] = sum;
  __syncthreads();
  int before = sum - own, total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    if (w < warp) before += shared.costs[w];
    total += shared.costs[w];
  }
  // A walker ends with the row that completes its share of the total.
  const auto complete = [&](int cost, int shares) {
    return int64_t(cost) * walkers >= int64_t(shares) * total;
  };
  for (int k = 0; k < count; ++k) {
    const int after = before + cost(k), row = begin + k;
    if (!complete(before, walker) && complete(after, walker)) shared.first = row + 1;
    if (!complete(before, walker + 1) && complete(after, walker + 1)) shared.last = row + 1;
    before = after;
  }
}

// What the producer must know of a row before it can fetch it, itself fetched a row earlier.
struct RowFacts {
  int slot = -1, pending = 0, length = 0;
  float log_decay = 0.f, scale = 0.f;
};

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__device__ void produce(const Mixer& mixer, StreamShared<kStateDim>& shared, char* stages,
                        const StageLayout& layout, const HeadPlace& place) {
  constexpr int kChunk = 16 / sizeof(data_t), kStateChunks = kStateDim / kChunk;
  constexpr int kTurns = (kMaxHeadDim + 2 * kStateDim + 32 * kChunk - 1) / (32 * kChunk);
  const auto& p = mixer.p;
  const int head = place.head;
  const int lane = threadIdx.x % 32, last = shared.last;
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

  const auto look_at = [&](int row, int slot) {
    RowFacts facts;
    facts.slot = slot;
    if (slot >= 0 && p.recent.pending) facts.pending = p.recent.pending[slot];
    if (row < last) {
      facts.length = mixer.length(row);
      facts.log_decay = mixer.log_decay(row, head);
      facts.scale = mixer.scale(row, head);
    }
    return facts;
  };
  const auto slot_of = [&](int row) { return row < last ? p.slots[row] : -1; };
  int row = shared.first;
  RowFacts next = look_at(row, slot_of(row));
  int slot_after = slot_of(row + 1);
  for (int turn = 0; row < last; ++row, ++turn) {
    const RowFacts now = next;
    next = look_at(row + 1, slot_after);
    slot_after = slot_of(row + 2);
    const int stage = turn % kStages;
    if (turn >= kStages) wait_for(&shared.empty[stage], (turn / kStages - 1) & 1);

    char* base = stages + stage * layout.bytes;
    auto& facts = shared.facts[stage];
    const int64_t slot = now.slot;
    int entry = 0;
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
        const data_t* from = mixer.C(row, place) + (i - token_chunks) * kChunk;
        if (i < x_chunks)
          from = mixer.x(row, place) + i * kChunk;
        else if (i < token_chunks)
          from = mixer.B(row, place) + (i - x_chunks) * kChunk;
        if (i < input_chunks) copy_async_16(inputs + i * kChunk, from);
      }
      if constexpr (Mixer::kGates)
        if (lane < x_chunks)
          copy_async_16(inputs + (input_chunks + lane) * kChunk,
                        mixer.z(row, head) + lane * kChunk);
      if constexpr (Mixer::kConvolves) {
        auto* past = reinterpret_cast<data_t*>(base + layout.ring) + lane * kChunk;
        const data_t* ring = mixer.ring(slot);
        entry = now.length % p.width;
        for (int w = 0; w < p.width - 1; ++w) {
#pragma unroll
          for (int t = 0; t < kTurns; ++t)
            if (lane + 32 * t < input_chunks)
              copy_async_16(past + (w * input_chunks + 32 * t) * kChunk,
                            ring + entry * mixer.channels() + channels[t]);
          entry = entry + 1 == p.width ? 0 : entry + 1;
        }
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
      facts.slot = slot;
      facts.pending = now.pending;
      facts.entry = entry;
      facts.log_decay = now.log_decay;
      facts.scale = now.scale;
      arrive_expecting(&shared.full[stage], slot >= 0 ? state_bytes : 0);
    } else {
      arrive(&shared.full[stage]);
    }
    arrive_after_copies(&shared.full[stage]);
  }
}

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__device__ void consume(const Mixer& mixer, StreamShared<kStateDim>& shared, char* stages,
                        const StageLayout& layout, const HeadPlace& place) {
  constexpr int kVec = 16 / sizeof(state_t), kTurns = 2;  // values that a thread makes of a token
  const auto& p = mixer.p;
  const int head = place.head;
  const int threads = blockDim.x - 32, thread = threadIdx.x, P = p.head_dim;
  const int count = P + 2 * kStateDim;
  const ConsumersSync sync{threads};
  const float skip = mixer.skip(head);
  const auto output_constants = mixer.output_constants(head, min(thread, P - 1));
  typename Mixer::Constants constants[kTurns];
#pragma unroll
  for (int t = 0; t < kTurns; ++t)
    if (thread + t * threads < count) constants[t] = mixer.constants(place, thread + t * threads);

  int live = 0;  // rows so far that are no padding
  for (int row = shared.first, last = shared.last, turn = 0; row < last; ++row, ++turn) {
    const int stage = turn % kStages;
    wait_for(&shared.full[stage], turn / kStages % 2);
    const auto& facts = shared.facts[stage];
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
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      const int i = thread + t * threads;
      if (i < count)
        token.values[i] =
            mixer.value(constants[t], inputs[i], mixer.past_of(past + i, count), facts.entry, slot);
    }
    if (thread < 32) {
      const int j = min(thread, kMaxRecent - 1);
      weigh(token, facts.decays[j], facts.gains[j], facts.log_decay);
    }
    sync();

    const auto* from = reinterpret_cast<const uint4*>(base) + thread;
    const auto load = [&](int pass) { return from[pass * threads]; };
    const bool writes = p.recent.pending == nullptr || pending + 1 >= p.recent.period;
    if (writes) {
      auto* to = static_cast<state_t*>(p.state) + (slot * p.heads + head) * int64_t(P) * kStateDim +
                 thread * kVec;
      write_state<state_t, kStateDim>(token, load, [&](int pass, const Floats<kVec>& s) {
        store_state(to + pass * threads * kVec, narrow(s, state_t{}));
      });
    } else {
      read_state<state_t, kStateDim>(token, load);
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
  auto& shared = *reinterpret_cast<StreamShared<kStateDim>*>(memory);
  char* stages = memory + (sizeof(shared) + 127) / 128 * 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&shared.full[stage], 64);  // every lane of the producer, twice
      init_barrier(&shared.empty[stage], blockDim.x / 32 - 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  let_next_start();
  wait_for_inputs();
  deal_rows(mixer.p, shared);
  __syncthreads();
  const HeadPlace place = place_of(mixer.p, blockIdx.x % mixer.p.heads);
  if (threadIdx.x >= blockDim.x - 32)
    produce<Mixer, data_t, state_t, kStateDim>(mixer, shared, stages, layout, place);
  else
    consume<Mixer, data_t, state_t, kStateDim>(mixer, shared, stages, layout, place);
}

// False if the rows would not fill the blocks more than once, if something is not where 16-byte
// copies want it, or if states are rounded at random, whose Philox rounds cost this body its
// registers: state_step.cuh serves these.
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
  int at = p.head_dim * kStateDim * sizeof(state_t);
  const bool bare = !Mixer::kConvolves && p.recent.pending == nullptr;
  if (at > (bare && sizeof(state_t) == 4 ? kMaxBareState : kMaxStreamedState)) return false;
  layout.recent = place(at, p.recent.capacity * (p.head_dim + kStateDim) * sizeof(data_t));
  layout.ring = place(at, Mixer::kConvolves ? Mixer::kMaxPast * inputs * sizeof(data_t) : 0);
  layout.inputs = place(at, (inputs + (Mixer::kGates ? p.head_dim : 0)) * sizeof(data_t));
  layout.bytes = (at + 127) / 128 * 128;
  const int bytes = (sizeof(StreamShared<kStateDim>) + 127) / 128 * 128 + kStages * layout.bytes;
  const auto kernel = state_stream_kernel<Mixer, data_t, state_t, kStateDim>;
  static const int limit = [] {
    int device, bytes;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
  }();
  if (bytes > limit) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  int device, processors, per_processor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
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
