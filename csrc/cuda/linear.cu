// y = x W^T for up to 4 rows of x: a stream of weights, each read once, in one order of sums; with
// what stands around the products of a layer, so that a layer is four such launches and a mixer:
//   norm   x is a residual stream, of which every block normalises the rows for itself
//   gated  W's rows are gates, then as many values: y = value silu(gate), one column for both
//   sum    y is added to a residual stream in place
// All of it has the bits of add_rms_norm.cu and gate.cu, which serve more rows.
//
// A warp takes 16 rows of W at a time and walks along K with m16n8k16 products whose columns are
// the rows of x, one after the other into one accumulator. That order is the point: it is the one
// in which cuBLAS's kernels sum when they do not split K (H100, H200: the same bits for the shapes
// of Llama and Llamba layers, 1 to 512 rows; unsplit_product.h asks for those). So a row of x gives
// the same y alone and among hundreds, and a sample its tokens. The price is a chain of K / 16
// products, each of which waits for the one before it, 33 cycles and more.
//
// A warp issues in order, so whatever else it does must stand between two products of the chain:
// fragments are read from shared memory one group of kSteps products ahead, and each group starts
// a part of the copies of the stage that is farthest ahead. W comes by asynchronous copies,
// kStages x 16 rows x 1 kB, through rows 16 bytes further apart than they are long, so that
// ldmatrix meets no bank twice; past the end of K they bring zeros. Blocks stay and their copies
// run on into the next 16 rows. The first copies of W start before the kernel in front has ended
// (launch.cuh): only x waits for it. Rows that are normalised stay in shared memory, others come
// with the stages. Of the 16 rows of W that make gated columns, 8 are gates and 8 their values, so
// that a thread has both. What normalises is a block of add_rms_norm.cu, of which one warp stays.
//
// A stage of 32 products takes 270 to 370 instructions: pointers move with the copies, and all else
// about a stage is found once. Found for each copy, it took 1,090, and the chain waited for them.
//
// One row, Llamba-1B's four products and its head, us on an H100 with cold weights:
//                     8224 x 2048   2048 x 2048   16384 x 2048   2048 x 8192   128256 x 2048
//   alone                 12.8           5.8           23.9           15.5          180.8
//   norm, sum, gate       13.0           5.0           24.4           13.7
//   cuBLAS alone          14.3           6.4           25.1           15.5          187.7
//   floor                 11.1           2.8           22.1           11.1          173.4
// (alone: before pointers moved with the copies). All of a step's are 1058; with 8 stages of 256 as
// well 1063, with 6 of them and three blocks 1151, with 3 of 512 1093. Before loads and copies
// stood between the products, the chain of 512 took 20.2.
// Tried: one bulk copy a row of W (issued one lane after the other: slower by the row of x); 16
// rows of x (twice the shared memory: 2 to 3 times cuBLAS's time). With 5 rows and more cuBLAS is
// as fast. The chain by a warpgroup's m64n8k16 with W in registers, of which one warp has the 16
// rows and the others copy: the same bits, and on an H200 16 cycles a product by itself instead of
// 30, but 27 with the loads between, and a step of Llamba-1B took 1030 us instead of 941.

#include "activation.cuh"
#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "rms_norm.cuh"

namespace reasoners {
namespace {

constexpr int kTile = 16;  // rows of W
constexpr int kRows = kLinearRows;
constexpr int kDepth = 512;  // of K, a stage
constexpr int kStages = 4;
constexpr int kSteps = 8;                      // products whose inputs are in registers together
constexpr int kGroupDepth = 16 * kSteps;       // of K, such a group
constexpr int kGroups = kDepth / kGroupDepth;  // in a stage
static_assert(kGroups % 2 == 0 && 8 % (kTile / kGroups) == 0 && kRows % kGroups == 0);
constexpr int kPad = 8;                        // values between rows in shared memory
constexpr int kChunk = 8;                      // values that a lane copies at a time
constexpr int kNormTurns = 2, kNormWarps = 8;  // of RmsNormShape at most: rows up to 4096

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void load_matrices(uint32_t (&a)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row)));
}

// What kSteps products take: of W 16 x 16 each, of x 8 rows for two of them.
struct Fragments {
  uint32_t w[kSteps][4], x[kSteps / 2][4];
};

// Rows of a residual stream, normalised into shared memory by the whole block, which has as many
// threads as a block of add_rms_norm.cu.
template <typename data_t>
__device__ void normalise_rows(const LinearParams& p, data_t* to, int pitch,
                               const Vec<data_t, kChunk> (&scales)[kNormTurns]) {
  using Chunk = Vec<data_t, kChunk>;
  __shared__ float of_warps[kLinearRows][kNormWarps];
  const int threads = blockDim.x, lane = threadIdx.x % 32;
  Chunk values[kLinearRows][kNormTurns];
#pragma unroll
  for (int row = 0; row < kLinearRows; ++row) {
    if (row >= p.rows) break;
    float squares = 0.f;
#pragma unroll
    for (int turn = 0; turn < kNormTurns; ++turn) {
      const int i = (turn * threads + int(threadIdx.x)) * kChunk;
      if (i >= p.depth) break;
      // Past the first-level cache, which may still have what was there when this kernel came.
      const auto* from = static_cast<const data_t*>(p.x) + row * p.x_stride + i;
      const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
      values[row][turn] = *reinterpret_cast<const Chunk*>(&bits);
    }
#pragma unroll
    for (int turn = 0; turn < kNormTurns; ++turn)
      if ((turn * threads + int(threadIdx.x)) * kChunk < p.depth)
        squares = add_squares(squares, values[row][turn]);
    squares = sum_warp(squares);
    if (lane == 0) of_warps[row][threadIdx.x / 32] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < kLinearRows; ++row) {
    if (row >= p.rows) break;
    const float squares = sum_warp(lane < threads / 32 ? of_warps[row][lane] : 0.f);
    const float norm = inverse_rms(squares, p.depth, p.eps);
#pragma unroll
    for (int turn = 0; turn < kNormTurns; ++turn) {
      const int i = (turn * threads + int(threadIdx.x)) * kChunk;
      if (i >= p.depth) break;
      Chunk y;
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        y.at[k] = normalised(values[row][turn].at[k], norm, scales[turn].at[k]);
      *reinterpret_cast<Chunk*>(to + row * pitch + i) = y;
    }
    for (int i = p.depth + int(threadIdx.x); i < pitch; i += threads)
      to[row * pitch + i] = from_float<data_t>(0.f);
  }
}

__host__ __device__ inline int norm_pitch(int depth) {  // whole stages
  return (depth + kDepth - 1) / kDepth * kDepth + kPad;
}

template <typename data_t, bool kNorm, bool kGated, bool kSum>
__global__ void __launch_bounds__(kNorm ? 32 * kNormWarps : 32)
    linear_kernel(const LinearParams p) {
  using Weights = data_t[kTile][kDepth + kPad];
  extern __shared__ __align__(128) char memory[];
  auto* weights = reinterpret_cast<Weights*>(memory);  // kStages
  auto* inputs = reinterpret_cast<data_t*>(memory) + kStages * sizeof(Weights) / sizeof(data_t);
  const int lane = threadIdx.x % 32, tiles = p.columns / kTile, depth = p.depth;
  const int pitch = kNorm ? norm_pitch(depth) : kDepth + kPad;  // of the rows of x
  constexpr int kTileStep = kGated ? 8 : kTile, kPartRows = kTile / kGroups;
  constexpr int kTurn = 32 * kChunk;  // of a row, by all lanes
  let_next_start();

  // ---- The stage that is farthest ahead, and what this lane copies into it: as few instructions
  // as can be, for they stand between the products.
  int far_tile = blockIdx.x, far_start = 0, far_stage = 0;
  int there[kDepth / kTurn];  // bytes of a copy: none past the end of K
  const data_t *w_from, *x_from;
  const auto set_far = [&] {
#pragma unroll
    for (int h = 0; h < kDepth / kTurn; ++h)
      there[h] = far_tile < tiles && far_start + h * kTurn + lane * kChunk < depth ? 16 : 0;
    w_from = static_cast<const data_t*>(p.weight) + int64_t(far_tile) * kTileStep * depth +
             far_start + lane * kChunk;
    x_from = static_cast<const data_t*>(p.x) + far_start + lane * kChunk;
  };
  const auto move_far = [&] {
    far_start += kDepth;
    if (far_start >= depth) far_start = 0, far_tile += gridDim.x;
    far_stage = far_stage + 1 == kStages ? 0 : far_stage + 1;
    set_far();
  };
  // A tile's first eight rows of W are neighbours, and so are the second.
  const int64_t to_second = kGated ? (int64_t(p.columns / 2) - 8) * depth : 0;
  const auto fetch_weights = [&](int part) {
    data_t* to = weights[far_stage][part * kPartRows] + lane * kChunk;
    if (kGated && part * kPartRows == 8) w_from += to_second;
#pragma unroll
    for (int i = 0; i < kPartRows; ++i, w_from += depth)
#pragma unroll
      for (int h = 0; h < kDepth / kTurn; ++h)
        copy_async_once(to + i * (kDepth + kPad) + h * kTurn, w_from + h * kTurn, there[h]);
  };
  const auto fetch_input = [&](int row) {
    if (kNorm) return;
    data_t* to = inputs + (far_stage * kRows + row) * pitch + lane * kChunk;
#pragma unroll
    for (int h = 0; h < kDepth / kTurn; ++h)
      copy_async_once(to + h * kTurn, x_from + h * kTurn, row < p.rows ? there[h] : 0);
    x_from += p.x_stride;
  };
  const auto first_stages = [&](const auto& fetch) {
    far_tile = blockIdx.x, far_start = 0, far_stage = 0;
    set_far();
    for (int stage = 0; stage < kStages - 1; ++stage, move_far()) fetch();
  };
  const auto fetch_tile = [&] {
#pragma unroll
    for (int part = 0; part < kGroups; ++part) fetch_weights(part);
  };
  if constexpr (kNorm) {
    Vec<data_t, kChunk> scales[kNormTurns];
#pragma unroll
    for (int turn = 0; turn < kNormTurns; ++turn) {
      const int i = (turn * int(blockDim.x) + int(threadIdx.x)) * kChunk;
      if (i < depth)
        scales[turn] = *reinterpret_cast<const Vec<data_t, kChunk>*>(
            static_cast<const data_t*>(p.norm_weight) + i);
    }
    if (threadIdx.x < 32) first_stages(fetch_tile);
    wait_for_inputs();
    normalise_rows(p, inputs, pitch, scales);
    __syncthreads();
    if (threadIdx.x >= 32) return;
  } else {
    first_stages(fetch_tile);
    wait_for_inputs();
  }
  first_stages([&] {
#pragma unroll
    for (int row = 0; row < kRows; ++row) fetch_input(row);
    commit_copies();
  });

  // ---- The stage at hand, and where the matrices are in it that this lane names to ldmatrix.
  // Columns of the product past the rows of x are not written: they may repeat rows, and have
  // anything in them.
  int tile = blockIdx.x, start = 0, stage = 0;
  const data_t *w_at, *x_at;
  const auto set_here = [&] {
    w_at = &weights[stage][lane % 16][lane / 16 * 8];
    x_at = inputs + (kNorm ? start : stage * kRows * pitch) + lane % kRows * pitch + lane / 8 * 8;
  };
  const auto load = [&](Fragments& to, int group) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) load_matrices(to.w[t], w_at + group * kGroupDepth + 16 * t);
#pragma unroll
    for (int t = 0; t < kSteps; t += 2)
      load_matrices(to.x[t / 2], x_at + group * kGroupDepth + 16 * t);
  };
  // Where the products are that this lane has of a tile: two rows of x, two columns.
  const int row = lane % 4 * 2, column = lane / 4;
  const int half = kGated ? p.columns / 2 : 8;
  // What the residual stream has there, read long before it is needed.
  data_t old[4];
  const auto read_residual = [&] {
    const auto* from =
        static_cast<const data_t*>(p.sum) + int64_t(row) * p.columns + tile * kTileStep + column;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (tile < tiles && row + j % 2 < p.rows) old[j] = from[j % 2 * p.columns + j / 2 * 8];
  };
  float sum[4] = {};
  const auto finish = [&] {
    const int first = tile * kTileStep + column, width = kGated ? half : p.columns;
    const auto* bias = static_cast<const data_t*>(p.bias) + first;
    auto* to = static_cast<data_t*>(kSum ? p.sum : p.y) + int64_t(row) * width + first;
    data_t y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[j] = from_float<data_t>(sum[j] + (p.bias ? to_float(bias[j / 2 * half]) : 0.f));
      sum[j] = 0.f;
    }
    if (kGated)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        y[j] = from_float<data_t>(__fmul_rn(to_float(y[j + 2]), silu(to_float(y[j]))));
    if (kSum)
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = from_float<data_t>(to_float(old[j]) + to_float(y[j]));
#pragma unroll
    for (int j = 0; j < (kGated ? 2 : 4); ++j)
      if (row + j % 2 < p.rows) to[j % 2 * width + j / 2 * 8] = y[j];
  };

  if (kSum) read_residual();
  set_here();
  wait_for_copies<kStages - 2>();
  __syncwarp();
  Fragments fragments[2];
  load(fragments[0], 0);
  // A stage a turn. The stage before this one was read to its end, so the stage farthest ahead
  // comes into its place, a part with each group: copies and reads of shared memory fill the time
  // in which a product waits for the one before it.
  while (true) {
    bool whole = false;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Fragments& now = fragments[group % 2];
      const auto products = [&](int from) {
#pragma unroll
        for (int t = from; t < from + kSteps / 2; ++t)
          multiply(sum, now.w[t], now.x[t / 2][t % 2 * 2], now.x[t / 2][t % 2 * 2 + 1], data_t{});
      };
      products(0);
      fetch_weights(group);
#pragma unroll
      for (int i = 0; i < kRows / kGroups; ++i) fetch_input(group * (kRows / kGroups) + i);
      if (group + 1 == kGroups) {
        commit_copies();
        move_far();
        start += kDepth;
        whole = start >= depth;
        if (whole) start = 0;
        stage = stage + 1 == kStages ? 0 : stage + 1;
        set_here();
        wait_for_copies<kStages - 2>();
        __syncwarp();
      }
      load(fragments[(group + 1) % 2], (group + 1) % kGroups);
      products(kSteps / 2);
    }
    if (!whole) continue;
    finish();
    tile += gridDim.x;
    if (tile >= tiles) return;
    if (kSum) read_residual();
  }
}

template <typename data_t, bool kNorm, bool kGated, bool kSum>
void launch(const LinearParams& p, cudaStream_t stream) {
  const auto kernel = linear_kernel<data_t, kNorm, kGated, kSum>;
  const int inputs = kNorm ? kRows * norm_pitch(p.depth) : kStages * kRows * (kDepth + kPad);
  const int bytes = (kStages * kTile * (kDepth + kPad) + inputs) * sizeof(data_t);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int processors = count_processors();
  int per_processor = 0;
  const int threads = kNorm ? RmsNormShape::of(p.depth / kChunk).threads : 32;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, bytes);
  const int blocks = min(p.columns / kTile, processors * per_processor);
  launch_overlapping(kernel, blocks, threads, bytes, stream, p);
}

template <typename data_t>
void dispatch(const LinearParams& p, cudaStream_t stream) {
  if (p.sum) return launch<data_t, false, false, true>(p, stream);
  if (p.gated) return launch<data_t, true, true, false>(p, stream);
  if (p.norm_weight) return launch<data_t, true, false, false>(p, stream);
  launch<data_t, false, false, false>(p, stream);
}

}  // namespace

void launch_linear(const LinearParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16)
    dispatch<__nv_bfloat16>(p, stream);
  else
    dispatch<__half>(p, stream);
}

bool can_normalise_in_linear(int depth) {
  const RmsNormShape shape = RmsNormShape::of(depth / kChunk);
  return shape.turns <= kNormTurns && shape.threads <= 32 * kNormWarps;
}

}  // namespace reasoners
