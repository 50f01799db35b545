// S_t = exp(log_decay_t) S_{t-1} + scale_t x_t B_t^T, y_t = S_t C_t + D x_t, one token after the
// other: for what ssd_scan.cu does not take.
//
// A block serves one (sequence, head) and a tile of the head's P rows, and walks all tokens of the
// sequence with its part of the state in registers, in fp32. kLanes neighbouring threads hold one
// row of N entries; the product with C is reduced over them by shuffles. Tokens come in stages of
// kStage: while one stage is computed from shared memory, the next is on its way into registers,
// and the two buffers in shared memory let one barrier a stage suffice. Rows past P and entries
// past N are zeros that take part and are not written.
//
//   N        <= 16   <= 32   <= 64   <= 128   <= 256
//   kLanes      4       4       8        8       16     rows of P per block: 128 / kLanes
//   kStage     16      16      16        8        4     tokens

#include "convert.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // per multiprocessor: room for the registers of four unrolled tokens

template <int kRows, int kSize, int kStage>
struct alignas(16) Stage {
  float b[kStage][kSize], c[kStage][kSize], x[kStage][kRows], decay[kStage], scale[kStage];
};

template <typename data_t, typename Row, int kStage>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ssd_scan_kernel(const SsdScanParams p, int tiles) {
  constexpr int kSize = Row::kSize, kEntries = Row::kEntries, kRows = kThreads / Row::kLanes;
  using Matrix = Share<kStage, kSize, kThreads>;
  using Input = Share<kStage, kRows, kThreads>;
  constexpr int kMatrix = Matrix::kCount, kInput = Input::kCount;
  __shared__ Stage<kRows, kSize, kStage> stages[2];

  const int64_t unit = blockIdx.x / tiles;
  const int first_row = blockIdx.x % tiles * kRows;
  const int64_t index = unit / p.heads;
  const int head = unit % p.heads;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const auto* x = static_cast<const data_t*>(p.x) + sequence.batch * p.x_strides.batch +
                  int64_t(head / (p.heads / p.x_heads)) * p.head_dim;
  const auto* b = static_cast<const data_t*>(p.B) + sequence.batch * p.b_strides.batch +
                  int64_t(head / (p.heads / p.b_groups)) * p.state_dim;
  const auto* c = static_cast<const data_t*>(p.C) + sequence.batch * p.c_strides.batch +
                  int64_t(head / (p.heads / p.c_groups)) * p.state_dim;
  const float* log_decay = p.log_decay + sequence.batch * p.log_decay_strides.batch + head;
  const float* scale = p.scale ? p.scale + sequence.batch * p.scale_strides.batch + head : nullptr;
  const float skip = p.D ? p.D[head] : 0.f;

  // This thread's tokens of the next stage, on their way to shared memory.
  data_t next_b[kMatrix], next_c[kMatrix], next_x[kInput];
  float next_decay = 0.f, next_scale = 1.f;
  const auto fetch = [&](int64_t t) {
    const data_t zero = from_float<data_t>(0.f);
    const int left = tokens_left(sequence, t, kStage);
    const data_t *from_b = b + t * p.b_strides.token, *from_c = c + t * p.c_strides.token,
                 *from_x = x + t * p.x_strides.token + first_row;
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
      const bool in = i < left && first_row + n < p.head_dim;
      next_x[k] = in ? from_x[i * p.x_strides.token + n] : zero;
    }
    const int i = threadIdx.x;
    if (i < left) {
      next_decay = log_decay[(t + i) * p.log_decay_strides.token];
      if (scale) next_scale = scale[(t + i) * p.scale_strides.token];
    }
  };
  const auto put = [&](Stage<kRows, kSize, kStage>& stage) {
#pragma unroll
    for (int k = 0; k < kMatrix; ++k) {
      stage.b[Matrix::row(k)][Matrix::column(k)] = to_float(next_b[k]);
      stage.c[Matrix::row(k)][Matrix::column(k)] = to_float(next_c[k]);
    }
#pragma unroll
    for (int k = 0; k < kInput; ++k)
      if (Input::row(k) < kStage) stage.x[Input::row(k)][Input::column(k)] = to_float(next_x[k]);
    if (threadIdx.x < kStage) {
      stage.decay[threadIdx.x] = expf(next_decay);
      stage.scale[threadIdx.x] = next_scale;
    }
  };

  const int lane = threadIdx.x % Row::kLanes, local_row = threadIdx.x / Row::kLanes;
  const int row = first_row + local_row;
  const int64_t home = (unit * p.head_dim + row) * p.state_dim;  // of the row in a state tensor
  float state[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    const bool in = p.initial_state && row < p.head_dim && n < p.state_dim;
    state[j] = in ? p.initial_state[home + n] : 0.f;
  }

  auto* y = static_cast<data_t*>(p.y) +
            (sequence.batch * p.length * p.heads + head) * int64_t(p.head_dim) + row;
  const int64_t y_stride = int64_t(p.heads) * p.head_dim;
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
      const float decay = stage.decay[i], input = stage.x[i][local_row];
      const float gain = stage.scale[i] * input;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kEntries; ++j) {
        state[j] = fmaf(decay, state[j], gain * in[j]);
        sum = fmaf(state[j], out[j], sum);
      }
      sum = Row::sum(sum);
      if (lane == 0 && row < p.head_dim)
        y[(t + i) * y_stride] = from_float<data_t>(fmaf(skip, input, sum));
    }
  }
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int n = Row::position(lane, j);
    if (row < p.head_dim && n < p.state_dim) p.final_state[home + n] = state[j];
  }
}

template <typename data_t, int kSize, int kLanes, int kStage>
void launch(const SsdScanParams& p, cudaStream_t stream) {
  const int rows = kThreads / kLanes, tiles = (p.head_dim + rows - 1) / rows;
  const int64_t blocks = p.sequences * p.heads * tiles;
  ssd_scan_kernel<data_t, StateRow<kSize, kLanes>, kStage>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, tiles);
}

template <typename data_t>
void dispatch_width(const SsdScanParams& p, cudaStream_t stream) {
  if (p.state_dim <= 16) return launch<data_t, 16, 4, 16>(p, stream);
  if (p.state_dim <= 32) return launch<data_t, 32, 4, 16>(p, stream);
  if (p.state_dim <= 64) return launch<data_t, 64, 8, 16>(p, stream);
  if (p.state_dim <= 128) return launch<data_t, 128, 8, 8>(p, stream);
  launch<data_t, kSsdScanMaxStateDim, 16, 4>(p, stream);
}

}  // namespace

void launch_ssd_scan_rows(const SsdScanParams& p, cudaStream_t stream) {
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
