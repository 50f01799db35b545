// y = x W^T for up to 8 rows of x: a stream of weights, each read once, in one order of sums.
//
// A warp takes 16 rows of W at a time and walks along K with m16n8k16 products whose columns are
// the rows of x, one after the other into one accumulator. That order is the point: it is the one
// in which cuBLAS's kernels sum when they do not split K (H100: the same bits for nine shapes of
// Llama and Llamba layers, 1 to 512 rows, wherever cuBLAS does not split). So a row of x gives the
// same y alone and among hundreds, and a sample its tokens. The price is a chain of K / 16
// products, each of which waits for the one before it, about 65 cycles: no matter at K = 2048, 5 us
// too many at 8192.
//
// W comes by asynchronous copies, kStages x 16 rows x 1 kB ahead, through shared memory with rows
// 16 bytes further apart than they are long, so that ldmatrix meets no bank twice. Blocks stay and
// their copies run on into the next 16 rows. The first copies of W start before the kernel in front
// has ended (launch.cuh): only x waits for it.
//
// One row, Llamba-1B's four products and its head, us on an H100 with cold weights:
//              8224 x 2048   2048 x 2048   16384 x 2048   2048 x 8192   128256 x 2048
//   here          12.9           5.7           23.4           20.2          179.6
//   cuBLAS        14.4           6.4           25.1           15.4          188.9
//   floor         11.1           2.8           22.1           11.1          173.4
// Tried: one bulk copy a row of W (issued one lane after the other: slower by the row of x); 16
// rows of x (twice the shared memory: 2 to 3 times cuBLAS's time). With 5 rows and more cuBLAS is
// as fast.

#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace reasoners {
namespace {

constexpr int kTile = 16;    // rows of W
constexpr int kRows = 8;     // of x, at most
constexpr int kDepth = 512;  // of K, a stage
constexpr int kStages = 4;
constexpr int kPad = 8;    // values between rows in shared memory
constexpr int kChunk = 8;  // values that a lane copies at a time

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

template <typename data_t>
struct Stage {
  alignas(16) data_t w[kTile][kDepth + kPad];
  alignas(16) data_t x[kRows][kDepth + kPad];
};

template <typename data_t>
__global__ void __launch_bounds__(32) linear_kernel(const LinearParams p) {
  extern __shared__ __align__(128) char memory[];
  auto* stages = reinterpret_cast<Stage<data_t>*>(memory);
  const int lane = threadIdx.x, tiles = p.columns / kTile, depth = p.depth;
  const auto* w = static_cast<const data_t*>(p.weight);
  const auto* x = static_cast<const data_t*>(p.x);
  let_next_start();

  // One 16-byte copy a lane: two of a row's 512 values each time.
  const auto fetch_row = [&](data_t* to, const data_t* from, int start) {
#pragma unroll
    for (int h = 0; h < kDepth; h += 32 * kChunk)
      if (start + h + lane * kChunk < depth)
        copy_async_16_once(to + h + lane * kChunk, from + h + lane * kChunk);
  };
  const auto fetch_weights = [&](int stage, int tile, int start) {
    const data_t* from = w + int64_t(tile) * kTile * depth + start;
#pragma unroll
    for (int row = 0; row < kTile; ++row, from += depth)
      fetch_row(stages[stage].w[row], from, start);
  };
  const auto fetch_inputs = [&](int stage, int start) {
    const data_t* from = x + start;
#pragma unroll
    for (int row = 0; row < kRows; ++row, from += p.x_stride)
      if (row < p.rows) fetch_row(stages[stage].x[row], from, start);
  };
  // The next stage to fetch: its tile and where in K it starts. Fetching goes on past the last tile
  // with empty groups, so that the count of groups in flight stays.
  int next_tile = blockIdx.x, next_start = 0;
  const auto move_on = [&] {
    next_start += kDepth;
    if (next_start >= depth) next_start = 0, next_tile += gridDim.x;
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (next_tile < tiles) fetch_weights(stage, next_tile, next_start);
    move_on();
  }
  wait_for_inputs();
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    fetch_inputs(stage, stage * kDepth % ((depth + kDepth - 1) / kDepth * kDepth));
    commit_copies();
  }

  // Where the matrices are that this lane names to ldmatrix: of W 16 x 16, of x 8 rows for two
  // steps of K.
  const int w_row = lane % 16, w_column = lane / 16 * 8;
  const int x_row = lane % 8, x_column = lane / 8 * 8;
  float sum[4] = {};
  int stage_at = 0, fetch_at = kStages - 1;
  for (int tile = blockIdx.x, start = 0; tile < tiles;) {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    // Into the stage that was computed on last.
    if (next_tile < tiles) {
      fetch_weights(fetch_at, next_tile, next_start);
      fetch_inputs(fetch_at, next_start);
    }
    commit_copies();
    move_on();
    fetch_at = fetch_at + 1 == kStages ? 0 : fetch_at + 1;
    const auto& stage = stages[stage_at];
    stage_at = stage_at + 1 == kStages ? 0 : stage_at + 1;
    const int length = min(kDepth, depth - start);
    // All that kAhead steps need is requested before the first of them: a product waits for the one
    // before it, but not for shared memory.
    constexpr int kAhead = 8;
    int k = 0;
#pragma unroll 2
    for (; k + 16 * kAhead <= length; k += 16 * kAhead) {
      uint32_t a[kAhead][4], b[kAhead / 2][4];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) load_matrices(a[t], &stage.w[w_row][k + 16 * t + w_column]);
#pragma unroll
      for (int t = 0; t < kAhead; t += 2)
        load_matrices(b[t / 2], &stage.x[x_row][k + 16 * t + x_column]);
#pragma unroll
      for (int t = 0; t < kAhead; ++t)
        multiply(sum, a[t], b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1], data_t{});
    }
    for (; k < length; k += 16) {
      uint32_t a[4], b[4];
      load_matrices(a, &stage.w[w_row][k + w_column]);
      load_matrices(b, &stage.x[x_row][k + x_column % 16]);
      multiply(sum, a, b[0], b[1], data_t{});
    }
    start += kDepth;
    if (start < depth) continue;
    const int first = tile * kTile + lane / 4;
    start = 0, tile += gridDim.x;
    auto* y = static_cast<data_t*>(p.y) + first;
    const auto* bias = static_cast<const data_t*>(p.bias) + first;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = lane % 4 * 2 + j % 2;
      const float v = sum[j] + (p.bias ? to_float(bias[j / 2 * 8]) : 0.f);
      if (row < p.rows) y[int64_t(row) * p.columns + j / 2 * 8] = from_float<data_t>(v);
      sum[j] = 0.f;
    }
  }
}

template <typename data_t>
void launch(const LinearParams& p, cudaStream_t stream) {
  const auto kernel = linear_kernel<data_t>;
  constexpr int kBytes = kStages * sizeof(Stage<data_t>);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  int device, processors, per_processor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, 32, kBytes);
  const int blocks = min(p.columns / kTile, processors * per_processor);
  launch_overlapping(kernel, blocks, 32, kBytes, stream, p);
}

}  // namespace

void launch_linear(const LinearParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
}

}  // namespace reasoners
