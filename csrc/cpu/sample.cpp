// From logits to a token: temperature, top-k, top-p, min-p, and Gumbel-max over what is kept.
//
// A row is read once from memory, for the maximum of every block of 128 tokens; what follows works
// from cache and skips blocks by their maximum.
//   1. log-sum-exp of the raw logits, for the log-probability.
//   2. top-k and top-p are thresholds on the logit, found by bisection on its value: steps down
//      from the maximum until enough is above, then halving between the last two, over the tokens
//      that are still between. Enough is a count for top-k, a mass for top-p.
//   3. The winner of z + Gumbel noise. Noise belongs to the token (philox.h), so that no order of
//      evaluation can change the choice. Philox runs 16 lanes wide, for the high halves of the
//      noise; the low ones are drawn, and logarithms taken, only of tokens that could still win, by
//      -log(E) <= -log(v) and a bound of log(v) read off its exponent.
// Nothing is sorted. Tried: bisection over the whole row, 4 times slower for top-p on flat rows.
// One row is one task: the threads of a row would cost more than they bring.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/fast_exp.h"
#include "philox.h"

namespace reasoners {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 128;   // tokens whose noise is drawn together
constexpr int64_t kChunk = 1024;  // numbers summed in float32 before float64 takes over

struct Filters {
  float temperature, top_p, min_p;
  int64_t top_k;
};

struct Choice {
  int64_t token;
  float logprob;
};

// Buffers that the rows of one thread take turns to use.
struct Scratch {
  std::vector<float> wide, block_max, between;
};

class Row {
 public:
  Row(const float* logits, int64_t vocabulary, Scratch& scratch)
      : x_(logits), size_(vocabulary), block_max_(scratch.block_max), between_(scratch.between) {
    block_max_.resize((size_ + kBlock - 1) / kBlock);
    for (int64_t b = 0; b < blocks(); ++b) {
      const float* x = block(b);
      float top = -kInfinity;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < width(b); ++i) top = x[i] > top ? x[i] : top;
      block_max_[b] = top;
      max_ = std::max(max_, top);
    }
  }

  Choice choose(const Filters& filters, const NoiseStream& noise) {
    const double sum = mass<true>(-kInfinity);
    if (!std::isfinite(max_) || std::isnan(sum)) return {-1, std::nanf("")};
    const int64_t token = filters.temperature > 0 ? draw(filters, noise) : first_maximum();
    return {token, static_cast<float>(x_[token] - max_ - std::log(sum))};
  }

 private:
  int64_t blocks() const { return block_max_.size(); }
  const float* block(int64_t b) const { return x_ + b * kBlock; }
  int64_t width(int64_t b) const { return std::min(kBlock, size_ - b * kBlock); }
  float z(float x) const { return (x - max_) * scale_; }

  // What the tokens at or above `threshold` weigh: exp(z), or 1 each.
  template <bool exponential>
  float weigh(const float* x, int64_t n, float threshold) const {
    float weight = 0;
#pragma omp simd reduction(+ : weight)
    for (int64_t i = 0; i < n; ++i)  // not x >= threshold: NaN must count, so that choose() sees it
      weight += x[i] < threshold ? 0.0f : exponential ? fast_exp(z(x[i])) : 1.0f;
    return weight;
  }
  template <bool exponential>
  double mass(float threshold) const {
    double total = 0;
    for (int64_t b = 0; b < blocks(); ++b)
      if (!(block_max_[b] < threshold)) total += weigh<exponential>(block(b), width(b), threshold);
    return total;
  }

  // Copies what lies in [low, high) to `out`, which may be `x`; returns how much that is.
  static int64_t select(const float* x, int64_t n, float low, float high, float* out) {
    int64_t selected = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    for (; i + 16 <= n; i += 16) {
      const __m512 values = _mm512_loadu_ps(x + i);
      const __mmask16 mask = _mm512_cmp_ps_mask(values, _mm512_set1_ps(low), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(values, _mm512_set1_ps(high), _CMP_LT_OQ);
      _mm512_storeu_ps(out + selected, _mm512_maskz_compress_ps(mask, values));
      selected += std::popcount(mask);
    }
#endif
    for (; i < n; ++i) {
      const float value = x[i];
      out[selected] = value;
      selected += (value >= low) & (value < high);  // no branch to mispredict
    }
    return selected;
  }

  // A logit such that the tokens at or above it are the fewest whose weight reaches `target`;
  // `lowest` if these are not enough.
  template <bool exponential>
  float threshold(double target, float lowest) {
    float high = max_, low = max_;
    double above_low = mass<exponential>(low), above_high = 0;
    if (above_low >= target) return max_;
    for (float step = exponential ? 4 / scale_ : 1; above_low < target; step *= 2) {
      if (low == lowest) return lowest;
      high = low, above_high = above_low;
      low = std::max(max_ - step, lowest);
      above_low = mass<exponential>(low);
    }
    between_.resize(size_ + kBlock);
    int64_t n = 0;
    for (int64_t b = 0; b < blocks(); ++b) {
      if (block_max_[b] < low) continue;
      n += select(block(b), width(b), low, high, between_.data() + n);
    }
    while (n > 1) {
      const float middle = 0.5f * low + 0.5f * high;
      if (middle <= low || middle >= high) break;  // equal logits
      double above = above_high;
      for (int64_t i = 0; i < n; i += kChunk)
        above += weigh<exponential>(between_.data() + i, std::min(kChunk, n - i), middle);
      const bool enough = above >= target;
      if (enough) {
        low = middle;
      } else {
        high = middle, above_high = above;
      }
      n = select(between_.data(), n, low, high, between_.data());
    }
    return low;
  }

  int64_t first_maximum() const {
    int64_t b = 0;
    while (block_max_[b] < max_) ++b;
    return std::find(block(b), x_ + size_, max_) - x_;
  }

  int64_t draw(const Filters& filters, const NoiseStream& noise) {
    // Clamped so that neither 0 * infinity nor infinity * 0 can arise.
    constexpr float kSmallest = std::numeric_limits<float>::min(), kLargest = 1 / kSmallest;
    scale_ = std::clamp(1 / filters.temperature, kSmallest, kLargest);
    float kept = -kInfinity;
    if (filters.top_k > 0 && filters.top_k < size_)
      kept = threshold<false>(static_cast<double>(filters.top_k), kept);
    if (filters.top_p < 1) kept = threshold<true>(filters.top_p * mass<true>(kept), kept);
    const float kept_z = filters.min_p > 0 ? std::min(std::log(filters.min_p), 0.0f) : -kInfinity;

    // Whoever wins scores no less than the most probable token, so that one sets the bar.
    const int64_t likeliest = first_maximum();
    Best best{-1, -kInfinity, noise_gumbel(noise_word(noise, likeliest))};
    for (int64_t b = 0; b < blocks(); ++b) {
      const float top = z(block_max_[b]);
      if (block_max_[b] < kept || top < kept_z || top + kMaxGumbel < best.bar) continue;
      visit(b, kept, kept_z, noise, best);
    }
    return best.token;
  }

  struct Best {
    int64_t token;
    float score, bar;
  };

  void visit(int64_t b, float kept, float kept_z, const NoiseStream& noise, Best& best) const {
    constexpr float kSlack = 1e-3f;  // over the rounding of the bound
    const float* x = block(b);
    uint32_t words[kBlock / 2], high[kBlock];  // the least words that have a token's high half
    const auto first = static_cast<uint32_t>(b * (kBlock / 8));
#pragma omp simd
    for (int lane = 0; lane < kBlock / 8; ++lane) {
      const PhiloxBlock block = noise.block(first + lane);
      words[4 * lane] = block.a;
      words[4 * lane + 1] = block.b;
      words[4 * lane + 2] = block.c;
      words[4 * lane + 3] = block.d;
    }
#pragma omp simd
    for (int i = 0; i < kBlock / 2; ++i) {
      high[2 * i] = words[i] << 16;
      high[2 * i + 1] = words[i] & 0xffff0000u;
    }
    float bound[kBlock];
    const int64_t n = width(b);
    int32_t hopeful = 0;
#pragma omp simd reduction(+ : hopeful)
    for (int64_t i = 0; i < n; ++i) {
      // log2(m 2^e) >= e + (m - 1): the bits of a float, read as an integer, bound its logarithm.
      const auto bits = std::bit_cast<int32_t>(noise_uniform(high[i])) - 0x3f800000;
      const float log_v = static_cast<float>(bits) * (0x1.62e43p-1f * 0x1p-23f);
      const float zi = z(x[i]);
      bound[i] = (x[i] >= kept) & (zi >= kept_z) ? zi - log_v + kSlack : -kInfinity;
      hopeful += bound[i] >= best.bar;
    }
    if (hopeful == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      if (bound[i] < best.bar) continue;
      const int64_t token = b * kBlock + i;
      const float score = z(x[i]) + noise_gumbel(noise_word(noise, token));
      if (score > best.score) best = {token, score, std::max(best.bar, score)};
    }
  }

  const float* x_;
  int64_t size_;
  std::vector<float>&block_max_, &between_;
  float max_ = -kInfinity, scale_ = 1.0f;
};

std::tuple<Tensor, Tensor> sample(const Tensor& logits_in, const Tensor& temperature,
                                  const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                                  const Tensor& rng_key) {
  check_sample(logits_in, temperature, top_k, top_p, min_p, rng_key);
  const Tensor logits = logits_in.contiguous(), keys = rng_key.contiguous();
  const int64_t batch = logits.size(0), vocabulary = logits.size(1);
  auto token = at::empty({batch}, logits.options().dtype(at::kLong));
  auto logprob = at::empty({batch}, logits.options().dtype(at::kFloat));
  const auto t = temperature.accessor<float, 1>(), p = top_p.accessor<float, 1>(),
             m = min_p.accessor<float, 1>();
  const auto k = top_k.accessor<int32_t, 1>();
  auto* tokens = token.mutable_data_ptr<int64_t>();
  auto* logprobs = logprob.mutable_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      const float* x;
      if (logits.scalar_type() == at::kFloat) {
        x = logits.const_data_ptr<float>() + row * vocabulary;
      } else {
        const auto* narrow = logits.const_data_ptr<at::BFloat16>() + row * vocabulary;
        scratch.wide.assign(narrow, narrow + vocabulary);
        x = scratch.wide.data();
      }
      const NoiseStream noise(keys.const_data_ptr<int64_t>() + row * 4);
      const Choice choice =
          Row(x, vocabulary, scratch).choose({t[row], p[row], m[row], k[row]}, noise);
      tokens[row] = choice.token;
      logprobs[row] = choice.logprob;
    }
  });
  return {token, logprob};
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) { m.impl("sample", &sample); }

}  // namespace
}  // namespace reasoners
