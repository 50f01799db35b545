// A tile of a matrix that stays in vector registers while products are summed into it: kRows rows
// by one vector. Eight independent sums hide the latency of the multiply-add, and a single vector
// of B a step leaves the compiler nothing to reload: on Zen 4 wider tiles (4 x 4, 4 x 2) ran at
// 45-95 GFLOP/s a core against 90-110 for this one, because GCC folds their loads into every
// multiply-add.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace reasoners {

constexpr int kRows = 8;
template <typename T>
constexpr int kLanes = at::vec::Vectorized<T>::size();

template <typename T>
T lane_sum(const at::vec::Vectorized<T>& v) {
  return at::vec::vec_reduce_all([](auto& a, auto& b) { return a + b; }, v);
}

template <typename T>
class Tile {
 public:
  using Vec = at::vec::Vectorized<T>;

  Tile() {
    for (auto& row : sum_) row = Vec(T(0));
  }
  // = factor * the rows at `from`.
  void load(const T* from, int64_t stride, T factor) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum_[r] = Vec::loadu(from + r * stride) * Vec(factor);
  }
  void store(T* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum_[r].store(to + r * stride);
  }

  // += A B. A is (kRows, depth) with any strides, so a transposed A costs nothing; B is
  // (depth, kLanes).
  void add_product(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
                   int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_depth) {
      const Vec row = Vec::loadu(b);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum_[r] = at::vec::fmadd(Vec(a[r * a_row]), row, sum_[r]);
    }
  }
  // += A B for a square A that is zero above (or below) its diagonal. What A holds there is not
  // read, so that a NaN in the future of a token cannot reach it through 0 * NaN.
  void add_lower(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth) {
    add_triangle(a, a_row, a_depth, b, b_depth, [](int r, int k) { return k <= r; });
  }
  void add_upper(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth) {
    add_triangle(a, a_row, a_depth, b, b_depth, [](int r, int k) { return k >= r; });
  }

  void add(const T* from, int64_t stride, T factor) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      sum_[r] = at::vec::fmadd(Vec(factor), Vec::loadu(from + r * stride), sum_[r]);
  }
  void multiply(const T* by, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum_[r] = sum_[r] * Vec::loadu(by + r * stride);
  }
  void scale_rows(const T* factor) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum_[r] = sum_[r] * Vec(factor[r]);
  }
  // out[r] += row r . the row at `with`.
  void add_row_dots(const T* with, int64_t stride, T* out) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) out[r] += lane_sum(sum_[r] * Vec::loadu(with + r * stride));
  }

 private:
  template <typename Within>
  void add_triangle(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
                    Within within) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const Vec row = Vec::loadu(b + k * b_depth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        if (within(r, k)) sum_[r] = at::vec::fmadd(Vec(a[r * a_row + k * a_depth]), row, sum_[r]);
    }
  }

  Vec sum_[kRows];
};

}  // namespace reasoners
