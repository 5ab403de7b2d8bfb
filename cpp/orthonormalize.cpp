#include "orthonormalize.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <utility>

#include "lapack.hpp"
#include "packing.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// In float, a Gram matrix carries relative errors of 1e-7, and so a Cholesky factor of columns scaled to length one
// is meaningful down to a diagonal of about the square root of it.
constexpr double kSmallestDiagonal = 1e-2;
// What projection leaves of a block that lies in the basis: the rounding of float.
constexpr double kExhausted = 1e-6;
// Of a column's square, below which what is left of it is not taken from a difference.
constexpr double kCancellation = 1.0 / 64;
constexpr int kMaxRounds = 6;

void householder_qr(ThreadPool& pool, std::size_t n, float* z, std::size_t k, double* r) {
  Buffer<float> columns(pool.scratch(), n * k);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < k; ++j) columns[j * n + i] = z[i * k + j];
  }
  const int rows = lapack::narrow(n), count = lapack::narrow(k);
  std::vector<float> tau(k), work(64 * k);
  const int size = lapack::narrow(work.size());
  int info = 0;
  lapack::scipy_sgeqrf_(&rows, &count, columns.data(), &rows, tau.data(), work.data(), &size, &info);
  for (std::size_t j = 0; j < k; ++j) {
    for (std::size_t i = 0; i < k; ++i) r[j * k + i] = i <= j ? static_cast<double>(columns[j * n + i]) : 0.0;
  }
  lapack::scipy_sorgqr_(&rows, &count, &count, columns.data(), &rows, tau.data(), work.data(), &size, &info);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < k; ++j) z[i * k + j] = columns[j * n + i];
  }
}

// A block on its way into the basis: z in float, and rounded in its columns of x.
template <class Element>
struct Candidate {
  // z ← z·inverse − basis·taken over the q columns before it, in one pass; without an inverse z itself.
  void update(const double* inverse, std::size_t q, const std::vector<double>& taken) {
    std::vector<double> negative(taken.size());
    std::transform(taken.begin(), taken.end(), negative.begin(), std::negate<>());
    std::optional<RightFactor<float>> triangle;
    if (inverse != nullptr) triangle.emplace(kernels, pool, k, inverse, k);
    std::optional<RightFactor<Element>> components;
    if (q > 0) components.emplace(kernels, pool, q, negative.data(), k);
    for_row_ranges([&](std::size_t begin, std::size_t rows) {
      float* out = spare + begin * k;
      if (triangle) {
        triangle->set_product(z + begin * k, k, rows, out, k);
      } else {
        std::copy_n(z + begin * k, rows * k, out);
      }
      if (components) components->add_product(block + begin * stride - q, stride, rows, out, k);
      round_to(kernels, out, rows, k, block + begin * stride, stride);
    });
    std::swap(z, spare);
  }

  void round() {
    for_row_ranges([&](std::size_t begin, std::size_t rows) {
      round_to(kernels, z + begin * k, rows, k, block + begin * stride, stride);
    });
  }

  // [the q columns before it, block]ᵀ·block, (q + k) × k.
  void products(std::size_t q, std::vector<double>& result) {
    result.resize((q + k) * k);
    cross_product(kernels, pool, n, block - q, q + k, block, k, stride, result.data());
  }

  template <class Task>
  void for_row_ranges(const Task& task) {
    pool.run((n + kRowsPerProduct - 1) / kRowsPerProduct, [&](std::size_t index) {
      const std::size_t begin = index * kRowsPerProduct;
      task(begin, std::min(kRowsPerProduct, n - begin));
    });
  }

  const Kernels& kernels;
  ThreadPool& pool;
  std::size_t n, k;
  Element* block;
  std::size_t stride;
  float* z;
  float* spare;
};

double trace(const std::vector<double>& matrix, std::size_t k) {
  double sum = 0;
  for (std::size_t j = 0; j < k; ++j) sum += matrix[j * k + j];
  return sum;
}

}  // namespace

// A product with the inverse is several times faster than a triangular solve so narrow, and as accurate for a triangle
// this well conditioned.
bool cholesky(std::size_t k, std::vector<double>& gram, std::vector<double>& r, std::vector<double>& inverse) {
  std::vector<double> length(k);
  for (std::size_t j = 0; j < k; ++j) {
    length[j] = std::sqrt(gram[j * k + j]);
    if (!(length[j] > 0)) return false;
  }
  for (std::size_t j = 0; j < k; ++j) {
    for (std::size_t i = 0; i < k; ++i) gram[j * k + i] /= length[i] * length[j];
  }
  const int size = lapack::narrow(k);
  int info = 0;
  lapack::scipy_dpotrf_("U", &size, gram.data(), &size, &info);
  if (info != 0) return false;
  std::fill(inverse.begin(), inverse.end(), 0.0);
  for (std::size_t j = 0; j < k; ++j) {
    if (gram[j * k + j] < kSmallestDiagonal) return false;
    for (std::size_t i = 0; i < k; ++i) r[j * k + i] = i <= j ? gram[j * k + i] * length[j] : 0.0;
    inverse[j * k + j] = 1;
  }
  lapack::solve_right(k, k, r.data(), k, inverse.data(), k);
  return true;
}

template <class Element>
Extension extend_basis(const Kernels& kernels, ThreadPool& pool, std::size_t n, Element* x, std::size_t stride,
                       std::size_t p, std::size_t recent, float* z, std::size_t k) {
  Buffer<float> spare(pool.scratch(), n * k);
  Candidate<Element> candidate{kernels, pool, n, k, x + p, stride, z, spare.data()};
  Extension result;
  std::vector<double> product, taken, gram(k * k), r(k * k), inverse(k * k);
  candidate.round();
  double share = 1;  // of z's square that the rounds so far have left
  for (int round = 0; round < kMaxRounds; ++round) {
    std::size_t q = round == 0 ? recent : p;
    candidate.products(q, product);
    taken.resize(q * k);
    for (std::size_t c = 0; c < k; ++c) {
      std::copy_n(product.data() + c * (q + k), q, taken.data() + c * q);
      std::copy_n(product.data() + c * (q + k) + q, k, gram.data() + c * k);
    }
    const double before = trace(gram, k);
    bool cancels = false;
    if (q > 0) {
      // The Gram matrix of what is left without these columns, by Pythagoras: one pass less over z. Where next to
      // nothing is left, it has to be taken from what is.
      lapack::gemm('T', 'N', k, k, q, -1.0, taken.data(), q, taken.data(), q, 1.0, gram.data(), k);
      for (std::size_t c = 0; c < k; ++c) {
        cancels = cancels || gram[c * k + c] < kCancellation * product[c * (q + k) + q + c];
      }
    }
    if (cancels) {
      candidate.update(nullptr, q, taken);
      q = 0;
      taken.clear();
      candidate.products(0, gram);
    }
    share *= trace(gram, k) / before;
    result.exhausted = !(share > kExhausted * kExhausted);
    if (result.exhausted) return result;
    if (cholesky(k, gram, r, inverse)) {
      if (q > 0) {
        const std::vector<double> components = taken;
        lapack::gemm('N', 'N', q, k, k, 1.0, components.data(), q, inverse.data(), k, 0.0, taken.data(), q);
      }
      candidate.update(inverse.data(), q, taken);
    } else {
      if (q > 0) candidate.update(nullptr, q, taken);
      householder_qr(pool, n, candidate.z, k, r.data());
      candidate.round();
      result.householder = true;
    }
    // Without a second round the loss of orthogonality grows from pass to pass, and copies of converged singular values
    // appear. A third is due to columns of which the second left little: they were not far from the rounding noise.
    double smallest = 1;
    for (std::size_t j = 0; j < k; ++j) smallest = std::min(smallest, std::fabs(r[j * k + j]));
    if (round > 0 && smallest > 0.5) return result;
  }
  result.exhausted = true;  // what is left is the basis again, as it was rounded
  return result;
}

template Extension extend_basis(const Kernels&, ThreadPool&, std::size_t, float*, std::size_t, std::size_t, std::size_t,
                                float*, std::size_t);
template Extension extend_basis(const Kernels&, ThreadPool&, std::size_t, std::uint16_t*, std::size_t, std::size_t,
                                std::size_t, float*, std::size_t);

}  // namespace pissa
