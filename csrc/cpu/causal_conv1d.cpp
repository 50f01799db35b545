// Depthwise causal convolution of width 2 to 4 over packed or batched sequences, and its
// derivative.
//
// Channels are the contiguous dimension, so every loop runs over a block of them and vectorises as
// it stands. A unit of work is (sequence, channel block) forward. Backward it is a channel block
// alone, walking all sequences in order: the sums for weight and bias then have one order, whatever
// the number of threads. Inputs before a sequence are its initial state, oldest first, or zero.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/operators.h"
#include "cpu/sequences.h"

namespace reasoners {
namespace {

constexpr int64_t kBlock = 256;  // channels of a unit: four rows of a block stay in L1
constexpr int64_t kMaxWidth = 4;

template <typename scalar_t>
struct Convolution {
  using acc_t = at::opmath_type<scalar_t>;

  const scalar_t *x, *weight, *bias, *initial_state;
  int64_t channels, width;
  bool silu;

  // Input `t` tokens after the start of the sequence at row `begin`; negative t reaches back into
  // the initial state. Null where that is zero.
  const scalar_t* input(int64_t sequence, int64_t begin, int64_t t) const {
    if (t >= 0) return x + (begin + t) * channels;
    if (initial_state == nullptr) return nullptr;
    return initial_state + (sequence * (width - 1) + width - 1 + t) * channels;
  }

  // Convolution without activation at token t for `count` channels from `first`.
  void accumulate(int64_t sequence, int64_t begin, int64_t t, int64_t first, int64_t count,
                  const acc_t* taps, acc_t* sum) const {
    for (int64_t c = 0; c < count; ++c) sum[c] = taps[width * kBlock + c];
    for (int64_t w = 0; w < width; ++w) {
      const scalar_t* u = input(sequence, begin, t - (width - 1) + w);
      if (u == nullptr) continue;
      const acc_t* tap = taps + w * kBlock;
      for (int64_t c = 0; c < count; ++c) sum[c] += tap[c] * static_cast<acc_t>(u[first + c]);
    }
  }

  // Weights of a block, one row per tap, and the bias after them.
  void load_taps(int64_t first, int64_t count, acc_t* taps) const {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t w = 0; w < width; ++w)
        taps[w * kBlock + c] = static_cast<acc_t>(weight[(first + c) * width + w]);
      taps[width * kBlock + c] = bias ? static_cast<acc_t>(bias[first + c]) : acc_t(0);
    }
  }
};

template <typename scalar_t>
Convolution<scalar_t> convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& initial_state, bool silu) {
  return {x.const_data_ptr<scalar_t>(),
          weight.const_data_ptr<scalar_t>(),
          bias ? bias->const_data_ptr<scalar_t>() : nullptr,
          initial_state ? initial_state->const_data_ptr<scalar_t>() : nullptr,
          x.size(2),
          weight.size(1),
          silu};
}

template <typename scalar_t>
void forward(const Convolution<scalar_t>& conv, const Sequences& sequences, int64_t num_sequences,
             scalar_t* y, scalar_t* final_state) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t channels = conv.channels, history = conv.width - 1;
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  at::parallel_for(0, num_sequences * blocks, 1, [&](int64_t from, int64_t to) {
    acc_t taps[(kMaxWidth + 1) * kBlock], sum[kBlock];
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t sequence = unit / blocks, first = unit % blocks * kBlock;
      const int64_t count = std::min(kBlock, channels - first);
      const int64_t begin = sequences.begin(sequence), length = sequences.end(sequence) - begin;
      conv.load_taps(first, count, taps);
      for (int64_t t = 0; t < length; ++t) {
        conv.accumulate(sequence, begin, t, first, count, taps, sum);
        scalar_t* out = y + (begin + t) * channels + first;
        if (conv.silu)
          for (int64_t c = 0; c < count; ++c)
            out[c] = static_cast<scalar_t>(sum[c] * fast_sigmoid(sum[c]));
        else
          for (int64_t c = 0; c < count; ++c) out[c] = static_cast<scalar_t>(sum[c]);
      }
      for (int64_t w = 0; w < history; ++w) {
        const scalar_t* u = conv.input(sequence, begin, length - history + w);
        scalar_t* out = final_state + (sequence * history + w) * channels + first;
        if (u == nullptr)
          std::fill(out, out + count, scalar_t(0));
        else
          std::copy(u + first, u + first + count, out);
      }
    }
  });
}

template <typename scalar_t>
void backward(const Convolution<scalar_t>& conv, const Sequences& sequences, int64_t num_sequences,
              const scalar_t* dy, const scalar_t* dfinal_state, scalar_t* dx, scalar_t* dweight,
              scalar_t* dbias, scalar_t* dinitial_state) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t channels = conv.channels, width = conv.width, history = width - 1;
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    acc_t taps[(kMaxWidth + 1) * kBlock], dtaps[(kMaxWidth + 1) * kBlock], sum[kBlock];
    // Gradients of the `width` inputs that the current token reads, a ring over t modulo width.
    acc_t du[kMaxWidth * kBlock];
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, channels - first);
      conv.load_taps(first, count, taps);
      std::fill(std::begin(dtaps), std::end(dtaps), acc_t(0));
      for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
        const int64_t begin = sequences.begin(sequence), length = sequences.end(sequence) - begin;
        const auto ring = [&](int64_t t) { return du + (t + width) % width * kBlock; };
        // The last `history` inputs are the final state; they may reach back before the sequence.
        const auto open = [&](int64_t t) {
          acc_t* g = ring(t);
          const int64_t w = t - (length - history);
          for (int64_t c = 0; c < count; ++c)
            g[c] = w < 0 ? acc_t(0)
                         : static_cast<acc_t>(
                               dfinal_state[(sequence * history + w) * channels + first + c]);
        };
        const auto close = [&](int64_t t) {
          const acc_t* g = ring(t);
          scalar_t* out = nullptr;
          if (t >= 0)
            out = dx + (begin + t) * channels + first;
          else if (dinitial_state != nullptr)
            out = dinitial_state + (sequence * history + history + t) * channels + first;
          if (out == nullptr) return;
          for (int64_t c = 0; c < count; ++c) out[c] = static_cast<scalar_t>(g[c]);
        };
        for (int64_t t = -history; t < 0; ++t) open(t);
        for (int64_t t = 0; t < length; ++t) {
          open(t);
          const scalar_t* g_in = dy + (begin + t) * channels + first;
          if (conv.silu) {
            conv.accumulate(sequence, begin, t, first, count, taps, sum);
            for (int64_t c = 0; c < count; ++c) {
              const acc_t s = fast_sigmoid(sum[c]);
              sum[c] = static_cast<acc_t>(g_in[c]) * s * (acc_t(1) + sum[c] * (acc_t(1) - s));
            }
          } else {
            for (int64_t c = 0; c < count; ++c) sum[c] = static_cast<acc_t>(g_in[c]);
          }
          for (int64_t c = 0; c < count; ++c) dtaps[width * kBlock + c] += sum[c];
          for (int64_t w = 0; w < width; ++w) {
            const int64_t at = t - history + w;
            acc_t* g = ring(at);
            const acc_t* tap = taps + w * kBlock;
            for (int64_t c = 0; c < count; ++c) g[c] += tap[c] * sum[c];
            const scalar_t* u = conv.input(sequence, begin, at);
            if (u == nullptr) continue;
            acc_t* dtap = dtaps + w * kBlock;
            for (int64_t c = 0; c < count; ++c)
              dtap[c] += sum[c] * static_cast<acc_t>(u[first + c]);
          }
          close(t - history);
        }
        for (int64_t t = length - history; t < length; ++t) close(t);
      }
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t w = 0; w < width; ++w)
          dweight[(first + c) * width + w] = static_cast<scalar_t>(dtaps[w * kBlock + c]);
        if (dbias != nullptr) dbias[first + c] = static_cast<scalar_t>(dtaps[width * kBlock + c]);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> cpu::causal_conv1d(const Tensor& x_in, const Tensor& weight_in,
                                              const OptionalTensor& bias_in,
                                              const OptionalTensor& initial_state_in,
                                              const OptionalTensor& cu_seqlens, bool silu) {
  const int64_t num_sequences =
      check_causal_conv1d("causal_conv1d", x_in, weight_in, bias_in, initial_state_in, cu_seqlens);
  if (cu_seqlens)
    Check{"causal_conv1d"}.boundaries("cu_seqlens", cu_seqlens->contiguous(), x_in.size(1));
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const OptionalTensor bias = cpu::contiguous(bias_in),
                       initial_state = cpu::contiguous(initial_state_in);
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({num_sequences, weight.size(1) - 1, x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "causal_conv1d", [&] {
    forward(convolution<scalar_t>(x, weight, bias, initial_state, silu),
            Sequences(cu_seqlens, x.size(1)), num_sequences, y.mutable_data_ptr<scalar_t>(),
            final_state.mutable_data_ptr<scalar_t>());
  });
  return {y, final_state};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& dy_in, const Tensor& dfinal_state_in, const Tensor& x_in, const Tensor& weight_in,
    const OptionalTensor& bias_in, const OptionalTensor& initial_state_in,
    const OptionalTensor& cu_seqlens, bool silu) {
  constexpr const char* op = "causal_conv1d_backward";
  const int64_t num_sequences =
      check_causal_conv1d(op, x_in, weight_in, bias_in, initial_state_in, cu_seqlens);
  const Check check{op};
  check.tensor("dy", dy_in, x_in, x_in.scalar_type(), {x_in.size(0), x_in.size(1), x_in.size(2)},
               "(batch, length, channels)");
  check.tensor("dfinal_state", dfinal_state_in, x_in, x_in.scalar_type(),
               {num_sequences, weight_in.size(1) - 1, x_in.size(2)},
               "(batch or sequences, width - 1, channels)");
  if (cu_seqlens) check.boundaries("cu_seqlens", cu_seqlens->contiguous(), x_in.size(1));
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous(), dy = dy_in.contiguous(),
               dfinal_state = dfinal_state_in.contiguous();
  const OptionalTensor bias = cpu::contiguous(bias_in),
                       initial_state = cpu::contiguous(initial_state_in);
  const auto like = [&](const OptionalTensor& t) {
    return t ? at::empty(t->sizes(), x.options()) : at::empty({0}, x.options());
  };
  auto dx = at::empty(x.sizes(), x.options()), dweight = at::empty(weight.sizes(), x.options());
  auto dbias = like(bias), dinitial_state = like(initial_state);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), op, [&] {
    backward(convolution<scalar_t>(x, weight, bias, initial_state, silu),
             Sequences(cu_seqlens, x.size(1)), num_sequences, dy.const_data_ptr<scalar_t>(),
             dfinal_state.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(),
             dweight.mutable_data_ptr<scalar_t>(),
             bias ? dbias.mutable_data_ptr<scalar_t>() : nullptr,
             initial_state ? dinitial_state.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return {dx, dweight, dbias, dinitial_state};
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("causal_conv1d", &cpu::causal_conv1d);
  m.impl("causal_conv1d_backward", &causal_conv1d_backward);
}

}  // namespace
}  // namespace reasoners
