// Causal attention of each row's last tokens over the row's pages.
//
// A block serves one (token, kv head) and up to 8 of the query heads that share it (4 outside of
// the tensor core path): they all use one read of K and V, and that read is the floor. The row, the
// query's position and the pages are found on the device. Positions are dealt out to walkers in
// turn; each keeps the maximum, the sum and the weighted values of its own positions (the online
// softmax of Dao 2023, FlashAttention-2), and at the end the walkers are merged through shared
// memory in a fixed order. Which walker sees a position depends on the position alone, so that the
// bits of a row depend neither on the batch nor on its pages' numbers. Positions past the query are
// not read: their scores are -inf and their values 0.
//
// tensor: bfloat16 and float16 with head_dim 64, 96 or 128. A walker is a warp, 16 positions a
//   step. K (16 x D) times the queries (D x 8) gives the scores, V^T (D x 16) times the weights
//   (16 x 8) the values, both with m16n8k16. K's fragments are 16-byte loads straight from the
//   cache, because the order of the channels in a dot product is free; V's are put together from
//   two positions by byte permutations, the weights' by an 8 x 8 transposition. Weights are split
//   in two numbers of the data type, so that nothing is lost against float32.
// plain: everything else. A walker is kLanes threads, that each hold kVec x kChunks channels.
//
// Prefill goes the same way, a query at a time: right, and as slow as that sounds.

#include <cmath>
#include <cstring>

#include "convert.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = ~0u;
constexpr float kMinusInfinity = -INFINITY;
constexpr float kLog2E = 1.44269504088896f;

// exp(score - max); a walker that has seen nothing yet has max = -inf and weighs 0.
__device__ inline float weight(float score, float max) {
  return exp2f((score - (max == kMinusInfinity ? 0.f : max)) * kLog2E);
}

// What a block works on.
struct Work {
  int token, kv_head, visible;  // the query sees positions below `visible`; padding: none
  int first_head, heads;        // of the query heads
  const int32_t* table;         // the row's pages
};

template <int kHeads>
__device__ inline Work find_work(const PagedAttentionParams& p) {
  const int group = p.heads / p.kv_heads;
  const int slices = (group + kHeads - 1) / kHeads;
  const int slice = blockIdx.x % slices;
  Work work;
  work.kv_head = blockIdx.x / slices % p.kv_heads;
  work.token = blockIdx.x / slices / p.kv_heads;
  work.first_head = work.kv_head * group + slice * kHeads;
  work.heads = min(kHeads, group - slice * kHeads);
  const RowPosition at = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, work.token);
  work.visible = at.position + 1;
  work.table = p.page_table + at.row * p.table_stride;
  return work;
}

// Where the vector of a position begins in the caches, in elements.
__device__ inline int64_t locate_vector(const PagedAttentionParams& p, const PageSize& pages,
                                        const Work& work, int position) {
  const int turn = pages.page(position);
  const int64_t page = work.table[turn];
  return ((page * p.kv_heads + work.kv_head) * p.page_size + (position - turn * p.page_size)) *
         p.head_dim;
}

// The walkers' results. Values are not yet divided by the sum.
template <int kWalkers, int kHeads, int kDim>
struct alignas(16) Partials {
  float max[kWalkers][kHeads], sum[kWalkers][kHeads];
  float values[kWalkers][kHeads][kDim];

  template <typename data_t>
  __device__ void merge(data_t* out, int heads, int head_dim) const {
    for (int i = threadIdx.x; i < heads * head_dim; i += kThreads) {
      const int head = i / head_dim, channel = i - head * head_dim;
      float top = kMinusInfinity;
#pragma unroll
      for (int w = 0; w < kWalkers; ++w) top = fmaxf(top, max[w][head]);
      float total = 0.f, value = 0.f;
#pragma unroll
      for (int w = 0; w < kWalkers; ++w) {
        const float fade = weight(max[w][head], top);
        total += fade * sum[w][head];
        value += fade * values[w][head][channel];
      }
      out[i] = from_float<data_t>(value / total);
    }
  }
};

template <typename data_t>
__device__ void write_zeros(data_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) out[i] = from_float<data_t>(0.f);
}

// ---- plain

// kWhole: head_dim is kLanes * kVec * kChunks; otherwise it is less.
template <typename data_t, int kLanes, int kVec, int kChunks, bool kWhole, int kHeads, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    plain_kernel(const PagedAttentionParams p, const PageSize pages) {
  static_assert(kWhole || kVec == 1);
  constexpr int kWalkers = kThreads / kLanes, kDim = kLanes * kVec * kChunks;
  using Chunk = Vec<data_t, kVec>;
  const Work work = find_work<kHeads>(p);
  const int head_dim = kWhole ? kDim : p.head_dim;
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * head_dim;
  if (work.visible <= 0) return write_zeros(out, work.heads * head_dim);
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
      const int64_t offset = valid[u] ? locate_vector(p, pages, work, position) : 0;
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
        score[u][h] = valid[u] ? dot * p.scale : kMinusInfinity;
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
  partials.merge(out, work.heads, head_dim);
}

// ---- tensor

template <typename data_t>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The 8 x 8 matrix of which lane (g, t) = (lane / 4, lane % 4) holds row g, columns 2t and 2t + 1.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// a in the low half, b in the high half, and what rounding takes from them.
template <typename data_t>
__device__ inline void split(float a, float b, uint32_t& coarse, uint32_t& fine) {
  const auto join = [](data_t low, data_t high) {
    Vec<data_t, 2> pair{{low, high}};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
  };
  const data_t low = from_float<data_t>(a), high = from_float<data_t>(b);
  coarse = join(low, high);
  fine = join(from_float<data_t>(a - to_float(low)), from_float<data_t>(b - to_float(high)));
}

// Lane (g, t) = (lane / 4, lane % 4) of a warp holds, of the 16 positions of a step:
//   K        positions g and g + 8, channels 32 c + 8 t + (0 to 7) of every chunk c of 32
//   scores   positions g and g + 8 of heads 2t and 2t + 1
//   V        positions 2t, 2t + 1, 2t + 8, 2t + 9, channels 8 kWide j + kWide g + (0 to kWide - 1)
//   values   those channels of heads 2t and 2t + 1
template <typename data_t, int kDim>
__global__ void __launch_bounds__(kThreads)
    tensor_kernel(const PagedAttentionParams p, const PageSize pages) {
  constexpr int kHeads = 8, kStep = 16;
  constexpr int kChunks = kDim / 32;             // 16-byte loads of a position of K
  constexpr int kWide = kDim % 64 == 0 ? 8 : 4;  // channels of one load of V
  constexpr int kLoads = kDim / (8 * kWide);     // loads of a position of V
  constexpr int kTiles = kWide / 2;              // pairs of channels in one of them
  using KChunk = Vec<uint32_t, 4>;
  using VChunk = Vec<uint32_t, kTiles>;

  const Work work = find_work<kHeads>(p);
  auto* out =
      static_cast<data_t*>(p.out) + (int64_t(work.token) * p.heads + work.first_head) * kDim;
  if (work.visible <= 0) return write_zeros(out, work.heads * kDim);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // Head g of the queries, in the same order of channels as K; heads past the group are 0.
  KChunk q[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    q[c] = KChunk{};
    if (g < work.heads)
      q[c] = *reinterpret_cast<const KChunk*>(static_cast<const data_t*>(p.q) +
                                              work.token * p.q_stride +
                                              (work.first_head + g) * kDim + c * 32 + t * 8);
  }

  float values[kLoads][kTiles][4] = {};
  float max[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0.f, 0.f};
  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  // Each lane looks up one position (two lanes the same), a step ahead of its use.
  const auto look_up = [&](int begin) {
    const int position = begin + lane % kStep;
    return position < work.visible ? locate_vector(p, pages, work, position) : int64_t(0);
  };
  int64_t own = look_up(warp * kStep);
  for (int begin = warp * kStep; begin < work.visible; begin += kWarps * kStep) {
    const int seen = work.visible - begin;  // of this step's positions
    KChunk k[2][kChunks];
    VChunk v[4][kLoads];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = g + 8 * r;
      const data_t* from = k_cache + __shfl_sync(kAll, own, i) + t * 8;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        k[r][c] = i < seen ? *reinterpret_cast<const KChunk*>(from + c * 32) : KChunk{};
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = 2 * t + r % 2 + r / 2 * 8;
      const data_t* from = v_cache + __shfl_sync(kAll, own, i) + g * kWide;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        v[r][j] = i < seen ? *reinterpret_cast<const VChunk*>(from + j * 8 * kWide) : VChunk{};
    }
    own = look_up(begin + kWarps * kStep);

    float score[4] = {};  // (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        multiply_add<data_t>(score,
                             {k[0][c].at[i], k[1][c].at[i], k[0][c].at[i + 1], k[1][c].at[i + 1]},
                             {q[c].at[i], q[c].at[i + 1]});
#pragma unroll
    for (int i = 0; i < 4; ++i)
      score[i] = g + i / 2 * 8 < seen ? score[i] * p.scale : kMinusInfinity;

    float fade[2], w[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(score[h], score[2 + h]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        top = fmaxf(top, __shfl_xor_sync(kAll, top, offset));
      top = fmaxf(top, max[h]);
      fade[h] = weight(max[h], top);
      max[h] = top;
      w[h] = weight(score[h], top);
      w[2 + h] = weight(score[2 + h], top);
      sum[h] = sum[h] * fade[h] + (w[h] + w[2 + h]);
    }
    uint32_t coarse[2], fine[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      split<data_t>(w[2 * r], w[2 * r + 1], coarse[r], fine[r]);
      coarse[r] = transpose(coarse[r]);
      fine[r] = transpose(fine[r]);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kTiles; ++e) {
        float (&c)[4] = values[j][e];
        c[0] *= fade[0], c[1] *= fade[1], c[2] *= fade[0], c[3] *= fade[1];
        // Row g of the tile is the even channel of the pair, row g + 8 the odd one.
        const uint32_t a[4] = {__byte_perm(v[0][j].at[e], v[1][j].at[e], 0x5410),
                               __byte_perm(v[0][j].at[e], v[1][j].at[e], 0x7632),
                               __byte_perm(v[2][j].at[e], v[3][j].at[e], 0x5410),
                               __byte_perm(v[2][j].at[e], v[3][j].at[e], 0x7632)};
        multiply_add<data_t>(c, a, coarse);
        multiply_add<data_t>(c, a, fine);
      }
  }

  __shared__ Partials<kWarps, kHeads, kDim> partials;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sum[h] += __shfl_xor_sync(kAll, sum[h], offset);
    const int head = 2 * t + h;
    if (g == 0) partials.max[warp][head] = max[h], partials.sum[warp][head] = sum[h];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int e = 0; e < kTiles; ++e)
        *reinterpret_cast<float2*>(
            &partials.values[warp][head][j * 8 * kWide + g * kWide + 2 * e]) =
            make_float2(values[j][e][h], values[j][e][2 + h]);
  }
  __syncthreads();
  partials.merge(out, work.heads, kDim);
}

// ---- launch

template <int kHeads>
int num_blocks(const PagedAttentionParams& p) {
  const int group = p.heads / p.kv_heads;
  return p.tokens * p.kv_heads * ((group + kHeads - 1) / kHeads);
}

template <typename data_t, int kLanes, int kVec, int kChunks, bool kWhole, int kHeads>
void launch_plain(const PagedAttentionParams& p, cudaStream_t stream) {
  plain_kernel<data_t, kLanes, kVec, kChunks, kWhole, kHeads, 2>
      <<<num_blocks<kHeads>(p), kThreads, 0, stream>>>(p, PageSize(p.page_size));
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

template <typename data_t, int kDim>
void launch_tensor(const PagedAttentionParams& p, cudaStream_t stream) {
  tensor_kernel<data_t, kDim><<<num_blocks<8>(p), kThreads, 0, stream>>>(p, PageSize(p.page_size));
}

template <typename data_t>
void dispatch(const PagedAttentionParams& p, cudaStream_t stream) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const auto all = address(p.q) | address(p.k_cache) | address(p.v_cache) |
                   uintptr_t(sizeof(data_t) * p.head_dim) | uintptr_t(sizeof(data_t) * p.q_stride);
  if (all % 16 == 0) {
    if constexpr (sizeof(data_t) == 2) {
      if (p.head_dim == 64) return launch_tensor<data_t, 64>(p, stream);
      if (p.head_dim == 96) return launch_tensor<data_t, 96>(p, stream);
      if (p.head_dim == 128) return launch_tensor<data_t, 128>(p, stream);
    } else {
      if (p.head_dim == 64) return dispatch_group<data_t, 8, 4, 2, true>(p, stream);
      if (p.head_dim == 96) return dispatch_group<data_t, 8, 4, 3, true>(p, stream);
      if (p.head_dim == 128) return dispatch_group<data_t, 16, 4, 2, true>(p, stream);
    }
  }
  dispatch_group<data_t, 32, 1, 8, false>(p, stream);
}

}  // namespace

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
