// Launches that overlap with the kernel before them in the stream (programmatic dependent launch):
// the next kernel's blocks come to the multiprocessors while the last ones of this kernel still
// run, and each waits by itself before it touches anything that a kernel before may have written.
// In a captured graph this hides most of the microsecond between two small kernels.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace reasoners {

// Everything that earlier kernels wrote is there. Every kernel launched by launch_overlapping
// begins with it, after what depends on weights alone.
__device__ inline void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may come. Its own wait_for_inputs still waits for the end of this one.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

template <typename... Parameters, typename... Arguments>
void launch_overlapping(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared_bytes,
                        cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace reasoners
