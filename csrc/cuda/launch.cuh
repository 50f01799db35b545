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

// Of the device at hand.
inline int count_processors() {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return processors;
}

// launch_overlapping in clusters of blocks.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 cluster, dim3 blocks, dim3 threads,
                     int shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster.x;
  attributes[1].val.clusterDim.y = cluster.y;
  attributes[1].val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
void launch_overlapping(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared_bytes,
                        cudaStream_t stream, Arguments&&... arguments) {
  launch_clusters(kernel, 1, blocks, threads, shared_bytes, stream,
                  std::forward<Arguments>(arguments)...);
}

}  // namespace reasoners
