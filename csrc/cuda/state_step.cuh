// One token of S = exp(log_decay) S + scale x B^T, y = S C + D x for one (row, head), in place on
// the row's slot: the body that state_update.cu, discrete_mamba2_update.cu and mamba2_update.cu
// share.
//
// The state is all that moves. Where it is depends on the row's slot, which is read while the
// kernel before still runs; whoever does not find it changed later has waited for memory once
// instead of twice. Everything else (the mixer's inputs and its convolution's ring, decays) is
// asked for at the same time. A block owns the whole (P, N) state of a head: with 2 P threads,
// kLanes neighbours on a row of P and kPasses rows a thread, the block's addresses are one linear
// stream. y is reduced over a row's lanes by shuffles in a fixed order and leaves through shared
// memory, so that gates and norms see whole heads. A `Mixer` says where x, B, C, decay and scale
// come from and what becomes of y.
//
// Deferred writes. A slot may hold `pending` recent tokens that its stored state S0 does not
// contain yet. With w_j = exp(sum of the decays after j) scale_j, all the tokens together are
//   S = w_0 S0 + sum_j w_j x_j B_j^T,   y = w_0 S0 C + sum_j w_j (B_j . C) x_j + D x.
// Every `period`-th token writes S (left form); the others only read S0 (right form) and store
// their x, B and decay. That moves 1 + 1 / period states per token instead of 2, plus the recent
// tokens: at N = 64 in 16 bits period / 2 tokens of 256 bytes beside a state of 8192, least at 8.
//
//   N      lanes, passes (fp32)    lanes, passes (16 bit)     threads: 2 P
//   16          4, 2                     2, 1                 state registers: kPasses * 4
//   32          8, 4                     4, 2
//   64         16, 8                     4, 4
//   128        32, 16                    4, 8
//
// From N = 64 on a state in 16 bits lies in the threads as the tensor cores want it (StateShare),
// and where x, B and C are of its type, S0 C and the B_j . C are their products: exact ones, as
// before, summed in fp32. A warp's S0 C at 64 x 64 takes 4 loads and 4 products instead of 140
// instructions. Elsewhere lanes exchange halves of what they sum, 8 shuffles for 8 rows instead of
// 32, so that loads do not wait for shuffles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include "philox.h"

namespace reasoners {

constexpr int kMaxHeadDim = 128;  // rows of P that a block covers
constexpr int kMaxRecent = 15;    // recent tokens a slot may hold

// 16 bytes of state, read once and written once: both bypass what the caches keep.
__device__ inline uint4 load_state(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}
__device__ inline void store_state(void* address, uint4 value) {
  __stcs(static_cast<uint4*>(address), value);
}

template <int kVec>
struct Floats {
  float at[kVec];
};

__device__ inline Floats<4> widen(uint4 raw, float) {
  return {{__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
           __uint_as_float(raw.w)}};
}
__device__ inline Floats<8> widen(uint4 raw, __nv_bfloat16) {
  Floats<8> v;
  const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<__nv_bfloat16>(words[i]);
    v.at[2 * i] = pair.x;
    v.at[2 * i + 1] = pair.y;
  }
  return v;
}
__device__ inline Floats<8> widen(uint4 raw, __half) {
  Floats<8> v;
  const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.at[2 * i] = __half2float(__ushort_as_half(words[i] & 0xffff));
    v.at[2 * i + 1] = __half2float(__ushort_as_half(words[i] >> 16));
  }
  return v;
}

__device__ inline uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ inline uint32_t bits_of(__half v) { return __half_as_ushort(v); }

// To the nearest value of the state's type.
__device__ inline uint4 narrow(const Floats<4>& v, float) {
  return {__float_as_uint(v.at[0]), __float_as_uint(v.at[1]), __float_as_uint(v.at[2]),
          __float_as_uint(v.at[3])};
}
template <typename state_t>
__device__ inline uint4 narrow(const Floats<8>& v, state_t) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = bits_of(from_float<state_t>(v.at[2 * i])) |
               bits_of(from_float<state_t>(v.at[2 * i + 1])) << 16;
  return {words[0], words[1], words[2], words[3]};
}

// To one of the two neighbours, so that the mean over `noise` (16 bits) is the value itself.
__device__ inline uint32_t round_stochastically(float v, uint32_t noise, __nv_bfloat16) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits_of(__float2bfloat16_rn(v));
  return (bits + noise) >> 16;
}
__device__ inline uint32_t round_stochastically(float v, uint32_t noise, __half) {
  const uint32_t low = bits_of(__float2half_rz(v));
  const float lo = __half2float(__ushort_as_half(low));
  const float hi = __half2float(__ushort_as_half(low + 1));
  return low + (noise * 0x1p-16f < (v - lo) / (hi - lo));  // a NaN or infinite quotient: low
}
// `index`: of the first of the 8 entries in its slot; one block of random bits serves them.
template <typename state_t>
__device__ inline uint4 narrow(const Floats<8>& v, const NoiseStream& noise, uint32_t index,
                               state_t type) {
  const PhiloxBlock random = noise.block(0x80000000u | index / 8);
  const uint32_t words[] = {random.a, random.b, random.c, random.d};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = round_stochastically(v.at[2 * i], words[i] & 0xffff, type) |
             round_stochastically(v.at[2 * i + 1], words[i] >> 16, type) << 16;
  return {out[0], out[1], out[2], out[3]};
}
__device__ inline uint4 narrow(const Floats<4>& v, const NoiseStream&, uint32_t, float type) {
  return narrow(v, type);  // checks.h refuses random rounding of a state that is not rounded
}

// Which of the x heads, B and C groups a head reads, and whether it is the first of those that do.
struct HeadPlace {
  int head, x, b, c;
  bool owns_x, owns_b, owns_c;
};
template <typename Params>
__device__ inline HeadPlace place_of(const Params& p, int head) {
  const int x_share = p.heads / p.x_heads, b_share = p.heads / p.b_groups,
            c_share = p.heads / p.c_groups;
  const int x = head / x_share, b = head / b_share, c = head / c_share;
  return {head, x, b, c, x * x_share == head, b * b_share == head, c * c_share == head};
}

// One head's token, in shared memory, and the threads that work on it: 2 P of them for P rows.
template <typename data_t, int kStateDim>
struct HeadToken {
  data_t* values;        // x (kMaxHeadDim), B (N), C (N)
  const data_t* recent;  // (pending, P + N): the recent tokens' x and B
  float* y;              // (P)
  float* weight;         // (pending + 1): w_j of the recent tokens, then of this one
  float* coefficient;    // (pending + 1): w_j (B_j . C)
  float* kept;           // (1): w_0
  int rows, pending, threads;
  float scale;

  static constexpr int kCount = kMaxHeadDim + 2 * kStateDim;
  // The i-th of the rows' x, B and C.
  __device__ data_t& value(int i) const { return values[i < rows ? i : i - rows + kMaxHeadDim]; }
  __device__ const data_t* x() const { return values; }
  __device__ const data_t* b() const { return values + kMaxHeadDim; }
  __device__ const data_t* c() const { return values + kMaxHeadDim + kStateDim; }
  __device__ const data_t* recent_x(int j) const { return recent + j * (rows + kStateDim); }
  __device__ const data_t* recent_b(int j) const { return recent_x(j) + rows; }
  // Of the token at hand, too.
  __device__ const data_t* token_b(int j) const { return j < pending ? recent_b(j) : b(); }
};

// Which 16 bytes of a head's (P, N) state a thread has in each of kPasses: kColumns of each of
// kRows rows. Either a row lies in neighbours, and the block's addresses are one stream; or, by
// fragments, warp w has the rows 16 w + g and 16 w + g + 8 in the lanes 4 g + t, as of the A of
// mma.cuh: k can be in any order there, as long as B's is the same, so that the neighbours 2 t and
// 2 t + 8 of two products are the 8 of 16 bytes. Odd rows take the columns in another order, for
// the banks.
template <typename state_t, int kStateDim, bool kFragments>
struct StateShare {
  static constexpr int kVec = 16 / sizeof(state_t), kPasses = kStateDim / (2 * kVec);
  static constexpr int kLanes = kFragments ? 4 : kStateDim / kVec;  // that have a row together
  static constexpr int kColumns = kFragments ? kStateDim / (kLanes * kVec) : 1;
  static constexpr int kRows = kPasses / kColumns;
  int thread, threads;

  __device__ static constexpr int pass(int row, int column) { return column * kRows + row; }
  __device__ int row(int i) const {
    return kFragments ? thread / 32 * 16 + thread % 32 / 4 + 8 * i
                      : thread / kLanes + i * (threads / kLanes);
  }
  __device__ int column(int i) const {
    return (kFragments ? thread % 4 + 4 * (i ^ (thread / 4 & 1)) : thread % kLanes) * kVec;
  }
  // The 16 bytes' place among those of the state.
  __device__ int place(int pass) const {
    if constexpr (!kFragments) return thread + pass * threads;
    return (row(pass % kRows) * kStateDim + column(pass / kRows)) / kVec;
  }
};
template <typename state_t, typename data_t, int kStateDim>
constexpr bool kByFragments =
    sizeof(state_t) == 2 && std::is_same_v<state_t, data_t> && kStateDim >= 64;

// Rows of 16-bit values times a vector, as StateShare deals them: 16 bytes of a lane's row are an A
// of mma.cuh, of which the second word, and the fourth, pass for another row's. So a product's
// columns 0 and 1 are for the words of even rows, whose sums meet in lane 4 g, and columns 2 and 3,
// whose B takes the vector in the order of odd rows, for those, in lane 4 g + 1.
template <typename data_t, int kStateDim>
struct RowProducts {
  using Share = StateShare<data_t, kStateDim, true>;
  uint32_t vector[Share::kColumns][2];

  __device__ RowProducts(const data_t* of) {
    const int lane = threadIdx.x % 32;
    const Share like{lane / 8 % 2 * 4 + lane % 4, 32};  // a lane of a row as odd as the column's
#pragma unroll
    for (int column = 0; column < Share::kColumns; ++column) {
      const auto* words =
          reinterpret_cast<const uint32_t*>(of + like.column(column)) + lane / 4 % 2;
      vector[column][0] = words[0], vector[column][1] = words[2];
    }
  }
  // Adds 16 bytes of the lane's row.
  __device__ void add(float (&sums)[4], uint4 values, int column) const {
    multiply_add<data_t>(sums, {values.x, values.y, values.z, values.w}, vector[column][0],
                         vector[column][1]);
  }
  // Whether this lane has the row's product then, and that.
  __device__ static bool has_product() { return threadIdx.x % 4 == threadIdx.x / 4 % 2; }
  __device__ static float product(const float (&sums)[4]) { return sums[0] + sums[3]; }
};

// The weights, by a warp. Lane j has the decay and the scale of recent token j; the decay from it
// to now is the sum of the decays after it.
template <typename Token>
__device__ inline void weigh(const Token& token, float decay, float scale, float log_decay) {
  const int lane = threadIdx.x % 32;
  if (token.pending == 0) {
    if (lane == 0) *token.kept = expf(log_decay), *token.weight = token.scale;
    return;
  }
  float total = lane < token.pending ? decay : lane == token.pending ? log_decay : 0.f;
#pragma unroll
  for (int offset = 1; offset <= kMaxRecent; offset *= 2) {
    const float next = __shfl_down_sync(~0u, total, offset);
    if (lane + offset < 32) total += next;
  }
  const float after = __shfl_down_sync(~0u, total, 1);
  if (lane < token.pending) token.weight[lane] = expf(after) * scale;
  if (lane == token.pending) token.weight[lane] = token.scale;
  if (lane == 0) *token.kept = expf(total);
}

// The sums of kRows rows over the kLanes that have a row together, the farthest lanes first. Lanes
// halve the rows between them as long as there are several, so that one is left: `row`, in each of
// kLanes / kRows neighbours.
template <int kLanes, int kRows, int kSize>
__device__ inline float sum_rows(float (&sums)[kSize], int& row) {
  constexpr int kHalf = kLanes / 2;
  if constexpr (kRows > 1) {
    const bool upper = (threadIdx.x & kHalf) != 0;
    row += upper ? kRows / 2 : 0;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const float mine = upper ? sums[i + kRows / 2] : sums[i];
      const float other = upper ? sums[i] : sums[i + kRows / 2];
      sums[i] = mine + __shfl_xor_sync(~0u, other, kHalf);
    }
    return sum_rows<kHalf, kRows / 2>(sums, row);
  } else if constexpr (kLanes > 1) {
    sums[0] += __shfl_xor_sync(~0u, sums[0], kHalf);
    return sum_rows<kHalf, 1>(sums, row);
  } else {
    return sums[0];
  }
}

// S from S0 = load(pass) and all tokens, to store(pass, S); y = S C, in one order of sums for
// either share. A recent token's B is read once for kTogether rows.
template <typename state_t, bool kFragments, typename data_t, int kStateDim, typename Load,
          typename Store>
__device__ inline void write_state(const HeadToken<data_t, kStateDim>& token, const Load& load,
                                   const Store& store) {
  using Share = StateShare<state_t, kStateDim, kFragments>;
  constexpr int kVec = Share::kVec, kRows = Share::kRows, kColumns = Share::kColumns;
  constexpr int kTogether = std::min(kRows, kVec * kStateDim > 512 ? 2 : 4);  // as registers hold
  using Row = Vec<data_t, kVec>;
  const Share share{static_cast<int>(threadIdx.x), token.threads};
  const float kept = *token.kept;
  struct Factors {
    float b[kVec], c[kVec];
  };
  const auto factors_of = [&](int column) {
    const auto token_b = *reinterpret_cast<const Row*>(token.b() + share.column(column));
    const auto token_c = *reinterpret_cast<const Row*>(token.c() + share.column(column));
    Factors factors;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      factors.b[k] = token.scale * to_float(token_b.at[k]);
      factors.c[k] = to_float(token_c.at[k]);
    }
    return factors;
  };
  const Factors first_factors = factors_of(0);
#pragma unroll
  for (int first = 0; first < kRows; first += kTogether) {
    float sums[kColumns][kTogether] = {};
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const Factors factors = column == 0 ? first_factors : factors_of(column);
      Floats<kVec> s[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        s[u] = widen(load(Share::pass(first + u, column)), state_t{});
        const float x = to_float(token.x()[share.row(first + u)]);
#pragma unroll
        for (int k = 0; k < kVec; ++k) s[u].at[k] = kept * s[u].at[k] + x * factors.b[k];
      }
#pragma unroll 2
      for (int j = 0; j < token.pending; ++j) {
        const auto old = *reinterpret_cast<const Row*>(token.recent_b(j) + share.column(column));
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          const float gain = token.weight[j] * to_float(token.recent_x(j)[share.row(first + u)]);
#pragma unroll
          for (int k = 0; k < kVec; ++k) s[u].at[k] += gain * to_float(old.at[k]);
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) sums[column][u] += s[u].at[k] * factors.c[k];
        store(Share::pass(first + u, column), s[u]);
      }
    }
    // As among neighbours, of which the farthest add first.
#pragma unroll
    for (int half = kColumns / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i)
#pragma unroll
        for (int u = 0; u < kTogether; ++u) sums[i][u] += sums[i + half][u];
    int row = 0;
    const float sum = sum_rows<Share::kLanes, kTogether>(sums[0], row);
    if (threadIdx.x % (Share::kLanes / kTogether) == 0) token.y[share.row(first + row)] = sum;
  }
}

// y = w_0 S0 C.
template <typename state_t, typename data_t, int kStateDim, typename Load>
__device__ inline void read_state(const HeadToken<data_t, kStateDim>& token, const Load& load) {
  constexpr bool kFragments = kByFragments<state_t, data_t, kStateDim>;
  using Share = StateShare<state_t, kStateDim, kFragments>;
  constexpr int kVec = Share::kVec;
  const Share share{static_cast<int>(threadIdx.x), token.threads};
  const float kept = *token.kept;
  if constexpr (kFragments) {
    const RowProducts<data_t, kStateDim> with_c(token.c());
    float sums[Share::kRows][4] = {};
#pragma unroll
    for (int column = 0; column < Share::kColumns; ++column)
#pragma unroll
      for (int row = 0; row < Share::kRows; ++row)
        with_c.add(sums[row], load(Share::pass(row, column)), column);
    if (with_c.has_product())
#pragma unroll
      for (int row = 0; row < Share::kRows; ++row)
        token.y[share.row(row)] = kept * with_c.product(sums[row]);
  } else {
    const auto c = *reinterpret_cast<const Vec<data_t, kVec>*>(token.c() + share.column(0));
    float sums[Share::kRows] = {};
#pragma unroll
    for (int row = 0; row < Share::kRows; ++row) {
      const auto s = widen(load(row), state_t{});
#pragma unroll
      for (int k = 0; k < kVec; ++k) sums[row] += s.at[k] * to_float(c.at[k]);
    }
    int row = 0;
    const float sum = sum_rows<Share::kLanes, Share::kRows>(sums, row);
    if (threadIdx.x % (Share::kLanes / Share::kRows) == 0) token.y[share.row(row)] = kept * sum;
  }
}

// The coefficients of the tokens, this one included: by one warp, the tokens as rows of a product,
// or a warp a token.
template <int kStateDim, typename data_t>
__device__ inline void find_coefficients(const HeadToken<data_t, kStateDim>& token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = token.threads / 32;
  if constexpr (sizeof(data_t) == 2 && kStateDim >= 64) {
    if (warp != warps - 1) return;
    const RowProducts<data_t, kStateDim> with_c(token.c());
    const StateShare<data_t, kStateDim, true> share{lane, 32};
#pragma unroll 1
    for (int first = 0; first <= token.pending; first += 8) {
      const int j = first + share.row(0);  // past the last token it is repeated
      const data_t* b = token.token_b(j);
      float sums[4] = {};
#pragma unroll
      for (int column = 0; column < share.kColumns; ++column)
        with_c.add(sums, *reinterpret_cast<const uint4*>(b + share.column(column)), column);
      if (with_c.has_product() && j <= token.pending)
        token.coefficient[j] = token.weight[j] * with_c.product(sums);
    }
  } else {
    for (int j = warp; j <= token.pending; j += warps) {
      float dot = 0.f;
      for (int n = lane; n < kStateDim; n += 32)
        dot += to_float(token.token_b(j)[n]) * to_float(token.c()[n]);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
      if (lane == 0) token.coefficient[j] = token.weight[j] * dot;
    }
  }
}

// Keep a token for the step that writes, by one warp; of the heads that share x or B, one does.
template <typename data_t, int kStateDim, typename Params>
__device__ inline void keep(const HeadToken<data_t, kStateDim>& token, const Params& p,
                            int64_t slot, const HeadPlace& place, int first, float log_decay) {
  if (threadIdx.x >= 32) return;
  constexpr int kChunk = 16 / sizeof(data_t);
  const int64_t at = slot * p.recent.capacity + token.pending;
  const int b_at = p.x_heads * p.head_dim, x_chunks = token.rows / kChunk;
  auto* entry = static_cast<data_t*>(p.recent.tokens) + at * (b_at + p.b_groups * kStateDim);
  for (int i = threadIdx.x; i < x_chunks + kStateDim / kChunk; i += 32) {
    const bool of_x = i < x_chunks;
    const int here = (of_x ? i : i - x_chunks) * kChunk;
    const data_t* from = of_x ? token.x() : token.b();
    data_t* to = entry + (of_x ? place.x * p.head_dim + first : b_at + place.b * kStateDim);
    if (of_x ? place.owns_x : place.owns_b && first == 0)
      *reinterpret_cast<uint4*>(to + here) = *reinterpret_cast<const uint4*>(from + here);
  }
  if (first == 0 && threadIdx.x == 0) {
    float* decays = p.recent.decays + at * 2 * p.heads + place.head;
    decays[0] = log_decay, decays[p.heads] = token.scale;
  }
}

// y of this thread's row, with D and what read_state left out.
template <typename Token>
__device__ inline float finished(const Token& token, bool writes, float skip) {
  const int row = threadIdx.x;
  if (row >= token.rows) return 0.f;
  const float x = to_float(token.x()[row]);
  float y = token.y[row] + skip * x;
  if (!writes) {
    for (int j = 0; j < token.pending; ++j)
      y += token.coefficient[j] * to_float(token.recent_x(j)[row]);
    y += token.coefficient[token.pending] * x;
  }
  return y;
}

// A row's slot before wait_for_inputs, when it may still change; negative: none that there is. The
// first-level cache, which would keep it, is passed by.
template <typename Params>
__device__ inline int guess_slot(const Params& p, int64_t row) {
  const int slot = __ldcg(&p.slots[row]);
  return slot < p.num_slots ? slot : -1;
}

// The next of `drawn` rows that `walkers` blocks draw, from 0 on. Each block draws one too many,
// and the last number drawn leaves 0 for the next launch.
__device__ inline int draw_ticket(uint32_t* tickets, int drawn, int walkers) {
  return static_cast<int>(atomicInc(tickets, drawn + walkers - 1));
}

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
__global__ void __launch_bounds__(2 * kMaxHeadDim, 2) state_step_kernel(const Mixer mixer) {
  constexpr bool kFragments = kByFragments<state_t, data_t, kStateDim>;
  using Share = StateShare<state_t, kStateDim, kFragments>;
  constexpr int kVec = Share::kVec, kPasses = Share::kPasses;
  constexpr int kChunk = 16 / sizeof(data_t);
  __shared__ float outputs[kMaxHeadDim], partial[8], kept;
  __shared__ alignas(32) data_t values[HeadToken<data_t, kStateDim>::kCount];
  __shared__ float weight[kMaxRecent + 1], coefficient[kMaxRecent + 1];
  __shared__ alignas(16) data_t recent[kMaxRecent * (kMaxHeadDim + kStateDim)];
  const auto& p = mixer.p;
  const int unit = blockIdx.x / mixer.tiles(), tile = blockIdx.x % mixer.tiles();
  const int64_t row = unit / p.heads;
  const int head = unit % p.heads, thread = threadIdx.x, threads = blockDim.x;
  const HeadPlace place = place_of(p, head);
  const int first = tile * kMaxHeadDim, rows = min(p.head_dim - first, kMaxHeadDim);
  const int count = rows + 2 * kStateDim;

  // While the kernel before still runs: where the slot is, unless that kernel moves it, and what
  // depends on weights alone.
  let_next_start();
  int64_t slot = guess_slot(p, row);
  const auto state_of = [&](int64_t slot) {
    return static_cast<state_t*>(p.state) +
           ((slot * p.heads + head) * p.head_dim + first) * kStateDim;
  };
  if (slot >= 0 && thread == 0)
    prefetch_bulk(state_of(slot), rows * kStateDim * int(sizeof(state_t)));
  typename Mixer::Constants constants[2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
    constants[t] = mixer.constants(place, min(thread + t * threads, count - 1));
  const auto output_constants = mixer.output_constants(head, min(thread, rows - 1));
  const float skip = mixer.skip(head);
  wait_for_inputs();

  // All that is read of the row, and of the slot if it is where it was.
  const int64_t true_slot = __ldcg(&p.slots[row]);
  const int entry = mixer.entry(row);
  const float log_decay = mixer.log_decay(row, head), scale = mixer.scale(row, head);
  const auto input_of = [&](int i) {
    return i < rows               ? mixer.x(row, place)[first + i]
           : i < rows + kStateDim ? mixer.B(row, place)[i - rows]
                                  : mixer.C(row, place)[i - rows - kStateDim];
  };
  data_t inputs[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) inputs[t] = input_of(min(thread + t * threads, count - 1));
  float z = 0.f;
  if constexpr (Mixer::kGates)
    if (thread < rows) z = to_float(mixer.z(row, head)[thread]);
  uint4 raw[kPasses];
  typename Mixer::Ring rings[2];
  int pending = 0;
  const Share share{thread, threads};
  const auto inside = [&](int pass) { return share.row(pass % Share::kRows) < rows; };
#pragma unroll 1
  while (true) {
    if (slot >= 0) {
      const state_t* state = state_of(slot);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass)
        raw[pass] = inside(pass) ? load_state(state + share.place(pass) * kVec) : uint4{};
#pragma unroll
      for (int t = 0; t < 2; ++t)
        rings[t] = mixer.ring_inputs(slot, place, min(thread + t * threads, count - 1));
      if (p.recent.pending) pending = p.recent.pending[slot];
    }
    if (slot == true_slot) break;
    slot = true_slot;
  }
  if (slot < 0) {
    if (thread < rows) mixer.store(row, head, first + thread, 0.f);
    return;
  }
  state_t* state = state_of(slot);

  const bool writes = p.recent.pending == nullptr || pending + 1 >= p.recent.period;
  const int weigher = threads - 32;  // the first thread of the warp that weighs
  float old_decay = 0.f, old_scale = 0.f;
  if (pending > 0) {
    const int b_at = p.x_heads * p.head_dim, row_size = b_at + p.b_groups * kStateDim;
    const int x_at = place.x * p.head_dim + first;
    const int x_chunks = rows / kChunk, chunks = x_chunks + kStateDim / kChunk;
    const int64_t oldest = slot * p.recent.capacity;
    const auto* tokens = static_cast<const data_t*>(p.recent.tokens) + oldest * row_size;
    for (int i = thread; i < pending * chunks; i += threads) {
      const int j = i / chunks, chunk = i % chunks;
      const int at = chunk < x_chunks ? x_at + chunk * kChunk
                                      : b_at + place.b * kStateDim + (chunk - x_chunks) * kChunk;
      copy_async_16(recent + i * kChunk, tokens + int64_t(j) * row_size + at);
    }
    if (thread >= weigher && thread - weigher < pending) {
      const float* decays = p.recent.decays + (oldest + thread - weigher) * 2 * p.heads + head;
      old_decay = decays[0], old_scale = decays[p.heads];
    }
  }

  const HeadToken<data_t, kStateDim> token{values, recent, outputs, weight,  coefficient,
                                           &kept,  rows,   pending, threads, scale};
  const auto newest = mixer.newest(slot, entry);
#pragma unroll
  for (int t = 0; t < 2; ++t)
    if (const int i = thread + t * threads; i < count)
      token.value(i) = mixer.value(constants[t], inputs[t], mixer.past(rings[t], entry), newest);
  for (int i = thread + 2 * threads; i < count; i += threads)
    token.value(i) = mixer.value(mixer.constants(place, i), input_of(i),
                                 mixer.past(mixer.ring_inputs(slot, place, i), entry), newest);
  if (thread >= weigher) weigh(token, old_decay, old_scale, log_decay);
  wait_copies();
  __syncthreads();

  const auto load = [&](int pass) { return raw[pass]; };
  if (writes) {
    const uint32_t base = (head * p.head_dim + first) * kStateDim;
    write_state<state_t, kFragments>(token, load, [&](int pass, const Floats<kVec>& s) {
      if (!inside(pass)) return;
      const int at = share.place(pass) * kVec;
      store_state(state + at, p.rng_key == nullptr ? narrow(s, state_t{})
                                                   : narrow(s, NoiseStream(p.rng_key + row * 4),
                                                            base + at, state_t{}));
    });
  } else {
    read_state<state_t>(token, load);
    find_coefficients(token);
    keep(token, p, slot, place, first, log_decay);
  }
  __syncthreads();
  mixer.finish(
      partial, [] { __syncthreads(); }, output_constants, row, head, first + thread, thread < rows,
      finished(token, writes, skip), z);
}

template <typename Mixer, typename data_t, typename state_t, int kStateDim>
void launch_state_step(const Mixer& mixer, cudaStream_t stream) {
  const auto& p = mixer.p;
  const int threads = (2 * min(p.head_dim, kMaxHeadDim) + 31) / 32 * 32;
  const int64_t blocks = int64_t(p.batch) * p.heads * mixer.tiles();
  launch_overlapping(state_step_kernel<Mixer, data_t, state_t, kStateDim>, blocks, threads, 0,
                     stream, mixer);
}

}  // namespace reasoners
