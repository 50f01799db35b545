// The derivative of ssd_scan one token after the other, for fp32 data and for extents that tensor
// cores do not take. With dS_t the gradient of the state after token t (dy_t C_t and what later
// tokens pass back) and u_t = scale_t x_t:
//   dC_t = dy_t^T S_t         dB_t = u_t^T dS_t         dS_{t-1} = decay_t dS_t + dy_{t-1}
//   C_{t-1}^T du_t = dS_t B_t           dx_t = scale_t du_t + D dy_t            dscale_t = du_t .
//   x_t dlog_decay_t = sum of dS_t * decay_t S_{t-1}
//
// A block serves one (sequence, head) and a tile of the head's P rows. As in
// selective_scan_backward.cu, it walks forwards leaving the state at the start of every span of
// kSpan tokens in global memory, then takes the spans from the last to the first: forwards with the
// states of its stages in shared memory, then stage by stage backwards with the states of the
// stage's tokens in registers. What is summed over rows and heads leaves the block in fp32 and is
// added up by a second launch, all in fixed order.
//
//   N        <= 16   <= 32   <= 64   <= 128   <= 256
//   kLanes      4       8      16       32       32     rows of P per block: 256 / kLanes

#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"
#include "scan_backward.cuh"
#include "ssd_scan_backward.cuh"
#include "sum_partials.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStage = 8;                // tokens
constexpr int kStages = 8;               // of a span
constexpr int kSpan = kStage * kStages;  // tokens

struct RowsScratch : SsdScanScratch {
  PartedGradient dx, dB, dC, dlog_decay, dscale;  // all parts one after the other

  PartedGradient take_parts(const SsdScanParams& f, int count, int groups, int width) {
    const int64_t floats = count > 1 ? f.batch * f.length * groups * width : 0;
    return {take(count * floats), count, groups, width};
  }
};

template <typename Row>
struct alignas(16) Shared {
  static constexpr int kRows = kThreads / Row::kLanes;
  struct Stage {
    float b[kStage][Row::kSize], c[kStage][Row::kSize];
    float x[kStage][kRows];  // later dx
    float dy[kStage][kRows];
    float decay[kStage], scale[kStage];
  };
  static constexpr int kSums = 2 * Row::kSize + 2;  // of dB, dC, dlog_decay and dscale
  Stage stages[2];
  Vec<float, Row::kRun> starts[kStages][Row::kEntries / Row::kRun][kThreads];
  float sums[kStage][kWarps][kSums];
};

template <typename data_t, typename Row>
__global__ void __launch_bounds__(kThreads, Row::kSize <= 32 ? 2 : 1)
    ssd_scan_rows_backward_kernel(const SsdScanBackwardParams p, int tiles,
                                  const RowsScratch scratch) {
  constexpr int kSize = Row::kSize, kEntries = Row::kEntries, kRows = kThreads / Row::kLanes;
  using Matrix = Share<kStage, kSize, kThreads>;
  using Input = Share<kStage, kRows, kThreads>;
  using Sums = RowSums<Row, 2 * kEntries>;
  constexpr int kMatrix = Matrix::kCount, kInput = Input::kCount;
  extern __shared__ float4 shared_memory[];
  auto& shared = *reinterpret_cast<Shared<Row>*>(shared_memory);

  const SsdScanParams& f = p.forward;
  const int64_t unit = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, first = tile * kRows;
  const int64_t index = unit / f.heads;
  const int head = unit % f.heads, rows = min(kRows, f.head_dim - first);  // of this tile
  const Sequence sequence = sequence_at(f.cu_seqlens, f.length, index);
  const auto from = [&](const void* data, TokenStrides strides, int share, int width) {
    return static_cast<const data_t*>(data) + sequence.batch * strides.batch +
           int64_t(head / share) * width;
  };
  const int x_share = f.heads / f.x_heads, b_share = f.heads / f.b_groups,
            c_share = f.heads / f.c_groups;
  const data_t* x = from(f.x, f.x_strides, x_share, f.head_dim) + first;
  const data_t* b = from(f.B, f.b_strides, b_share, f.state_dim);
  const data_t* c = from(f.C, f.c_strides, c_share, f.state_dim);
  const data_t* dy = from(p.dy, p.dy_strides, 1, f.head_dim) + first;
  const float* log_decay = f.log_decay + sequence.batch * f.log_decay_strides.batch + head;
  const float* scale = f.scale ? f.scale + sequence.batch * f.scale_strides.batch + head : nullptr;
  const float skip = f.D ? f.D[head] : 0.f;

  // This thread's tokens of the next stage, on their way to shared memory. Walks forwards leave out
  // what only the way back needs. Tokens past the end pass the states on as they are.
  data_t next_b[kMatrix], next_c[kMatrix], next_x[kInput], next_dy[kInput];
  float next_decay = 0.f, next_scale = 1.f;
  const auto fetch = [&](int64_t t, bool back) {
    const data_t zero = from_float<data_t>(0.f);
    const int left = tokens_left(sequence, t, kStage);
    const data_t *from_b = b + t * f.b_strides.token, *from_c = c + t * f.c_strides.token,
                 *from_x = x + t * f.x_strides.token, *from_dy = dy + t * p.dy_strides.token;
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      const int i = Matrix::row(k), n = Matrix::column(k);
      const bool in = i < left && n < f.state_dim;
      next_b[k] = in ? from_b[i * f.b_strides.token + n] : zero;
      next_c[k] = in && back ? from_c[i * f.c_strides.token + n] : zero;
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      const int i = Input::row(k), n = Input::column(k);
      const bool in = i < left && n < rows;
      next_x[k] = in ? from_x[i * f.x_strides.token + n] : zero;
      next_dy[k] = in && back ? from_dy[i * p.dy_strides.token + n] : zero;
    }
    const int i = threadIdx.x;
    next_decay = i < left ? log_decay[(t + i) * f.log_decay_strides.token] : 0.f;
    next_scale = i < left && scale ? scale[(t + i) * f.scale_strides.token] : 1.f;
  };
  int buffer = 1;
  // Puts the stage that was fetched where all threads find it; one barrier.
  const auto put = [&] {
    buffer ^= 1;
    auto& stage = shared.stages[buffer];
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      if (Matrix::row(k) >= kStage) continue;
      stage.b[Matrix::row(k)][Matrix::column(k)] = to_float(next_b[k]);
      stage.c[Matrix::row(k)][Matrix::column(k)] = to_float(next_c[k]);
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      if (Input::row(k) >= kStage) continue;
      stage.x[Input::row(k)][Input::column(k)] = to_float(next_x[k]);
      stage.dy[Input::row(k)][Input::column(k)] = to_float(next_dy[k]);
    }
    if (threadIdx.x < kStage) {
      stage.decay[threadIdx.x] = expf(next_decay);
      stage.scale[threadIdx.x] = next_scale;
    }
    __syncthreads();
  };

  const int lane = threadIdx.x % Row::kLanes, local = threadIdx.x / Row::kLanes;
  const int lane_of_warp = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool writes = local < rows;
  const int64_t home = (unit * f.head_dim + first + local) * f.state_dim;  // in a state tensor
  float state[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    const bool in = writes && n < f.state_dim;
    state[j] = in && f.initial_state ? f.initial_state[home + n] : 0.f;
  }
  const auto advance = [&](const typename Shared<Row>::Stage& stage, int i) {
    float in[kEntries];
    Row::read(stage.b[i], lane, in);
    const float decay = stage.decay[i], gain = stage.scale[i] * stage.x[i][local];
#pragma unroll
    for (int j = 0; j < kEntries; ++j) state[j] = fmaf(decay, state[j], gain * in[j]);
  };

  const int64_t per_checkpoint = int64_t(f.heads) * tiles * kEntries * kThreads;
  float* checkpoint = p.scratch + scratch.states + threadIdx.x +
                      first_checkpoint(sequence, f.length, index, kSpan) * per_checkpoint +
                      int64_t(head * tiles + tile) * kEntries * kThreads;
  const int64_t spans = (sequence.end - sequence.begin + kSpan - 1) / kSpan;
  if (spans > 1) fetch(sequence.begin, false);
  for (int64_t span = 0; span < spans; ++span, checkpoint += per_checkpoint) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) checkpoint[j * kThreads] = state[j];
    if (span + 1 == spans) break;
    for (int k = 0; k < kStages; ++k) {
      put();
      fetch(sequence.begin + (span * kStages + k + 1) * kStage, false);
#pragma unroll 4
      for (int i = 0; i < kStage; ++i) advance(shared.stages[buffer], i);
    }
  }

  float dstate[kEntries], dD = 0.f;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    dstate[j] = writes && n < f.state_dim ? p.dfinal_state[home + n] : 0.f;
  }
  const int64_t row = sequence.batch * f.length, tokens = f.batch * f.length;
  // To a part of a gradient, or to the gradient if that is its only part.
  const auto store = [&](const PartedGradient& gradient, auto* whole, int part, int group,
                         int64_t t, int n, float sum) {
    const int64_t pitch = int64_t(gradient.groups) * gradient.width;
    const int64_t at = (row + t) * pitch + int64_t(group) * gradient.width + n;
    if (gradient.count > 1) {
      p.scratch[gradient.parts + part * tokens * pitch + at] = sum;
    } else {
      whole[at] = from_float<std::remove_pointer_t<decltype(whole)>>(sum);
    }
  };

  for (int64_t span = spans - 1; span >= 0; --span, checkpoint -= per_checkpoint) {
    const int64_t begin = sequence.begin + span * kSpan;
    const int stages = (tokens_left(sequence, begin, kSpan) + kStage - 1) / kStage;
#pragma unroll
    for (int j = 0; j < kEntries; ++j) state[j] = checkpoint[j * kThreads];
    const auto keep = [&](int k) {
#pragma unroll
      for (int j = 0; j < kEntries; j += Row::kRun) {
        Vec<float, Row::kRun> run;
#pragma unroll
        for (int l = 0; l < Row::kRun; ++l) run.at[l] = state[j + l];
        shared.starts[k][j / Row::kRun][threadIdx.x] = run;
      }
    };
    fetch(begin, false);
    for (int k = 0; k + 1 < stages; ++k) {
      keep(k);
      put();
      fetch(begin + (k + 1) * kStage, false);
#pragma unroll 4
      for (int i = 0; i < kStage; ++i) advance(shared.stages[buffer], i);
    }
    keep(stages - 1);
    fetch(begin + (stages - 1) * kStage, true);
    for (int k = stages - 1; k >= 0; --k) {
      const int64_t t = begin + k * kStage;
      const int count = tokens_left(sequence, t, kStage);
      put();
      auto& stage = shared.stages[buffer];
      if (k > 0) fetch(t - kStage, true);

      float before[kStage][kEntries];
#pragma unroll
      for (int j = 0; j < kEntries; j += Row::kRun) {
        const auto run = shared.starts[k][j / Row::kRun][threadIdx.x];
#pragma unroll
        for (int l = 0; l < Row::kRun; ++l) state[j + l] = run.at[l];
      }
#pragma unroll
      for (int i = 0; i < kStage; ++i) {
#pragma unroll
        for (int j = 0; j < kEntries; ++j) before[i][j] = state[j];
        advance(stage, i);
      }
#pragma unroll
      for (int i = kStage - 1; i >= 0; --i) {
        float in[kEntries], out[kEntries], sums[2 * kEntries];
        Row::read(stage.b[i], lane, in);
        Row::read(stage.c[i], lane, out);
        const float input = stage.x[i][local], g = stage.dy[i][local], decay = stage.decay[i];
        const float gain = stage.scale[i] * input;
        float du = 0.f, passed = 0.f;
#pragma unroll
        for (int j = 0; j < kEntries; ++j) {
          const float total = fmaf(g, out[j], dstate[j]);
          sums[j] = total * gain;
          sums[kEntries + j] = g * state[j];
          du = fmaf(total, in[j], du);
          dstate[j] = total * decay;
          passed = fmaf(dstate[j], before[i][j], passed);
          state[j] = before[i][j];
        }
        du = Row::sum(du);
        float dscale = lane == 0 ? du * input : 0.f;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
          passed += __shfl_xor_sync(~0u, passed, offset);
          dscale += __shfl_xor_sync(~0u, dscale, offset);
        }
        if (lane == 0) stage.x[i][local] = fmaf(du, stage.scale[i], skip * g);
        dD = fmaf(g, input, dD);
        Sums::reduce(sums, lane_of_warp);
        const int kept = Sums::first(lane_of_warp);
#pragma unroll
        for (int l = 0; l < Sums::kKept; ++l) {
          const int v = kept + l;
          shared.sums[i][warp][v < kEntries ? Row::position(lane, v)
                                            : kSize + Row::position(lane, v - kEntries)] = sums[l];
        }
        if (lane_of_warp == 0) {
          shared.sums[i][warp][2 * kSize] = passed;
          shared.sums[i][warp][2 * kSize + 1] = dscale;
        }
      }
      __syncthreads();
#pragma unroll
      for (int l = 0; l < kInput; ++l) {
        const int i = Input::row(l), n = Input::column(l);
        if (i >= count || n >= rows) continue;
        store(scratch.dx, static_cast<data_t*>(p.dx), head % x_share, head / x_share, t + i,
              first + n, stage.x[i][n]);
      }
      for (int v = threadIdx.x; v < kStage * Shared<Row>::kSums; v += kThreads) {
        const int i = v / Shared<Row>::kSums, n = v % Shared<Row>::kSums;
        if (i >= count) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.sums[i][w][n];
        if (n == 2 * kSize) {
          store(scratch.dlog_decay, p.dlog_decay, tile, head, t + i, 0, sum);
        } else if (n == 2 * kSize + 1) {
          if (p.dscale) store(scratch.dscale, p.dscale, tile, head, t + i, 0, sum);
        } else if (n < kSize) {
          if (n < f.state_dim)
            store(scratch.dB, static_cast<data_t*>(p.dB), head % b_share * tiles + tile,
                  head / b_share, t + i, n, sum);
        } else if (n - kSize < f.state_dim) {
          store(scratch.dC, static_cast<data_t*>(p.dC), head % c_share * tiles + tile,
                head / c_share, t + i, n - kSize, sum);
        }
      }
    }
  }
  if (writes && p.dinitial_state) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      const int n = Row::position(lane, j);
      if (n < f.state_dim) p.dinitial_state[home + n] = dstate[j];
    }
  }
  if (f.D == nullptr) return;
  if (lane > 0) dD = 0.f;  // the lanes of a row have the same sum
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) dD += __shfl_xor_sync(~0u, dD, offset);
  __syncthreads();
  if (lane_of_warp == 0) shared.sums[0][warp][0] = dD;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) dD += shared.sums[0][w][0];
  p.scratch[scratch.dD + (index * tiles + tile) * f.heads + head] = dD;
}

template <typename Row>
int tiles_of(const SsdScanParams& f) {
  constexpr int kRows = kThreads / Row::kLanes;
  return (f.head_dim + kRows - 1) / kRows;
}

template <typename Row>
RowsScratch scratch_of(const SsdScanParams& f) {
  const int tiles = tiles_of<Row>(f);
  RowsScratch scratch{};
  scratch.states = scratch.take(count_checkpoints(f.batch * f.length, f.sequences, kSpan) *
                                f.heads * tiles * Row::kEntries * kThreads);
  scratch.dD = scratch.take(f.D ? f.sequences * tiles * f.heads : 0);
  scratch.dx = scratch.take_parts(f, f.heads / f.x_heads, f.x_heads, f.head_dim);
  scratch.dB = scratch.take_parts(f, f.heads / f.b_groups * tiles, f.b_groups, f.state_dim);
  scratch.dC = scratch.take_parts(f, f.heads / f.c_groups * tiles, f.c_groups, f.state_dim);
  scratch.dlog_decay = scratch.take_parts(f, tiles, f.heads, 1);
  scratch.dscale = scratch.take_parts(f, tiles, f.scale ? f.heads : 0, 1);
  return scratch;
}

template <typename data_t>
void sum_parts(const PartedGradient& gradient, const SsdScanBackwardParams& p, data_t* sum,
               cudaStream_t stream) {
  const int64_t size = p.forward.batch * p.forward.length * gradient.groups * gradient.width;
  if (gradient.count > 1)
    sum_partials(p.scratch + gradient.parts, size, gradient.count, size, sum, stream);
}

template <typename data_t, typename Row>
void launch(const SsdScanBackwardParams& p, cudaStream_t stream) {
  const SsdScanParams& f = p.forward;
  const int tiles = tiles_of<Row>(f);
  const RowsScratch scratch = scratch_of<Row>(f);
  constexpr int kBytes = sizeof(Shared<Row>);
  auto* kernel = &ssd_scan_rows_backward_kernel<data_t, Row>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto blocks = static_cast<unsigned>(f.sequences * f.heads * tiles);
  if (blocks > 0) kernel<<<blocks, kThreads, kBytes, stream>>>(p, tiles, scratch);
  sum_parts(scratch.dx, p, static_cast<data_t*>(p.dx), stream);
  sum_parts(scratch.dB, p, static_cast<data_t*>(p.dB), stream);
  sum_parts(scratch.dC, p, static_cast<data_t*>(p.dC), stream);
  sum_parts(scratch.dlog_decay, p, p.dlog_decay, stream);
  if (p.dscale != nullptr) sum_parts(scratch.dscale, p, p.dscale, stream);
  if (p.dD != nullptr)
    sum_partials(p.scratch + scratch.dD, f.heads, f.sequences * tiles, f.heads, p.dD, stream);
}

// What a shape runs on; the two uses are the launch and the size of its scratch memory.
template <typename Use>
void with_row(const SsdScanParams& f, const Use& use) {
  if (f.state_dim <= 16) return use(StateRow<16, 4>());
  if (f.state_dim <= 32) return use(StateRow<32, 8>());
  if (f.state_dim <= 64) return use(StateRow<64, 16>());
  if (f.state_dim <= 128) return use(StateRow<128, 32>());
  use(StateRow<kSsdScanMaxStateDim, 32>());
}

}  // namespace

int64_t count_ssd_scan_rows_scratch(const SsdScanParams& f) {
  int64_t floats = 0;
  with_row(f, [&](auto row) { floats = scratch_of<decltype(row)>(f).size; });
  return floats;
}

void launch_ssd_scan_rows_backward(const SsdScanBackwardParams& p, cudaStream_t stream) {
  with_row(p.forward, [&](auto row) {
    switch (p.forward.dtype) {
      case DType::kFloat32:
        return launch<float, decltype(row)>(p, stream);
      case DType::kBFloat16:
        return launch<__nv_bfloat16, decltype(row)>(p, stream);
      case DType::kFloat16:
        return launch<__half, decltype(row)>(p, stream);
    }
  });
}

}  // namespace reasoners
