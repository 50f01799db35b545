// Causal attention of each row's last tokens over its pages, in two kernels over one list of work.
//
// split: rows with one query (decode). A unit is (row, kv head, 256 positions): the query heads of
//   the kv head share each K and V vector while it is in registers. Scores are dot products along
//   head_dim, sixteen accumulators (tokens x heads) reduced together. What comes next is
//   prefetched, 1.2 to 2.9 times faster on scattered pages out of cache. A row's units are combined
//   in order by whichever thread finishes the last one.
// tile: rows with more queries, and any head_dim that is not whole vectors. A unit is (row, kv
//   head, 64 packed (query, head) pairs): blocks of 64 positions are widened once, K transposed,
//   and both products are the same small matrix kernel around an online softmax.
//
// Cuts depend on the row's own queries and length only, and a unit is computed the same way by any
// thread: a row's result is the same bits in any batch, on any pages, on any number of threads.
//
// Split units run by position, then row, then kv head: rows forked from one prompt read its pages
// while they are in cache. Tried: kv head outermost, slower in every shape with and without sharing
// (2 to 40 %); 512 positions a unit, no faster. Hence `shared`, which says as much, changes
// nothing; nor does `max_queries`, as the rows' own counts are at hand here.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/fast_exp.h"

namespace reasoners {
namespace {

constexpr int64_t kSplit = 256;    // positions of a split unit
constexpr int64_t kAhead = 64;     // positions between a prefetch and its use
constexpr int64_t kBlock = 64;     // positions of a block of a tile
constexpr int64_t kTileRows = 64;  // (query, head) pairs of a tile
constexpr int64_t kGemmRows = 6;   // rows of the matrix kernel: 6 x 4 accumulators in 32 registers

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename scalar_t>
at::vec::Vectorized<at::opmath_type<scalar_t>> load_wide(const scalar_t* from) {
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    at::vec::Vectorized<float> wide;
    at::vec::load_fp32_from_bf16(from, wide);
    return wide;
  } else {
    return at::vec::Vectorized<scalar_t>::loadu(from);
  }
}

// out[i] = the sum of the lanes of v[i].
template <typename acc_t>
C10_ALWAYS_INLINE void sum_lanes(const at::vec::Vectorized<acc_t> (&v)[16], acc_t* out) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc_t, float>) {
    // Four rounds of pairwise halving: 45 instructions for sixteen sums.
    __m512 quarter[4];
    for (int k = 0; k < 4; ++k) {
      const auto halve = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
      };
      const __m512 low = halve(v[k], v[4 + k]), high = halve(v[8 + k], v[12 + k]);
      quarter[k] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                                 _mm512_shuffle_f32x4(low, high, 0xDD));
    }
    const auto halve = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512 low = halve(quarter[0], quarter[1]), high = halve(quarter[2], quarter[3]);
    _mm512_storeu_ps(
        out, _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE)));
    return;
  }
#endif
  for (int i = 0; i < 16; ++i) {
    acc_t lanes[at::vec::Vectorized<acc_t>::size()];
    v[i].store(lanes);
    out[i] = std::accumulate(std::begin(lanes), std::end(lanes), acc_t(0));
  }
}

template <typename acc_t>
struct Softmax {
  acc_t max, sum;
};
// Scores to weights exp(scale * score - max), in place and not yet divided by their sum; 0 from
// `seen` on. The maximum takes in that of what came before.
template <typename acc_t>
Softmax<acc_t> exponentiate(acc_t* scores, int64_t seen, int64_t n, acc_t scale, acc_t max) {
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < seen; ++i) {
    scores[i] *= scale;
    max = scores[i] > max ? scores[i] : max;
  }
  std::fill(scores + seen, scores + n, -std::numeric_limits<acc_t>::infinity());
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = fast_exp(scores[i] - max);
    sum += scores[i];
  }
  return {max, sum};
}

template <typename scalar_t>
class PagedAttention {
  using acc_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();
  static constexpr int64_t kLine = 64 / sizeof(scalar_t);
  static constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

 public:
  PagedAttention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& page_table, const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                 double scale, Tensor& out, Tensor& lse)
      : q_(q.const_data_ptr<scalar_t>()),
        k_(k_cache.const_data_ptr<scalar_t>()),
        v_(v_cache.const_data_ptr<scalar_t>()),
        out_(out.mutable_data_ptr<scalar_t>()),
        lse_(lse.defined() ? lse.mutable_data_ptr<acc_t>() : nullptr),
        table_(page_table.const_data_ptr<int32_t>()),
        starts_(cu_seqlens_q.const_data_ptr<int32_t>()),
        lengths_(kv_lengths.const_data_ptr<int32_t>()),
        rows_(kv_lengths.numel()),
        max_pages_(page_table.size(1)),
        heads_(q.size(1)),
        kv_heads_(k_cache.size(1)),
        group_(heads_ / kv_heads_),
        page_size_(k_cache.size(2)),
        head_dim_(q.size(2)),
        scale_(static_cast<acc_t>(scale)) {}

  void run() {
    plan();
    std::atomic<size_t> next{0};
    const auto threads = std::min<int64_t>(at::get_num_threads(), units_.size());
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Scratch scratch;
      for (size_t i = next++; i < units_.size(); i = next++) {
        const Unit& unit = units_[i];
        unit.partial < 0 ? tile(unit, scratch) : split(unit, scratch);
      }
    });
  }

 private:
  struct Unit {
    int32_t row, kv_head;
    int64_t begin;    // tile: its first query within the row; split: its first position
    int64_t partial;  // split: where its result goes; tile: -1
  };
  struct Scratch {
    int64_t offsets[kSplit];
    const scalar_t* vectors[2 * kSplit + kAhead];
    std::vector<acc_t> buffer;
    acc_t* reserve(int64_t size) {
      if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
      return buffer.data();
    }
  };

  // Cuts every row into units.
  void plan() {
    const bool whole_vectors = head_dim_ % kLanes == 0;
    int64_t longest = 0;
    std::vector<int64_t> splits(rows_, 0);  // per row, 0 for tiles and padding
    first_partial_.resize(rows_);
    int64_t partials = 0;
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t queries = starts_[row + 1] - starts_[row], length = lengths_[row];
      if (length <= 0) {
        std::fill(out_ + starts_[row] * heads_ * head_dim_,
                  out_ + starts_[row + 1] * heads_ * head_dim_, scalar_t(0));
        if (lse_ != nullptr)
          std::fill(lse_ + starts_[row] * heads_, lse_ + starts_[row + 1] * heads_, kMinusInfinity);
      } else if (queries == 1 && whole_vectors) {
        splits[row] = ceil_div(length, kSplit);
        first_partial_[row] = partials;
        partials += splits[row] * kv_heads_;
        longest = std::max(longest, splits[row]);
      } else {
        // The last tile sees most positions: longest work first.
        for (int64_t t = ceil_div(queries, tile_queries()) - 1; t >= 0; --t)
          for (int32_t head = 0; head < kv_heads_; ++head)
            units_.push_back({static_cast<int32_t>(row), head, t * tile_queries(), -1});
      }
    }
    for (int64_t s = 0; s < longest; ++s)
      for (int64_t row = 0; row < rows_; ++row)
        for (int32_t head = 0; head < kv_heads_; ++head)
          if (s < splits[row])
            units_.push_back({static_cast<int32_t>(row), head, s * kSplit,
                              first_partial_[row] + head * splits[row] + s});
    partials_.reset(new acc_t[partials * partial_size()]);
    unfinished_.reset(new std::atomic<int64_t>[rows_ * kv_heads_]);
    for (int64_t i = 0; i < rows_ * kv_heads_; ++i) unfinished_[i] = splits[i / kv_heads_];
  }

  int64_t tile_queries() const { return std::max<int64_t>(1, kTileRows / group_); }
  // Of one split: values (group, head_dim), then maximum and sum of each head of the group.
  int64_t partial_size() const { return group_ * (head_dim_ + 2); }

  // Where positions [begin, begin + n) of a row are in the caches.
  void locate(int64_t row, int64_t kv_head, int64_t begin, int64_t n, int64_t* offsets) const {
    for (int64_t i = 0; i < n;) {
      const int64_t page = (begin + i) / page_size_, slot = (begin + i) % page_size_;
      const int64_t here = std::min(n - i, page_size_ - slot);
      const int64_t id = table_[row * max_pages_ + page];
      const int64_t base = ((id * kv_heads_ + kv_head) * page_size_ + slot) * head_dim_;
      for (int64_t j = 0; j < here; ++j) offsets[i++] = base + j * head_dim_;
    }
  }

  // ---- split

  void split(const Unit& unit, Scratch& scratch) {
    const int64_t row = unit.row, n = std::min(kSplit, lengths_[row] - unit.begin);
    const int64_t padded = round_up(n, 16);
    locate(row, unit.kv_head, unit.begin, n, scratch.offsets);
    // All that is read, in order: K, its last vector repeated to fill a group of tokens; V; and
    // again its last vector, as far as prefetches reach.
    const scalar_t** k = scratch.vectors;
    const scalar_t** v = k + padded;
    for (int64_t t = 0; t < n; ++t) k[t] = k_ + scratch.offsets[t], v[t] = v_ + scratch.offsets[t];
    std::fill(k + n, v, k[n - 1]);
    std::fill(v + n, v + n + kAhead, v[n - 1]);

    const int64_t first = (starts_[row] * heads_ + unit.kv_head * group_) * head_dim_;
    acc_t* q = scratch.reserve(group_ * (head_dim_ + kSplit));
    acc_t* p = q + group_ * head_dim_;
    for (int64_t i = 0; i < group_ * head_dim_; i += kLanes) load_wide(q_ + first + i).store(q + i);

    acc_t* y = partials_.get() + unit.partial * partial_size();
    acc_t* softmax = y + group_ * head_dim_;
    for (int64_t h = 0; h < group_; h += 4) {
      with_extent<4>(group_ - h, [&](auto heads) {
        scores<heads>(q + h * head_dim_, k, padded, p + h * kSplit);
        for (int64_t i = h; i < h + heads; ++i) {
          const auto [max, sum] = exponentiate(p + i * kSplit, n, padded, scale_, kMinusInfinity);
          softmax[2 * i] = max, softmax[2 * i + 1] = sum;
        }
        for (int64_t d = 0; d < head_dim_; d += 4 * kLanes)
          with_extent<4>((head_dim_ - d) / kLanes, [&](auto width) {
            values<heads, width>(p + h * kSplit, v, n, d, y + h * head_dim_ + d);
          });
      });
    }
    if (--unfinished_[row * kv_heads_ + unit.kv_head] == 0) combine(row, unit.kv_head);
  }

  // f(constant) with the constant min(extent, limit).
  template <int limit, typename F>
  static void with_extent(int64_t extent, const F& f) {
    if constexpr (limit > 1)
      if (extent < limit) return with_extent<limit - 1>(extent, f);
    f(std::integral_constant<int, limit>());
  }

  // scores[h][t] = q[h] . k[t]
  template <int heads>
  void scores(const acc_t* q, const scalar_t* const* k, int64_t n, acc_t* scores) const {
    constexpr int kTokens = heads > 2 ? 4 : 16 / heads;
    for (int64_t t = 0; t < n; t += kTokens) {
      for (int j = 0; j < kTokens; ++j)
        for (int64_t d = 0; d < head_dim_; d += kLine) __builtin_prefetch(k[t + j + kAhead] + d);
      Vec sums[16];
#pragma GCC unroll 16
      for (auto& sum : sums) sum = Vec(0);
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        Vec kt[kTokens];
#pragma GCC unroll 16
        for (int j = 0; j < kTokens; ++j) kt[j] = load_wide(k[t + j] + d);
#pragma GCC unroll 4
        for (int h = 0; h < heads; ++h) {
          const Vec qh = Vec::loadu(q + h * head_dim_ + d);
#pragma GCC unroll 16
          for (int j = 0; j < kTokens; ++j)
            sums[h * kTokens + j] = at::vec::fmadd(qh, kt[j], sums[h * kTokens + j]);
        }
      }
      acc_t dots[16];
      sum_lanes(sums, dots);
      for (int h = 0; h < heads; ++h)
        for (int j = 0; j < kTokens; ++j) scores[h * kSplit + t + j] = dots[h * kTokens + j];
    }
  }

  // y[h] = sum_t p[h][t] v[t], for `width` vectors of head_dim from d on
  template <int heads, int width>
  void values(const acc_t* p, const scalar_t* const* v, int64_t n, int64_t d, acc_t* y) const {
    Vec sums[heads][width];
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) sums[h][i] = Vec(0);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < width * kLanes; i += kLine) __builtin_prefetch(v[t + kAhead] + d + i);
      Vec vt[width];
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) vt[i] = load_wide(v[t] + d + i * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < heads; ++h) {
        const Vec pt(p[h * kSplit + t]);
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) sums[h][i] = at::vec::fmadd(pt, vt[i], sums[h][i]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) sums[h][i].store(y + h * head_dim_ + i * kLanes);
  }

  void combine(int64_t row, int64_t kv_head) const {
    const int64_t splits = ceil_div(lengths_[row], kSplit);
    const int64_t first = starts_[row] * heads_ + kv_head * group_;
    acc_t* parts = partials_.get() + (first_partial_[row] + kv_head * splits) * partial_size();
    for (int64_t h = 0; h < group_; ++h) {
      const auto softmax = [&](int64_t s) {
        return parts + s * partial_size() + group_ * head_dim_ + 2 * h;
      };
      acc_t max = kMinusInfinity, sum = 0;
      for (int64_t s = 0; s < splits; ++s) max = std::max(max, softmax(s)[0]);
      acc_t* total = parts + h * head_dim_;
      for (int64_t s = 0; s < splits; ++s) {
        const acc_t weight = fast_exp(softmax(s)[0] - max);
        sum += weight * softmax(s)[1];
        const acc_t* part = total + s * partial_size();
        for (int64_t d = 0; d < head_dim_; ++d)
          total[d] = s == 0 ? weight * part[d] : total[d] + weight * part[d];
      }
      scalar_t* out = out_ + (first + h) * head_dim_;
      for (int64_t d = 0; d < head_dim_; ++d) out[d] = static_cast<scalar_t>(total[d] / sum);
      if (lse_ != nullptr) lse_[first + h] = max + std::log(sum);
    }
  }

  // ---- tile

  void tile(const Unit& unit, Scratch& scratch) const {
    const int64_t queries =
        std::min(tile_queries(), starts_[unit.row + 1] - starts_[unit.row] - unit.begin);
    const int64_t rows = queries * group_, padded = round_up(rows, kGemmRows);
    const int64_t dim = head_dim_, wide = round_up(dim, kLanes);
    acc_t* q = scratch.reserve(padded * (2 * wide + kBlock + 2) + 3 * kBlock * wide);
    acc_t* out = q + padded * wide;
    acc_t* scores = out + padded * wide;
    acc_t* max = scores + padded * kBlock;
    acc_t* sum = max + padded;
    acc_t* k = sum + padded;
    acc_t* k_transposed = k + kBlock * wide;
    acc_t* v = k_transposed + kBlock * wide;
    std::fill(q, k, acc_t(0));
    std::fill(max, sum, kMinusInfinity);

    const int64_t first_query = starts_[unit.row] + unit.begin;
    const int64_t first = first_query * heads_ + unit.kv_head * group_;
    const auto packed = [&](int64_t r) { return first + r / group_ * heads_ + r % group_; };
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < dim; ++d)
        q[r * wide + d] = static_cast<acc_t>(q_[packed(r) * dim + d]);

    const int64_t first_position = lengths_[unit.row] - starts_[unit.row + 1] + first_query;
    const int64_t end = first_position + queries;
    for (int64_t begin = 0; begin < end; begin += kBlock) {
      const int64_t n = std::min(kBlock, end - begin);
      locate(unit.row, unit.kv_head, begin, n, scratch.offsets);
      widen(k_, scratch.offsets, n, k, wide);
      widen(v_, scratch.offsets, n, v, wide);
      at::vec::transpose_mxn<acc_t>(k, wide, k_transposed, kBlock, n, dim);
      gemm<false>(q, wide, k_transposed, kBlock, scores, kBlock, padded, kBlock, dim);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = first_position + r / group_ + 1 - begin;
        const auto block = exponentiate(scores + r * kBlock, std::clamp<int64_t>(visible, 0, n),
                                        kBlock, scale_, max[r]);
        const acc_t fade = fast_exp(max[r] - block.max);
        max[r] = block.max;
        sum[r] = sum[r] * fade + block.sum;
        for (int64_t d = 0; d < wide; ++d) out[r * wide + d] *= fade;
      }
      gemm<true>(scores, kBlock, v, wide, out, wide, padded, wide, n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < dim; ++d)
        out_[packed(r) * dim + d] = static_cast<scalar_t>(out[r * wide + d] / sum[r]);
      if (lse_ != nullptr) lse_[packed(r)] = max[r] + std::log(sum[r]);
    }
  }

  void widen(const scalar_t* cache, const int64_t* offsets, int64_t n, acc_t* to,
             int64_t stride) const {
    for (int64_t t = 0; t < n; ++t, to += stride)
      for (int64_t d = 0; d < head_dim_; ++d) to[d] = static_cast<acc_t>(cache[offsets[t] + d]);
  }

  // C (m, n) = A (m, k) B (k, n), plus C if `add`; m in whole kGemmRows, n in whole vectors.
  template <bool add>
  static void gemm(const acc_t* a, int64_t lda, const acc_t* b, int64_t ldb, acc_t* c, int64_t ldc,
                   int64_t m, int64_t n, int64_t k) {
    constexpr int kColumns = kLanes * sizeof(acc_t) >= 64 ? 4 : 2;
    for (int64_t j = 0; j < n; j += kColumns * kLanes)
      with_extent<kColumns>((n - j) / kLanes, [&](auto columns) {
        for (int64_t i = 0; i < m; i += kGemmRows)
          gemm_block<add, columns>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, k);
      });
  }
  template <bool add, int columns>
  static void gemm_block(const acc_t* a, int64_t lda, const acc_t* b, int64_t ldb, acc_t* c,
                         int64_t ldc, int64_t k) {
    Vec sums[kGemmRows][columns];
#pragma GCC unroll 6
    for (int i = 0; i < kGemmRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j)
        sums[i][j] = add ? Vec::loadu(c + i * ldc + j * kLanes) : Vec(0);
    for (int64_t l = 0; l < k; ++l) {
      Vec row[columns];
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) row[j] = Vec::loadu(b + l * ldb + j * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kGemmRows; ++i) {
        const Vec factor(a[i * lda + l]);
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) sums[i][j] = at::vec::fmadd(factor, row[j], sums[i][j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kGemmRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) sums[i][j].store(c + i * ldc + j * kLanes);
  }

  const scalar_t *q_, *k_, *v_;
  scalar_t* out_;
  acc_t* lse_;  // (tokens, heads) or null
  const int32_t *table_, *starts_, *lengths_;
  int64_t rows_, max_pages_, heads_, kv_heads_, group_, page_size_, head_dim_;
  acc_t scale_;
  std::vector<Unit> units_;
  std::vector<int64_t> first_partial_;  // per row
  std::unique_ptr<acc_t[]> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished_;  // split units, per (row, kv head)
};

// The result, and its log-sum-exp where it is wanted.
std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table, const Tensor& cu_seqlens_q,
                                  const Tensor& kv_lengths, double scale, int64_t max_queries,
                                  const OptionalTensor& shared, bool wants_lse) {
  check_paged_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, max_queries,
                        shared);
  const Tensor table = page_table.contiguous(), starts = cu_seqlens_q.contiguous(),
               lengths = kv_lengths.contiguous();
  check_page_values("paged_attention", k_cache, table, starts, lengths, q.size(0));
  if (shared) check_shared_values(k_cache, table, starts, lengths, *shared);
  check_max_queries(starts, max_queries);
  auto out = at::empty(q.sizes(), q.options());
  Tensor lse;
  if (wants_lse)
    lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(wide_dtype(q.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q.scalar_type(), "paged_attention", [&] {
    PagedAttention<scalar_t>(q.contiguous(), k_cache, v_cache, table, starts, lengths, scale, out,
                             lse)
        .run();
  });
  return {out, lse};
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& page_table, const Tensor& cu_seqlens_q,
                       const Tensor& kv_lengths, double scale, int64_t max_queries,
                       const OptionalTensor& shared) {
  return std::get<0>(attend(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale,
                            max_queries, shared, false));
}

std::tuple<Tensor, Tensor> paged_attention_lse(const Tensor& q, const Tensor& k_cache,
                                               const Tensor& v_cache, const Tensor& page_table,
                                               const Tensor& cu_seqlens_q, const Tensor& kv_lengths,
                                               double scale, int64_t max_queries,
                                               const OptionalTensor& shared) {
  return attend(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale, max_queries,
                shared, true);
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("paged_attention", &paged_attention);
  m.impl("paged_attention_lse", &paged_attention_lse);
}

}  // namespace
}  // namespace reasoners
