// The walk over a sequence's chunks that ssd_scan.cu describes, for inputs that are tensors and for
// inputs that a mixer makes of in_proj's rows on the way. A Source says which, and what a token's
// log_decay and scale are and what becomes of y.
//
// A mixer's chunk is convolved first: x, B and C out of what was copied, `raw`, into the tiles that
// the products read. Who does it is Tile::kProducers:
//
// Of a small tile, four warps that do nothing else, the producers, for four that multiply. A chunk
// is convolved while the one before it is multiplied, gated and written, and the one after it is on
// its way:
//
//   producers: copies of chunk k are here | free | convolve k | full | nobody reads raw: copy k + 1
//   others:    full | y, gated | state | free
//
// Chunk k is convolved into buffer k % 2, and the state before it put into copy k % 2. `full` of a
// buffer waits for the producers, and for the others among themselves: so that copy is whole, and
// nobody reads the one of chunk k - 1 once all have passed the next. `free` waits for all others to
// have read chunk k - 2, and for the producers among themselves: so what they copied is whole.
// Neither can be passed twice before the other: each has at most one round under way.
//
// Of a larger one, whose two buffers would leave one block on a multiprocessor at most, all warps,
// in two phases: in the first the block convolves, and leaves scalars and the state there; in the
// second it computes as for tensors, while the next chunk's inputs are on their way to where these
// were.
//
// z is copied by the warp that needs it and waits for nobody else.
#pragma once

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "conv_chunk.cuh"
#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "projected_chunks.cuh"
#include "roles.cuh"
#include "scan.cuh"
#include "ssd_chunk.cuh"
#include "ssd_deal.cuh"

namespace reasoners {
namespace {

// What a block keeps in shared memory, and how many blocks a multiprocessor shall have. Without
// Source::kConvolves the inputs are tensors: two chunks of them lie there, one in use and one on
// its way. With it the next chunk is on its way to `raw` and is convolved into the other buffer,
// or, without producers, into the place of this one; and a chunk of z is there, or on its way, for
// the warps that gate with it.
template <typename Source, int kP, int kN>
struct Tile {
  using data_t = typename Source::data_t;
  static constexpr int kParts = kP * kN <= 64 * 64 ? 1 : 2;
  static constexpr int kProducers = Source::kConvolves && kParts == 1 ? 4 : 0;  // warps
  static constexpr int kWalkers = 32 * kBlocks * kParts;                        // threads
  static constexpr int kThreads = kWalkers + 32 * kProducers;
  // The threads that make a chunk of what a mixer copied.
  static constexpr int kMakers = kProducers > 0 ? 32 * kProducers : kWalkers;
  static constexpr int kFirstMaker = kThreads - kMakers;
  // Registers of their threads, of 128 at two blocks a multiprocessor.
  static constexpr int kProducerRegisters = 88, kWalkerRegisters = 168;
  struct Inputs {
    Matrix<data_t, kChunk, kP> x;
    Matrix<data_t, kChunk, kN> b, c;
  };
  static constexpr int kPerSM = 233472;  // bytes of a multiprocessor, 1024 of them for each block
  static constexpr int kMost = kParts == 1 ? 3 : kP * kN <= 128 * 64 ? 2 : 1;  // blocks on it
  static constexpr int kStates =  // with two, one barrier a chunk is enough
      kProducers > 0 || (!Source::kConvolves &&
                         kMost * (2 * sizeof(Inputs) + 2 * sizeof(Matrix<data_t, kP, kN>) +
                                  2 * sizeof(Scalars) + 1024) <=
                             kPerSM)
          ? 2
          : 1;
  static constexpr int kBuffers = Source::kConvolves && kProducers == 0 ? 1 : 2;  // of chunks
  struct OfTensors {
    Inputs inputs[2];
    Matrix<data_t, kP, kN> states[kStates];
    Scalars scalars[2];
  };
  struct OfMixer {
    Inputs inputs[kBuffers];
    Matrix<data_t, kP, kN> states[kStates];
    Scalars scalars[kBuffers];
    RawChunk<data_t, kP + 2 * kN> raw;
    Swizzled<data_t, kP> z;
    float constants[kP];            // Source::constant of y's columns
    float squares[kParts][kChunk];  // of rows of y, where they are normalised
  };
  using Shared = std::conditional_t<Source::kConvolves, OfMixer, OfTensors>;
  static constexpr int kWanted =
      Source::kConvolves && kMost > 1 && kMost * (sizeof(Shared) + 1024) > kPerSM ? kMost - 1
                                                                                  : kMost;
  static_assert(kWanted * (sizeof(Shared) + 1024) <= kPerSM);
  static_assert(kProducers == 0 ||
                kWanted * (kMakers * kProducerRegisters + kWalkers * kWalkerRegisters) <= 65536);
  // Of a warp: y's tiles of 8 columns; a state's rows 16 (r + 4 m) and tiles of 8 columns.
  static constexpr int kYTiles = kP / 8 / kParts;
  static constexpr int kRowTiles = (kP / 16 + kBlocks - 1) / kBlocks;
  static constexpr int kColumnTiles = kN / 8 / kParts;
};

// Barriers of producers and walkers, the first two for each buffer.
constexpr int kFull = 1, kFree = 3, kProduced = 5;

// kAdds: leaves what each segment adds, and no y.
template <typename Source, int kP, int kN, bool kAdds>
__global__ void __launch_bounds__(Tile<Source, kP, kN>::kThreads, Tile<Source, kP, kN>::kWanted)
    ssd_walk_kernel(const typename Source::Params params, const Deal deal) {
  using T = Tile<Source, kP, kN>;
  using data_t = typename Source::data_t;
  const SsdScanParams& p = Source::scan(params);
  constexpr int kRowTiles = T::kRowTiles, kColumnTiles = T::kColumnTiles, kThreads = T::kThreads;
  using State = float[kRowTiles][kColumnTiles][4];
  extern __shared__ float4 shared_memory[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(shared_memory);
  let_next_start();
  wait_for_inputs();

  const int head = blockIdx.x % p.heads, unit = blockIdx.x / p.heads;
  const int blocks = max(deal.blocks, 1), index = unit / blocks;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const int batch = static_cast<int>(sequence.batch), begin = static_cast<int>(sequence.begin),
            length = static_cast<int>(sequence.end - sequence.begin);
  const int chunks = (length + kChunk - 1) / kChunk;
  const Segments segments(deal.most, length);
  const int first = unit % blocks * deal.each,
            last = deal.blocks > 0 ? min(first + deal.each, segments.count) : segments.count;
  const int x_offset = head / (p.heads / p.x_heads) * p.head_dim,
            b_offset = head / (p.heads / p.b_groups) * p.state_dim,
            c_offset = head / (p.heads / p.c_groups) * p.state_dim;
  constexpr bool kConvolves = Source::kConvolves, kProduces = T::kProducers > 0;
  const ProjectedChunks<T, typename Source::Params, kP, kN, kAdds ? kP + kN : kP + 2 * kN>
      projected{params, shared, {head, index, batch, begin, length, x_offset, b_offset, c_offset}};
  // By the block of the last chunk, or of none; the inputs are in the second-level cache then.
  const auto keep_last = [&] {
    if constexpr (kConvolves && !kAdds) projected.keep_last();
  };
  if (deal.blocks > 0 && first >= last) {
    if (first == 0 && static_cast<int>(threadIdx.x) >= T::kFirstMaker) keep_last();
    return;
  }
  const int first_chunk = segments.first_chunk(first),
            last_chunk = min(segments.first_chunk(last), chunks);
  const float skip = p.D ? p.D[head] : 0.f;

  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int r = warp % kBlocks, h = warp / kBlocks;
  const int first_token = r * kBlock, n_part = h * (kN / T::kParts), p_part = h * (kP / T::kParts);

  // ---- What the next chunk reads, on its way.
  const Source source(params, head);
  float next_decay[2],
      next_scale[2];  // of tokens 2 lane and 2 lane + 1, in the warp that sums them
  constexpr int kScalarWarp = T::kFirstMaker / 32;  // or 0, which has the fewest blocks of C B^T
  const auto copy_rows = [&](auto& to, const void* data, TokenStrides strides, int offset, int t,
                             int width) {
    constexpr int kVectors = sizeof(to.at[0]) / 16 - 1, kCopies = kChunk * kVectors / kThreads;
    const auto* from = static_cast<const data_t*>(data) + batch * strides.batch +
                       int64_t(begin + t) * strides.token + offset;
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int v = threadIdx.x + u * kThreads, i = v / kVectors, column = v % kVectors * 8;
      const bool there = t + i < length && column < width;
      copy_async_16_once(&to.at[i][column], there ? from + i * strides.token + column : from,
                         there);
    }
  };
  const auto read_scalars = [&](int t) {
    if (warp != kScalarWarp) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = t + 2 * lane + k;
      source.read(next_decay[k], next_scale[k], batch, begin + i, i < length);
    }
  };
  const auto request = [&](int chunk) {
    const int t = chunk * kChunk;
    auto& in = shared.inputs[chunk & 1];
    copy_rows(in.x, p.x, p.x_strides, x_offset, t, p.head_dim);
    copy_rows(in.b, p.B, p.b_strides, b_offset, t, p.state_dim);
    if (!kAdds) copy_rows(in.c, p.C, p.c_strides, c_offset, t, p.state_dim);
    commit_copies();
    read_scalars(t);
  };

  // Of a mixer. Without producers the groups of copies alternate, one of what is convolved, one of
  // z, and are there even where nothing is left to copy: so the one before the latest is what a
  // warp waits for.
  const auto request_raw = [&](int chunk) {
    if constexpr (kConvolves) {
      if (chunk < last_chunk) {
        projected.request(chunk * kChunk);
        read_scalars(chunk * kChunk);
      }
      commit_copies();
    }
  };
  const auto request_z = [&](int chunk) {
    if constexpr (kConvolves && !kAdds) {
      __syncwarp();  // nobody still reads the last one
      if (chunk < last_chunk)
        projected.template request_z<kP / T::kParts>(chunk * kChunk, first_token, p_part);
    }
    commit_copies();
  };
  const auto weigh = [&] {
    if constexpr (kConvolves)
#pragma unroll
      for (int k = 0; k < 2; ++k) source.weigh(next_decay[k], next_scale[k]);
  };

  // A barrier is named by a constant, so that no more of them are taken.
  const auto at_buffer = [](int chunk, auto&& use) {
    if (chunk & 1)
      use(std::integral_constant<int, 1>());
    else
      use(std::integral_constant<int, 0>());
  };
  // The buffer of a chunk, which nobody reads any more.
  const auto free_for = [&](int chunk) {
    if constexpr (kProduces)
      if (chunk < last_chunk) at_buffer(chunk, [](auto b) { arrive_at<kFree + b, T::kThreads>(); });
  };
  if constexpr (kProduces) {
    if (warp >= kScalarWarp) {  // a producer
      keep_registers<T::kProducerRegisters>();
      request_raw(first_chunk);
      projected.put_constants(source);
#pragma unroll 1
      for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
        wait_copies();
        if (warp == kScalarWarp) weigh();
        at_buffer(chunk, [](auto b) { wait_at<kFree + b, T::kThreads>(); });
        if (warp == kScalarWarp) put_scalars(shared.scalars[chunk & 1], next_decay, next_scale);
        projected.template convolve<Source::kSilu>(chunk * kChunk, shared.inputs[chunk & 1]);
        at_buffer(chunk, [](auto b) { arrive_at<kFull + b, T::kThreads>(); });
        wait_at<kProduced, T::kMakers>();
        request_raw(chunk + 1);
      }
      if (last == segments.count) keep_last();
      return;
    }
    take_registers<T::kWalkerRegisters>();
  }

  // ---- States in registers, shared and global memory.
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) visit(m, n, 16 * (r + kBlocks * m), n_part + 8 * n);
  };
  // visit(values, offset) of the neighbours that a thread has of a state tensor.
  const auto each_pair = [&](State& state, auto&& visit) {
    each([&](int m, int n, int first_row, int first_column) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first_row + g + half * 8, j = first_column + 2 * q;
        visit(&state[m][n][2 * half], i < p.head_dim && j < p.state_dim ? i * p.state_dim + j : -1);
      }
    });
  };
  const auto read_state = [&](const float* data, State& to) {
    each_pair(to, [&](float* values, int offset) {
      const bool in = data != nullptr && offset >= 0;
      const float2 pair = in ? *reinterpret_cast<const float2*>(data + offset) : float2{0.f, 0.f};
      values[0] = pair.x;
      values[1] = pair.y;
    });
  };
  const auto write_state = [&](State& from, float* data) {
    each_pair(from, [&](const float* values, int offset) {
      if (offset >= 0) *reinterpret_cast<float2*>(data + offset) = {values[0], values[1]};
    });
  };
  // The state from what was carried into the segment and what it added.
  State carried = {}, local = {};
  float since = 1.f;  // decay from the segment's start
  const auto whole_state = [&](int m, int n, int v) {
    return fmaf(since, carried[m][n][v], local[m][n][v]);
  };
  const auto begin_segment = [&] {
    since = 1.f;
    each([&](int m, int n, int, int) {
#pragma unroll
      for (int v = 0; v < 4; ++v) local[m][n][v] = 0.f;
    });
  };
  const auto put_state = [&](Matrix<data_t, kP, kN>& to) {
    each([&](int m, int n, int first_row, int first_column) {
      if (first_row >= kP) return;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to.put_pair(first_row + g + half * 8, first_column + 2 * q,
                    pack<data_t>(whole_state(m, n, 2 * half), whole_state(m, n, 2 * half + 1)));
    });
  };
  // local = whole local + (gain x)^T B, summed over the chunk's tokens.
  const auto advance = [&](const typename T::Inputs& in, const Scalars& scalars) {
    each([&](int m, int n, int, int) {
#pragma unroll
      for (int v = 0; v < 4; ++v) local[m][n][v] *= scalars.whole;
    });
    since *= scalars.whole;
    add_outer_products<data_t, kP>(local, in.x, scalars.gain, in.b, r, n_part);
  };

  // A mixer's y: with D x, gated and, if Source says so, normalised over its head.
  const auto finish = [&](float (&d)[T::kYTiles][4], const Matrix<data_t, kChunk, kP>& x) {
    if constexpr (kConvolves) {
      wait_for_copies<kProduces ? 0 : 1>();
      __syncwarp();  // z is here
      float squares[2] = {};
#pragma unroll
      for (int n = 0; n < T::kYTiles; n += 2) {
        uint32_t x_of[4], z_of[4];
        x.load_a(x_of, first_token, p_part + n * 8);
        shared.z.load_a(z_of, first_token, p_part + n * 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 constant =
              *reinterpret_cast<const float2*>(&shared.constants[p_part + (n + e) * 8 + 2 * q]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 u = unpack<data_t>(x_of[2 * e + half]),
                         z = unpack<data_t>(z_of[2 * e + half]);
            float* y = &d[n + e][2 * half];
            y[0] = Source::gate(fmaf(skip, u.x, y[0]), z.x, constant.x);
            y[1] = Source::gate(fmaf(skip, u.y, y[1]), z.y, constant.y);
            if (Source::kNormalises) squares[half] += y[0] * y[0] + y[1] * y[1];
          }
        }
      }
      if constexpr (Source::kNormalises) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int offset = 1; offset < 4; offset *= 2)
            squares[half] += __shfl_xor_sync(~0u, squares[half], offset);
        if constexpr (T::kParts > 1) {
          float (&sums)[T::kParts][kChunk] = shared.squares;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (q == 0) sums[h][first_token + g + half * 8] = squares[half];
          __syncthreads();
#pragma unroll
          for (int half = 0; half < 2; ++half)
            squares[half] =
                sums[0][first_token + g + half * 8] + sums[1][first_token + g + half * 8];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) squares[half] = source.norm(squares[half]);
#pragma unroll
        for (int n = 0; n < T::kYTiles; ++n) {
          const float2 weight =
              *reinterpret_cast<const float2*>(&shared.constants[p_part + n * 8 + 2 * q]);
#pragma unroll
          for (int v = 0; v < 4; ++v) d[n][v] *= squares[v / 2] * (v % 2 ? weight.y : weight.x);
        }
      }
    }
  };

  // y of a chunk: the state's part first, which is weighed, then the chunk's tokens.
  const auto draw_y = [&](const typename T::Inputs& in, const Matrix<data_t, kP, kN>& state,
                          const Scalars& scalars, int t) {
    float d[T::kYTiles][4] = {};
    uint32_t c_rows[kN / 16][4];
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      in.c.load_a(c_rows[k], first_token, k * 16);
#pragma unroll
      for (int n = 0; n < T::kYTiles; n += 2) {
        uint32_t b[4];
        state.load_b_transposed(b, k * 16, p_part + n * 8);
        multiply_add<data_t>(d[n], c_rows[k], b[0], b[1]);
        multiply_add<data_t>(d[n + 1], c_rows[k], b[2], b[3]);
      }
    }
    const int i0 = first_token + g;
    const float since_of[2] = {scalars.since[i0], scalars.since[i0 + 8]},
                c_of[2] = {scalars.c[i0], scalars.c[i0 + 8]};
#pragma unroll
    for (int n = 0; n < T::kYTiles; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) d[n][v] *= since_of[v / 2];
#pragma unroll 1
    for (int block = 0; block <= r; ++block) {
      float scores[2][4] = {};
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) {
        uint32_t b[4];
        in.b.load_b_transposed(b, k * 16, block * kBlock);
        multiply_add<data_t>(scores[0], c_rows[k], b[0], b[1]);
        multiply_add<data_t>(scores[1], c_rows[k], b[2], b[3]);
      }
      uint32_t a[4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int j0 = block * kBlock + tile * 8 + 2 * q;
        const float2 c_from = *reinterpret_cast<const float2*>(&scalars.c[j0]),
                     scale_of = *reinterpret_cast<const float2*>(&scalars.scale[j0]);
        float weights[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float passes = exp2_fast(c_of[v / 2] - (v % 2 ? c_from.y : c_from.x));
          const bool seen = j0 + v % 2 <= i0 + v / 2 * 8;
          weights[v] = seen ? scores[tile][v] * (passes * (v % 2 ? scale_of.y : scale_of.x)) : 0.f;
        }
        a[2 * tile] = pack<data_t>(weights[0], weights[1]);
        a[2 * tile + 1] = pack<data_t>(weights[2], weights[3]);
      }
      multiply_block<data_t>(d, a, in.x, block * kBlock, p_part);
    }
    finish(d, in.x);
    // Lanes trade halves of tiles so that each writes 8 bytes and four write a whole sector.
    auto* y = static_cast<data_t*>(p.y) +
              ((batch * p.length + begin + t) * p.heads + head) * int64_t(p.head_dim);
    const bool odd = q & 1;
#pragma unroll
    for (int n = 0; n < T::kYTiles; n += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i0 + half * 8;
        uint32_t mine[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (kConvolves) {
            mine[e] = pack<data_t>(d[n + e][2 * half], d[n + e][2 * half + 1]);
          } else {
            const float2 x = unpack<data_t>(in.x.pair(i, p_part + (n + e) * 8 + 2 * q));
            mine[e] = pack<data_t>(fmaf(skip, x.x, d[n + e][2 * half]),
                                   fmaf(skip, x.y, d[n + e][2 * half + 1]));
          }
        }
        const uint32_t theirs = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
        const int column = p_part + n * 8 + (odd ? 8 + 2 * (q - 1) : 2 * q);
        if (t + i < length && column < p.head_dim)
          *reinterpret_cast<uint2*>(y + int64_t(i) * p.heads * p.head_dim + column) =
              odd ? uint2{theirs, mine[1]} : uint2{mine[0], theirs};
      }
  };

  // ---- The walk.
  const Places places(p, sequence, index, segments, head);
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const int64_t home = (int64_t(index) * p.heads + head) * size;  // in a state tensor
  if (first_chunk < last_chunk) {
    if constexpr (kConvolves) {
      if (!kProduces) request_raw(first_chunk);
      request_z(first_chunk);
    } else {
      request(first_chunk);
    }
  }
  free_for(first_chunk);
  free_for(first_chunk + 1);
  const float* from = deal.blocks > 0   ? p.scratch + deal.states + places.of(first) * size
                      : p.initial_state ? p.initial_state + home
                                        : nullptr;
  read_state(kAdds ? nullptr : from, carried);
  begin_segment();
  if constexpr (kConvolves && !kProduces)
    projected.put_constants(source);
  else if (!kAdds)
    put_state(shared.states[0]);
  int left = segments.chunks;  // of the segment
#pragma unroll 1
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    Scalars& scalars = shared.scalars[chunk & (T::kBuffers - 1)];
    auto& in = shared.inputs[chunk & (T::kBuffers - 1)];
    const auto& state = shared.states[(chunk - first_chunk) % T::kStates];
    if constexpr (kProduces) {
      at_buffer(chunk, [](auto b) { wait_at<kFull + b, T::kThreads>(); });
    } else if constexpr (kConvolves) {
      // What the chunk before was computed from is free after the first barrier.
      wait_for_copies<1>();
      if (warp == kScalarWarp) weigh();
      __syncthreads();
      if (warp == kScalarWarp) put_scalars(scalars, next_decay, next_scale);
      if (!kAdds) put_state(shared.states[0]);
      projected.template convolve<Source::kSilu>(chunk * kChunk, in);
      __syncthreads();
      request_raw(chunk + 1);
    } else {
      if (warp == kScalarWarp) put_scalars(scalars, next_decay, next_scale);
      wait_copies();
      __syncthreads();
      if (chunk + 1 < last_chunk) request(chunk + 1);
    }
    if (!kAdds) draw_y(in, state, scalars, chunk * kChunk);
    if constexpr (kConvolves) request_z(chunk + 1);
    advance(in, scalars);
    free_for(chunk + 2);
    if (chunk + 1 == last_chunk || --left == 0) {
      left = segments.chunks;
      if (kAdds) {
        const int64_t place = places.of(segments.of(chunk));
        write_state(local, p.scratch + deal.states + place * size);
        if (threadIdx.x == 0) p.scratch[deal.decays + place] = since;
      }
      each([&](int m, int n, int, int) {
#pragma unroll
        for (int v = 0; v < 4; ++v) carried[m][n][v] = whole_state(m, n, v);
      });
      begin_segment();
    }
    if (kAdds || (kConvolves && !kProduces) || chunk + 1 == last_chunk) continue;
    if (T::kStates == 1) __syncthreads();
    put_state(shared.states[(chunk + 1 - first_chunk) % T::kStates]);
  }
  if (!kAdds && deal.blocks == 0) write_state(carried, p.final_state + home);
  if (!kProduces && last == segments.count) keep_last();
}

template <typename Source, int kP, int kN>
void launch_walk(const typename Source::Params& params, cudaStream_t stream) {
  using T = Tile<Source, kP, kN>;
  const SsdScanParams& p = Source::scan(params);
  constexpr int kBytes = sizeof(typename T::Shared);
  const auto scan = ssd_walk_kernel<Source, kP, kN, false>;
  cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const Deal deal = make_deal(p, T::kWanted);
  const auto walks = static_cast<unsigned>(p.sequences * p.heads);
  if (deal.blocks > 0) {
    const auto add = ssd_walk_kernel<Source, kP, kN, true>;
    cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    Deal single = deal;  // segments
    single.each = 1;
    single.blocks = static_cast<int>(count_segments(p, deal));
    launch_overlapping(add, walks * single.blocks, T::kThreads, kBytes, stream, params, single);
    launch_carry(p, deal, stream);
  }
  launch_overlapping(scan, walks * std::max(deal.blocks, 1), T::kThreads, kBytes, stream, params,
                     deal);
}

// use(P, N) of the tile of a shape, as constants.
template <typename Use>
auto with_tile(const SsdScanParams& p, const Use& use) {
  if (p.state_dim <= 64) {
    if (p.head_dim <= 64)
      return use(std::integral_constant<int, 64>(), std::integral_constant<int, 64>());
    if (p.head_dim <= 96)
      return use(std::integral_constant<int, 96>(), std::integral_constant<int, 64>());
    return use(std::integral_constant<int, 128>(), std::integral_constant<int, 64>());
  }
  if (p.head_dim <= 64)
    return use(std::integral_constant<int, 64>(), std::integral_constant<int, 128>());
  return use(std::integral_constant<int, 128>(), std::integral_constant<int, 128>());
}

// Floats of scratch memory that the walks of these inputs need.
template <template <typename> typename Source>
int64_t count_walk_scratch(const SsdScanParams& p) {
  return with_tile(p, [&](auto rows, auto columns) {
    return make_deal(p, Tile<Source<__half>, rows(), columns()>::kWanted).size;
  });
}

template <template <typename> typename Source, typename Params>
void launch_walks(const Params& params, cudaStream_t stream) {
  const SsdScanParams& p = Source<__half>::scan(params);
  with_tile(p, [&](auto rows, auto columns) {
    if (p.dtype == DType::kBFloat16)
      launch_walk<Source<__nv_bfloat16>, rows(), columns()>(params, stream);
    else
      launch_walk<Source<__half>, rows(), columns()>(params, stream);
  });
}

}  // namespace
}  // namespace reasoners
