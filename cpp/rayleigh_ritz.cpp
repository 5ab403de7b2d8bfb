#include "rayleigh_ritz.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "lapack.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// Columns of Y (scaled to length one) that add less than this to those before are rounding noise of float.
constexpr double kDependent = 1e-5;
constexpr double kDependentExact = 1e-7;

// In T's precision; the matrix is kept.
template <class T>
bool eigenpairs_of(Scratch& scratch, const Buffer<double>& matrix, std::size_t n, std::size_t count,
                   std::vector<double>& values, Buffer<double>& vectors) {
  Buffer<T> destroyed(scratch, matrix.size());
  std::copy(matrix.begin(), matrix.end(), destroyed.begin());
  return lapack::largest_eigenpairs(n, destroyed.data(), count, values.data(), vectors.data());
}

// How much of the Ritz values' sum the first t columns of the orthonormal basis hold: tr((VᵗᵀVᵗ)⁻¹·VᵗᵀMVᵗ) for the
// first t rows Vᵗ of the Ritz vectors. A lower bound of what Rayleigh–Ritz found there.
double energy_of_leading(Scratch& scratch, const Buffer<double>& m, std::size_t n, const Buffer<double>& v,
                         std::size_t t, std::size_t rank) {
  Buffer<double> mv(scratch, t * rank), inner(scratch, rank * rank), gram(scratch, rank * rank);
  lapack::gemm('N', 'N', t, rank, t, 1.0, m.data(), n, v.data(), n, 0.0, mv.data(), t);
  lapack::gemm('T', 'N', rank, rank, t, 1.0, v.data(), n, mv.data(), t, 0.0, inner.data(), rank);
  lapack::gemm('T', 'N', rank, rank, t, 1.0, v.data(), n, v.data(), n, 0.0, gram.data(), rank);
  const int size = lapack::narrow(rank);
  int info = 0;
  lapack::scipy_dpotrf_("U", &size, gram.data(), &size, &info);
  if (info != 0) return 0;
  // tr(G⁻¹·S) with G = RᵀR: solve S·R⁻¹, then R⁻ᵀ from the left, and take the trace.
  lapack::solve_right(rank, rank, gram.data(), rank, inner.data(), rank);
  const double one = 1;
  lapack::scipy_dtrsm_("L", "U", "T", "N", &size, &size, &one, gram.data(), &size, inner.data(), &size);
  double trace = 0;
  for (std::size_t i = 0; i < rank; ++i) trace += inner[i * rank + i];
  return trace;
}

void estimate_deficit(Scratch& scratch, const Buffer<double>& m, std::size_t n, const Buffer<double>& v,
                      std::size_t rank, std::size_t block, double energy, RitzTriplets& result) {
  result.estimated_deficit = result.convergence = 1;
  if (n < rank + 2 * block || !(energy > 0)) return;
  const double last = energy - energy_of_leading(scratch, m, n, v, n - block, rank);
  const double both = energy - energy_of_leading(scratch, m, n, v, n - 2 * block, rank);
  const double before = std::max(both - last, 1e-300);
  // The gains of a converging Krylov method shrink; a ratio near one only says that it is too early to tell.
  const double ratio = std::clamp(last / before, 0.05, 0.9);
  result.convergence = ratio;
  result.estimated_deficit = std::max(0.0, last * ratio / (1 - ratio) / energy);
}

}  // namespace

RitzTriplets rayleigh_ritz(ThreadPool& pool, const KrylovBasis& basis, std::size_t rows, std::size_t rank, bool exact) {
  const std::size_t k = basis.columns();
  const std::size_t h_used = basis.x_columns();
  Buffer<double> gram(pool.scratch(), k * k);
  cross_product(pool, rows, basis.y.data(), k, basis.y.data(), k, exact, gram.data());
  std::vector<double> length(k);
  for (std::size_t j = 0; j < k; ++j) length[j] = gram[j * k + j] > 0 ? std::sqrt(gram[j * k + j]) : 1;
  for (std::size_t j = 0; j < k; ++j) {
    for (std::size_t i = 0; i < k; ++i) gram[j * k + i] /= length[i] * length[j];
  }
  // Plain Cholesky keeps the order of the passes, which the estimate needs; pivoting finds the independent columns
  // where there are fewer than k.
  const double tolerance = exact ? kDependentExact : kDependent;
  std::vector<int> order(k);
  std::iota(order.begin(), order.end(), 1);
  Buffer<double> factor(pool.scratch(), k * k);
  std::copy(gram.begin(), gram.end(), factor.begin());
  const int size = lapack::narrow(k);
  int info = 0;
  int independent = size;
  lapack::scipy_dpotrf_("U", &size, factor.data(), &size, &info);
  bool full = info == 0;
  for (std::size_t j = 0; full && j < k; ++j) full = factor[j * k + j] > tolerance;
  if (!full) {
    std::copy(gram.begin(), gram.end(), factor.begin());
    std::vector<double> work(2 * k);
    const double drop = tolerance * tolerance;
    lapack::scipy_dpstrf_("U", &size, factor.data(), &size, order.data(), &independent, &drop, work.data(), &info);
  }
  const auto n = static_cast<std::size_t>(independent);
  // T = H·R⁻¹ over the kept columns: Wᵀ·P = X·T for the orthonormal P = Y·R⁻¹.
  Buffer<double> t(pool.scratch(), h_used * n);
  for (std::size_t j = 0; j < n; ++j) {
    const auto column = static_cast<std::size_t>(order[j] - 1);
    for (std::size_t i = 0; i < h_used; ++i) t[j * h_used + i] = basis.h[column * basis.h_rows + i] / length[column];
  }
  lapack::solve_right(h_used, n, factor.data(), k, t.data(), h_used);
  Buffer<double> m(pool.scratch(), n * n);
  lapack::gemm('T', 'N', n, n, h_used, 1.0, t.data(), h_used, t.data(), h_used, 0.0, m.data(), n);
  const std::size_t found = std::min(rank, n);
  std::vector<double> values(rank, 0.0);
  Buffer<double> vectors(pool.scratch(), n * rank);
  std::fill(vectors.begin(), vectors.end(), 0.0);
  if (!(exact ? eigenpairs_of<double>(pool.scratch(), m, n, found, values, vectors)
              : eigenpairs_of<float>(pool.scratch(), m, n, found, values, vectors))) {
    throw std::runtime_error("LAPACK syevr did not converge");
  }
  RitzTriplets result;
  double energy = 0;
  for (double& value : values) {
    value = std::max(value, 0.0);
    energy += value;
    result.sigma.push_back(std::sqrt(value));
  }
  if (full && !basis.exhausted) estimate_deficit(pool.scratch(), m, n, vectors, rank, basis.block, energy, result);
  result.x_coefficients.resize(h_used * rank);
  lapack::gemm('N', 'N', h_used, rank, n, 1.0, t.data(), h_used, vectors.data(), n, 0.0, result.x_coefficients.data(),
               h_used);
  lapack::solve_left(n, rank, factor.data(), k, vectors.data(), n);
  result.y_coefficients.assign(k * rank, 0.0);
  for (std::size_t c = 0; c < rank; ++c) {
    for (std::size_t i = 0; i < n; ++i) {
      const auto row = static_cast<std::size_t>(order[i] - 1);
      result.y_coefficients[c * k + row] = vectors[c * n + i] / length[row];
    }
  }
  return result;
}

}  // namespace pissa
