// Half-precision vectors widened once for all the channels that share them.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace reasoners {

template <typename scalar_t, typename acc_t>
class Widened {
 public:
  explicit Widened(int64_t size) : wide_(std::is_same_v<scalar_t, acc_t> ? 0 : size) {}

  // `source`, of the size given, as acc_t; converted only when it is another one than last time.
  const acc_t* operator()(const scalar_t* source) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return source;
    } else {
      if (source != source_) {
        source_ = source;
        for (size_t i = 0; i < wide_.size(); ++i) wide_[i] = static_cast<acc_t>(source[i]);
      }
      return wide_.data();
    }
  }

 private:
  std::vector<acc_t> wide_;
  const scalar_t* source_ = nullptr;
};

}  // namespace reasoners
