// Copies of tiles of a tensor into shared memory by the copy engine (sm_90): one thread asks for a
// whole tile, and an mbarrier is told the bytes that have come. What lies outside the tensor comes
// as zeros.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "async_copy.cuh"
#include "kernels.h"

namespace reasoners {

// What the engine knows of a tensor (batch, tokens, columns) of 16-bit data, and of a tile of it:
// 64 columns of some tokens, permuted as Panels in wgmma.cuh.
using TensorMap = CUtensorMap;
constexpr int kTileColumns = 64;

// False if the driver has no such function, or takes no such tensor.
inline bool describe_tensor(TensorMap& map, const void* data, DType dtype, int64_t batch,
                            int64_t tokens, int64_t columns, TokenStrides strides,
                            int tile_tokens) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                        cudaEnableDefault, &status);
    const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(tokens),
                              static_cast<cuuint64_t>(batch)};
  const cuuint64_t steps[] = {2 * static_cast<cuuint64_t>(strides.token),
                              2 * static_cast<cuuint64_t>(strides.batch)};  // bytes
  const cuuint32_t tile[] = {kTileColumns, static_cast<cuuint32_t>(tile_tokens), 1},
                   every[] = {1, 1, 1};
  return encode(&map,
                dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                3, const_cast<void*>(data), sizes, steps, tile, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The tile that begins at a column, a token and a batch row. Of kernel parameters,
// __grid_constant__.
__device__ inline void copy_tile(void* shared, const TensorMap& map, int column, int token,
                                 int batch, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(token), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace reasoners
