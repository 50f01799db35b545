// The supported domain of every operator, and the only place where its errors are worded:
// "op: argument expected ..., got ...". ValueError for shapes and values, TypeError for dtypes,
// NotImplementedError for what would make sense and is not there.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace reasoners {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;          // any extent, in a wanted shape
constexpr int64_t kMaxCapacity = 15;  // of entries that a deferred state update may hold back

// The dtype of decays, scales, D and states beside data of type `data`.
inline at::ScalarType wide_dtype(at::ScalarType data) {
  return data == at::kDouble ? at::kDouble : at::kFloat;
}

struct Check {
  const char* op;

  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want,
             const char* words) const {
    bool fits = t.dim() == static_cast<int64_t>(want.size());
    for (int64_t i = 0; fits && i < t.dim(); ++i) {
      const int64_t extent = want.begin()[i];
      fits = extent == kAny || extent == t.size(i);
    }
    if (fits) return;
    TORCH_CHECK_VALUE(false, op, ": ", name, " expected shape ", words, " = ",
                      tuple({want.begin(), want.size()}), ", got ", tuple(t.sizes()));
  }
  static std::string tuple(at::IntArrayRef extents) {
    std::ostringstream text;
    for (const int64_t extent : extents) {
      text << (text.tellp() > 0 ? ", " : "(");
      extent == kAny ? text << "*" : text << extent;
    }
    text << (extents.empty() ? "()" : ")");
    return text.str();
  }
  void dtype(const char* name, const Tensor& t, at::ScalarType want) const {
    TORCH_CHECK_TYPE(t.scalar_type() == want, op, ": ", name, " expected dtype ", want, ", got ",
                     t.scalar_type());
  }
  void data_dtype(const char* name, const Tensor& t) const {
    const auto type = t.scalar_type();
    const bool fits = type == at::kFloat || type == at::kBFloat16 ||
                      (t.is_cuda() ? type == at::kHalf : type == at::kDouble);
    TORCH_CHECK_TYPE(fits, op, ": ", name, " expected dtype float32, bfloat16 or ",
                     t.is_cuda() ? "float16" : "float64", ", got ", type);
  }
  void device(const char* name, const Tensor& t, const Tensor& like) const {
    TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " expected on ", like.device(),
                      ", got ", t.device());
  }
  void divides(const char* name, int64_t part, const char* whole_name, int64_t whole) const {
    TORCH_CHECK_VALUE(part > 0 && whole % part == 0, op, ": ", name, " expected to divide ",
                      whole_name, " = ", whole, ", got ", part);
  }
  // An extent that only the CUDA kernel bounds.
  void at_most_on_cuda(const char* name, int64_t extent, int64_t most) const {
    TORCH_CHECK_NOT_IMPLEMENTED(extent <= most, op, ": ", name, " expected at most ", most,
                                " on CUDA, got ", extent);
  }
  // (tokens, heads, head_dim) that rotates in place by one angle per pair of channels.
  void rotates(const char* name, const Tensor& t, const Tensor& inv_freq) const {
    const int64_t heads = t.size(1), head_dim = t.size(2);
    TORCH_CHECK_VALUE(head_dim % 2 == 0, op, ": head_dim expected even, got ", head_dim);
    const bool packed = (head_dim <= 1 || t.stride(2) == 1) &&
                        (heads <= 1 || t.stride(1) == head_dim) &&
                        (t.size(0) <= 1 || t.stride(0) >= heads * head_dim);
    TORCH_CHECK_VALUE(packed || t.numel() == 0, op, ": ", name,
                      " expected packed heads at any token stride, got strides ", t.strides());
    tensor("inv_freq", inv_freq, t, at::kFloat, {head_dim / 2}, "(head_dim / 2)");
  }
  void contiguous(const char* name, const Tensor& t) const {
    TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, " expected contiguous, got strides ",
                      t.strides());
  }
  // A whole argument at once: device, dtype and shape.
  void tensor(const char* name, const Tensor& t, const Tensor& like, at::ScalarType type,
              std::initializer_list<int64_t> want, const char* words) const {
    device(name, t, like);
    dtype(name, t, type);
    shape(name, t, want, words);
  }
  // An argument that is as another one in everything.
  void same_as(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    device(name, t, like);
    dtype(name, t, like.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == like.sizes(), op, ": ", name, " expected shape ",
                      tuple(like.sizes()), " as ", like_name, ", got ", tuple(t.sizes()));
  }
  // What a recurrence leaves in its slots: mutated, and in a dtype of its own.
  void state(const Tensor& state, const Tensor& data, const char* data_name,
             std::initializer_list<int64_t> want, const char* words) const {
    data_dtype("state", state);
    device("state", state, data);
    TORCH_CHECK_TYPE((state.scalar_type() == at::kDouble) == (data.scalar_type() == at::kDouble),
                     op, ": state and ", data_name, " expected both or neither float64, got ",
                     state.scalar_type(), " and ", data.scalar_type());
    shape("state", state, want, words);
    contiguous("state", state);
  }
  // The noise that rounds a 16-bit state.
  void rng_key(const OptionalTensor& rng_key, const Tensor& state, int64_t batch) const {
    if (!rng_key) return;
    const auto type = state.scalar_type();
    TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf, op,
                      ": rng_key expected None for a ", type == at::kDouble ? "float64" : "float32",
                      " state, got a tensor");
    tensor("rng_key", *rng_key, state, at::kLong, {batch, 4}, "(batch, 4)");
  }
  // The tokens held back on top of each slot's state. `width`: channels of x and B together.
  void recent(const Tensor& recent, const Tensor& recent_decay, const Tensor& pending,
              const Tensor& state, const Tensor& data, int64_t heads, int64_t width,
              int64_t period) const {
    tensor("recent", recent, data, data.scalar_type(), {state.size(0), kAny, width},
           "(slots, capacity, Hx * P + Gb * N)");
    const int64_t capacity = recent.size(1);
    TORCH_CHECK_VALUE(capacity <= kMaxCapacity, op, ": capacity expected at most ", kMaxCapacity,
                      ", got ", capacity);
    tensor("recent_decay", recent_decay, data, wide_dtype(data.scalar_type()),
           {state.size(0), capacity, 2, heads}, "(slots, capacity, 2, H)");
    tensor("pending", pending, data, at::kInt, {state.size(0)}, "(slots)");
    contiguous("recent", recent);
    contiguous("recent_decay", recent_decay);
    contiguous("pending", pending);
    TORCH_CHECK_VALUE(period >= 1 && period <= capacity + 1, op, ": period expected 1 to ",
                      capacity + 1, ", got ", period);
  }
  // The ring of past inputs of a convolution; returns its width.
  int64_t ring(const char* name, const Tensor& ring, const char* weight_name, const Tensor& weight,
               const char* bias_name, const OptionalTensor& bias, const Tensor& data,
               int64_t channels) const {
    const auto type = data.scalar_type();
    tensor(weight_name, weight, data, type, {channels, kAny}, "(channels, width)");
    const int64_t width = weight.size(1);
    TORCH_CHECK_VALUE(width >= 2 && width <= 4, op, ": width expected 2 to 4, got ", width);
    if (bias) tensor(bias_name, *bias, data, type, {channels}, "(channels)");
    tensor(name, ring, data, type, {kAny, width, channels}, "(slots, width, channels)");
    contiguous(name, ring);
    return width;
  }
  void eps(double eps) const {
    TORCH_CHECK_VALUE(eps >= 0, op, ": eps expected at least 0, got ", eps);
  }
  // Which sequence a row extends, and to which length.
  void rows(const Tensor& slots, const Tensor& lengths, const Tensor& data, int64_t batch) const {
    tensor("slots", slots, data, at::kInt, {batch}, "(batch)");
    tensor("lengths", lengths, data, at::kInt, {batch}, "(batch)");
  }
  // cu_seqlens packs sequences along `length` of a single row; returns how many initial states
  // there are. Its values are not read here: on CUDA that would synchronise. CPU kernels call
  // boundaries().
  int64_t sequences(const OptionalTensor& cu_seqlens, const Tensor& x,
                    const char* name = "x") const {
    if (!cu_seqlens) return x.size(0);
    tensor("cu_seqlens", *cu_seqlens, x, at::kInt, {kAny}, "(sequences + 1)");
    TORCH_CHECK_VALUE(x.size(0) == 1, op, ": ", name, " expected batch 1 with cu_seqlens, got ",
                      x.size(0));
    TORCH_CHECK_VALUE(cu_seqlens->numel() >= 1, op,
                      ": cu_seqlens expected at least 1 entry, got 0");
    return cu_seqlens->numel() - 1;
  }
  // Offsets must rise from 0 to `total`.
  void boundaries(const char* name, const Tensor& offsets, int64_t total) const {
    const auto* o = offsets.const_data_ptr<int32_t>();
    const int64_t n = offsets.numel();
    TORCH_CHECK_VALUE(o[0] == 0 && o[n - 1] == total, op, ": ", name, " expected to run from 0 to ",
                      total, ", got ", o[0], " to ", o[n - 1]);
    for (int64_t i = 1; i < n; ++i)
      TORCH_CHECK_VALUE(o[i] >= o[i - 1], op, ": ", name, " expected non-decreasing, got ",
                        o[i - 1], " before ", o[i]);
  }
  // Rows that write must name distinct slots: two writers of one state would race.
  void slots(const Tensor& slots, int64_t num_slots) const {
    const auto* s = slots.const_data_ptr<int32_t>();
    std::vector<bool> seen(num_slots, false);
    for (int64_t i = 0; i < slots.numel(); ++i) {
      if (s[i] < 0) continue;
      TORCH_CHECK_VALUE(s[i] < num_slots, op, ": slots expected below ", num_slots, ", got ", s[i]);
      TORCH_CHECK_VALUE(!seen[s[i]], op, ": slots expected distinct, got ", s[i], " twice");
      seen[s[i]] = true;
    }
  }
  // With the token of this step, a row's sequence has at least that.
  void lengths(const Tensor& slots, const Tensor& lengths) const {
    const auto *s = slots.const_data_ptr<int32_t>(), *l = lengths.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i)
      TORCH_CHECK_VALUE(s[i] < 0 || l[i] >= 1, op, ": lengths[", i, "] expected at least 1, got ",
                        l[i]);
  }
  // What the rows' slots hold back must fit, and so must what this token adds to it.
  void pending(const Tensor& slots, const Tensor& pending, int64_t capacity) const {
    const auto *s = slots.const_data_ptr<int32_t>(), *count = pending.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i)
      TORCH_CHECK_VALUE(s[i] < 0 || (count[s[i]] >= 0 && count[s[i]] <= capacity), op, ": pending[",
                        s[i], "] expected 0 to ", capacity, ", got ", count[s[i]]);
  }
};

// Shapes shared by ssd_scan and its derivative. Returns the number of initial states.
inline int64_t check_ssd_scan(const char* op, const Tensor& x, const Tensor& log_decay,
                              const Tensor& B, const Tensor& C, const OptionalTensor& scale,
                              const OptionalTensor& D, const OptionalTensor& initial_state,
                              const OptionalTensor& cu_seqlens) {
  const Check check{op};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny, kAny, kAny}, "(batch, length, Hx, P)");
  const auto wide = wide_dtype(x.scalar_type());
  const int64_t batch = x.size(0), length = x.size(1);
  check.tensor("log_decay", log_decay, x, wide, {batch, length, kAny}, "(batch, length, H)");
  const int64_t heads = log_decay.size(2);
  check.tensor("B", B, x, x.scalar_type(), {batch, length, kAny, kAny}, "(batch, length, Gb, N)");
  check.tensor("C", C, x, x.scalar_type(), {batch, length, kAny, B.size(3)},
               "(batch, length, Gc, N)");
  check.divides("Hx", x.size(2), "H", heads);
  check.divides("Gb", B.size(2), "H", heads);
  check.divides("Gc", C.size(2), "H", heads);
  if (scale) check.tensor("scale", *scale, x, wide, {batch, length, heads}, "(batch, length, H)");
  if (D) check.tensor("D", *D, x, wide, {heads}, "(H)");
  const int64_t sequences = check.sequences(cu_seqlens, x);
  if (initial_state)
    check.tensor("initial_state", *initial_state, x, wide, {sequences, heads, x.size(3), B.size(3)},
                 "(batch or sequences, H, P, N)");
  return sequences;
}

// One token of the recurrence, shared by state_update and deferred_state_update.
inline void check_token(const char* op, const Tensor& state, const Tensor& slots, const Tensor& x,
                        const Tensor& log_decay, const Tensor& B, const Tensor& C,
                        const OptionalTensor& scale, const OptionalTensor& D,
                        const OptionalTensor& rng_key) {
  const Check check{op};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny, kAny}, "(batch, Hx, P)");
  const auto wide = wide_dtype(x.scalar_type());
  const int64_t batch = x.size(0);
  check.tensor("log_decay", log_decay, x, wide, {batch, kAny}, "(batch, H)");
  const int64_t heads = log_decay.size(1);
  check.tensor("B", B, x, x.scalar_type(), {batch, kAny, kAny}, "(batch, Gb, N)");
  check.tensor("C", C, x, x.scalar_type(), {batch, kAny, B.size(2)}, "(batch, Gc, N)");
  check.divides("Hx", x.size(1), "H", heads);
  check.divides("Gb", B.size(1), "H", heads);
  check.divides("Gc", C.size(1), "H", heads);
  if (scale) check.tensor("scale", *scale, x, wide, {batch, heads}, "(batch, H)");
  if (D) check.tensor("D", *D, x, wide, {heads}, "(H)");
  check.tensor("slots", slots, x, at::kInt, {batch}, "(batch)");
  check.state(state, x, "x", {kAny, heads, x.size(2), B.size(2)}, "(slots, H, P, N)");
  check.rng_key(rng_key, state, batch);
}

inline void check_state_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                               const Tensor& log_decay, const Tensor& B, const Tensor& C,
                               const OptionalTensor& scale, const OptionalTensor& D,
                               const OptionalTensor& rng_key) {
  check_token("state_update", state, slots, x, log_decay, B, C, scale, D, rng_key);
}

inline void check_deferred_state_update(const Tensor& state, const Tensor& recent,
                                        const Tensor& recent_decay, const Tensor& pending,
                                        const Tensor& slots, const Tensor& x,
                                        const Tensor& log_decay, const Tensor& B, const Tensor& C,
                                        const OptionalTensor& scale, const OptionalTensor& D,
                                        int64_t period, const OptionalTensor& rng_key) {
  const char* op = "deferred_state_update";
  check_token(op, state, slots, x, log_decay, B, C, scale, D, rng_key);
  Check{op}.recent(recent, recent_decay, pending, state, x, log_decay.size(1),
                   x.size(1) * x.size(2) + B.size(1) * B.size(2), period);
}

inline void check_count_pending(const Tensor& pending, const Tensor& slots, int64_t period) {
  const Check check{"count_pending"};
  check.tensor("pending", pending, pending, at::kInt, {kAny}, "(slots)");
  check.contiguous("pending", pending);
  check.tensor("slots", slots, pending, at::kInt, {kAny}, "(batch)");
  TORCH_CHECK_VALUE(period >= 1 && period <= kMaxCapacity + 1,
                    "count_pending: period expected 1 to ", kMaxCapacity + 1, ", got ", period);
}

// Shapes shared by selective_scan and its derivative. Returns the number of initial states.
inline int64_t check_selective_scan(const char* op, const Tensor& x, const Tensor& delta,
                                    const Tensor& A, const Tensor& B, const Tensor& C,
                                    const OptionalTensor& D, const OptionalTensor& initial_state,
                                    const OptionalTensor& cu_seqlens) {
  const Check check{op};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny, kAny}, "(batch, length, channels)");
  const auto wide = wide_dtype(x.scalar_type());
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2);
  check.tensor("delta", delta, x, wide, {batch, length, channels}, "(batch, length, channels)");
  check.tensor("A", A, x, wide, {channels, kAny}, "(channels, N)");
  check.tensor("B", B, x, x.scalar_type(), {batch, length, kAny, A.size(1)},
               "(batch, length, Gb, N)");
  check.tensor("C", C, x, x.scalar_type(), {batch, length, kAny, A.size(1)},
               "(batch, length, Gc, N)");
  check.divides("Gb", B.size(2), "channels", channels);
  check.divides("Gc", C.size(2), "channels", channels);
  if (D) check.tensor("D", *D, x, wide, {channels}, "(channels)");
  const int64_t sequences = check.sequences(cu_seqlens, x);
  if (initial_state)
    check.tensor("initial_state", *initial_state, x, wide, {sequences, channels, A.size(1)},
                 "(batch or sequences, channels, N)");
  return sequences;
}

inline void check_selective_update(const Tensor& state, const Tensor& slots, const Tensor& x,
                                   const Tensor& delta, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const OptionalTensor& D) {
  const Check check{"selective_update"};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny}, "(batch, channels)");
  const auto wide = wide_dtype(x.scalar_type());
  const int64_t batch = x.size(0), channels = x.size(1);
  check.tensor("delta", delta, x, wide, {batch, channels}, "(batch, channels)");
  check.tensor("A", A, x, wide, {channels, kAny}, "(channels, N)");
  check.tensor("B", B, x, x.scalar_type(), {batch, kAny, A.size(1)}, "(batch, Gb, N)");
  check.tensor("C", C, x, x.scalar_type(), {batch, kAny, A.size(1)}, "(batch, Gc, N)");
  check.divides("Gb", B.size(1), "channels", channels);
  check.divides("Gc", C.size(1), "channels", channels);
  if (D) check.tensor("D", *D, x, wide, {channels}, "(channels)");
  check.tensor("slots", slots, x, at::kInt, {batch}, "(batch)");
  check.state(state, x, "x", {kAny, channels, A.size(1)}, "(slots, channels, N)");
}

// Shapes shared by causal_conv1d and its derivative. Returns the number of initial states.
inline int64_t check_causal_conv1d(const char* op, const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& initial_state,
                                   const OptionalTensor& cu_seqlens) {
  const Check check{op};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny, kAny}, "(batch, length, channels)");
  const int64_t channels = x.size(2);
  check.tensor("weight", weight, x, x.scalar_type(), {channels, kAny}, "(channels, width)");
  const int64_t width = weight.size(1);
  TORCH_CHECK_VALUE(width >= 2 && width <= 4, op, ": width expected 2 to 4, got ", width);
  if (bias) check.tensor("bias", *bias, x, x.scalar_type(), {channels}, "(channels)");
  const int64_t sequences = check.sequences(cu_seqlens, x);
  if (initial_state)
    check.tensor("initial_state", *initial_state, x, x.scalar_type(),
                 {sequences, width - 1, channels}, "(batch or sequences, width - 1, channels)");
  return sequences;
}

inline void check_conv_update(const Tensor& state, const Tensor& slots, const Tensor& lengths,
                              const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Check check{"conv_update"};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny}, "(batch, channels)");
  check.rows(slots, lengths, x, x.size(0));
  check.ring("state", state, "weight", weight, "bias", bias, x, x.size(1));
}

// What the two Mamba-2 mixers share. `x_heads` and `b_groups` describe the convolution's channels.
inline void check_mamba2_states(const Check& check, const Tensor& conv_state, const Tensor& state,
                                const OptionalTensor& recent, const OptionalTensor& recent_decay,
                                const OptionalTensor& pending, const Tensor& slots,
                                const Tensor& lengths, const Tensor& projected,
                                const Tensor& conv_weight, const Tensor& conv_bias, int64_t x_heads,
                                int64_t b_groups, int64_t period, const OptionalTensor& rng_key) {
  const int64_t batch = projected.size(0), heads = state.size(1);
  check.rows(slots, lengths, projected, batch);
  check.ring("conv_state", conv_state, "conv_weight", conv_weight, "conv_bias", conv_bias,
             projected, conv_state.size(2));
  check.state(state, projected, "projected", {conv_state.size(0), kAny, kAny, kAny},
              "(slots, H, P, N)");
  check.rng_key(rng_key, state, batch);
  const int given = recent.has_value() + recent_decay.has_value() + pending.has_value();
  TORCH_CHECK_VALUE(given == 0 || given == 3, check.op,
                    ": recent, recent_decay and pending expected together or not at all, got ",
                    given, " of 3");
  if (recent)
    check.recent(*recent, *recent_decay, *pending, state, projected, heads,
                 x_heads * state.size(2) + b_groups * state.size(3), period);
  else
    TORCH_CHECK_VALUE(period == 1, check.op, ": period expected 1 without recent, got ", period);
}

inline void check_discrete_mamba2_update(const Tensor& conv_state, const Tensor& state,
                                         const OptionalTensor& recent,
                                         const OptionalTensor& recent_decay,
                                         const OptionalTensor& pending, const Tensor& slots,
                                         const Tensor& lengths, const Tensor& projected,
                                         const Tensor& conv_weight, const Tensor& conv_bias,
                                         const Tensor& z_bias, const Tensor& D, int64_t period,
                                         const OptionalTensor& rng_key) {
  const Check check{"discrete_mamba2_update"};
  check.data_dtype("projected", projected);
  check.shape("conv_state", conv_state, {kAny, kAny, kAny}, "(slots, width, I + 2 G N)");
  check.shape("state", state, {kAny, kAny, kAny, kAny}, "(slots, H, P, N)");
  const int64_t heads = state.size(1), state_dim = state.size(3), inner = heads * state.size(2);
  const int64_t channels = conv_state.size(2), shared = channels - inner;
  TORCH_CHECK_VALUE(state_dim > 0 && shared > 0 && shared % (2 * state_dim) == 0, check.op,
                    ": conv_state expected I + 2 G N channels with I = ", inner,
                    " and N = ", state_dim, ", got ", channels);
  const int64_t groups = shared / (2 * state_dim);
  check.divides("G", groups, "H", heads);
  check.shape("projected", projected, {kAny, channels + inner + heads},
              "(batch, I + 2 G N + I + H)");
  check_mamba2_states(check, conv_state, state, recent, recent_decay, pending, slots, lengths,
                      projected, conv_weight, conv_bias, heads, groups, period, rng_key);
  const auto data = projected.scalar_type();
  check.tensor("z_bias", z_bias, projected, data, {inner}, "(I)");
  check.tensor("D", D, projected, wide_dtype(data), {heads}, "(H)");
}

inline void check_mamba2_update(const Tensor& conv_state, const Tensor& state,
                                const OptionalTensor& recent, const OptionalTensor& recent_decay,
                                const OptionalTensor& pending, const Tensor& slots,
                                const Tensor& lengths, const Tensor& projected,
                                const Tensor& conv_weight, const Tensor& conv_bias,
                                const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                                const Tensor& norm_weight, double eps, int64_t period,
                                const OptionalTensor& rng_key) {
  const Check check{"mamba2_update"};
  check.data_dtype("projected", projected);
  check.shape("conv_state", conv_state, {kAny, kAny, kAny}, "(slots, width, K (P + N) + H N)");
  check.shape("state", state, {kAny, kAny, kAny, kAny}, "(slots, H, P, N)");
  const int64_t heads = state.size(1), state_dim = state.size(3), inner = heads * state.size(2);
  const int64_t channels = conv_state.size(2), shared = channels - heads * state_dim;
  const int64_t both = state.size(2) + state_dim;
  TORCH_CHECK_VALUE(both > 0 && shared > 0 && shared % both == 0, check.op,
                    ": conv_state expected K (P + N) + H N channels with P + N = ", both,
                    " and H N = ", heads * state_dim, ", got ", channels);
  const int64_t kv_heads = shared / both;
  check.divides("K", kv_heads, "H", heads);
  check.shape("projected", projected, {kAny, inner + channels + heads},
              "(batch, I + K (P + N) + H N + H)");
  check_mamba2_states(check, conv_state, state, recent, recent_decay, pending, slots, lengths,
                      projected, conv_weight, conv_bias, kv_heads, kv_heads, period, rng_key);
  const auto data = projected.scalar_type();
  check.tensor("dt_bias", dt_bias, projected, wide_dtype(data), {heads}, "(H)");
  check.tensor("A_log", A_log, projected, wide_dtype(data), {heads}, "(H)");
  check.tensor("D", D, projected, wide_dtype(data), {heads}, "(H)");
  check.tensor("norm_weight", norm_weight, projected, data, {inner}, "(I)");
  check.eps(eps);
}

// Sizes of a Mamba-2 mixer that its arguments imply: H heads of P x N, `inner` = H P, `shared`
// groups of B and C, or kv heads, and how many sequences there are.
struct MixerSizes {
  int64_t heads, head_dim, state_dim, inner, shared, channels, sequences;
};

// What the two Mamba-2 mixers over whole sequences share, once `sizes` has all but `sequences`.
inline void check_mixer_scan(const Check& check, const Tensor& projected, const Tensor& conv_weight,
                             const Tensor& conv_bias, const Tensor& D, const OptionalTensor& past,
                             const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                             const char* row_words, MixerSizes& sizes) {
  const auto data = projected.scalar_type();
  check.shape("projected", projected, {kAny, kAny, sizes.inner + sizes.channels + sizes.heads},
              row_words);
  check.tensor("conv_weight", conv_weight, projected, data, {sizes.channels, kAny},
               "(channels, width)");
  const int64_t width = conv_weight.size(1);
  TORCH_CHECK_VALUE(width >= 2 && width <= 4, check.op, ": width expected 2 to 4, got ", width);
  check.tensor("conv_bias", conv_bias, projected, data, {sizes.channels}, "(channels)");
  check.tensor("D", D, projected, wide_dtype(data), {sizes.heads}, "(H)");
  sizes.sequences = check.sequences(cu_seqlens, projected, "projected");
  if (past)
    check.tensor("past", *past, projected, data, {sizes.sequences, width - 1, sizes.channels},
                 "(batch or sequences, width - 1, channels)");
  if (initial_state)
    check.tensor("initial_state", *initial_state, projected, wide_dtype(data),
                 {sizes.sequences, sizes.heads, sizes.head_dim, sizes.state_dim},
                 "(batch or sequences, H, P, N)");
}

// H, P and N of a mixer: from D, from `per_channel`, of H P values, and as given.
inline MixerSizes mixer_sizes(const Check& check, const Tensor& projected,
                              const Tensor& conv_weight, const Tensor& D, const char* name,
                              const Tensor& per_channel, int64_t state_dim) {
  check.data_dtype("projected", projected);
  check.shape("conv_weight", conv_weight, {kAny, kAny}, "(channels, width)");
  check.shape("D", D, {kAny}, "(H)");
  check.tensor(name, per_channel, projected, projected.scalar_type(), {kAny}, "(I)");
  TORCH_CHECK_VALUE(state_dim > 0, check.op, ": state_dim expected at least 1, got ", state_dim);
  const int64_t heads = D.size(0), inner = per_channel.size(0);
  check.divides("H", heads, "I", inner);
  return {heads, inner / heads, state_dim, inner, 0, conv_weight.size(0), 0};
}

inline MixerSizes check_discrete_mamba2_scan(const Tensor& projected, const Tensor& conv_weight,
                                             const Tensor& conv_bias, const Tensor& z_bias,
                                             const Tensor& D, int64_t state_dim,
                                             const OptionalTensor& past,
                                             const OptionalTensor& initial_state,
                                             const OptionalTensor& cu_seqlens) {
  const Check check{"discrete_mamba2_scan"};
  MixerSizes sizes = mixer_sizes(check, projected, conv_weight, D, "z_bias", z_bias, state_dim);
  const int64_t both = sizes.channels - sizes.inner;
  TORCH_CHECK_VALUE(both > 0 && both % (2 * state_dim) == 0, check.op,
                    ": conv_weight expected I + 2 G N channels with I = ", sizes.inner,
                    " and N = ", state_dim, ", got ", sizes.channels);
  sizes.shared = both / (2 * state_dim);
  check.divides("G", sizes.shared, "H", sizes.heads);
  check_mixer_scan(check, projected, conv_weight, conv_bias, D, past, initial_state, cu_seqlens,
                   "(batch, length, I + 2 G N + I + H)", sizes);
  return sizes;
}

inline MixerSizes check_mamba2_scan(const Tensor& projected, const Tensor& conv_weight,
                                    const Tensor& conv_bias, const Tensor& dt_bias,
                                    const Tensor& A_log, const Tensor& D, const Tensor& norm_weight,
                                    double eps, int64_t state_dim, const OptionalTensor& past,
                                    const OptionalTensor& initial_state,
                                    const OptionalTensor& cu_seqlens) {
  const Check check{"mamba2_scan"};
  MixerSizes sizes =
      mixer_sizes(check, projected, conv_weight, D, "norm_weight", norm_weight, state_dim);
  const int64_t both = sizes.channels - sizes.heads * state_dim, each = sizes.head_dim + state_dim;
  TORCH_CHECK_VALUE(both > 0 && both % each == 0, check.op,
                    ": conv_weight expected K (P + N) + H N channels with P + N = ", each,
                    " and H N = ", sizes.heads * state_dim, ", got ", sizes.channels);
  sizes.shared = both / each;
  check.divides("K", sizes.shared, "H", sizes.heads);
  check_mixer_scan(check, projected, conv_weight, conv_bias, D, past, initial_state, cu_seqlens,
                   "(batch, length, I + K (P + N) + H N + H)", sizes);
  const auto wide = wide_dtype(projected.scalar_type());
  check.tensor("dt_bias", dt_bias, projected, wide, {sizes.heads}, "(H)");
  check.tensor("A_log", A_log, projected, wide, {sizes.heads}, "(H)");
  check.eps(eps);
  return sizes;
}

inline void check_mamba1_update(const Tensor& conv_state, const Tensor& state, const Tensor& slots,
                                const Tensor& lengths, const Tensor& projected, const Tensor& dt,
                                const Tensor& conv_weight, const Tensor& conv_bias,
                                const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                                int64_t kv_dim) {
  const Check check{"mamba1_update"};
  check.data_dtype("projected", projected);
  check.shape("projected", projected, {kAny, kAny}, "(batch, 2 I + 2 kv_dim + R)");
  check.shape("state", state, {kAny, kAny, kAny}, "(slots, I, N)");
  const int64_t batch = projected.size(0), inner = state.size(1), state_dim = state.size(2);
  check.divides("kv_dim", kv_dim, "I", inner);
  check.divides("N", state_dim, "kv_dim", kv_dim);
  TORCH_CHECK_VALUE(projected.size(1) >= 2 * (inner + kv_dim), check.op,
                    ": projected expected at least 2 I + 2 kv_dim = ", 2 * (inner + kv_dim),
                    " channels, got ", projected.size(1));
  check.rows(slots, lengths, projected, batch);
  check.ring("conv_state", conv_state, "conv_weight", conv_weight, "conv_bias", conv_bias,
             projected, inner);
  check.state(state, projected, "projected", {conv_state.size(0), inner, state_dim},
              "(slots, I, N)");
  const auto data = projected.scalar_type();
  check.tensor("dt", dt, projected, data, {batch, inner}, "(batch, I)");
  check.tensor("dt_bias", dt_bias, projected, data, {inner}, "(I)");
  check.tensor("A_log", A_log, projected, wide_dtype(data), {inner, state_dim}, "(I, N)");
  check.tensor("D", D, projected, wide_dtype(data), {inner}, "(I)");
}

inline void check_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Check check{"linear"};
  check.data_dtype("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "linear: x expected at least 1 dimension, got 0");
  check.tensor("weight", weight, x, x.scalar_type(), {kAny, x.size(-1)},
               "(out_features, in_features)");
  if (bias) check.tensor("bias", *bias, x, x.scalar_type(), {weight.size(0)}, "(out_features)");
}

inline void check_rms_norm_linear(const Tensor& h, const Tensor& norm_weight, double eps,
                                  const Tensor& weight, const OptionalTensor& bias, bool gated) {
  const Check check{"rms_norm_linear"};
  check.data_dtype("h", h);
  TORCH_CHECK_VALUE(h.dim() >= 1, "rms_norm_linear: h expected at least 1 dimension, got 0");
  check.contiguous("h", h);
  check.tensor("norm_weight", norm_weight, h, h.scalar_type(), {h.size(-1)}, "(dim)");
  check.eps(eps);
  check.tensor("weight", weight, h, h.scalar_type(), {kAny, h.size(-1)}, "(out_features, dim)");
  if (bias) check.tensor("bias", *bias, h, h.scalar_type(), {weight.size(0)}, "(out_features)");
  TORCH_CHECK_VALUE(!gated || weight.size(0) % 2 == 0,
                    "rms_norm_linear: weight expected an even number of rows if gated, got ",
                    weight.size(0));
}

inline void check_add_linear(const Tensor& h, const Tensor& x, const Tensor& weight) {
  const Check check{"add_linear"};
  check.data_dtype("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "add_linear: x expected at least 1 dimension, got 0");
  check.tensor("weight", weight, x, x.scalar_type(), {kAny, x.size(-1)},
               "(out_features, in_features)");
  check.contiguous("h", h);
  check.device("h", h, x);
  check.dtype("h", h, x.scalar_type());
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  TORCH_CHECK_VALUE(h.sizes() == at::IntArrayRef(sizes), "add_linear: h expected shape ",
                    Check::tuple(sizes), ", got ", Check::tuple(h.sizes()));
}

inline void check_add_rms_norm(const Tensor& h, const OptionalTensor& delta, const Tensor& weight,
                               double eps) {
  const Check check{"add_rms_norm"};
  check.data_dtype("h", h);
  TORCH_CHECK_VALUE(h.dim() >= 1, "add_rms_norm: h expected at least 1 dimension, got 0");
  check.contiguous("h", h);
  if (delta) check.same_as("delta", *delta, "h", h);
  check.tensor("weight", weight, h, h.scalar_type(), {h.size(-1)}, "(dim)");
  check.eps(eps);
}

inline void check_rotate(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  const Check check{"rotate"};
  check.data_dtype("x", x);
  check.shape("x", x, {kAny, kAny, kAny}, "(tokens, heads, head_dim)");
  check.rotates("x", x, inv_freq);
  check.tensor("positions", positions, x, at::kInt, {x.size(0)}, "(tokens)");
}

inline void check_gate(const char* op, const Tensor& x, const Tensor& z,
                       const OptionalTensor& bias) {
  const Check check{op};
  check.data_dtype("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x expected at least 1 dimension, got 0");
  check.same_as("z", z, "x", x);
  if (bias) check.tensor("bias", *bias, x, x.scalar_type(), {x.size(-1)}, "(channels)");
}

inline void check_gate_backward(const Tensor& dy, const Tensor& x, const Tensor& z,
                                const OptionalTensor& bias) {
  const Check check{"gate_backward"};
  check_gate(check.op, x, z, bias);
  check.same_as("dy", dy, "x", x);
}

inline void check_swiglu(const char* op, const Tensor& gate_up) {
  Check{op}.data_dtype("gate_up", gate_up);
  TORCH_CHECK_VALUE(gate_up.dim() >= 1, op, ": gate_up expected at least 1 dimension, got 0");
  TORCH_CHECK_VALUE(gate_up.size(-1) % 2 == 0, op,
                    ": gate_up expected an even number of channels, got ", gate_up.size(-1));
}

inline void check_swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  const Check check{"swiglu_backward"};
  check_swiglu(check.op, gate_up);
  check.device("dy", dy, gate_up);
  check.dtype("dy", dy, gate_up.scalar_type());
  auto sizes = gate_up.sizes().vec();
  sizes.back() /= 2;
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(sizes), "swiglu_backward: dy expected shape ",
                    Check::tuple(sizes), ", got ", Check::tuple(dy.sizes()));
}

inline void check_softplus(const Tensor& x, const OptionalTensor& bias) {
  const Check check{"softplus"};
  check.data_dtype("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "softplus: x expected at least 1 dimension, got 0");
  if (bias) check.tensor("bias", *bias, x, wide_dtype(x.scalar_type()), {x.size(-1)}, "(channels)");
}

inline void check_distillation_losses(const Tensor& logits, const OptionalTensor& taught,
                                      const Tensor& labels, double beta, double temperature,
                                      double kl_weight) {
  const Check check{"distillation_losses"};
  check.data_dtype("logits", logits);
  check.shape("logits", logits, {kAny, kAny}, "(tokens, vocab)");
  check.contiguous("logits", logits);
  TORCH_CHECK_VALUE(logits.size(1) > 0, "distillation_losses: vocab expected at least 1, got 0");
  if (taught) {
    check.tensor("taught", *taught, logits, logits.scalar_type(), {logits.size(0), logits.size(1)},
                 "(tokens, vocab)");
    check.contiguous("taught", *taught);
  }
  check.tensor("labels", labels, logits, at::kLong, {logits.size(0)}, "(tokens)");
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1,
                    "distillation_losses: beta expected between 0 and 1, got ", beta);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                    "distillation_losses: temperature expected above 0 and finite, got ",
                    temperature);
  TORCH_CHECK_VALUE(kl_weight >= 0 && kl_weight <= 1,
                    "distillation_losses: kl_weight expected between 0 and 1, got ", kl_weight);
  TORCH_CHECK_VALUE(taught || kl_weight == 0,
                    "distillation_losses: taught expected a tensor where kl_weight = ", kl_weight,
                    ", got None");
}

// The paged cache and the rows that address it, shared by append_kv and paged_attention.
inline void check_pages(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& page_table, const Tensor& cu_seqlens_q,
                        const Tensor& kv_lengths) {
  const Check check{op};
  check.data_dtype("k_cache", k_cache);
  check.shape("k_cache", k_cache, {kAny, kAny, kAny, kAny},
              "(pages, kv_heads, page_size, head_dim)");
  TORCH_CHECK_VALUE(k_cache.size(2) > 0, op, ": page_size expected at least 1, got 0");
  check.tensor("v_cache", v_cache, k_cache, k_cache.scalar_type(),
               {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)},
               "(pages, kv_heads, page_size, head_dim)");
  check.contiguous("k_cache", k_cache);
  check.contiguous("v_cache", v_cache);
  check.tensor("page_table", page_table, k_cache, at::kInt, {kAny, kAny}, "(rows, max_pages)");
  const int64_t rows = page_table.size(0);
  check.tensor("cu_seqlens_q", cu_seqlens_q, k_cache, at::kInt, {rows + 1}, "(rows + 1)");
  check.tensor("kv_lengths", kv_lengths, k_cache, at::kInt, {rows}, "(rows)");
}

// What a row asks of its pages, read on the host: CPU only, CUDA kernels trust their caller.
inline void check_page_values(const char* op, const Tensor& k_cache, const Tensor& page_table,
                              const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                              int64_t num_tokens) {
  Check{op}.boundaries("cu_seqlens_q", cu_seqlens_q, num_tokens);
  const auto* starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const auto* lengths = kv_lengths.const_data_ptr<int32_t>();
  const auto table = page_table.accessor<int32_t, 2>();
  const int64_t num_pages = k_cache.size(0), page_size = k_cache.size(2);
  for (int64_t row = 0; row < kv_lengths.numel(); ++row) {
    if (lengths[row] <= 0) continue;  // a padding row
    const int64_t queries = starts[row + 1] - starts[row];
    TORCH_CHECK_VALUE(lengths[row] >= queries, op, ": kv_lengths[", row, "] expected at least the ",
                      queries, " queries of the row, got ", lengths[row]);
    const int64_t pages = (lengths[row] + page_size - 1) / page_size;
    TORCH_CHECK_VALUE(pages <= page_table.size(1), op, ": kv_lengths[", row, "] expected at most ",
                      page_table.size(1) * page_size, " tokens in the page table, got ",
                      lengths[row]);
    for (int64_t i = 0; i < pages; ++i)
      TORCH_CHECK_VALUE(table[row][i] >= 0 && table[row][i] < num_pages, op, ": page_table[", row,
                        "][", i, "] expected a page below ", num_pages, ", got ", table[row][i]);
  }
}

inline void check_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                            const Tensor& v, const Tensor& page_table, const Tensor& cu_seqlens_q,
                            const Tensor& kv_lengths) {
  check_pages("append_kv", k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths);
  const Check check{"append_kv"};
  check.tensor("k", k, k_cache, k_cache.scalar_type(), {kAny, k_cache.size(1), k_cache.size(3)},
               "(tokens, kv_heads, head_dim)");
  check.tensor("v", v, k_cache, k_cache.scalar_type(),
               {k.size(0), k_cache.size(1), k_cache.size(3)}, "(tokens, kv_heads, head_dim)");
}

inline void check_rotate_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& qkv,
                                   const Tensor& inv_freq, const Tensor& page_table,
                                   const Tensor& cu_seqlens_q, const Tensor& kv_lengths) {
  check_pages("rotate_append_kv", k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths);
  const Check check{"rotate_append_kv"};
  const int64_t kv_heads = k_cache.size(1);
  check.tensor("qkv", qkv, k_cache, k_cache.scalar_type(), {kAny, kAny, k_cache.size(3)},
               "(tokens, heads + 2 * kv_heads, head_dim)");
  TORCH_CHECK_VALUE(qkv.size(1) >= 2 * kv_heads, "rotate_append_kv: qkv expected at least ",
                    2 * kv_heads, " heads, of keys and of values, got ", qkv.size(1));
  check.rotates("qkv", qkv, inv_freq);
}

inline void check_paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table, const Tensor& cu_seqlens_q,
                                  const Tensor& kv_lengths, int64_t max_queries,
                                  const OptionalTensor& shared) {
  check_pages("paged_attention", k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths);
  const Check check{"paged_attention"};
  check.tensor("q", q, k_cache, k_cache.scalar_type(), {kAny, kAny, k_cache.size(3)},
               "(tokens, heads, head_dim)");
  check.divides("kv_heads", k_cache.size(1), "heads", q.size(1));
  TORCH_CHECK_NOT_IMPLEMENTED(!q.is_cuda() || q.size(2) <= 256,
                              "paged_attention: head_dim expected at most 256 on CUDA, got ",
                              q.size(2));
  const int64_t rows = kv_lengths.numel();
  if (shared) {
    check.tensor("shared", *shared, k_cache, at::kInt, {rows, 2}, "(rows, 2)");
    TORCH_CHECK_VALUE(q.size(0) == rows, "paged_attention: shared expected with one query a row, ",
                      "got ", q.size(0), " queries of ", rows, " rows");
    TORCH_CHECK_VALUE(max_queries == 1, "paged_attention: shared expected with max_queries = 1, ",
                      "got ", max_queries);
  }
  TORCH_CHECK_VALUE(max_queries >= 1, "paged_attention: max_queries expected at least 1, got ",
                    max_queries);
  TORCH_CHECK_VALUE(max_queries > 1 || q.size(0) == rows,
                    "paged_attention: max_queries = 1 expected with one query a row, got ",
                    q.size(0), " queries of ", rows, " rows");
}

// What a row may ask, read on the host: CPU only, CUDA kernels trust their caller.
inline void check_max_queries(const Tensor& cu_seqlens_q, int64_t max_queries) {
  const auto* starts = cu_seqlens_q.const_data_ptr<int32_t>();
  for (int64_t row = 0; row + 1 < cu_seqlens_q.numel(); ++row)
    TORCH_CHECK_VALUE(starts[row + 1] - starts[row] <= max_queries,
                      "paged_attention: max_queries expected at least the ",
                      starts[row + 1] - starts[row], " queries of row ", row, ", got ",
                      max_queries);
}

// Who shares what, read on the host: CPU only, CUDA kernels trust their caller.
inline void check_shared_values(const Tensor& k_cache, const Tensor& page_table,
                                const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                                const Tensor& shared) {
  const auto* starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const auto* lengths = kv_lengths.const_data_ptr<int32_t>();
  const auto table = page_table.accessor<int32_t, 2>();
  const auto groups = shared.accessor<int32_t, 2>();
  const int64_t page_size = k_cache.size(2);
  for (int64_t row = 0; row < kv_lengths.numel(); ++row) {
    TORCH_CHECK_VALUE(starts[row + 1] - starts[row] == 1,
                      "paged_attention: shared expected with one query a row, got ",
                      starts[row + 1] - starts[row], " queries of row ", row);
    const int64_t first = groups[row][0], tokens = groups[row][1];
    const bool follows =
        row > 0 && first < row && first == groups[row - 1][0] && tokens == groups[row - 1][1];
    TORCH_CHECK_VALUE(first == row || follows, "paged_attention: shared[", row,
                      "] expected its own row, or the pair of the row before, got [", first, ", ",
                      tokens, "]");
    const int64_t room = page_table.size(1) * page_size;
    TORCH_CHECK_VALUE(tokens >= 0 && tokens % page_size == 0 && tokens <= room,
                      "paged_attention: shared[", row, "] expected a multiple of ", page_size,
                      " tokens up to ", room, ", got ", tokens);
    if (lengths[row] <= 0) continue;  // a padding row
    TORCH_CHECK_VALUE(tokens < lengths[row], "paged_attention: shared[", row,
                      "] expected fewer tokens than its row's ", lengths[row], ", got ", tokens);
    for (int64_t i = 0; i < tokens / page_size; ++i)
      TORCH_CHECK_VALUE(table[row][i] == table[first][i], "paged_attention: page_table[", row, "][",
                        i, "] expected page ", table[first][i], " of row ", first,
                        ", with which it is shared, got ", table[row][i]);
  }
}

inline void check_sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                         const Tensor& top_p, const Tensor& min_p, const Tensor& rng_key) {
  const Check check{"sample"};
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16,
                   "sample: logits expected dtype float32 or bfloat16, got ", logits.scalar_type());
  check.shape("logits", logits, {kAny, kAny}, "(batch, vocabulary)");
  const int64_t batch = logits.size(0);
  TORCH_CHECK_VALUE(logits.size(1) > 0, "sample: logits expected a vocabulary, got 0 columns");
  check.tensor("temperature", temperature, logits, at::kFloat, {batch}, "(batch)");
  check.tensor("top_k", top_k, logits, at::kInt, {batch}, "(batch)");
  check.tensor("top_p", top_p, logits, at::kFloat, {batch}, "(batch)");
  check.tensor("min_p", min_p, logits, at::kFloat, {batch}, "(batch)");
  check.tensor("rng_key", rng_key, logits, at::kLong, {batch, 4},
               "(batch, seed prompt sample position)");
}

inline void check_advance(const Tensor& token, const Tensor& logprob, const Tensor& stop_ids,
                          const Tensor& last, const Tensor& slots, const Tensor& lengths,
                          const Tensor& remaining, const Tensor& rng_key, const Tensor& drawn,
                          const Tensor& logprobs, const Tensor& step) {
  const Check check{"advance"};
  check.tensor("token", token, token, at::kLong, {kAny}, "(rows)");
  const int64_t rows = token.size(0);
  const auto mutated = [&](const char* name, const Tensor& t, at::ScalarType type,
                           std::initializer_list<int64_t> want, const char* words) {
    check.tensor(name, t, token, type, want, words);
    check.contiguous(name, t);
  };
  check.tensor("logprob", logprob, token, at::kFloat, {rows}, "(rows)");
  check.tensor("stop_ids", stop_ids, token, at::kLong, {rows, kAny}, "(rows, any)");
  mutated("last", last, at::kLong, {rows}, "(rows)");
  mutated("slots", slots, at::kInt, {rows}, "(rows)");
  mutated("lengths", lengths, at::kInt, {rows}, "(rows)");
  mutated("remaining", remaining, at::kInt, {rows}, "(rows)");
  mutated("rng_key", rng_key, at::kLong, {rows, 4}, "(rows, 4)");
  mutated("drawn", drawn, at::kLong, {kAny, kAny}, "(steps, rows or more)");
  mutated("logprobs", logprobs, at::kFloat, {drawn.size(0), drawn.size(1)},
          "(steps, rows or more)");
  TORCH_CHECK_VALUE(drawn.size(1) >= rows, "advance: drawn expected at least ", rows,
                    " columns, got ", drawn.size(1));
  mutated("step", step, at::kInt, {1}, "(1)");
}

}  // namespace reasoners
