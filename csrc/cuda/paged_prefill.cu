// Causal attention of many tokens a row over the row's pages, on tensor cores: the prefill of
// paged_attention, for bfloat16 and float16 with head_dim 64, 96 or 128.
//
// The online softmax of Dao 2023 (FlashAttention-2). A thread block takes a tile of 128 columns, of
// neighbouring queries and heads (prefill_deal.cuh). It walks the positions from 0 on in steps of
// 64; K and V of the next step are copied while this one is multiplied, and the pages of the step
// after it are looked up. A warp has 32 of the columns, two products high, as every fragment of K
// and V that it reads from shared memory then serves two: with one, reading takes longer than
// multiplying. Weights are rounded to the data type once, and added up before. Tiles are numbered
// from the last, as a row's last tile sees most positions.
//
// On Hopper paged_prefill_wgmma.cu takes its place.
//
// The bits of a query depend on its row's K and V up to it, and on nothing else: steps begin at
// multiples of 64 wherever its tile begins, columns do not see each other, and a step that a column
// does not see multiplies by 1 and adds zeros. They are not those of paged_attention.cu, which
// merges splits of 256 positions.
//
// H200, bfloat16, pages of 16, us, beside SDPA's flash kernel without pages:
//                            32 q, 8 kv heads of 64      24 q, 8 kv heads of 128
//   8 x 4096                   1893   1892                 2762   2560
//   1 x 8192                    906    995                 1338   1342
//   8 x 512 after 3,584         455    443                  786    595
// 280 to 310 TFLOP/s, 36 to 39 % of a matrix product's rate: what mma.sync and shared memory give
// four warps of 255 registers. Few new tokens over many cached ones leave the last tiles alone with
// long walks; a split over positions is what to try there.

#include "async_copy.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "matrix.cuh"
#include "prefill_deal.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kTiles = 2, kWarpColumns = 16 * kTiles;  // of 16 columns, of a warp
constexpr int kColumns = kWarps * kWarpColumns;
constexpr int kStep = 64;  // positions
constexpr int kStepTiles = kStep / 8;
constexpr int kStages = 2;
constexpr int kBlocks = 2;  // on a multiprocessor: 255 registers a thread

template <typename data_t, int kDim>
struct Stage {
  Matrix<data_t, kStep, kDim> k, v;
};
template <typename data_t, int kDim>
struct Shared {
  Matrix<data_t, kColumns, kDim> columns;  // the queries, and the results in the end
  Stage<data_t, kDim> stages[kStages];
};

template <typename data_t, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks)
    prefill_kernel(const PagedAttentionParams p, const PageSize pages, const PrefillDeal deal) {
  // A line is a vector of kDim; a warp copies kLines of them at once.
  constexpr int kChunks = kDim / 8, kLines = 32 / kChunks;
  constexpr int kWarpStep = kStep / kWarps;
  constexpr bool kHeld = kDim == 64;  // the queries, in registers
  using Chunk = Vec<uint32_t, 4>;
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared<data_t, kDim>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int line = lane / kChunks, channel = lane % kChunks * 8;
  const bool copies = line < kLines;
  let_next_start();
  wait_for_inputs();

  const PrefillTask task = find_task(p, deal, static_cast<int>(blockIdx.x));
  const PrefillTile& tile = task.tile;
  const int kv_head = task.kv_head, first_head = task.first_head, heads = task.heads;
  if (tile.queries <= 0) return;

  // Lane i knows column i of its warp.
  const int column = warp * kWarpColumns + lane;
  const int query = column / deal.heads, head = column % deal.heads;
  const bool is_there = query < tile.queries && head < heads;
  const int64_t token = tile.token + query;
  const int64_t place = is_there ? token * p.heads + first_head + head : -1;
  auto* out = static_cast<data_t*>(p.out);
  const auto each_line = [&](const auto& f) {  // f(column of the warp, where it is)
#pragma unroll
    for (int i = 0; i < kWarpColumns; i += kLines) {
      const int64_t at = __shfl_sync(kAll, place, i + line);
      if (copies && at >= 0) f(i + line, out + at * kDim + channel);
    }
  };
  const int end = tile.position + tile.queries;  // of the positions that the tile sees
  if (end <= 0) {
    each_line([](int, data_t* to) { *reinterpret_cast<Chunk*>(to) = Chunk{}; });
    if (p.lse != nullptr && is_there) p.lse[place] = kMinusInfinity;
    return;
  }

  const auto* q = static_cast<const data_t*>(p.q);
  const auto* k_cache = static_cast<const data_t*>(p.k_cache);
  const auto* v_cache = static_cast<const data_t*>(p.v_cache);
  const int64_t source = is_there ? token * p.q_stride + int64_t(first_head + head) * kDim : -1;
  auto& columns = shared.columns;
#pragma unroll
  for (int i = 0; i < kWarpColumns; i += kLines) {
    const int64_t at = __shfl_sync(kAll, source, i + line);
    if (copies)
      copy_async_16_once(&columns.at[warp * kWarpColumns + i + line][channel],
                         q + (at < 0 ? 0 : at) + channel, at >= 0);
  }
  commit_copies();

  // A warp copies 16 of a step's positions, and its lane i knows where position i % 16 is, counted
  // in vectors. Positions past the end are zeros: weights of 0 would make NaN of NaN.
  const auto look_up = [&](int step) {
    const int position = min(step * kStep + warp * kWarpStep + lane % kWarpStep, end - 1);
    const int turn = pages.page(position);
    const int page = __ldg(&p.page_table[tile.row * p.table_stride + turn]);
    return (page * p.kv_heads + kv_head) * p.page_size + (position - turn * p.page_size);
  };
  const auto request = [&](int step, int where) {
    auto& stage = shared.stages[step % kStages];
    const int left = end - step * kStep - warp * kWarpStep;
#pragma unroll
    for (int i = 0; i < kWarpStep; i += kLines) {
      const int64_t from = int64_t(__shfl_sync(kAll, where, i + line)) * kDim + channel;
      const int to = warp * kWarpStep + i + line;
      if (copies) {
        copy_async_16_once(&stage.k.at[to][channel], k_cache + from, i + line < left);
        copy_async_16_once(&stage.v.at[to][channel], v_cache + from, i + line < left);
      }
    }
    commit_copies();
  };
  request(0, look_up(0));
  int next = look_up(1);

  // What the warp's columns see: its first column less than all others.
  const int first_query = warp * kWarpColumns / deal.heads;
  const int last_query =
      min((warp * kWarpColumns + kWarpColumns - 1) / deal.heads, tile.queries - 1);
  const int first_end = tile.position + first_query + 1;
  const int warp_end = first_query <= last_query ? tile.position + last_query + 1 : 0;
  int seen[kTiles][2];  // of the columns g and g + 8 of each tile, positions
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      seen[m][r] =
          tile.position + 1 + __shfl_sync(kAll, min(query, tile.queries - 1), 16 * m + 8 * r + g);

  const float scale = positive_scale(p.scale);
  wait_for_copies<1>();
  if (p.scale < 0.f)
    for (int i = 0; i < kWarpColumns; i += kLines)
      if (copies) {
        auto& chunk =
            *reinterpret_cast<Chunk*>(&columns.at[warp * kWarpColumns + i + line][channel]);
#pragma unroll
        for (int j = 0; j < 4; ++j) chunk.at[j] ^= 0x80008000u;
      }
  __syncwarp();
  uint32_t held[kHeld ? kDim / 16 : 1][kTiles][4];
  const auto load_queries = [&](uint32_t (&a)[kTiles][4], int k) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) columns.load_a(a[m], warp * kWarpColumns + 16 * m, 16 * k);
  };
  if constexpr (kHeld)
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) load_queries(held[k], k);

  float values[kTiles][kDim / 8][4], max[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[m][n][i] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) max[m][r] = kMinusInfinity, sum[m][r] = 0.f;
  }

#pragma unroll 1
  for (int step = 0; step * kStep < end; ++step) {
    wait_copies();
    __syncthreads();  // all copies of this step are there, and nobody reads the one before it
    const int begin = step * kStep;
    if (begin + kStep < end) {
      request(step + 1, next);
      next = look_up(step + 2);
    }
    if (begin >= warp_end) continue;
    const auto& stage = shared.stages[step % kStages];

    float score[kTiles][kStepTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t loaded[kTiles][4];
      if constexpr (!kHeld) load_queries(loaded, k);
      const auto& a = kHeld ? held[kHeld ? k : 0] : loaded;
#pragma unroll
      for (int n = 0; n < kStepTiles; n += 2) {
        uint32_t b[4];
        stage.k.load_b_transposed(b, 16 * k, 8 * n);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<data_t>(score[m][n], a[m], b[0], b[1]);
          multiply_add<data_t>(score[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (begin + kStep > first_end) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kStepTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (begin + 8 * n + 2 * t + i % 2 >= seen[m][i / 2]) score[m][n][i] = kMinusInfinity;
    }

    // The maximum is subtracted scaled, so that one rounding of it serves all steps.
    float fade[kTiles][2], top[kTiles][2];
    bool fades = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = kMinusInfinity;
#pragma unroll
        for (int n = 0; n < kStepTiles; ++n)
          largest = fmaxf(largest, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
        const float now = fmaxf(max[m][r], largest * scale);
        fade[m][r] = weight(max[m][r], now);
        fades |= fade[m][r] != 1.f;
        sum[m][r] *= fade[m][r];
        max[m][r] = now;
        top[m][r] = now == kMinusInfinity ? 0.f : now;
      }
    // After the first steps a maximum seldom moves, and times 1 is the same.
    if (__any_sync(kAll, fades)) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) values[m][n][i] *= fade[m][i / 2];
    }
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      // A product's result has its columns where the next one takes them.
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // columns g and g + 8, then the next 8 positions
          const float* pair = &score[m][2 * k + j / 2][j % 2 * 2];
          const float low = exp2_fast(__fmaf_rn(pair[0], scale, -top[m][j % 2])),
                      high = exp2_fast(__fmaf_rn(pair[1], scale, -top[m][j % 2]));
          sum[m][j % 2] += low + high;
          a[m][j] = pack<data_t>(low, high);
        }
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t b[4];
        stage.v.load_b(b, 16 * k, 8 * n);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<data_t>(values[m][n], a[m], b[0], b[1]);
          multiply_add<data_t>(values[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  if (warp_end == 0) return;

  __syncwarp();  // nobody reads the queries any more
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int mine = 16 * m + 8 * r + g;
      float all = sum[m][r];
      all += __shfl_xor_sync(kAll, all, 1);
      all += __shfl_xor_sync(kAll, all, 2);
      const int64_t at = __shfl_sync(kAll, place, mine);
      if (p.lse != nullptr && t == 0 && at >= 0) p.lse[at] = log_sum_exp(max[m][r], all);
      const float inverse = 1.f / all;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        columns.put_pair(
            warp * kWarpColumns + mine, 8 * n + 2 * t,
            pack<data_t>(values[m][n][2 * r] * inverse, values[m][n][2 * r + 1] * inverse));
    }
  __syncwarp();
  each_line([&](int i, data_t* to) {
    *reinterpret_cast<Chunk*>(to) =
        *reinterpret_cast<const Chunk*>(&columns.at[warp * kWarpColumns + i][channel]);
  });
}

template <typename data_t, int kDim>
void launch(const PagedAttentionParams& p, cudaStream_t stream) {
  const PrefillDeal deal(p, kColumns);
  constexpr int kBytes = sizeof(Shared<data_t, kDim>);
  const auto kernel = prefill_kernel<data_t, kDim>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch_overlapping(kernel, deal.tiles * p.kv_heads * deal.slices, kThreads, kBytes, stream, p,
                     PageSize(p.page_size), deal);
}

template <typename data_t>
void dispatch(const PagedAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim == 64) return launch<data_t, 64>(p, stream);
  if (p.head_dim == 96) return launch<data_t, 96>(p, stream);
  launch<data_t, 128>(p, stream);
}

}  // namespace

void launch_paged_prefill(const PagedAttentionParams& p, cudaStream_t stream) {
  if (runs_paged_prefill_wgmma()) return launch_paged_prefill_wgmma(p, stream);
  if (p.dtype == DType::kBFloat16) return dispatch<__nv_bfloat16>(p, stream);
  dispatch<__half>(p, stream);
}

}  // namespace reasoners
