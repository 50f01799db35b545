// S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t, y_t = S_t . C_t + D x_t, one token after the
// other, with a decay for every channel and state entry.
//
// A block serves one sequence and a tile of neighbouring channels that read the same group of B and
// of C, and walks all tokens of the sequence. kLanes neighbouring threads hold one channel's state
// of N entries and its row of A in registers; the product with C is reduced over them by shuffles.
// Tokens come in stages of kStage: while one stage is computed from shared memory, the next is on
// its way into registers, and the two buffers in shared memory let one barrier a stage suffice.
// Channels past the tile and entries past N are zeros that take part and are not written. What is
// left is the exponentials, one per state entry and token.
//
//   N        <= 16   <= 32   <= 64   <= 128   <= 256
//   kLanes      4       4       8       16       32     channels per block: 128 / kLanes
//   kStage     16      16       8        8        4     tokens

#include <numeric>

#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // per multiprocessor: room for the registers of four unrolled tokens

template <int kChannels, int kSize, int kStage>
struct alignas(16) Stage {
  float b[kStage][kSize], c[kStage][kSize], x[kStage][kChannels], delta[kStage][kChannels];
};

// `run` neighbouring channels share B and C; each run is cut into `tiles` tiles.
template <typename data_t, typename Row, int kStage>
__global__ void __launch_bounds__(kThreads, kBlocks)
    selective_scan_kernel(const SelectiveScanParams p, int run, int tiles) {
  constexpr int kSize = Row::kSize, kEntries = Row::kEntries, kChannels = kThreads / Row::kLanes;
  using Matrix = Share<kStage, kSize, kThreads>;
  using Input = Share<kStage, kChannels, kThreads>;
  constexpr int kMatrix = Matrix::kCount, kInput = Input::kCount;
  __shared__ Stage<kChannels, kSize, kStage> stages[2];

  const int blocks = p.channels / run * tiles;  // of one sequence
  const int64_t index = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int first_of_run = block / tiles * run, first = first_of_run + block % tiles * kChannels;
  const int channels = min(kChannels, first_of_run + run - first);  // of this tile
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const auto* x = static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch + first;
  const float* delta = p.delta + sequence.batch * p.delta_strides.batch + first;
  const auto* b = static_cast<const data_t*>(p.B) + sequence.batch * p.b_strides.batch +
                  int64_t(first / (p.channels / p.b_groups)) * p.state_dim;
  const auto* c = static_cast<const data_t*>(p.C) + sequence.batch * p.c_strides.batch +
                  int64_t(first / (p.channels / p.c_groups)) * p.state_dim;

  // This thread's tokens of the next stage, on their way to shared memory.
  data_t next_b[kMatrix], next_c[kMatrix], next_x[kInput];
  float next_delta[kInput];
  const auto fetch = [&](int64_t t) {
    const data_t zero = from_float<data_t>(0.f);
    const int left = tokens_left(sequence, t, kStage);
    const data_t *from_b = b + t * p.b_strides.token, *from_c = c + t * p.c_strides.token,
                 *from_x = x + t * p.x_strides.token;
    const float* from_delta = delta + t * p.delta_strides.token;
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      const int i = Matrix::row(k), n = Matrix::column(k);
      const bool in = i < left && n < p.state_dim;
      next_b[k] = in ? from_b[i * p.b_strides.token + n] : zero;
      next_c[k] = in ? from_c[i * p.c_strides.token + n] : zero;
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      const int i = Input::row(k), n = Input::column(k);
      const bool in = i < left && n < channels;
      next_x[k] = in ? from_x[i * p.x_strides.token + n] : zero;
      next_delta[k] = in ? from_delta[i * p.delta_strides.token + n] : 0.f;
    }
  };
  const auto put = [&](Stage<kChannels, kSize, kStage>& stage) {
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      stage.b[Matrix::row(k)][Matrix::column(k)] = to_float(next_b[k]);
      stage.c[Matrix::row(k)][Matrix::column(k)] = to_float(next_c[k]);
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k) {
      if (Input::row(k) >= kStage) continue;
      stage.x[Input::row(k)][Input::column(k)] = to_float(next_x[k]);
      stage.delta[Input::row(k)][Input::column(k)] = next_delta[k];
    }
  };

  const int lane = threadIdx.x % Row::kLanes, local = threadIdx.x / Row::kLanes;
  const bool writes = local < channels;
  const int64_t channel = first + local;
  const float skip = p.D && writes ? p.D[channel] : 0.f;
  const int64_t home = (index * p.channels + channel) * p.state_dim;  // in a state tensor
  // exp(delta A) is 2 to the power of delta times this: one multiplication less an entry.
  constexpr float kLog2e = 1.44269504088896f;
  float exponent[kEntries], state[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    const bool in = writes && n < p.state_dim;
    exponent[j] = in ? p.A[channel * p.state_dim + n] * kLog2e : 0.f;
    state[j] = in && p.initial_state ? p.initial_state[home + n] : 0.f;
  }

  auto* y = static_cast<data_t*>(p.y) + sequence.batch * p.length * p.channels + channel;
  int buffer = 0;
  fetch(sequence.begin);
  for (int64_t t = sequence.begin; t < sequence.end; t += kStage) {
    const auto& stage = stages[buffer];
    put(stages[buffer]);
    buffer ^= 1;
    __syncthreads();
    fetch(t + kStage);
    const int count = tokens_left(sequence, t, kStage);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float in[kEntries], out[kEntries];
      Row::read(stage.b[i], lane, in);
      Row::read(stage.c[i], lane, out);
      const float step = stage.delta[i][local], input = stage.x[i][local];
      const float gain = step * input;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kEntries; ++j) {
        state[j] = fmaf(exp2f(step * exponent[j]), state[j], gain * in[j]);
        sum = fmaf(state[j], out[j], sum);
      }
      sum = Row::sum(sum);
      if (lane == 0 && writes) y[(t + i) * p.channels] = from_float<data_t>(fmaf(skip, input, sum));
    }
  }
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    if (writes && n < p.state_dim) p.final_state[home + n] = state[j];
  }
}

template <typename data_t, int kSize, int kLanes, int kStage>
void launch(const SelectiveScanParams& p, cudaStream_t stream) {
  const int run = std::gcd(p.channels / p.b_groups, p.channels / p.c_groups);
  const int per_block = kThreads / kLanes, tiles = (run + per_block - 1) / per_block;
  const int64_t blocks = p.sequences * (p.channels / run) * tiles;
  selective_scan_kernel<data_t, StateRow<kSize, kLanes>, kStage>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, run, tiles);
}

template <typename data_t>
void dispatch_width(const SelectiveScanParams& p, cudaStream_t stream) {
  if (p.state_dim <= 16) return launch<data_t, 16, 4, 16>(p, stream);
  if (p.state_dim <= 32) return launch<data_t, 32, 4, 16>(p, stream);
  if (p.state_dim <= 64) return launch<data_t, 64, 8, 8>(p, stream);
  if (p.state_dim <= 128) return launch<data_t, 128, 16, 8>(p, stream);
  launch<data_t, kSelectiveScanMaxStateDim, 32, 4>(p, stream);
}

}  // namespace

void launch_selective_scan(const SelectiveScanParams& p, cudaStream_t stream) {
  if (p.sequences == 0 || p.channels == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_width<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_width<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_width<__half>(p, stream);
  }
}

}  // namespace reasoners
