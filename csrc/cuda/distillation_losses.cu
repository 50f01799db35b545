// Cross entropy and divergence of every token's next-token distribution, and in place of the
// student's logits the gradient of their weighted sum.
//
// With s and t the softmax of the student's and the teacher's logits over the temperature, and
// M = (1 - beta) s + beta t, in one row:
//   beta 0    KL(t || s)                                    gradient  (s - t) / temperature
//   beta 1    KL(s || t)                              s (log s/t - KL(s || t)) / temperature
//   between   beta KL(t || M) + (1 - beta) KL(s || M)
//                                        (1 - beta) s (log s/M - KL(s || M)) / temperature
// A block has a row, which it reads three times: for the sums of exponentials, as vectors come,
// rescaled when a higher logit does; for the divergence; for the gradient. What PyTorch's operators
// move for the same is some 45 bytes a logit of 16 bits, in 14 kernels; this moves 14.
//
// H200, 2,048 tokens of 128,256 logits of 16 bits, beta 1: 1.2 ms, PyTorch's operators 15.9; the
// bytes of three reads need 0.9, of one 0.4. A distillation step of Llamba-1B (16,384 tokens)
// spends 2.5 % of its time here. Next: a cluster that keeps a row in shared memory.
//
// All sums are fp32, in the order of threads, lanes and warps: two runs give the same bits.

#include <cstdint>

#include "convert.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr float kLn2 = 0.693147180559945f;

__device__ inline float exp_of(float x) { return exp2_fast(x * kLog2e); }

// A sum of exp(factor (x - max)) whose terms come one after the other.
struct Exponentials {
  float max, sum;

  __device__ void rescale(float higher, float factor) {
    if (higher > max) {
      sum *= exp_of(factor * (max - higher));
      max = higher;
    }
  }
  __device__ void add(const Exponentials& other, float factor) {
    const float higher = fmaxf(max, other.max);
    // Where neither has seen a number the sum stays 0; what is left of NaN stays NaN.
    const auto part = [&](const Exponentials& of) {
      return of.max == higher ? of.sum : of.sum * exp_of(factor * (of.max - higher));
    };
    sum = part(*this) + part(other);
    max = higher;
  }
};

// log p of a logit x is factor (x - max) - log_sum.
struct Normalizer {
  float factor, max, log_sum;

  __device__ Normalizer(const Exponentials& all, float factor)
      : factor(factor), max(all.max), log_sum(kLn2 * log2f(all.sum)) {}
  __device__ float log_of(float x) const { return fmaf(factor, x - max, -log_sum); }
};

// Over the block's threads; all of them get the result.
template <typename Value, typename Add>
__device__ Value over_block(Value value, Value (&shared)[kWarps], const Add& add) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto over_lanes = [&](int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      Value other;
      constexpr int kWords = sizeof(Value) / sizeof(float);
      for (int i = 0; i < kWords; ++i)
        reinterpret_cast<float*>(&other)[i] =
            __shfl_xor_sync(~0u, reinterpret_cast<const float*>(&value)[i], offset);
      // The same order in both lanes of a pair.
      value = lane & offset ? add(other, value) : add(value, other);
    }
  };
  over_lanes(32);
  __syncthreads();  // whoever read the result before has it
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = shared[lane % kWarps];
  over_lanes(kWarps);
  return value;
}

template <typename data_t, int kVec>
__global__ void __launch_bounds__(kThreads, 2)
    distillation_losses_kernel(const DistillationLossesParams p) {
  using Some = Vec<data_t, kVec>;
  let_next_start();
  wait_for_inputs();
  const int64_t row = blockIdx.x;
  auto* logits = static_cast<data_t*>(p.logits) + row * p.vocab;
  const auto* taught =
      p.taught == nullptr ? nullptr : static_cast<const data_t*>(p.taught) + row * p.vocab;
  const float inverse = 1 / p.temperature;
  const bool warm = p.temperature != 1;

  __shared__ Exponentials of_warps[kWarps];
  __shared__ float sums[kWarps];
  const auto total_of = [&](float value) {
    return over_block(value, sums, [](float a, float b) { return a + b; });
  };
  const auto each = [&](auto&& visit) {  // visit(place, student's, teacher's)
#pragma unroll 2
    for (int i = threadIdx.x * kVec; i < p.vocab; i += kThreads * kVec) {
      const Some a = *reinterpret_cast<const Some*>(logits + i);
      const Some b = taught ? *reinterpret_cast<const Some*>(taught + i) : Some{};
      float student[kVec], teacher[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        student[k] = to_float(a.at[k]);
        teacher[k] = to_float(b.at[k]);
      }
      visit(i, student, teacher);
    }
  };

  // ---- The sums of exponentials: of the student's logits, of theirs and the teacher's over the
  // temperature.
  const Exponentials nothing{-INFINITY, 0.f};
  Exponentials plain = nothing, student = nothing, teacher = nothing;
  const auto take = [](Exponentials& all, const float (&values)[kVec], float factor) {
    float highest = values[0];
#pragma unroll
    for (int k = 1; k < kVec; ++k) highest = fmaxf(highest, values[k]);
    all.rescale(highest, factor);
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      all.sum += values[k] == -INFINITY ? 0.f : exp_of(factor * (values[k] - all.max));
  };
  each([&](int, const float (&a)[kVec], const float (&b)[kVec]) {
    take(plain, a, 1.f);
    if (!taught) return;
    if (warm) take(student, a, inverse);
    take(teacher, b, inverse);
  });
  const auto complete = [&](const Exponentials& mine, float factor) {
    const auto all = over_block(mine, of_warps, [&](Exponentials a, const Exponentials& b) {
      a.add(b, factor);
      return a;
    });
    return Normalizer(all, factor);
  };
  const Normalizer of_plain = complete(plain, 1.f);
  const Normalizer of_student = warm && taught ? complete(student, inverse) : of_plain;
  const Normalizer of_teacher = taught ? complete(teacher, inverse) : of_plain;

  // ---- The losses.
  const int64_t label = p.labels[row];
  const bool known = label >= 0 && label < p.vocab;
  if (threadIdx.x == 0)
    p.ce[row] = known ? -of_plain.log_of(to_float(logits[label])) : __int_as_float(0x7fffffff);
  const float beta = p.beta, log_beta = kLn2 * log2f(beta), log_rest = kLn2 * log2f(1 - beta);
  // log of (1 - beta) s + beta t.
  const auto log_mixture = [&](float log_s, float log_t) {
    const float s = log_s + log_rest, t = log_t + log_beta;
    return fmaxf(s, t) + log1pf(exp_of(-fabsf(s - t)));
  };
  float middle = 0.f;  // KL(s || t), or KL(s || M)
  if (taught) {
    float forward = 0.f, reverse = 0.f;
    each([&](int, const float (&a)[kVec], const float (&b)[kVec]) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float log_s = of_student.log_of(a[k]), log_t = of_teacher.log_of(b[k]);
        const float s = exp_of(log_s), t = exp_of(log_t);
        if (beta == 0) {
          forward += t == 0 ? 0.f : t * (log_t - log_s);
        } else if (beta == 1) {
          reverse += s == 0 ? 0.f : s * (log_s - log_t);
        } else {
          const float log_m = log_mixture(log_s, log_t);
          forward += t == 0 ? 0.f : t * (log_t - log_m);
          reverse += s == 0 ? 0.f : s * (log_s - log_m);
        }
      }
    });
    forward = total_of(forward);
    middle = total_of(reverse);
    const float between = fmaf(beta, forward, (1 - beta) * middle);
    if (threadIdx.x == 0) p.kl[row] = beta == 0 ? forward : beta == 1 ? middle : between;
  } else if (threadIdx.x == 0) {
    p.kl[row] = 0.f;
  }
  if (!p.gradient) return;
  __syncthreads();  // the label's logit has been read

  // ---- The gradient.
  const float of_ce = 1 - p.kl_weight;
  const float of_kl = p.kl_weight * inverse * (beta > 0 && beta < 1 ? 1 - beta : 1.f);
  each([&](int i, const float (&a)[kVec], const float (&b)[kVec]) {
    Some gradient;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      float sum = 0.f;
      if (of_ce > 0) sum = of_ce * (exp_of(of_plain.log_of(a[k])) - (i + k == label ? 1.f : 0.f));
      if (of_kl > 0) {
        const float log_s = of_student.log_of(a[k]), log_t = of_teacher.log_of(b[k]);
        const float s = exp_of(log_s);
        float part = 0.f;
        if (beta == 0)
          part = s - exp_of(log_t);
        else if (s != 0)
          part = s * (log_s - (beta == 1 ? log_t : log_mixture(log_s, log_t)) - middle);
        sum = fmaf(of_kl, part, sum);
      }
      gradient.at[k] = from_float<data_t>(sum);
    }
    *reinterpret_cast<Some*>(logits + i) = gradient;
  });
}

template <typename data_t>
void dispatch(const DistillationLossesParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(data_t);
  using Some = Vec<data_t, kVec>;
  const bool whole =
      p.vocab % kVec == 0 && is_aligned<Some>(p.logits) && is_aligned<Some>(p.taught);
  launch_overlapping(
      whole ? distillation_losses_kernel<data_t, kVec> : distillation_losses_kernel<data_t, 1>,
      static_cast<unsigned>(p.tokens), kThreads, 0, stream, p);
}

}  // namespace

void launch_distillation_losses(const DistillationLossesParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch<float>(p, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch<__half>(p, stream);
  }
}

}  // namespace reasoners
