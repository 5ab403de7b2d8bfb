// A few eigenpairs of a symmetric tridiagonal matrix. Several are found side by side: LAPACK's bisection and inverse
// iteration take one after another, and wait for one division after another.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

#include "thread_pool.hpp"

namespace pissa {

// The `count` largest eigenvalues, ascending, of the matrix with this diagonal (n) and what is beside it (n − 1), to
// the precision of T at its norm. Bisection by Sturm's counts (Givens 1954).
template <class T>
std::vector<T> largest_by_bisection(ThreadPool& pool, std::size_t n, const T* diagonal, const T* beside,
                                    std::size_t count) {
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
  pool.run((count + kLanes - 1) / kLanes, [&](std::size_t group) {
    const std::size_t first = group * kLanes;
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
  });
  return values;
}

constexpr std::size_t kSideBySide = 8;  // vectors, whose matrices' factors stay in the first-level cache

// T − λ for several λ as P·L·U, with row exchanges (Wilkinson 1965, chapter 5).
template <class T>
class ShiftedMatrices {
 public:
  using Lanes = std::array<T, kSideBySide>;

  // `tiny` stands for a pivot of zero.
  ShiftedMatrices(std::size_t n, const T* diagonal, const T* beside, const Lanes& shifts, T tiny)
      : upper_(n), multiplier_(n), exchanged_(n) {
    Lanes pivot, right;  // of the row that is still to be eliminated with
    for (std::size_t j = 0; j < kSideBySide; ++j) pivot[j] = diagonal[0] - shifts[j];
    right.fill(n > 1 ? beside[0] : T{0});
    for (std::size_t i = 0; i < n; ++i) {
      const bool last = i + 1 == n;
      const T below = last ? T{0} : beside[i], beyond = i + 2 < n ? beside[i + 1] : T{0};
      Row& row = upper_[i];
      for (std::size_t j = 0; j < kSideBySide; ++j) {
        const T middle = last ? T{0} : diagonal[i + 1] - shifts[j];
        const bool exchange = std::abs(below) > std::abs(pivot[j]);
        const T chosen = exchange ? below : std::abs(pivot[j]) < tiny ? tiny : pivot[j];
        const T other = exchange ? pivot[j] : below;
        const T multiplier = other / chosen;
        row.inverse[j] = 1 / chosen;
        row.first[j] = exchange ? middle : right[j];
        row.second[j] = exchange ? beyond : T{0};
        exchanged_[i][j] = exchange ? T{1} : T{0};
        multiplier_[i][j] = multiplier;
        pivot[j] = (exchange ? right[j] : middle) - multiplier * row.first[j];
        right[j] = (exchange ? T{0} : beyond) - multiplier * row.second[j];
      }
    }
  }

  // x ← L⁻¹·P⁻¹·x.
  void eliminate(std::vector<Lanes>& x) const {
    for (std::size_t i = 0; i + 1 < x.size(); ++i) {
      for (std::size_t j = 0; j < kSideBySide; ++j) {
        const bool exchange = exchanged_[i][j] != 0;
        const T chosen = exchange ? x[i + 1][j] : x[i][j], other = exchange ? x[i][j] : x[i + 1][j];
        x[i][j] = chosen;
        x[i + 1][j] = other - multiplier_[i][j] * chosen;
      }
    }
  }

  // x ← U⁻¹·x, of length one.
  void substitute(std::vector<Lanes>& x) const {
    Lanes next{}, after{}, squares{};
    for (std::size_t i = x.size(); i-- > 0;) {
      const Row& row = upper_[i];
      for (std::size_t j = 0; j < kSideBySide; ++j) {
        T value = (x[i][j] - row.first[j] * next[j] - row.second[j] * after[j]) * row.inverse[j];
        value = std::abs(value) < kNothing ? T{0} : value;
        after[j] = next[j];
        next[j] = x[i][j] = value;
        squares[j] += value * value;
      }
    }
    for (T& square : squares) square = 1 / std::sqrt(square);
    for (Lanes& row : x) {
      for (std::size_t j = 0; j < kSideBySide; ++j) {
        row[j] *= squares[j];
        row[j] = std::abs(row[j]) < kNothing ? T{0} : row[j];
      }
    }
  }

 private:
  // Beside a length of one. Vectors fall off quickly, and CPUs are slow with denormals.
  static constexpr T kNothing = sizeof(T) == sizeof(float) ? T(0x1p-60) : T(0x1p-500);
  struct Row {
    Lanes inverse, first, second;  // of the pivot, and what is right of it
  };
  std::vector<Row> upper_;
  std::vector<Lanes> multiplier_, exchanged_;
};

// Several sums, as one waits for itself.
template <class T>
T dot(const T* a, const T* b, std::size_t n) {
  std::array<T, kSideBySide> sums{};
  const std::size_t whole = n / kSideBySide;
  for (std::size_t i = 0; i < whole; ++i) {
    for (std::size_t j = 0; j < kSideBySide; ++j) sums[j] += a[i * kSideBySide + j] * b[i * kSideBySide + j];
  }
  for (std::size_t i = whole * kSideBySide; i < n; ++i) sums[0] += a[i] * b[i];
  return std::accumulate(sums.begin(), sums.end(), T{0});
}

// The vectors (n × count, orthonormal) of eigenvalues that largest_by_bisection found, by inverse iteration. False
// where some lie too close together for it.
template <class T>
bool vectors_by_inverse_iteration(ThreadPool& pool, std::size_t n, const T* diagonal, const T* beside,
                                  const std::vector<T>& values, T* vectors) {
  constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
  constexpr T kTooLarge = 100 * kEpsilon;  // a residual
  constexpr T kTooSmall = T(0.1);          // what vectors before it leave of one
  T norm = 0;
  for (std::size_t i = 0; i < n; ++i) norm = std::max(norm, std::abs(diagonal[i]));
  for (std::size_t i = 0; i + 1 < n; ++i) norm = std::max(norm, std::abs(beside[i]));
  if (!(norm > 0)) return false;
  std::vector<T> d(n), e(n);
  for (std::size_t i = 0; i < n; ++i) d[i] = diagonal[i] / norm;
  for (std::size_t i = 0; i + 1 < n; ++i) e[i] = beside[i] / norm;
  pool.run((values.size() + kSideBySide - 1) / kSideBySide, [&](std::size_t group) {
    using Lanes = typename ShiftedMatrices<T>::Lanes;
    const std::size_t first = group * kSideBySide, end = std::min(values.size(), first + kSideBySide);
    Lanes shifts;
    for (std::size_t j = 0; j < kSideBySide; ++j) shifts[j] = values[std::min(first + j, end - 1)] / norm;
    const ShiftedMatrices<T> matrices(n, d.data(), e.data(), shifts, kEpsilon);
    std::vector<Lanes> x(n);
    for (Lanes& row : x) row.fill(T{1});
    matrices.substitute(x);
    for (int step = 0; step < 2; ++step) {
      matrices.eliminate(x);
      matrices.substitute(x);
    }
    for (std::size_t j = first; j < end; ++j) {
      for (std::size_t i = 0; i < n; ++i) vectors[j * n + i] = x[i][j - first];
    }
  });
  for (std::size_t j = 0; j < values.size(); ++j) {
    T* vector = vectors + j * n;
    for (std::size_t before = 0; before < j; ++before) {
      const T* other = vectors + before * n;
      const T along = dot(vector, other, n);
      if (std::abs(along) < kEpsilon) continue;
      for (std::size_t i = 0; i < n; ++i) vector[i] -= along * other[i];
    }
    const T length = std::sqrt(dot(vector, vector, n));
    if (!(length > kTooSmall)) return false;
    T residual = 0;
    for (std::size_t i = 0; i < n; ++i) vector[i] /= length;
    for (std::size_t i = 0; i < n; ++i) {
      const T image =
          d[i] * vector[i] + (i > 0 ? e[i - 1] * vector[i - 1] : T{0}) + (i + 1 < n ? e[i] * vector[i + 1] : T{0});
      residual = std::max(residual, std::abs(image - values[j] / norm * vector[i]));
    }
    if (!(residual < kTooLarge)) return false;
  }
  return true;
}

}  // namespace pissa
