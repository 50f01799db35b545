// One token of a depthwise causal convolution, in place on each row's ring of past inputs: the
// input at position t is entry t % width, so that a token costs one write and no shift.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kMaxWidth = 4;

template <typename scalar_t>
void update(const Tensor& state, const Tensor& slots, const Tensor& lengths, const Tensor& x,
            const Tensor& weight, const OptionalTensor& bias, bool silu, const Tensor& y) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t batch = x.size(0), channels = x.size(1), width = weight.size(1);
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  const auto* slot_of = slots.const_data_ptr<int32_t>();
  const auto* length_of = lengths.const_data_ptr<int32_t>();
  const auto* x_data = x.const_data_ptr<scalar_t>();
  const auto* weight_data = weight.const_data_ptr<scalar_t>();
  const auto* bias_data = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
  auto* state_data = state.mutable_data_ptr<scalar_t>();
  auto* y_data = y.mutable_data_ptr<scalar_t>();

  // A unit is a block of channels for all rows: its taps are turned once.
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    acc_t taps[kMaxWidth][kBlock], sum[kBlock];
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, channels - first);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t w = 0; w < width; ++w)
          taps[w][c] = static_cast<acc_t>(weight_data[(first + c) * width + w]);
      for (int64_t row = 0; row < batch; ++row) {
        scalar_t* out = y_data + row * channels + first;
        if (slot_of[row] < 0) {
          std::fill(out, out + count, scalar_t(0));
          continue;
        }
        scalar_t* ring = state_data + slot_of[row] * width * channels + first;
        const scalar_t* u = x_data + row * channels + first;
        for (int64_t c = 0; c < count; ++c)
          sum[c] = bias_data ? static_cast<acc_t>(bias_data[first + c]) : acc_t(0);
        for (int64_t w = 0; w < width; ++w) {
          const scalar_t* input =
              w + 1 < width ? ring + (length_of[row] + w) % width * channels : u;
          for (int64_t c = 0; c < count; ++c) sum[c] += taps[w][c] * static_cast<acc_t>(input[c]);
        }
        std::copy(u, u + count, ring + (length_of[row] - 1) % width * channels);
        if (silu)
          for (int64_t c = 0; c < count; ++c) sum[c] *= fast_sigmoid(sum[c]);
        for (int64_t c = 0; c < count; ++c) out[c] = static_cast<scalar_t>(sum[c]);
      }
    }
  });
}

}  // namespace

Tensor cpu::conv_update(const Tensor& state, const Tensor& slots_in, const Tensor& lengths_in,
                        const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        bool silu) {
  check_conv_update(state, slots_in, lengths_in, x, weight, bias);
  const Tensor slots = slots_in.contiguous(), lengths = lengths_in.contiguous();
  Check{"conv_update"}.slots(slots, state.size(0));
  Check{"conv_update"}.lengths(slots, lengths);
  auto y = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "conv_update", [&] {
    update<scalar_t>(state, slots, lengths, x.contiguous(), weight.contiguous(),
                     bias ? OptionalTensor(bias->contiguous()) : bias, silu, y);
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("conv_update", &cpu::conv_update); }

}  // namespace reasoners
