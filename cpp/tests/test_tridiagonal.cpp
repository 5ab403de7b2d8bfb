// A few eigenpairs of tridiagonal matrices: orthonormal, eigen to the precision of the type, and the largest, however
// close together they lie. And the reduction of symmetric matrices to them by every kernel, against LAPACK's in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.hpp"
#include "eigenpairs.hpp"
#include "matrices.hpp"

using namespace pissa;

namespace {

enum class Kind { random, decaying, wilkinson, apart, repeated, constant };
const Kind kKinds[] = {Kind::random, Kind::decaying, Kind::wilkinson, Kind::apart, Kind::repeated, Kind::constant};
const char* const kNames[] = {"random", "decaying", "Wilkinson's", "in parts", "repeated", "constant"};

template <class T>
void make(Kind kind, std::size_t n, double scale, std::vector<T>& d, std::vector<T>& e) {
  for (std::size_t i = 0; i < n; ++i) {
    const auto x = static_cast<double>(i);
    double diagonal = 0, beside = 0;
    switch (kind) {
      case Kind::random:
        diagonal = random_value(1, i);
        beside = random_value(2, i);
        break;
      case Kind::decaying:  // as that of a Gram matrix
        diagonal = std::exp(-0.1 * x) * (1 + 0.1 * static_cast<double>(random_value(1, i)));
        beside = 0.3 * diagonal;
        break;
      case Kind::wilkinson:  // pairs of eigenvalues that agree to the last digit
        diagonal = std::fabs(x - static_cast<double>(n - 1) / 2);
        beside = 1;
        break;
      case Kind::apart:
        diagonal = random_value(1, i);
        beside = i % 7 == 6 ? 0 : random_value(2, i);
        break;
      case Kind::repeated:
        diagonal = i % 2;
        break;
      case Kind::constant:
        diagonal = 1;
        beside = 0.5;
        break;
    }
    d[i] = static_cast<T>(scale * diagonal);
    e[i] = static_cast<T>(scale * beside);
  }
}

// Whether inverse iteration did it.
template <class T>
bool check(Kind kind, std::size_t n, std::size_t count, double scale) {
  const char* name = kNames[static_cast<int>(kind)];
  ThreadPool pool(2);
  std::vector<T> d(n), e(n), z(n * n);
  make(kind, n, scale, d, e);
  const std::vector<T> values = largest_by_bisection(pool, n, d.data(), e.data(), count);
  const bool by_inverse_iteration = vectors_by_inverse_iteration(pool, n, d.data(), e.data(), values, z.data());
  std::vector<T> found = d, destroyed = e;
  CHECK(solve_tridiagonal(pool, n, count, found.data(), destroyed.data(), z.data()), "%s", name);
  std::vector<T> all = d, other(n * n);
  destroyed = e;
  CHECK(solve_tridiagonal(pool, n, n, all.data(), destroyed.data(), other.data()), "%s", name);
  const auto at = [&](std::size_t i, std::size_t j) { return static_cast<double>(z[(n - count + j) * n + i]); };
  double off = 0, residual = 0, angle = 0, norm = 0;
  for (const T value : all) norm = std::max(norm, std::fabs(static_cast<double>(value)));
  for (std::size_t j = 0; j < count; ++j) {
    const auto value = static_cast<double>(found[n - count + j]);
    off = std::max(off, std::fabs(value - static_cast<double>(all[n - count + j])));
    for (std::size_t i = 0; i < n; ++i) {
      double image = static_cast<double>(d[i]) * at(i, j);
      if (i > 0) image += static_cast<double>(e[i - 1]) * at(i - 1, j);
      if (i + 1 < n) image += static_cast<double>(e[i]) * at(i + 1, j);
      residual = std::max(residual, std::fabs(image - value * at(i, j)));
    }
    for (std::size_t k = 0; k <= j; ++k) {
      double sum = 0;
      for (std::size_t i = 0; i < n; ++i) sum += at(i, j) * at(i, k);
      angle = std::max(angle, std::fabs(sum - (j == k)));
    }
  }
  const double unit = 100 * static_cast<double>(std::numeric_limits<T>::epsilon());
  CHECK(off <= unit * norm && residual <= unit * norm && angle <= unit,
        "%s, %zu of %zu times %g: values off by %g, residual %g, angles %g of %g", name, count, n, scale, off / norm,
        residual / norm, angle, unit);
  return by_inverse_iteration;
}

template <class T>
void check_all(double smallest, double largest) {
  for (const double scale : {1.0, smallest, largest}) {
    for (const Kind kind : kKinds) {
      for (const std::size_t count : {1u, 15u, 16u, 17u, 32u, 100u, 128u}) {
        for (const std::size_t n : {2 * count, 2 * count + 1, 4 * count, 5 * count + 30}) {
          const bool by_inverse_iteration = check<T>(kind, n, count, scale);
          const bool expected =
              kind == Kind::decaying || kind == Kind::constant || (kind == Kind::random && count < 32);
          CHECK(by_inverse_iteration || !expected, "%s, %zu of %zu times %g: not by inverse iteration",
                kNames[static_cast<int>(kind)], count, n, scale);
        }
      }
    }
  }
}

enum class Shape { gram, indefinite, rank_one, diagonal, zero, isolated };
const Shape kShapes[] = {Shape::gram,     Shape::indefinite, Shape::rank_one,
                         Shape::diagonal, Shape::zero,       Shape::isolated};

// Of order one, n × n.
std::vector<double> symmetric(Shape shape, std::size_t n) {
  std::vector<double> a(n * n, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double value = 0;
      switch (shape) {
        case Shape::gram:
          for (std::size_t k = 0; k < 8; ++k) {
            value += static_cast<double>(random_value(k, i)) * static_cast<double>(random_value(k, j));
          }
          value = value / 8 + (i == j ? 0.01 * static_cast<double>(i) : 0.0);
          break;
        case Shape::indefinite:
          value = static_cast<double>(random_value(i, j));
          break;
        case Shape::rank_one:
          value = static_cast<double>(random_value(1, i)) * static_cast<double>(random_value(1, j));
          break;
        case Shape::diagonal:
          value = i == j ? static_cast<double>(random_value(1, i)) : 0.0;
          break;
        case Shape::zero:
          break;
        case Shape::isolated:  // a block, and rows of zeros
          value = i % 3 == 1 && j % 3 == 1 ? static_cast<double>(random_value(i, j)) : 0.0;
          break;
      }
      a[i * n + j] = a[j * n + i] = value;
    }
  }
  return a;
}

void check_reduction(const Kernels& kernels, Shape shape, std::size_t n, double scale) {
  ThreadPool pool(2);
  std::vector<double> exact = symmetric(shape, n), values(n), expected(n), exact_vectors(n * n);
  std::vector<float> a(n * n), lower(n * n), vectors(n * n), d(n), e(n);
  double norm = 0;
  for (std::size_t i = 0; i < n * n; ++i) {
    a[i] = lower[i] = static_cast<float>(scale * exact[i]);
    exact[i] = static_cast<double>(a[i]) / scale;
    norm = std::max(norm, std::fabs(exact[i]));
  }
  // Only the triangle that is named is read.
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t i = 0; i < n; ++i) (i > j ? a : lower)[j * n + i] = i == j ? a[j * n + i] : 1e30f;
  }
  norm *= static_cast<double>(n);
  CHECK(largest_eigenpairs(kernels, pool, n, exact.data(), n, expected.data(), exact_vectors.data()) &&
            largest_eigenpairs(kernels, pool, n, a.data(), n, values.data(), vectors.data()) &&
            tridiagonalize(kernels, pool.scratch(), n, lower.data(), d.data(), e.data()),
        "%s %zu: failed", kernels.name, n);
  std::vector<double> wide_d(d.begin(), d.end()), wide_e(e.begin(), e.end()), z(n * n);
  CHECK(solve_tridiagonal(pool, n, n, wide_d.data(), wide_e.data(), z.data()), "%s %zu: failed", kernels.name, n);
  double off = 0, residual = 0, angle = 0;
  for (std::size_t j = 0; j < n; ++j) {
    off = std::max(off, std::fabs(values[j] / scale - expected[j]));
    off = std::max(off, std::fabs(wide_d[n - 1 - j] / scale - expected[j]));
    for (std::size_t i = 0; i < n; ++i) {
      double image = 0, sum = 0;
      for (std::size_t k = 0; k < n; ++k) {
        image += exact[i * n + k] * static_cast<double>(vectors[j * n + k]);
        sum += static_cast<double>(vectors[i * n + k]) * static_cast<double>(vectors[j * n + k]);
      }
      residual = std::max(residual, std::fabs(image - values[j] / scale * static_cast<double>(vectors[j * n + i])));
      angle = std::max(angle, std::fabs(sum - (i == j)));
    }
  }
  const double unit = 8 * static_cast<double>(std::numeric_limits<float>::epsilon());
  CHECK(off <= unit * norm && residual <= unit * norm && angle <= 4 * unit * std::sqrt(static_cast<double>(n)),
        "%s, shape %d, %zu times %g: values off by %g, residual %g, angles %g", kernels.name, static_cast<int>(shape),
        n, scale, off / norm, residual / norm, angle);
}

void check_infinite(const Kernels& kernels) {
  ThreadPool pool(2);
  std::vector<float> a(9, 1.0f), vectors(9);
  std::vector<double> values(3);
  a[3] = std::numeric_limits<float>::infinity();
  CHECK(!largest_eigenpairs(kernels, pool, 3, a.data(), 3, values.data(), vectors.data()), "%s takes infinity",
        kernels.name);
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) {
    for (const Shape shape : kShapes) {
      for (const std::size_t n : {1u, 2u, 3u, 15u, 16u, 17u, 33u, 96u}) {
        for (const double scale : {1.0, 1e-25, 1e25}) check_reduction(*kernels, shape, n, scale);
      }
      check_reduction(*kernels, shape, 257, 1);
    }
    check_infinite(*kernels);
  }
  check_all<float>(1e-15, 1e15);
  check_all<double>(1e-30, 1e30);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
