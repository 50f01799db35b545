// Cross entropy and divergence of every token's next-token distribution, and the gradient of their
// weighted sum in place of the student's logits. A thread has a row, widened once for all passes;
// exponentials and sums are loops that the compiler vectorises.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/fast_exp.h"

namespace reasoners {
namespace {

constexpr int64_t kGrain = 16384;  // logits a thread takes at least

// The sum of value(i) over i < n, in a fixed order; partial sums of a vector's width.
template <typename acc_t, typename Value>
acc_t sum_of(int64_t n, const Value& value) {
  constexpr int64_t kLanes = 16, kBlock = 64 * kLanes;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    acc_t lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += value(i + k);
    for (; i < end; ++i) lanes[i % kLanes] += value(i);
    for (const acc_t lane : lanes) sum += lane;
  }
  return static_cast<acc_t>(sum);
}

// log p of a logit x is factor (x - max) - log_sum.
template <typename acc_t>
struct Normalizer {
  acc_t factor, max, log_sum;

  Normalizer(const std::vector<acc_t>& logits, acc_t factor)
      : factor(factor), max(*std::max_element(logits.begin(), logits.end())) {
    const acc_t* x = logits.data();
    log_sum = std::log(sum_of<acc_t>(
        logits.size(), [&, max = max](int64_t i) { return fast_exp(factor * (x[i] - max)); }));
  }
  acc_t log_of(acc_t x) const { return factor * (x - max) - log_sum; }
};

// Of one row: losses(), and gradient(write).
template <typename acc_t>
class Row {
 public:
  Row(std::vector<acc_t> student, std::vector<acc_t> teacher, double beta, double temperature)
      : a_(std::move(student)),
        b_(std::move(teacher)),
        beta_(beta),
        inverse_(1 / temperature),
        plain_(a_, 1),
        student_(temperature == 1 ? plain_ : Normalizer<acc_t>(a_, inverse_)),
        teacher_(b_.empty() ? plain_ : Normalizer<acc_t>(b_, inverse_)) {}

  acc_t ce(int64_t label) const { return -plain_.log_of(a_[label]); }

  acc_t kl() {
    const acc_t *a = a_.data(), *b = b_.data();
    // 0 log 0 is 0; and where a probability is too small for a number its term is.
    const auto term = [](acc_t log_p, acc_t log_q) {
      const acc_t p = fast_exp(log_p);
      return p == 0 ? acc_t(0) : p * (log_p - log_q);
    };
    const auto sum = [&](auto&& value) {
      return sum_of<acc_t>(a_.size(), [&](int64_t i) {
        return value(student_.log_of(a[i]), teacher_.log_of(b[i]));
      });
    };
    if (beta_ == 0) return sum([&](acc_t s, acc_t t) { return term(t, s); });
    if (beta_ == 1) return middle_ = sum(term);
    middle_ = sum([&](acc_t s, acc_t t) { return term(s, log_mixture(s, t)); });
    return beta_ * sum([&](acc_t s, acc_t t) { return term(t, log_mixture(s, t)); }) +
           (1 - beta_) * middle_;
  }

  // write(i, gradient of (1 - kl_weight) ce + kl_weight kl); kl() comes first.
  template <typename Write>
  void gradient(int64_t label, acc_t kl_weight, const Write& write) const {
    const acc_t of_ce = 1 - kl_weight,
                of_kl = kl_weight * inverse_ * (beta_ > 0 && beta_ < 1 ? 1 - beta_ : 1);
    for (int64_t i = 0; i < static_cast<int64_t>(a_.size()); ++i) {
      acc_t sum = 0;
      if (of_ce > 0) sum = of_ce * (fast_exp(plain_.log_of(a_[i])) - (i == label));
      if (of_kl > 0) {
        const acc_t log_s = student_.log_of(a_[i]), log_t = teacher_.log_of(b_[i]);
        const acc_t s = fast_exp(log_s);
        if (beta_ == 0)
          sum += of_kl * (s - fast_exp(log_t));
        else if (s != 0)
          sum += of_kl * s * (log_s - (beta_ == 1 ? log_t : log_mixture(log_s, log_t)) - middle_);
      }
      write(i, sum);
    }
  }

 private:
  // log of (1 - beta) s + beta t.
  acc_t log_mixture(acc_t log_s, acc_t log_t) const {
    const acc_t s = log_s + std::log1p(-beta_), t = log_t + std::log(beta_);
    return std::max(s, t) + std::log1p(std::exp(-std::abs(s - t)));
  }

  std::vector<acc_t> a_, b_;
  acc_t beta_, inverse_;
  Normalizer<acc_t> plain_, student_, teacher_;
  acc_t middle_ = 0;  // KL(s || t), or KL(s || M)
};

std::tuple<Tensor, Tensor> distillation_losses(const Tensor& logits, const OptionalTensor& taught,
                                               const Tensor& labels_in, double beta,
                                               double temperature, double kl_weight,
                                               bool gradient) {
  check_distillation_losses(logits, taught, labels_in, beta, temperature, kl_weight);
  const int64_t tokens = logits.size(0), vocab = logits.size(1);
  const Tensor labels = labels_in.contiguous();
  const auto* label_of = labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < tokens; ++row)
    TORCH_CHECK_INDEX(label_of[row] >= 0 && label_of[row] < vocab,
                      "distillation_losses: labels expected from 0 to ", vocab - 1, ", got ",
                      label_of[row]);
  const auto wide = logits.options().dtype(wide_dtype(logits.scalar_type()));
  auto ce = at::empty({tokens}, wide), kl = at::zeros({tokens}, wide);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, logits.scalar_type(), "distillation_losses", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto* student = logits.mutable_data_ptr<scalar_t>();
    const auto* teacher = taught ? taught->const_data_ptr<scalar_t>() : nullptr;
    auto *ces = ce.mutable_data_ptr<acc_t>(), *kls = kl.mutable_data_ptr<acc_t>();
    at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / vocab), [&](int64_t r, int64_t end) {
      const auto widened = [&](const scalar_t* from) {
        return from ? std::vector<acc_t>(from + r * vocab, from + (r + 1) * vocab)
                    : std::vector<acc_t>();
      };
      for (; r < end; ++r) {
        Row<acc_t> row(widened(student), widened(teacher), beta, temperature);
        ces[r] = row.ce(label_of[r]);
        if (teacher) kls[r] = row.kl();
        if (gradient)
          row.gradient(label_of[r], kl_weight, [to = student + r * vocab](int64_t i, acc_t value) {
            to[i] = static_cast<scalar_t>(value);
          });
      }
    });
  });
  return {ce, kl};
}

}  // namespace

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("distillation_losses", &distillation_losses); }

}  // namespace reasoners
