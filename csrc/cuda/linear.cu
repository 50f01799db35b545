// y = x W^T for up to 4 rows of x: a stream of weights, each read once, in one order of sums; with
// what stands around the products of a layer, so that a layer is four such launches and a mixer:
//   norm   x is a residual stream, of which every block normalises the rows for itself
//   gated  W's rows are gates, then as many values: y = value silu(gate), one column for both
//   sum    y is added to a residual stream in place
// All of it has the bits of add_rms_norm.cu and gate.cu, which serve more rows.
//
// A warp takes 16 rows of W at a time and walks along K with m16n8k16 products whose columns are
// the rows of x, one after the other into one accumulator. That order is the point: it is the one
// in which cuBLAS's kernels sum when they do not split K (H100: the same bits for nine shapes of
// Llama and Llamba layers, 1 to 512 rows, wherever cuBLAS does not split). So a row of x gives the
// same y alone and among hundreds, and a sample its tokens. The price is a chain of K / 16
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
// that a thread has both.
//
// One row, Llamba-1B's four products and its head, us on an H100 with cold weights:
//              8224 x 2048   2048 x 2048   16384 x 2048   2048 x 8192   128256 x 2048
//   here          12.8           5.8           23.9           15.5          180.8
//   cuBLAS        14.3           6.4           25.1           15.5          187.7
//   floor         11.1           2.8           22.1           11.1          173.4
// Before loads and copies stood between the products, the chain of 512 took 20.2.
// Tried: one bulk copy a row of W (issued one lane after the other: slower by the row of x); 16
// rows of x (twice the shared memory: 2 to 3 times cuBLAS's time). With 5 rows and more cuBLAS is
// as fast.

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
static_assert(kTile % kGroups == 0 && kRows % kGroups == 0);
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

// Where a block stands in its stream of tiles, kDepth of K after kDepth.
struct Place {
  int tile, start, stage;
  __device__ void move_on(int depth) {
    start += kDepth;
    if (start >= depth) start = 0, tile += gridDim.x;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

// A row of a residual stream, as the threads of add_rms_norm.cu have it: lane i of this warp in
// turn has what lane i of every one of those warps has.
template <typename data_t>
struct NormRow {
  using Chunk = Vec<data_t, kChunk>;
  Chunk at[kNormTurns][kNormWarps];

  // visit(turn, warp, first value) of the chunks that are there.
  template <typename Visit>
  __device__ static void each(int depth, int threads, const Visit& visit) {
#pragma unroll
    for (int warp = 0; warp < kNormWarps; ++warp)
#pragma unroll
      for (int turn = 0; turn < kNormTurns; ++turn) {
        const int i = (turn * threads + warp * 32 + int(threadIdx.x)) * kChunk;
        if (warp * 32 < threads && i < depth) visit(turn, warp, i);
      }
  }
  // Past the first-level cache, which may still have what was there when this kernel came.
  __device__ void load(const data_t* from, int depth, int threads) {
    each(depth, threads, [&](int turn, int warp, int i) {
      const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from + i));
      at[turn][warp] = *reinterpret_cast<const Chunk*>(&bits);
    });
  }
  __device__ float inverse_rms(int depth, int threads, float eps) {
    float squares[kNormWarps] = {}, of_warps = 0.f;
    each(depth, threads, [&](int turn, int warp, int) {
      squares[warp] = add_squares(squares[warp], at[turn][warp]);
    });
#pragma unroll
    for (int warp = 0; warp < kNormWarps; ++warp) {
      const float sum = sum_warp(squares[warp]);
      if (int(threadIdx.x) == warp) of_warps = sum;
    }
    return reasoners::inverse_rms(sum_warp(of_warps), depth, eps);
  }
};

__host__ __device__ inline int norm_pitch(int depth) {  // whole groups of products
  return (depth + kGroupDepth - 1) / kGroupDepth * kGroupDepth + kPad;
}

template <typename data_t, bool kNorm, bool kGated, bool kSum>
__global__ void __launch_bounds__(32) linear_kernel(const LinearParams p) {
  using Weights = data_t[kTile][kDepth + kPad];
  extern __shared__ __align__(128) char memory[];
  auto* weights = reinterpret_cast<Weights*>(memory);  // kStages
  auto* inputs = reinterpret_cast<data_t*>(memory) + kStages * sizeof(Weights) / sizeof(data_t);
  const int lane = threadIdx.x, tiles = p.columns / kTile, depth = p.depth;
  const int pitch = kNorm ? norm_pitch(depth) : kDepth + kPad;  // of the rows of x
  const auto* w = static_cast<const data_t*>(p.weight);
  const auto* x = static_cast<const data_t*>(p.x);
  // A tile's first eight rows of W are neighbours; how far from them the second eight are.
  const int half = kGated ? p.columns / 2 : 8;
  constexpr int kTileStep = kGated ? 8 : kTile, kPartRows = kTile / kGroups;
  let_next_start();

  // 16 bytes a lane and copy; zeros past the end of K, and for rows and tiles that are not there.
  const auto fetch_row = [&](data_t* to, const data_t* from, int start, bool there) {
#pragma unroll
    for (int h = 0; h < kDepth; h += 32 * kChunk) {
      const int at = h + lane * kChunk;
      copy_async_16_once(to + at, from + at, there && start + at < depth);
    }
  };
  const auto fetch_weights = [&](const Place& to, int part) {
    int row = to.tile * kTileStep + part * kPartRows;
    if (kGated && part * kPartRows >= 8) row += half - 8;
    const data_t* from = w + int64_t(row) * depth + to.start;
#pragma unroll
    for (int i = 0; i < kPartRows; ++i)
      fetch_row(weights[to.stage][part * kPartRows + i], from + i * depth, to.start,
                to.tile < tiles);
  };
  const auto fetch_input = [&](const Place& to, int row) {
    if (kNorm) return;
    const data_t* from = x + row * p.x_stride + to.start;
    fetch_row(inputs + (to.stage * kRows + row) * pitch, from, to.start, row < p.rows);
  };
  data_t* const scales = inputs + kRows * pitch;  // of the norm
  if constexpr (kNorm) {
    for (int i = lane * kChunk; i < depth; i += 32 * kChunk)
      copy_async_16(scales + i, static_cast<const data_t*>(p.norm_weight) + i);
    commit_copies();
  }
  Place far{static_cast<int>(blockIdx.x), 0, 0};
  for (int stage = 0; stage < kStages - 1; ++stage, far.move_on(depth))
    for (int part = 0; part < kGroups; ++part) fetch_weights(far, part);
  if constexpr (kNorm) {
    using Chunk = typename NormRow<data_t>::Chunk;
    const int threads = RmsNormShape::of(depth / kChunk).threads;
    wait_for_copies<0>();  // of the scales: those of W are not yet committed
    __syncwarp();
    wait_for_inputs();
#pragma unroll 1
    for (int row = 0; row < p.rows; ++row) {
      NormRow<data_t> values;
      values.load(x + row * p.x_stride, depth, threads);
      const float norm = values.inverse_rms(depth, threads, p.eps);
      values.each(depth, threads, [&](int turn, int warp, int i) {
        const auto scale = *reinterpret_cast<const Chunk*>(scales + i);
        Chunk y;
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
          y.at[k] = normalised(values.at[turn][warp].at[k], norm, scale.at[k]);
        *reinterpret_cast<Chunk*>(inputs + row * pitch + i) = y;
      });
      for (int i = depth + lane; i < pitch; i += 32)
        inputs[row * pitch + i] = from_float<data_t>(0.f);
    }
  } else {
    wait_for_inputs();
  }
  far = {static_cast<int>(blockIdx.x), 0, 0};
  for (int stage = 0; stage < kStages - 1; ++stage, far.move_on(depth)) {
    for (int row = 0; row < kRows; ++row) fetch_input(far, row);
    commit_copies();
  }

  const auto load = [&](Fragments& to, const Place& from, int group) {
    // Where the matrices are that this lane names to ldmatrix. Columns of the product past the rows
    // of x are not written: they may repeat rows, and have anything in them.
    const int at = group * kGroupDepth;
    const data_t* w_at = &weights[from.stage][lane % 16][at + lane / 16 * 8];
    const data_t* x_at = inputs + (kNorm ? from.start : from.stage * kRows * pitch) +
                         lane % kRows * pitch + at + lane / 8 * 8;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) load_matrices(to.w[t], w_at + 16 * t);
#pragma unroll
    for (int t = 0; t < kSteps; t += 2) load_matrices(to.x[t / 2], x_at + 16 * t);
  };
  // Where the products are that this lane has of a tile: two rows of x, two columns.
  const int row = lane % 4 * 2, column = lane / 4;
  // What the residual stream has there, read long before it is needed.
  data_t old[4];
  const auto read_residual = [&](int tile) {
    const auto* from =
        static_cast<const data_t*>(p.sum) + int64_t(row) * p.columns + tile * kTileStep + column;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (tile < tiles && row + j % 2 < p.rows) old[j] = from[j % 2 * p.columns + j / 2 * 8];
  };
  Place here{static_cast<int>(blockIdx.x), 0, 0};
  int group = 0;
  float sum[4] = {};
  Fragments even, odd;
  if (kSum) read_residual(here.tile);
  wait_for_copies<kStages - 2>();
  __syncwarp();
  load(even, here, 0);

  const auto fetch_part = [&](int part) {
    fetch_weights(far, part);
#pragma unroll
    for (int i = 0; i < kRows / kGroups; ++i) fetch_input(far, part * (kRows / kGroups) + i);
  };
  const auto finish = [&](int tile) {
    const int first = tile * kTileStep + column;
    const auto* bias = static_cast<const data_t*>(p.bias) + first;
    const int width = kGated ? half : p.columns;
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
  // kSteps products; false after the last of all. The stage before this one was read to its end, so
  // the stage farthest ahead comes into its place, a part with each group: copies and reads of
  // shared memory fill the time in which a product waits for the one before it.
  const auto step = [&](const Fragments& now, Fragments& next) {
    const auto products = [&](int from) {
#pragma unroll
      for (int t = from; t < from + kSteps / 2; ++t)
        multiply(sum, now.w[t], now.x[t / 2][t % 2 * 2], now.x[t / 2][t % 2 * 2 + 1], data_t{});
    };
    products(0);
    fetch_part(group);
    const Place before = here;
    if (here.start + (group + 1) * kGroupDepth < min(here.start + kDepth, depth)) {
      ++group;
    } else {
      for (++group; group < kGroups; ++group) fetch_part(group);
      commit_copies();
      far.move_on(depth);
      here.move_on(depth);
      group = 0;
      wait_for_copies<kStages - 2>();
      __syncwarp();
    }
    load(next, here, group);
    products(kSteps / 2);
    if (here.tile == before.tile) return true;
    finish(before.tile);
    if (kSum) read_residual(here.tile);
    return here.tile < tiles;
  };
  while (step(even, odd) && step(odd, even)) continue;
}

template <typename data_t, bool kNorm, bool kGated, bool kSum>
void launch(const LinearParams& p, cudaStream_t stream) {
  const auto kernel = linear_kernel<data_t, kNorm, kGated, kSum>;
  const int inputs =
      kNorm ? kRows * norm_pitch(p.depth) + p.depth : kStages * kRows * (kDepth + kPad);
  const int bytes = (kStages * kTile * (kDepth + kPad) + inputs) * sizeof(data_t);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int device, processors, per_processor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, 32, bytes);
  const int blocks = min(p.columns / kTile, processors * per_processor);
  launch_overlapping(kernel, blocks, 32, bytes, stream, p);
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
