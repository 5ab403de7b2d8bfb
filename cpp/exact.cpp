#include "exact.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "eigenpairs.hpp"
#include "factorize.hpp"
#include "lapack.hpp"
#include "projection.hpp"

namespace pissa {
namespace {

constexpr std::size_t kPiece = 512;  // of the longer side, in a product

// Squares of float between which their sums and products stay in range.
constexpr double kSmallSquare = 1e-20, kLargeSquare = 1e20;

// Calls task(at, count, part, stride) for [at, at + count) of the longer side: its rows, or its columns of all rows. A
// part is row-major.
template <class T, class Task>
void for_each_part(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const Task& task) {
  const bool wide = weight.rows <= weight.cols, as_it_lies = std::is_same_v<T, float> && weight.dtype == DType::f32;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  Buffer<T> part(pool.scratch(), as_it_lies ? 0 : small * kPiece);
  Buffer<float> row(pool.scratch(), as_it_lies ? 0 : std::max(small, kPiece));
  for (std::size_t at = 0; at < large; at += kPiece) {
    const std::size_t count = std::min(kPiece, large - at), rows = wide ? small : count, cols = wide ? count : small;
    const char* first = static_cast<const char*>(weight.data) + (wide ? at : at * weight.cols) * size_of(weight.dtype);
    if (as_it_lies) {
      task(at, count, reinterpret_cast<const T*>(first), weight.cols);
      continue;
    }
    for (std::size_t i = 0; i < rows; ++i) {
      kernels.widen(first + i * weight.cols * size_of(weight.dtype), weight.dtype, row.data(), cols);
      std::copy_n(row.data(), cols, part.data() + i * cols);
    }
    task(at, count, static_cast<const T*>(part.data()), cols);
  }
}

template <class T>
struct Directions {
  std::vector<double> squares;  // σ², descending
  Buffer<T> small, large;       // column-major: orthonormal ones of the shorter side, and their images
};

// None where T is float and not precise enough for them.
template <class T>
std::optional<Directions<T>> directions(const Kernels& kernels, ThreadPool& pool, const Weight& weight,
                                        std::size_t rank, bool images) {
  const bool wide = weight.rows <= weight.cols;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  constexpr bool kIsDouble = std::is_same_v<T, double>;
  Buffer<T> gram = small_gram<T>(kernels, pool, weight);
  double trace = 0;
  for (std::size_t j = 0; j < small; ++j) {
    for (std::size_t i = 0; i < j; ++i) gram[j * small + i] = gram[i * small + j];
    trace += static_cast<double>(gram[j * small + j]);
  }
  if (!kIsDouble && !(trace > kSmallSquare && trace < kLargeSquare)) return std::nullopt;
  if (!std::isfinite(trace)) throw std::domain_error("holds NaN or infinity");
  Directions<T> found{std::vector<double>(rank), Buffer<T>(pool.scratch(), small * rank),
                      Buffer<T>(pool.scratch(), images ? large * rank : 0)};
  if (!largest_eigenpairs(kernels, pool, small, gram.data(), rank, found.squares.data(), found.small.data())) {
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  if (!kIsDouble && found.squares[rank - 1] < kPrecise * kPrecise * found.squares[0]) return std::nullopt;
  if (!images) return found;
  for_each_part<T>(kernels, pool, weight, [&](std::size_t at, std::size_t count, const T* part, std::size_t stride) {
    // What is row-major here is transposed to the BLAS.
    lapack::gemm(wide ? 'N' : 'T', 'N', count, rank, small, T{1}, part, stride, found.small.data(), small, T{0},
                 found.large.data() + at, large);
  });
  return found;
}

// Columns (n × rank, column-major) as rows × rank, row-major.
template <class T>
Buffer<float> row_major(ThreadPool& pool, const Buffer<T>& columns, std::size_t n, std::size_t rank) {
  Buffer<float> result(pool.scratch(), n * rank);
  for (std::size_t i = 0; i < rank; ++i) {
    for (std::size_t j = 0; j < n; ++j) result[j * rank + i] = static_cast<float>(columns[i * n + j]);
  }
  return result;
}

template <class T>
Factors as_factors(ThreadPool& pool, const Weight& weight, std::size_t rank, Directions<T> found) {
  const bool wide = weight.rows <= weight.cols;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  Factors factors;
  factors.stride = rank;
  factors.order.resize(rank);
  std::iota(factors.order.begin(), factors.order.end(), 0);
  for (std::size_t i = 0; i < rank; ++i) {
    T* image = found.large.data() + i * large;
    const double sigma = std::sqrt(std::inner_product(image, image + large, image, 0.0));
    factors.sigma.push_back(sigma);
    if (wide) continue;
    // The left factor is orthonormal, and the right one has the lengths.
    for (std::size_t j = 0; j < large; ++j)
      image[j] = sigma > 0 ? static_cast<T>(static_cast<double>(image[j]) / sigma) : T{0};
    for (std::size_t j = 0; j < small; ++j) {
      T& value = found.small[i * small + j];
      value = static_cast<T>(static_cast<double>(value) * sigma);
    }
  }
  factors.length = factors.sigma;
  factors.left = row_major(pool, wide ? found.small : found.large, weight.rows, rank);
  factors.right = row_major(pool, wide ? found.large : found.small, weight.cols, rank);
  return factors;
}

// A float weight's: None also where it would be no faster than double.
std::optional<Factors> project_on_directions(const Kernels& kernels, ThreadPool& pool, const Weight& weight,
                                             std::size_t rank) {
  const bool wide = weight.rows <= weight.cols;
  const std::size_t count = with_spare(rank);
  if (2 * count > std::min(weight.rows, weight.cols)) return std::nullopt;
  std::optional<Directions<float>> found = directions<float>(kernels, pool, weight, count, !wide);
  if (!found) return std::nullopt;
  const int exponent = std::clamp(std::ilogb(std::sqrt(found->squares[0])), -120, 120);
  Buffer<float> left = row_major(pool, wide ? found->small : found->large, weight.rows, count);
  found.reset();
  Factors factors = project(kernels, pool, weight, std::move(left), count, rank, exponent);
  if (factors.sigma.empty()) return std::nullopt;
  return factors;
}

}  // namespace

template <class T>
Buffer<T> small_gram(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  const std::size_t small = std::min(weight.rows, weight.cols);
  const char trans = weight.rows <= weight.cols ? 'T' : 'N';
  Buffer<T> gram(pool.scratch(), small * small);
  for_each_part<T>(kernels, pool, weight, [&](std::size_t at, std::size_t count, const T* part, std::size_t stride) {
    lapack::rank_update(trans, small, count, part, stride, at == 0 ? T{0} : T{1}, gram.data());
  });
  return gram;
}

template Buffer<float> small_gram(const Kernels&, ThreadPool&, const Weight&);
template Buffer<double> small_gram(const Kernels&, ThreadPool&, const Weight&);

std::size_t small_gram_workspace_bytes(const Weight& weight) {
  const std::size_t small = std::min(weight.rows, weight.cols);
  return Scratch::rounded(sizeof(double) * small * small) + Scratch::rounded(sizeof(double) * small * kPiece) +
         Scratch::rounded(sizeof(float) * std::max(small, kPiece));
}

Factors factor_exactly(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t rank, bool precise) {
  if (weight.dtype == DType::f32 && precise) {
    std::optional<Factors> factors = project_on_directions(kernels, pool, weight, rank);
    if (factors) return std::move(*factors);
  } else {
    std::optional<Directions<float>> found = directions<float>(kernels, pool, weight, rank, true);
    if (found) return as_factors(pool, weight, rank, std::move(*found));
  }
  return as_factors(pool, weight, rank, *directions<double>(kernels, pool, weight, rank, true));
}

std::size_t exact_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  return std::max(sizeof(double) * (2 * small * small + small * (kPiece + rank) + large * rank),
                  projection_workspace_bytes(weight, with_spare(rank), threads));
}

}  // namespace pissa
