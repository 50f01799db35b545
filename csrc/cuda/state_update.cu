// One token of S = exp(log_decay) S + scale x B^T, y = S C + D x, in place on each row's slot, with
// the state written at once (state_update) or every few tokens (deferred_state_update): see
// state_step.cuh and state_stream.cuh. State dimensions other than 16, 32, 64 and 128 take the loop
// at the end, a warp to a row of P, which is right and no more.

#include "state_stream.cuh"

namespace reasoners {
namespace {

template <typename data_t>
struct Bare {
  StateUpdateParams p;

  static constexpr bool kConvolves = false, kGates = false;

  __host__ __device__ int tiles() const { return (p.head_dim + kMaxHeadDim - 1) / kMaxHeadDim; }
  __device__ float log_decay(int64_t row, int head) const {
    return p.log_decay[row * p.log_decay_stride + head];
  }
  __device__ float scale(int64_t row, int head) const {
    return p.scale ? p.scale[row * p.scale_stride + head] : 1.f;
  }
  __device__ float skip(int head) const { return p.D ? p.D[head] : 0.f; }
  __device__ const data_t* x(int64_t row, const HeadPlace& place) const {
    return static_cast<const data_t*>(p.x) + row * p.x_stride + int64_t(place.x) * p.head_dim;
  }
  __device__ const data_t* B(int64_t row, const HeadPlace& place) const {
    return static_cast<const data_t*>(p.B) + row * p.b_stride + int64_t(place.b) * p.state_dim;
  }
  __device__ const data_t* C(int64_t row, const HeadPlace& place) const {
    return static_cast<const data_t*>(p.C) + row * p.c_stride + int64_t(place.c) * p.state_dim;
  }
  __device__ const data_t* z(int64_t, int) const { return nullptr; }

  // No convolution: a value is its input.
  struct Nothing {};
  using Constants = Nothing;
  using Ring = Nothing;
  using Past = Nothing;
  __device__ int entry(int64_t) const { return 0; }
  __device__ int channel(const HeadPlace&, int) const { return 0; }
  __device__ Nothing constants(const HeadPlace&, int) const { return {}; }
  static constexpr int kMaxPast = 0;
  __device__ int length(int64_t) const { return 0; }
  __device__ Nothing ring_inputs(int64_t, const HeadPlace&, int) const { return {}; }
  __device__ Nothing past(Nothing, int) const { return {}; }
  __device__ Nothing past_of(const data_t*, int) const { return {}; }
  __device__ data_t* newest(int64_t, int) const { return nullptr; }
  __device__ data_t value(Nothing, data_t input, Nothing, data_t*) const { return input; }
  bool aligned() const {
    constexpr int kChunk = 16 / sizeof(data_t);
    const auto fits = [](int64_t count) { return count % kChunk == 0; };
    return fits(p.x_stride) && fits(p.b_stride) && fits(p.c_stride) && is_aligned<uint4>(p.x) &&
           is_aligned<uint4>(p.B) && is_aligned<uint4>(p.C) && is_aligned<uint4>(p.state) &&
           is_aligned<uint4>(p.recent.tokens);
  }
  __device__ void store(int64_t row, int head, int channel, float y) const {
    static_cast<data_t*>(p.y)[(row * p.heads + head) * p.head_dim + channel] =
        from_float<data_t>(y);
  }
  __device__ Nothing output_constants(int, int) const { return {}; }
  template <typename Sync>
  __device__ void finish(float*, const Sync&, Nothing, int64_t row, int head, int i, bool valid,
                         float y, float) const {
    if (valid) store(row, head, i, y);
  }
};

template <typename state_t>
__device__ state_t narrow_one(float v, const int64_t* rng_key, uint32_t index) {
  if constexpr (sizeof(state_t) == 2) {
    if (rng_key) {
      const PhiloxBlock block = NoiseStream(rng_key).block(0x80000000u | index / 8);
      const uint32_t words[] = {block.a, block.b, block.c, block.d};
      const uint32_t word = words[index % 8 / 2];
      const uint32_t noise = index % 2 ? word >> 16 : word & 0xffff;
      const unsigned short bits = round_stochastically(v, noise, state_t{});
      return *reinterpret_cast<const state_t*>(&bits);
    }
  }
  return from_float<state_t>(v);
}

template <typename data_t, typename state_t>
__global__ void __launch_bounds__(128) any_width_kernel(const Bare<data_t> mixer) {
  const auto& p = mixer.p;
  const int64_t row = blockIdx.x / p.heads, slot = p.slots[row];
  const int head = blockIdx.x % p.heads, lane = threadIdx.x % 32;
  const HeadPlace place = place_of(p, head);
  const int b_at = p.x_heads * p.head_dim, row_size = b_at + p.b_groups * p.state_dim;
  const data_t *x = mixer.x(row, place), *b = mixer.B(row, place), *c = mixer.C(row, place);
  const float log_decay = mixer.log_decay(row, head), scale = mixer.scale(row, head);
  const int64_t* rng_key = p.rng_key ? p.rng_key + row * 4 : nullptr;

  const int pending = slot >= 0 && p.recent.pending ? p.recent.pending[slot] : 0;
  const bool writes = p.recent.pending == nullptr || pending + 1 >= p.recent.period;
  const int64_t oldest = slot * p.recent.capacity;
  auto* tokens = static_cast<data_t*>(p.recent.tokens) + oldest * row_size;
  float* decays = p.recent.decays + oldest * 2 * p.heads + head;
  for (int i = threadIdx.x / 32; i < p.head_dim; i += blockDim.x / 32) {
    float sum = 0.f;
    if (slot >= 0) {
      const float input = to_float(x[i]);
      const int64_t first = ((slot * p.heads + head) * p.head_dim + i) * p.state_dim;
      auto* s = static_cast<state_t*>(p.state) + first;
      for (int n = lane; n < p.state_dim; n += 32) {
        float next = to_float(s[n]);
        for (int j = 0; j < pending; ++j) {
          const data_t* old = tokens + int64_t(j) * row_size;
          const float* entry = decays + int64_t(j) * 2 * p.heads;
          next = expf(entry[0]) * next + entry[p.heads] * to_float(old[place.x * p.head_dim + i]) *
                                             to_float(old[b_at + place.b * p.state_dim + n]);
        }
        next = expf(log_decay) * next + scale * input * to_float(b[n]);
        if (writes)
          s[n] = narrow_one<state_t>(next, rng_key, (head * p.head_dim + i) * p.state_dim + n);
        sum += next * to_float(c[n]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      sum += mixer.skip(head) * input;
    }
    if (lane == 0) mixer.store(row, head, i, sum);
  }
  if (slot < 0 || writes) return;
  data_t* entry = tokens + int64_t(pending) * row_size;
  if (place.owns_x)
    for (int i = threadIdx.x; i < p.head_dim; i += blockDim.x)
      entry[place.x * p.head_dim + i] = x[i];
  if (place.owns_b)
    for (int n = threadIdx.x; n < p.state_dim; n += blockDim.x)
      entry[b_at + place.b * p.state_dim + n] = b[n];
  if (threadIdx.x == 0) {
    decays[int64_t(pending) * 2 * p.heads] = log_decay;
    decays[(int64_t(pending) * 2 + 1) * p.heads] = scale;
  }
}

template <typename data_t, typename state_t>
void dispatch_width(const StateUpdateParams& p, cudaStream_t stream) {
  const Bare<data_t> mixer{p};
  // Recent tokens come 16 bytes at a time there.
  const bool whole = p.recent.pending == nullptr || p.head_dim * sizeof(data_t) % 16 == 0;
  if (!whole || !launch_state<Bare<data_t>, data_t, state_t>(mixer, stream))
    any_width_kernel<data_t, state_t><<<int64_t(p.batch) * p.heads, 128, 0, stream>>>(mixer);
}

template <typename data_t>
void dispatch_state(const StateUpdateParams& p, cudaStream_t stream) {
  switch (p.state_dtype) {
    case DType::kFloat32:
      return dispatch_width<data_t, float>(p, stream);
    case DType::kBFloat16:
      return dispatch_width<data_t, __nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_width<data_t, __half>(p, stream);
  }
}

}  // namespace

void launch_state_update(const StateUpdateParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.head_dim == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return dispatch_state<float>(p, stream);
    case DType::kBFloat16:
      return dispatch_state<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return dispatch_state<__half>(p, stream);
  }
}

}  // namespace reasoners
