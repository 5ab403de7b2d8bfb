#include "norms.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "buffer.hpp"
#include "eigenpairs.hpp"
#include "exact.hpp"
#include "factors.hpp"
#include "lapack.hpp"
#include "packing.hpp"
#include "philox.hpp"
#include "root_trace.hpp"
#include "sweep.hpp"

namespace pissa {
namespace {

constexpr std::size_t kPiece = 4096;  // values that a task adds up
constexpr std::size_t kLanes = 8;

const char* place(const Weight& weight, std::size_t row, std::size_t col) {
  return static_cast<const char*>(weight.data) + (row * weight.cols + col) * size_of(weight.dtype);
}

}  // namespace

double frobenius_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  const std::size_t count = weight.rows * weight.cols;
  std::vector<double> sums((count + kPiece - 1) / kPiece);
  pool.run(sums.size(), [&](std::size_t task) {
    alignas(64) float values[kPiece];
    const std::size_t size = std::min(kPiece, count - task * kPiece);
    kernels.widen(place(weight, 0, task * kPiece), weight.dtype, values, size);
    std::array<double, kLanes> lanes{};  // side by side, as one sum waits for itself
    std::fill(values + size, values + (size + kLanes - 1) / kLanes * kLanes, 0.0f);
    for (std::size_t i = 0; i < size; i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const auto value = static_cast<double>(values[i + lane]);
        lanes[lane] += value * value;
      }
    }
    sums[task] = std::accumulate(lanes.begin(), lanes.end(), 0.0);
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return std::sqrt(sum);
}

namespace {

template <class T>
TridiagonalMatrix reduced(const Kernels& kernels, ThreadPool& pool, Buffer<T> gram, std::size_t n) {
  std::vector<T> diagonal(n), beside(n);
  if (!tridiagonalize(kernels, pool.scratch(), n, gram.data(), diagonal.data(), beside.data())) {
    throw std::runtime_error("LAPACK sytrd failed");
  }
  return {{diagonal.begin(), diagonal.end()}, {beside.begin(), beside.end()}};
}

// In place of eigenvalues that are zero, ones of a size that rounding does not matter to.
class Filling {
 public:
  // Adds `value`·l·lᵀ for each of the directions l, made of length one, to the Gram matrix of the float weight's
  // shorter side: they are columns (rows × count, row-major) where that is its rows, or else rows (count × cols).
  Filling(ThreadPool& pool, const Weight& weight, const float* directions, std::size_t count, double value,
          Buffer<float>& gram)
      : count_(static_cast<double>(count)), root_(std::sqrt(value)) {
    const bool wide = weight.rows <= weight.cols;
    const std::size_t n = std::min(weight.rows, weight.cols), along = wide ? 1 : n, across = wide ? count : 1;
    Buffer<float> scaled(pool.scratch(), n * count), products(pool.scratch(), count * count);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t c = 0; c < count; ++c) scaled[i * count + c] = directions[i * across + c * along];
    }
    std::vector<double> factor = column_lengths(pool, scaled, n, count, count);
    for (double& length : factor) length = length > 0 ? root_ / length : 0;
    scale_columns(pool, scaled, n, count, factor);
    energy_ = energy_along(weight, scaled, count) / value;
    lapack::rank_update('N', count, n, scaled.data(), count, 0.0f, products.data());
    for (std::size_t j = 0; j < count; ++j) {
      for (std::size_t i = j; i < count; ++i) {
        const double off = static_cast<double>(products[j * count + i]) / value - (i == j ? 1 : 0);
        dependence_ += off * off * (i == j ? 1 : 2);
      }
    }
    lapack::rank_update('T', n, count, scaled.data(), count, 1.0f, gram.data());
  }

  // What it adds to the sum of the roots, were the directions orthogonal; and how far off that can be.
  double sum() const { return count_ * root_; }
  double uncertainty() const { return dependence_ * root_; }
  // What the sum lacks by the roots that were along them before, at most: as rounding leaves it, next to nothing.
  double replaced() const { return std::sqrt(count_ * energy_); }

 private:
  // The weight's square along all of the columns l (those of its shorter side), Σ ‖Wᵀ·l‖² or Σ ‖W·l‖², estimated from
  // their sums with random signs.
  static double energy_along(const Weight& weight, const Buffer<float>& columns, std::size_t count) {
    constexpr std::size_t kEstimates = 2;
    constexpr std::uint64_t kKey = 0x66696c6c;  // any
    const bool wide = weight.rows <= weight.cols;
    const std::size_t n = columns.size() / count;
    std::vector<float> signs(kEstimates * count), direction(n), sums(weight.cols);
    random_signs(kKey, 0, signs.size(), signs.data());
    double energy = 0;
    for (std::size_t estimate = 0; estimate < kEstimates; ++estimate) {
      for (std::size_t i = 0; i < n; ++i) {
        const float* row = columns.data() + i * count;
        direction[i] = std::inner_product(row, row + count, signs.data() + estimate * count, 0.0f);
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (std::size_t i = 0; i < weight.rows; ++i) {
        const auto* row = static_cast<const float*>(weight.data) + i * weight.cols;
        if (wide) {
          for (std::size_t j = 0; j < weight.cols; ++j) sums[j] += direction[i] * row[j];
        } else {
          std::array<float, kLanes> lanes{};
          for (std::size_t j = 0; j < weight.cols; ++j) lanes[j % kLanes] += direction[j] * row[j];
          const double sum = std::accumulate(lanes.begin(), lanes.end(), 0.0);
          energy += sum * sum / kEstimates;
        }
      }
      for (const float sum : sums) energy += static_cast<double>(sum) * static_cast<double>(sum) / kEstimates;
    }
    return energy;
  }

  double count_, root_, energy_ = 0, dependence_ = 0;
};

// Of the largest eigenvalue: twice what those of a Gram matrix were seen to be wrong by in float, more where many are
// zero but for such errors, whose squares add up; and ample in double.
constexpr double kFloatShift = 2 * static_cast<double>(std::numeric_limits<float>::epsilon());
constexpr double kFloatShiftOverZeros = 2 * kFloatShift;
constexpr double kDoubleShift = 64 * std::numeric_limits<double>::epsilon();
constexpr double kTolerance = 2e-5;
// Norms whose squares float holds, and of what is far smaller, too.
constexpr double kSmallNorm = 0x1p-40, kLargeNorm = 0x1p40;

double exact_nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t zeros,
                          const float* outside) {
  const double norm = frobenius_norm(kernels, pool, weight);
  const std::size_t small = std::min(weight.rows, weight.cols);
  if (norm > kSmallNorm && norm < kLargeNorm) {
    Buffer<float> gram = small_gram<float>(kernels, pool, weight);
    if (outside != nullptr && weight.dtype == DType::f32 && zeros < small) {
      const double each = norm * norm / static_cast<double>(small - zeros);
      const Filling filling(pool, weight, outside, zeros, each, gram);
      const RootTrace found = root_trace(reduced(kernels, pool, std::move(gram), small), kFloatShift, 0);
      const double value = found.value - filling.sum() + (found.uncertainty + filling.replaced()) / 2;
      if (found.uncertainty + filling.replaced() / 2 + filling.uncertainty() < kTolerance * value) return value;
    } else {
      const RootTrace found = root_trace(reduced(kernels, pool, std::move(gram), small),
                                         zeros > 0 ? kFloatShiftOverZeros : kFloatShift, zeros);
      if (found.uncertainty < kTolerance * found.value) return found.value + found.uncertainty / 2;
    }
  }
  const RootTrace found =
      root_trace(reduced(kernels, pool, small_gram<double>(kernels, pool, weight), small), kDoubleShift, 0);
  if (!std::isfinite(found.uncertainty)) throw std::runtime_error("a Gram matrix has negative eigenvalues");
  return found.value;
}

constexpr std::size_t kExactSide = 1024;
constexpr std::size_t kProbes = 16, kSteps = 16;
constexpr std::uint64_t kProbeKey = 0x6e75636c656172;  // any

// The Gram matrix of the smaller side, applied to kProbes columns.
class SmallGram {
 public:
  SmallGram(const Kernels& kernels, ThreadPool& pool, const Weight& weight, float scale)
      : sweep_(kernels, pool, weight, kProbes),
        wide_(weight.rows < weight.cols),
        scale_(scale),
        other_(pool.scratch(), std::max(weight.rows, weight.cols) * kProbes) {}

  void apply(const float* x, float* result) {
    if (wide_) {
      sweep_.transposed_product(x, kProbes, kProbes, scale_, other_.data(), kProbes);
      sweep_.product(other_.data(), kProbes, kProbes, scale_, result, kProbes);
    } else {
      sweep_.power_step(x, kProbes, kProbes, scale_, other_.data(), kProbes, scale_, result);
    }
  }

 private:
  Sweep<float> sweep_;
  bool wide_;
  float scale_;
  Buffer<float> other_;
};

using Sums = std::array<double, kProbes>;

Sums dot(const Buffer<float>& a, const Buffer<float>& b, std::size_t rows) {
  Sums sums{};
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t c = 0; c < kProbes; ++c) {
      sums[c] += static_cast<double>(a[i * kProbes + c]) * static_cast<double>(b[i * kProbes + c]);
    }
  }
  return sums;
}

// eᵀ·√T·e for the first unit vector e and the tridiagonal T of a Lanczos run.
double quadrature(const Kernels& kernels, ThreadPool& pool, const std::array<Sums, kSteps>& diagonal,
                  const std::array<Sums, kSteps>& beside, std::size_t probe) {
  std::vector<double> matrix(kSteps * kSteps), values(kSteps), vectors(kSteps * kSteps);
  for (std::size_t j = 0; j < kSteps; ++j) {
    matrix[j * kSteps + j] = diagonal[j][probe];
    if (j > 0) matrix[j * kSteps + j - 1] = beside[j - 1][probe];
  }
  if (!largest_eigenpairs(kernels, pool, kSteps, matrix.data(), kSteps, values.data(), vectors.data())) {
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  double sum = 0;
  for (std::size_t i = 0; i < kSteps; ++i) {
    sum += vectors[i * kSteps] * vectors[i * kSteps] * std::sqrt(std::max(0.0, values[i]));
  }
  return sum;
}

}  // namespace

double estimate_nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  const double size = frobenius_norm(kernels, pool, weight);
  if (size == 0) return 0;
  const int exponent = std::clamp(std::ilogb(size), -120, 120);
  const std::size_t rows = std::min(weight.rows, weight.cols);
  SmallGram gram(kernels, pool, weight, std::ldexp(1.0f, -exponent));
  Buffer<float> now(pool.scratch(), rows * kProbes), before(pool.scratch(), rows * kProbes),
      next(pool.scratch(), rows * kProbes);
  random_signs(kProbeKey, 0, rows * kProbes, now.data());
  const float start = 1.0f / std::sqrt(static_cast<float>(rows));
  for (std::size_t i = 0; i < rows * kProbes; ++i) now[i] *= start;
  std::fill(before.begin(), before.end(), 0.0f);
  std::array<Sums, kSteps> diagonal{}, beside{};
  for (std::size_t step = 0; step < kSteps; ++step) {
    gram.apply(now.data(), next.data());
    diagonal[step] = dot(now, next, rows);
    std::array<float, kProbes> along{}, back{}, inverse{};
    for (std::size_t c = 0; c < kProbes; ++c) {
      along[c] = static_cast<float>(diagonal[step][c]);
      back[c] = step > 0 ? static_cast<float>(beside[step - 1][c]) : 0.0f;
    }
    for (std::size_t i = 0; i < rows * kProbes; ++i) {
      next[i] -= along[i % kProbes] * now[i] + back[i % kProbes] * before[i];
    }
    const Sums squares = dot(next, next, rows);
    for (std::size_t c = 0; c < kProbes; ++c) {
      beside[step][c] = std::sqrt(squares[c]);
      inverse[c] = squares[c] > 0 ? static_cast<float>(1 / beside[step][c]) : 0.0f;
    }
    for (std::size_t i = 0; i < rows * kProbes; ++i) {
      before[i] = now[i];
      now[i] = next[i] * inverse[i % kProbes];
    }
  }
  // The probes estimate the sum of squares, too, which is known: they err alike in both.
  double sum = 0, squares = 0;
  for (std::size_t c = 0; c < kProbes; ++c) {
    sum += quadrature(kernels, pool, diagonal, beside, c);
    squares += diagonal[0][c];
  }
  const double each = static_cast<double>(rows) / kProbes;
  return sum * each * size / std::sqrt(squares * each);
}

NuclearNorm nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t zeros,
                         const float* outside) {
  if (std::min(weight.rows, weight.cols) > kExactSide) return {estimate_nuclear_norm(kernels, pool, weight), true};
  return {exact_nuclear_norm(kernels, pool, weight, zeros, outside), false};
}

std::size_t nuclear_norm_workspace_bytes(const Weight& weight, unsigned threads, std::size_t zeros) {
  const std::size_t small = std::min(weight.rows, weight.cols);
  if (small <= kExactSide) {
    const std::size_t full = reduced_stride(small);
    const std::size_t filling =
        Scratch::rounded(sizeof(float) * small * zeros) + Scratch::rounded(sizeof(float) * zeros * zeros);
    return std::max(small_gram_workspace_bytes(weight),
                    Scratch::rounded(sizeof(float) * full * full) +
                        std::max(Scratch::rounded(sizeof(float) * full * full), filling)) +
           sizeof(double) * (small * 128 + 2048);
  }
  return Sweep<float>::workspace_bytes(weight, kProbes, threads) +
         3 * Scratch::rounded(sizeof(float) * kProbes * small) +
         Scratch::rounded(sizeof(float) * kProbes * std::max(weight.rows, weight.cols));
}

}  // namespace pissa
