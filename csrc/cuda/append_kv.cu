// Writes the keys and values of new tokens to their places in the paged cache.
//
// A block serves one token. It finds the token's row by its place among the rows' offsets, and from
// the row's length and page table the one slot of one page where the token goes. Its threads then
// copy the token's keys and values, which lie together in k and in v and a page apart from head to
// head in the caches. Bits are moved, not numbers: the unit is 16 bytes where head_dim, strides and
// addresses allow, one element otherwise. A token of a padding row has no place, and its block
// ends.

#include "kernels.h"
#include "rows.cuh"

namespace reasoners {
namespace {

constexpr int kThreads = 128;

template <typename unit_t>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const AppendKvParams p, const PageSize pages, int head_units, int64_t k_stride,
                     int64_t v_stride) {
  const int token = blockIdx.x;
  const auto [row, position] = locate_token(p.cu_seqlens_q, p.kv_lengths, p.rows, token);
  if (position < 0) return;
  const int turn = pages.page(position);
  const int64_t page = p.page_table[row * p.table_stride + turn];
  const int slot = position - turn * p.page_size;
  const auto* k = static_cast<const unit_t*>(p.k) + token * k_stride;
  const auto* v = static_cast<const unit_t*>(p.v) + token * v_stride;
  const int token_units = p.kv_heads * head_units;
  for (int i = threadIdx.x; i < 2 * token_units; i += kThreads) {
    const bool is_value = i >= token_units;
    const int from = is_value ? i - token_units : i;
    const int head = from / head_units;
    const int64_t to =
        ((page * p.kv_heads + head) * p.page_size + slot) * head_units + (from - head * head_units);
    auto* cache = static_cast<unit_t*>(is_value ? p.v_cache : p.k_cache);
    cache[to] = is_value ? v[from] : k[from];
  }
}

template <typename unit_t>
void launch(const AppendKvParams& p, int element_bytes, cudaStream_t stream) {
  const int elements = sizeof(unit_t) / element_bytes;
  append_kv_kernel<unit_t>
      <<<p.tokens, kThreads, 0, stream>>>(p, PageSize(p.page_size), p.head_dim / elements,
                                          p.k_stride / elements, p.v_stride / elements);
}

}  // namespace

void launch_append_kv(const AppendKvParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.kv_heads == 0 || p.head_dim == 0) return;
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const auto all = address(p.k) | address(p.v) | address(p.k_cache) | address(p.v_cache) |
                   uintptr_t(bytes * p.head_dim) | uintptr_t(bytes * p.k_stride) |
                   uintptr_t(bytes * p.v_stride);
  if (all % 16 == 0) return launch<uint4>(p, bytes, stream);
  if (bytes == 4) return launch<uint32_t>(p, bytes, stream);
  launch<uint16_t>(p, bytes, stream);
}

}  // namespace reasoners
