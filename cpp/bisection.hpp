// A few eigenvalues of a symmetric tridiagonal matrix.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace pissa {

// The `count` largest eigenvalues, ascending, of the matrix with this diagonal (n) and what is beside it (n − 1), to
// the precision of T at its norm. Bisection by Sturm's counts (Givens 1954), for several eigenvalues side by side:
// LAPACK's waits for one division after another.
template <class T>
std::vector<T> largest_by_bisection(std::size_t n, const T* diagonal, const T* beside, std::size_t count) {
  constexpr std::size_t kLanes = 16;
  const auto radius = [&](std::size_t i) {
    return (i > 0 ? std::abs(beside[i - 1]) : T{0}) + (i + 1 < n ? std::abs(beside[i]) : T{0});
  };
  T low = diagonal[0], high = diagonal[0];
  for (std::size_t i = 0; i < n; ++i) {
    low = std::min(low, diagonal[i] - radius(i));
    high = std::max(high, diagonal[i] + radius(i));
  }
  std::vector<T> squares(n, T{0});
  for (std::size_t i = 1; i < n; ++i) squares[i] = beside[i - 1] * beside[i - 1];
  // So small that it stands for zero beside any square.
  const T tiny = std::max(std::numeric_limits<T>::min(), std::numeric_limits<T>::epsilon() * (high - low));
  std::vector<T> values(count);
  for (std::size_t first = 0; first < count; first += kLanes) {
    std::array<T, kLanes> below, above;
    below.fill(low);
    above.fill(high);
    for (int bit = 0; bit < std::numeric_limits<T>::digits + 2; ++bit) {
      std::array<T, kLanes> middle, pivot;
      std::array<int, kLanes> smaller{};  // eigenvalues than `middle`
      pivot.fill(T{1});
      for (std::size_t j = 0; j < kLanes; ++j) middle[j] = below[j] + (above[j] - below[j]) / 2;
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < kLanes; ++j) {
          const T next = diagonal[i] - middle[j] - squares[i] / pivot[j];
          pivot[j] = std::abs(next) < tiny ? -tiny : next;
          smaller[j] += pivot[j] < 0;
        }
      }
      for (std::size_t j = 0; j < kLanes; ++j) {
        const bool too_high = smaller[j] > static_cast<int>(n - count + std::min(first + j, count - 1));
        (too_high ? above : below)[j] = middle[j];
      }
    }
    for (std::size_t j = first; j < std::min(count, first + kLanes); ++j) values[j] = above[j - first];
  }
  return values;
}

}  // namespace pissa
