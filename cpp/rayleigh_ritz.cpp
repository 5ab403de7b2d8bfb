#include "rayleigh_ritz.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "lapack.hpp"

namespace pissa {
namespace {

// Of σ₁: what lies below is the rounding of Y and of its Gram matrix.
constexpr double kNegligible = 1e-6;

// How much of the Ritz values' sum the basis holds without its last b columns: tr(G⁻¹·S) for G = Vᵗᵀ·Vᵗ and
// S = Vᵗᵀ·M·Vᵗ over the other rows Vᵗ of the Ritz vectors; a lower bound of what Rayleigh–Ritz found there. Both follow
// from the last rows Vᵇ alone, because V is orthonormal and M·V = V·Λ.
template <class T>
double energy_without_last(Scratch& scratch, const Buffer<T>& m, std::size_t n, const Buffer<T>& v, std::size_t b,
                           std::size_t rank, const std::vector<double>& values) {
  const std::size_t t = n - b;
  Buffer<double> last(scratch, b * rank), corner(scratch, b * b), product(scratch, b * rank),
      gram(scratch, rank * rank), inner(scratch, rank * rank);
  for (std::size_t j = 0; j < b; ++j) {
    for (std::size_t i = 0; i < b; ++i) corner[j * b + i] = m[(t + std::max(i, j)) * n + t + std::min(i, j)];
  }
  for (std::size_t j = 0; j < rank; ++j) std::copy_n(v.data() + j * n + t, b, last.data() + j * b);
  lapack::gemm('N', 'N', b, rank, b, 1.0, corner.data(), b, last.data(), b, 0.0, product.data(), b);
  lapack::gemm('T', 'N', rank, rank, b, 1.0, last.data(), b, product.data(), b, 0.0, inner.data(), rank);
  lapack::gemm('T', 'N', rank, rank, b, -1.0, last.data(), b, last.data(), b, 0.0, gram.data(), rank);
  for (std::size_t j = 0; j < rank; ++j) {
    for (std::size_t i = 0; i < rank; ++i) inner[j * rank + i] += gram[j * rank + i] * (values[i] + values[j]);
    inner[j * rank + j] += values[j];
    gram[j * rank + j] += 1;
  }
  const int size = lapack::narrow(rank);
  int info = 0;
  lapack::scipy_dpotrf_("U", &size, gram.data(), &size, &info);
  if (info != 0) return 0;
  lapack::solve_right(rank, rank, gram.data(), rank, inner.data(), rank);
  lapack::solve_left('T', rank, rank, gram.data(), rank, inner.data(), rank);
  double trace = 0;
  for (std::size_t i = 0; i < rank; ++i) trace += inner[i * rank + i];
  return trace;
}

// What eigenpairs of m say: `values` (count, descending), `vectors` (k × found, column-major).
template <class T>
RitzTriplets triplets_of(ThreadPool& pool, const Buffer<T>& m, std::size_t k, std::size_t rank, std::size_t block,
                         const std::vector<double>& values, const Buffer<T>& vectors) {
  Scratch& scratch = pool.scratch();
  RitzTriplets result;
  for (std::size_t i = 0; i < rank; ++i) {
    result.sigma.push_back(values[i] > kNegligible * kNegligible * values[0] ? std::sqrt(values[i]) : 0.0);
  }
  result.vectors.assign(k * values.size(), 0.0);
  std::copy(vectors.begin(), vectors.end(), result.vectors.begin());
  const double energy = std::accumulate(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank), 0.0);
  if (k < rank + 2 * block || !(energy > 0)) return result;
  double gained[2];  // by the last pass, and by the last two
  pool.run(2, [&](std::size_t task) {
    gained[task] = energy - energy_without_last(scratch, m, k, vectors, (task + 1) * block, rank, values);
  });
  const double before = std::max(gained[1] - gained[0], 1e-300);
  // The gains of a converging Krylov method shrink; a ratio near one only says that it is too early to tell.
  const double ratio = std::clamp(gained[0] / before, 0.05, 0.9);
  result.convergence = ratio;
  result.estimated_deficit = std::max(0.0, gained[0] * ratio / (1 - ratio) / energy);
  return result;
}

template <class T>
RitzTriplets solve(ThreadPool& pool, const Buffer<T>& m, std::size_t k, std::size_t rank, std::size_t count,
                   std::size_t block) {
  const std::size_t found = std::min(count, k);
  std::vector<double> values(count, 0.0);
  Buffer<T> destroyed(pool.scratch(), k * k), vectors(pool.scratch(), k * found);
  std::copy(m.begin(), m.end(), destroyed.begin());
  if (!lapack::largest_eigenpairs(k, destroyed.data(), found, values.data(), vectors.data())) {
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  return triplets_of(pool, m, k, rank, block, values, vectors);
}

}  // namespace

RitzTriplets ritz_triplets(ThreadPool& pool, const Buffer<double>& gram, std::size_t k, std::size_t rank,
                           std::size_t block, const std::vector<double>& values, const Buffer<double>& vectors) {
  return triplets_of(pool, gram, k, rank, block, values, vectors);
}

RitzTriplets rayleigh_ritz(ThreadPool& pool, Buffer<double> gram, std::size_t k, std::size_t rank, std::size_t count,
                           std::size_t block, bool exact) {
  if (exact) return solve(pool, gram, k, rank, count, block);
  Buffer<float> narrow(pool.scratch(), k * k);
  std::transform(gram.begin(), gram.end(), narrow.begin(), [](double value) { return static_cast<float>(value); });
  return solve(pool, narrow, k, rank, count, block);
}

}  // namespace pissa
