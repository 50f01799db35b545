// state_update with the state written every `period` tokens: the tokens between are kept as they
// came and folded onto the state where it is read.
//
// With w_j = scale_j exp(sum of the log decays after j) and d the decay over all of them,
//   S = d state + sum_j w_j x_j B_j^T,   S C = d (state C) + sum_j w_j (B_j . C) x_j,
// so a token that does not write reads the state once and costs little more for what is pending.
// Work is one (row, head).

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/head_state.h"
#include "cpu/operators.h"

namespace reasoners {
namespace {

// A head's tokens, oldest first: those pending and the one that comes.
template <typename scalar_t, typename acc_t>
struct Tokens {
  int64_t count;
  const scalar_t* x[kMaxCapacity + 1];
  acc_t weight[kMaxCapacity + 1];
  acc_t decay;     // of the state, over all tokens
  const acc_t* b;  // (count, N)
};

template <typename scalar_t, typename state_t, typename acc_t>
void read_head(const state_t* state, const Tokens<scalar_t, acc_t>& tokens, const acc_t* c,
               acc_t skip, int64_t head_dim, int64_t state_dim, scalar_t* out) {
  acc_t seen[kMaxCapacity + 1];
  for (int64_t j = 0; j < tokens.count; ++j) {
    const acc_t* b = tokens.b + j * state_dim;
    acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < state_dim; ++n) sum += b[n] * c[n];
    seen[j] = tokens.weight[j] * sum;
  }
  seen[tokens.count - 1] += skip;
  for (int64_t p = 0; p < head_dim; ++p, state += state_dim) {
    acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < state_dim; ++n) sum += static_cast<acc_t>(state[n]) * c[n];
    sum *= tokens.decay;
    for (int64_t j = 0; j < tokens.count; ++j) sum += seen[j] * static_cast<acc_t>(tokens.x[j][p]);
    out[p] = static_cast<scalar_t>(sum);
  }
}

template <typename scalar_t, typename state_t, typename acc_t>
void write_head(state_t* state, const Tokens<scalar_t, acc_t>& tokens, const acc_t* c, acc_t skip,
                const uint16_t* noise, int64_t head_dim, int64_t state_dim, acc_t* next,
                scalar_t* out) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kVec = Vec::size();
  acc_t gain[kMaxCapacity + 1];
  for (int64_t p = 0; p < head_dim; ++p, state += state_dim) {
    for (int64_t n = 0; n < state_dim; ++n) next[n] = tokens.decay * static_cast<acc_t>(state[n]);
    for (int64_t j = 0; j < tokens.count; ++j)
      gain[j] = tokens.weight[j] * static_cast<acc_t>(tokens.x[j][p]);
    int64_t n = 0;
    for (; n + 4 * kVec <= state_dim; n += 4 * kVec) {  // all tokens onto entries in registers
      Vec sums[4];
      for (int k = 0; k < 4; ++k) sums[k] = Vec::loadu(next + n + k * kVec);
      for (int64_t j = 0; j < tokens.count; ++j) {
        const acc_t* b = tokens.b + j * state_dim + n;
        for (int k = 0; k < 4; ++k)
          sums[k] = at::vec::fmadd(Vec(gain[j]), Vec::loadu(b + k * kVec), sums[k]);
      }
      for (int k = 0; k < 4; ++k) sums[k].store(next + n + k * kVec);
    }
    for (int64_t j = 0; j < tokens.count; ++j)
      for (int64_t i = n; i < state_dim; ++i) next[i] += gain[j] * tokens.b[j * state_dim + i];
    acc_t sum = skip * static_cast<acc_t>(tokens.x[tokens.count - 1][p]);
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < state_dim; ++n) sum += next[n] * c[n];
    out[p] = static_cast<scalar_t>(sum);
    if constexpr (std::is_same_v<state_t, at::BFloat16>) {
      if (noise) {
        for (int64_t n = 0; n < state_dim; ++n) state[n] = round_by(next[n], noise[n]);
        noise += state_dim;
        continue;
      }
    }
    for (int64_t n = 0; n < state_dim; ++n) state[n] = narrow<state_t>(next[n]);
  }
}

template <typename scalar_t, typename state_t>
void update(const Tensor& state, const Tensor& recent, const Tensor& recent_decay,
            const Tensor& pending, const Tensor& slots, const Tensor& x, const Tensor& log_decay,
            const Tensor& B, const Tensor& C, const OptionalTensor& scale, const OptionalTensor& D,
            int64_t period, const OptionalTensor& rng_key, const Tensor& y) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t batch = y.size(0), heads = y.size(1), head_dim = y.size(2), state_dim = B.size(2);
  const int64_t x_share = heads / x.size(1), b_share = heads / B.size(1),
                c_share = heads / C.size(1);
  const int64_t x_width = x.size(1) * head_dim, b_width = B.size(1) * state_dim;
  const int64_t capacity = recent.size(1), size = head_dim * state_dim;
  const auto* slot_of = slots.const_data_ptr<int32_t>();
  const auto* pending_of = pending.const_data_ptr<int32_t>();
  const auto* x_data = x.const_data_ptr<scalar_t>();
  const auto* decay_data = log_decay.const_data_ptr<acc_t>();
  const auto* b_data = B.const_data_ptr<scalar_t>();
  const auto* c_data = C.const_data_ptr<scalar_t>();
  const auto* scale_data = scale ? scale->const_data_ptr<acc_t>() : nullptr;
  const auto* d_data = D ? D->const_data_ptr<acc_t>() : nullptr;
  const auto* key_data = rng_key ? rng_key->const_data_ptr<int64_t>() : nullptr;
  auto* state_data = state.mutable_data_ptr<state_t>();
  auto* recent_data = recent.mutable_data_ptr<scalar_t>();
  auto* kept_data = recent_decay.mutable_data_ptr<acc_t>();
  auto* y_data = y.mutable_data_ptr<scalar_t>();

  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> wide((kMaxCapacity + 3) * state_dim);
    acc_t *b = wide.data(), *c = b + (kMaxCapacity + 1) * state_dim, *next = c + state_dim;
    RoundingNoise noise;
    Tokens<scalar_t, acc_t> tokens;
    tokens.b = b;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads, head = i % heads, slot = slot_of[row];
      scalar_t* out = y_data + i * head_dim;
      if (slot < 0) {
        std::fill(out, out + head_dim, scalar_t(0));
        continue;
      }
      const int64_t held = pending_of[slot];
      scalar_t* entries = recent_data + slot * capacity * (x_width + b_width);
      acc_t* kept = kept_data + slot * capacity * 2 * heads;
      const int64_t x_from = head / x_share * head_dim, b_from = head / b_share * state_dim;
      const auto* c_in = c_data + (row * C.size(1) + head / c_share) * state_dim;
      for (int64_t n = 0; n < state_dim; ++n) c[n] = static_cast<acc_t>(c_in[n]);

      // From the last token back, the log decays add up to what is left of the ones before.
      tokens.count = held + 1;
      acc_t after = 0;
      for (int64_t j = held; j >= 0; --j) {
        const bool now = j == held;
        const acc_t* old = kept + j * 2 * heads;
        const acc_t weight = now ? (scale_data ? scale_data[i] : acc_t(1)) : old[heads + head];
        tokens.weight[j] = weight * std::exp(after);
        after += now ? decay_data[i] : old[head];
        const scalar_t* entry = entries + j * (x_width + b_width);
        tokens.x[j] = (now ? x_data + row * x_width : entry) + x_from;
        const scalar_t* b_in = (now ? b_data + row * b_width : entry + x_width) + b_from;
        for (int64_t n = 0; n < state_dim; ++n) b[j * state_dim + n] = static_cast<acc_t>(b_in[n]);
      }
      tokens.decay = std::exp(after);

      const acc_t skip = d_data ? d_data[head] : acc_t(0);
      state_t* s = state_data + (slot * heads + head) * size;
      if (held + 1 < period) {
        read_head(s, tokens, c, skip, head_dim, state_dim, out);
        acc_t* keep = kept + held * 2 * heads + head;
        keep[0] = decay_data[i];
        keep[heads] = tokens.weight[held];
        if (head == 0) {
          scalar_t* entry = entries + held * (x_width + b_width);
          std::copy_n(x_data + row * x_width, x_width, entry);
          std::copy_n(b_data + row * b_width, b_width, entry + x_width);
        }
        continue;
      }
      const auto* bits = key_data ? noise(key_data + 4 * row, head * size, size) : nullptr;
      if (held == 0)
        token_onto_head(s, tokens.x[0], b, c, tokens.decay, tokens.weight[0], skip, bits, head_dim,
                        state_dim, out);
      else
        write_head(s, tokens, c, skip, bits, head_dim, state_dim, next, out);
    }
  });
}

}  // namespace

Tensor cpu::deferred_state_update(const Tensor& state, const Tensor& recent,
                                  const Tensor& recent_decay, const Tensor& pending,
                                  const Tensor& slots_in, const Tensor& x, const Tensor& log_decay,
                                  const Tensor& B, const Tensor& C, const OptionalTensor& scale,
                                  const OptionalTensor& D, int64_t period,
                                  const OptionalTensor& rng_key) {
  check_deferred_state_update(state, recent, recent_decay, pending, slots_in, x, log_decay, B, C,
                              scale, D, period, rng_key);
  const Tensor slots = slots_in.contiguous();
  const Check check{"deferred_state_update"};
  check.slots(slots, state.size(0));
  check.pending(slots, pending, recent.size(1));
  auto y = at::empty({x.size(0), log_decay.size(1), x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "deferred_state_update", [&] {
    using data_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND(
        at::kBFloat16, state.scalar_type(), "deferred_state_update", [&] {
          if constexpr (std::is_same_v<data_t, double> == std::is_same_v<scalar_t, double>)
            update<data_t, scalar_t>(state, recent, recent_decay, pending, slots, x.contiguous(),
                                     log_decay.contiguous(), B.contiguous(), C.contiguous(),
                                     cpu::contiguous(scale), cpu::contiguous(D), period,
                                     cpu::contiguous(rng_key), y);
        });
  });
  return y;
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("deferred_state_update", &cpu::deferred_state_update);
}

}  // namespace reasoners
