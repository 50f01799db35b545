// y = x W^T for up to 4 rows of x: a stream of weights, each read once, in one order of sums.
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
// (launch.cuh): only x waits for it.
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

#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace reasoners {
namespace {

constexpr int kTile = 16;    // rows of W
constexpr int kRows = 4;     // of x, at most
constexpr int kDepth = 512;  // of K, a stage
constexpr int kStages = 4;
constexpr int kSteps = 8;                      // products whose inputs are in registers together
constexpr int kGroups = kDepth / 16 / kSteps;  // such in a stage
static_assert(kGroups == kRows && kTile % kGroups == 0);
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

template <typename data_t>
__global__ void __launch_bounds__(32) linear_kernel(const LinearParams p) {
  extern __shared__ __align__(128) char memory[];
  auto* stages = reinterpret_cast<Stage<data_t>*>(memory);
  const int lane = threadIdx.x, tiles = p.columns / kTile, depth = p.depth;
  const auto* w = static_cast<const data_t*>(p.weight);
  const auto* x = static_cast<const data_t*>(p.x);
  let_next_start();

  // 16 bytes a lane and copy; zeros past the end of K, and for rows and tiles that are not there.
  const auto fetch_row = [&](data_t* to, const data_t* from, int start, bool there) {
#pragma unroll
    for (int h = 0; h < kDepth; h += 32 * kChunk) {
      const int at = h + lane * kChunk;
      copy_async_16_once(to + at, from + at, there && start + at < depth);
    }
  };
  const auto fetch_weights = [&](const Place& to, int row) {
    const data_t* from = w + (int64_t(to.tile) * kTile + row) * depth + to.start;
    fetch_row(stages[to.stage].w[row], from, to.start, to.tile < tiles);
  };
  const auto fetch_input = [&](const Place& to, int row) {
    const data_t* from = x + row * p.x_stride + to.start;
    fetch_row(stages[to.stage].x[row], from, to.start, row < p.rows);
  };
  Place far{static_cast<int>(blockIdx.x), 0, 0};
  for (int stage = 0; stage < kStages - 1; ++stage, far.move_on(depth))
    for (int row = 0; row < kTile; ++row) fetch_weights(far, row);
  wait_for_inputs();
  far = {static_cast<int>(blockIdx.x), 0, 0};
  for (int stage = 0; stage < kStages - 1; ++stage, far.move_on(depth)) {
    for (int row = 0; row < kRows; ++row) fetch_input(far, row);
    commit_copies();
  }

  const auto load = [&](Fragments& to, const Place& from, int group) {
    // Where the matrices are that this lane names to ldmatrix. Columns of the product past the rows
    // of x are not written: they may repeat rows.
    const auto& stage = stages[from.stage];
    const data_t* w_at = &stage.w[lane % 16][group * kSteps * 16 + lane / 16 * 8];
    const data_t* x_at = &stage.x[lane % kRows][group * kSteps * 16 + lane / 8 * 8];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) load_matrices(to.w[t], w_at + 16 * t);
#pragma unroll
    for (int t = 0; t < kSteps; t += 2) load_matrices(to.x[t / 2], x_at + 16 * t);
  };
  Place here{static_cast<int>(blockIdx.x), 0, 0};
  int group = 0;
  float sum[4] = {};
  Fragments even, odd;
  wait_for_copies<kStages - 2>();
  __syncwarp();
  load(even, here, 0);

  const auto fetch_part = [&](int part) {
#pragma unroll
    for (int i = 0; i < kTile / kGroups; ++i) fetch_weights(far, part * (kTile / kGroups) + i);
    fetch_input(far, part);
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
    if (here.start + (group + 1) * kSteps * 16 < min(here.start + kDepth, depth)) {
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
    const int first = before.tile * kTile + lane / 4;
    auto* y = static_cast<data_t*>(p.y) + first;
    const auto* bias = static_cast<const data_t*>(p.bias) + first;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = lane % 4 * 2 + j % 2;
      const float v = sum[j] + (p.bias ? to_float(bias[j / 2 * 8]) : 0.f);
      if (row < p.rows) y[int64_t(row) * p.columns + j / 2 * 8] = from_float<data_t>(v);
      sum[j] = 0.f;
    }
    return here.tile < tiles;
  };
  while (step(even, odd) && step(odd, even)) continue;
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
