// The Mamba-1 recurrence S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t, y_t = S_t . C_t + D x_t
// over packed or batched sequences, and its derivative. Every channel c has a state of N entries;
// it reads B and C of its group.
//
// A unit of work is (sequence, block of channels), tokens inside: the block's state stays in L1,
// and each channel's loop over N vectorises, its exponential included (it dominates). The
// derivative walks segments of kSegment tokens backwards, first recomputing the states of the
// segment from its stored start. A channel's dA and dD are summed over sequences in order
// afterwards, dB and dC over the channels of a group inside the unit, whose blocks are whole
// groups: no sum depends on the threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "cpu/sequences.h"
#include "cpu/widened.h"

namespace reasoners {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kSegment = 32;

template <typename scalar_t>
struct Arguments {
  using acc_t = at::opmath_type<scalar_t>;

  Arguments(const Tensor& x_in, const Tensor& delta_in, const Tensor& A_in, const Tensor& B_in,
            const Tensor& C_in, const OptionalTensor& D_in, const OptionalTensor& initial_in,
            const OptionalTensor& cu_seqlens)
      : held{x_in.contiguous(),
             delta_in.contiguous(),
             A_in.contiguous(),
             B_in.contiguous(),
             C_in.contiguous(),
             D_in ? D_in->contiguous() : Tensor(),
             initial_in ? initial_in->contiguous() : Tensor()},
        sequences(cu_seqlens, x_in.size(1)),
        x(held[0].const_data_ptr<scalar_t>()),
        delta(held[1].const_data_ptr<acc_t>()),
        A(held[2].const_data_ptr<acc_t>()),
        B(held[3].const_data_ptr<scalar_t>()),
        C(held[4].const_data_ptr<scalar_t>()),
        D(D_in ? held[5].const_data_ptr<acc_t>() : nullptr),
        initial(initial_in ? held[6].const_data_ptr<acc_t>() : nullptr),
        channels(x_in.size(2)),
        state_dim(A_in.size(1)),
        b_groups(B_in.size(2)),
        c_groups(C_in.size(2)) {}

  const scalar_t* b(int64_t row, int64_t c) const {
    return B + (row * b_groups + c / (channels / b_groups)) * state_dim;
  }
  const scalar_t* c(int64_t row, int64_t ch) const {
    return C + (row * c_groups + ch / (channels / c_groups)) * state_dim;
  }
  // The state of channels [first, last) before the sequence, (last - first, N).
  void start(int64_t sequence, int64_t first, int64_t last, acc_t* state) const {
    const int64_t size = (last - first) * state_dim;
    if (initial == nullptr)
      std::fill(state, state + size, acc_t(0));
    else
      std::copy_n(initial + (sequence * channels + first) * state_dim, size, state);
  }
  // One token of one channel: next = exp(delta A) state + delta x B.
  void advance(int64_t row, int64_t ch, const acc_t* in, const acc_t* state, acc_t* next) const {
    const acc_t step = delta[row * channels + ch];
    const acc_t gain = step * static_cast<acc_t>(x[row * channels + ch]);
    const acc_t* a = A + ch * state_dim;
#pragma omp simd
    for (int64_t n = 0; n < state_dim; ++n)
      next[n] = fast_exp(step * a[n]) * state[n] + gain * in[n];
  }

  const Tensor held[7];
  const Sequences sequences;
  const scalar_t* const x;
  const acc_t *const delta, *const A;
  const scalar_t *const B, *const C;
  const acc_t *const D, *const initial;
  const int64_t channels, state_dim, b_groups, c_groups;
};

template <typename scalar_t>
void forward(const Arguments<scalar_t>& in, int64_t num_sequences, scalar_t* y,
             at::opmath_type<scalar_t>* final_state) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t blocks = (in.channels + kBlock - 1) / kBlock, N = in.state_dim;
  at::parallel_for(0, num_sequences * blocks, 1, [&](int64_t from, int64_t to) {
    Widened<scalar_t, acc_t> wide_b(N), wide_c(N);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t sequence = unit / blocks, first = unit % blocks * kBlock;
      const int64_t last = std::min(first + kBlock, in.channels);
      acc_t* state = final_state + (sequence * in.channels + first) * N;
      in.start(sequence, first, last, state);
      for (int64_t row = in.sequences.begin(sequence); row < in.sequences.end(sequence); ++row) {
        for (int64_t ch = first; ch < last; ++ch) {
          acc_t* s = state + (ch - first) * N;
          in.advance(row, ch, wide_b(in.b(row, ch)), s, s);
          const acc_t* read = wide_c(in.c(row, ch));
          acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t n = 0; n < N; ++n) sum += s[n] * read[n];
          const int64_t at = row * in.channels + ch;
          if (in.D != nullptr) sum += in.D[ch] * static_cast<acc_t>(in.x[at]);
          y[at] = static_cast<scalar_t>(sum);
        }
      }
    }
  });
}

template <typename scalar_t>
struct Gradients {
  using acc_t = at::opmath_type<scalar_t>;
  scalar_t* x;
  acc_t *delta, *A, *B, *C, *D, *initial;  // A and D: one row per sequence; B and C: before casting
};

template <typename scalar_t>
void backward(const Arguments<scalar_t>& in, int64_t num_sequences, const scalar_t* dy,
              const at::opmath_type<scalar_t>* dfinal, const Gradients<scalar_t>& out) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t N = in.state_dim;
  // Whole groups of B and of C in every block, so that no two units add to one gradient.
  const int64_t group = std::lcm(in.channels / in.b_groups, in.channels / in.c_groups);
  const int64_t block = (kBlock + group - 1) / group * group;
  const int64_t blocks = (in.channels + block - 1) / block;
  at::parallel_for(0, num_sequences * blocks, 1, [&](int64_t from, int64_t to) {
    std::vector<acc_t> states, starts, dstate;
    Widened<scalar_t, acc_t> wide_b(N), wide_c(N);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t sequence = unit / blocks, first = unit % blocks * block;
      const int64_t last = std::min(first + block, in.channels), size = (last - first) * N;
      const int64_t begin = in.sequences.begin(sequence), end = in.sequences.end(sequence);
      const int64_t segments = (end - begin + kSegment - 1) / kSegment;
      // starts[i]: the state before segment i. states: before and after each token of a segment.
      starts.resize(std::max<int64_t>(segments, 1) * size);
      states.resize((kSegment + 1) * size);
      in.start(sequence, first, last, starts.data());
      for (int64_t i = 0; i + 1 < segments; ++i) {
        acc_t* state = starts.data() + (i + 1) * size;
        std::copy_n(state - size, size, state);
        for (int64_t row = begin + i * kSegment; row < begin + (i + 1) * kSegment; ++row)
          for (int64_t ch = first; ch < last; ++ch)
            in.advance(row, ch, wide_b(in.b(row, ch)), state + (ch - first) * N,
                       state + (ch - first) * N);
      }
      const int64_t home = sequence * in.channels + first;
      dstate.assign(dfinal + home * N, dfinal + home * N + size);
      for (int64_t i = segments - 1; i >= 0; --i) {
        const int64_t start = begin + i * kSegment, stop = std::min(start + kSegment, end);
        std::copy_n(starts.data() + i * size, size, states.data());
        for (int64_t row = start; row < stop; ++row)
          for (int64_t ch = first; ch < last; ++ch) {
            acc_t* before = states.data() + (row - start) * size + (ch - first) * N;
            in.advance(row, ch, wide_b(in.b(row, ch)), before, before + size);
          }
        for (int64_t row = stop - 1; row >= start; --row) {
          for (int64_t ch = first; ch < last; ++ch) {
            const int64_t at = row * in.channels + ch;
            const acc_t* before = states.data() + (row - start) * size + (ch - first) * N;
            const acc_t* after = before + size;
            const acc_t step = in.delta[at], input = static_cast<acc_t>(in.x[at]);
            const acc_t g = static_cast<acc_t>(dy[at]);
            const acc_t* a = in.A + ch * N;
            const acc_t *b = wide_b(in.b(row, ch)), *c = wide_c(in.c(row, ch));
            acc_t* ds = dstate.data() + (ch - first) * N;
            acc_t* dA = out.A + (sequence * in.channels + ch) * N;
            acc_t* dB = out.B + (in.b(row, ch) - in.B);
            acc_t* dC = out.C + (in.c(row, ch) - in.C);
            acc_t dgain = 0, dstep = 0;
#pragma omp simd reduction(+ : dgain, dstep)
            for (int64_t n = 0; n < N; ++n) {
              dC[n] += g * after[n];
              const acc_t total = ds[n] + g * c[n];
              dB[n] += total * step * input;
              dgain += total * b[n];
              const acc_t decay = fast_exp(step * a[n]);
              const acc_t dexponent = total * decay * before[n];
              dstep += dexponent * a[n];
              dA[n] += dexponent * step;
              ds[n] = total * decay;
            }
            acc_t dinput = dgain * step;
            if (in.D != nullptr) {
              dinput += g * in.D[ch];
              out.D[sequence * in.channels + ch] += g * input;
            }
            out.delta[at] = dstep + dgain * input;
            out.x[at] = static_cast<scalar_t>(dinput);
          }
        }
      }
      if (out.initial != nullptr) std::copy(dstate.begin(), dstate.end(), out.initial + home * N);
    }
  });
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& delta, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens) {
  const int64_t num_sequences =
      check_selective_scan("selective_scan", x, delta, A, B, C, D, initial_state, cu_seqlens);
  if (cu_seqlens)
    Check{"selective_scan"}.boundaries("cu_seqlens", cu_seqlens->contiguous(), x.size(1));
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({num_sequences, x.size(2), A.size(1)}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "selective_scan", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Arguments<scalar_t> in(x, delta, A, B, C, D, initial_state, cu_seqlens);
    forward(in, num_sequences, y.mutable_data_ptr<scalar_t>(),
            final_state.mutable_data_ptr<acc_t>());
  });
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& dy, const Tensor& dfinal_state, const Tensor& x, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "selective_scan_backward";
  const int64_t num_sequences =
      check_selective_scan(op, x, delta, A, B, C, D, initial_state, cu_seqlens);
  const Check check{op};
  const int64_t channels = x.size(2), state_dim = A.size(1);
  check.tensor("dy", dy, x, x.scalar_type(), {x.size(0), x.size(1), channels},
               "(batch, length, channels)");
  check.tensor("dfinal_state", dfinal_state, x, A.scalar_type(),
               {num_sequences, channels, state_dim}, "(batch or sequences, channels, N)");
  if (cu_seqlens) check.boundaries("cu_seqlens", cu_seqlens->contiguous(), x.size(1));
  auto dx = at::empty(x.sizes(), x.options()), ddelta = at::empty(delta.sizes(), A.options());
  auto dA = at::zeros({num_sequences, channels, state_dim}, A.options());
  auto dB = at::zeros(B.sizes(), A.options()), dC = at::zeros(C.sizes(), A.options());
  auto dD = at::zeros({D ? num_sequences : 0, channels}, A.options());
  auto dinitial =
      initial_state ? at::empty(initial_state->sizes(), A.options()) : at::empty({0}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), op, [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Arguments<scalar_t> in(x, delta, A, B, C, D, initial_state, cu_seqlens);
    const auto data = [](const Tensor& t) { return t.mutable_data_ptr<acc_t>(); };
    const Tensor g = dy.contiguous(), gf = dfinal_state.contiguous();
    backward(in, num_sequences, g.const_data_ptr<scalar_t>(), gf.const_data_ptr<acc_t>(),
             Gradients<scalar_t>{dx.mutable_data_ptr<scalar_t>(), data(ddelta), data(dA), data(dB),
                                 data(dC), data(dD), initial_state ? data(dinitial) : nullptr});
  });
  return {dx,
          ddelta,
          dA.sum(0),
          dB.to(B.scalar_type()),
          dC.to(C.scalar_type()),
          D ? dD.sum(0) : at::empty({0}, A.options()),
          dinitial};
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("selective_scan", &selective_scan);
  m.impl("selective_scan_backward", &selective_scan_backward);
}

}  // namespace
}  // namespace reasoners
