// Half-split rotary embedding of a pair of channels. Products and sums are spelled out, so that
// every kernel rounds the same.
#pragma once

namespace reasoners {

struct Rotation {
  float sine, cosine;

  Rotation() = default;
  __device__ Rotation(int position, float inv_freq) {
    sincosf(__fmul_rn(float(position), inv_freq), &sine, &cosine);
  }
  __device__ float first(float u, float v) const {
    return __fmaf_rn(u, cosine, -__fmul_rn(v, sine));
  }
  __device__ float second(float u, float v) const {
    return __fmaf_rn(v, cosine, __fmul_rn(u, sine));
  }
};

}  // namespace reasoners
