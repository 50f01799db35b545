// Counters that kernels find at zero and leave at zero, so that nothing has to clear them between
// launches.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace reasoners {

// At least `count` of them, for a launch on `stream`. Launches that may run at the same time never
// share any: a stream has its own, and so has a captured graph, which clears them when it starts.
// Those of a stream's last graph stay allocated.
inline uint32_t* tickets_for(const c10::cuda::CUDAStream& stream, int64_t count) {
  struct Tickets {
    at::Tensor eager, captured;
    unsigned long long capture = 0;
  };
  using Streams = std::map<std::pair<int, c10::StreamId>, Tickets>;
  static auto* streams = new Streams;  // never freed: the device may be gone by then
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Tickets& tickets = (*streams)[{stream.device_index(), stream.id()}];

  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
  const bool captures = status == cudaStreamCaptureStatusActive;
  at::Tensor& mine = captures ? tickets.captured : tickets.eager;
  if (!mine.defined() || mine.numel() < count || (captures && capture != tickets.capture)) {
    constexpr int64_t kFewest = 256;
    mine = at::zeros({std::max(count, kFewest)}, at::device(stream.device()).dtype(at::kInt));
    if (captures) tickets.capture = capture;
  }
  return reinterpret_cast<uint32_t*>(mine.mutable_data_ptr<int32_t>());
}

}  // namespace reasoners
