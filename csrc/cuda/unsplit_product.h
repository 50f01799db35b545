// y = x W^T (+ bias) by cuBLAS, whose sums are in one order whatever the number of rows.
//
// For few rows cuBLAS likes to split a long sum among blocks, which changes its order; from which
// number of rows on it does not, is another one for every shape and GPU. Asked for kernels that do
// not split, it has them for every number of rows, and they all sum from the first to the last.
// But where a sum is long it names poor ones for few rows (H200, 2048 sums of 8192, 5 to 64 rows:
// 184 us), and good ones for kFewestRows of them (17 us), which serve fewer as well.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <cublasLt.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace reasoners {

constexpr int64_t kFewestRows = 128;

// x (rows, depth) with packed rows, weight (columns, depth) and y (rows, columns) packed, all of
// one 16-bit type. False if cuBLAS has no such kernel.
inline bool multiply_unsplit(const Tensor& y, const Tensor& x, const Tensor& weight,
                             const OptionalTensor& bias) {
  const auto type = x.scalar_type() == at::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);

  // cuBLAS counts columns first: it finds y^T = W x^T.
  cublasLtMatmulDescOpaque_t product;
  TORCH_CUDABLAS_CHECK(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const auto set_product = [&](cublasLtMatmulDescAttributes_t name, const auto& value) {
    TORCH_CUDABLAS_CHECK(cublasLtMatmulDescSetAttribute(&product, name, &value, sizeof(value)));
  };
  set_product(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (bias) {
    set_product(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set_product(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias->const_data_ptr());
  }
  struct Layouts {
    cublasLtMatrixLayoutOpaque_t w, x, y;
  };
  const auto layouts_for = [&](int64_t rows) {
    Layouts l;
    TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&l.w, type, depth, columns, depth));
    TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&l.x, type, depth, rows, x.stride(0)));
    TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&l.y, type, columns, rows, columns));
    return l;
  };
  Layouts asked = layouts_for(depth > columns ? std::max(rows, kFewestRows) : rows);
  Layouts own = layouts_for(rows);

  cublasLtMatmulPreferenceOpaque_t preference;
  TORCH_CUDABLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
    TORCH_CUDABLAS_CHECK(
        cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof(value)));
  };
  constexpr uint64_t kMostWorkspace = 32 << 20;
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMostWorkspace);
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  const auto alignment = [](const Tensor& t) {
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return static_cast<uint32_t>(std::min<uintptr_t>(address & -address, 256));
  };
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(weight));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(x));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(y));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(y));

  const auto handle = at::cuda::getCurrentCUDABlasLtHandle();
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle, &product, &asked.w, &asked.x, &asked.y,
                                                     &asked.y, &preference, 1, &found, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && count == 0))
    return false;
  TORCH_CUDABLAS_CHECK(status);
  const auto bytes = static_cast<int64_t>(found.workspaceSize);
  const auto workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  const float one = 1.f, zero = 0.f;
  TORCH_CUDABLAS_CHECK(cublasLtMatmul(
      handle, &product, &one, weight.const_data_ptr(), &own.w, x.const_data_ptr(), &own.x, &zero,
      y.const_data_ptr(), &own.y, y.mutable_data_ptr(), &own.y, &found.algo,
      workspace.mutable_data_ptr(), bytes, at::cuda::getCurrentCUDAStream()));
  return true;
}

}  // namespace reasoners
