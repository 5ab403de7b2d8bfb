#include "rayleigh_ritz.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "eigenpairs.hpp"
#include "lapack.hpp"

namespace pissa {
namespace {

// Of σ₁: what lies below is the rounding of Y and of its Gram matrix.
constexpr double kNegligible = 1e-6;

// By how much the Ritz values' sum is more than what the basis holds of it without its last b columns, at most: that is
// tr(G⁻¹·S) for G = Vᵗᵀ·Vᵗ and S = Vᵗᵀ·M·Vᵗ over the other rows Vᵗ of the Ritz vectors, a lower bound of what
// Rayleigh–Ritz found there. As V is orthonormal and M·V = V·Λ, the last rows L and M's last corner C tell it alone:
// G = 1 − LᵀL, S = Λ + LᵀCL − LᵀLΛ − ΛLᵀL, and by Woodbury, with K = LLᵀ and P = LΛLᵀ, which are b × b,
// tr(G⁻¹S) − tr Λ = tr(CK) − 2·tr P + tr((1 − K)⁻¹·(P + KCK − KP − PK)).
template <class T>
double energy_of_last(const Buffer<T>& m, std::size_t n, const Buffer<T>& v, std::size_t b, std::size_t rank,
                      const std::vector<double>& values) {
  const std::size_t t = n - b, size = b * b;
  std::vector<double> last(b * rank), weighted(b * rank), corner(size), k(size), p(size), rest(size), product(size);
  for (std::size_t j = 0; j < b; ++j) {
    for (std::size_t i = 0; i < b; ++i) {
      corner[j * b + i] = static_cast<double>(m[(t + std::max(i, j)) * n + t + std::min(i, j)]);
    }
  }
  for (std::size_t j = 0; j < rank; ++j) {
    for (std::size_t i = 0; i < b; ++i) {
      last[j * b + i] = static_cast<double>(v[j * n + t + i]);
      weighted[j * b + i] = last[j * b + i] * values[j];
    }
  }
  lapack::gemm('N', 'T', b, b, rank, 1.0, last.data(), b, last.data(), b, 0.0, k.data(), b);
  lapack::gemm('N', 'T', b, b, rank, 1.0, last.data(), b, weighted.data(), b, 0.0, p.data(), b);
  // KCK − KP is K·(CK − P), and PK its transpose's like.
  lapack::gemm('N', 'N', b, b, b, 1.0, corner.data(), b, k.data(), b, 0.0, product.data(), b);
  double trace = 0;
  for (std::size_t i = 0; i < b; ++i) trace += product[i * b + i] - 2 * p[i * b + i];
  for (std::size_t i = 0; i < size; ++i) product[i] -= p[i];
  rest = p;
  lapack::gemm('N', 'N', b, b, b, 1.0, k.data(), b, product.data(), b, 1.0, rest.data(), b);
  lapack::gemm('N', 'N', b, b, b, -1.0, p.data(), b, k.data(), b, 1.0, rest.data(), b);
  for (std::size_t i = 0; i < size; ++i) k[i] = -k[i];
  for (std::size_t i = 0; i < b; ++i) k[i * b + i] += 1;
  const int narrow = lapack::narrow(b);
  int info = 0;
  lapack::scipy_dpotrf_("U", &narrow, k.data(), &narrow, &info);
  if (info != 0) return std::accumulate(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank), 0.0);
  lapack::solve_right(b, b, k.data(), b, rest.data(), b);
  lapack::solve_left('T', b, b, k.data(), b, rest.data(), b);
  for (std::size_t i = 0; i < b; ++i) trace += rest[i * b + i];
  return -trace;
}

// What eigenpairs of m say: `values` (count, descending), `vectors` (k × found, column-major).
template <class T>
RitzTriplets triplets_of(const Buffer<T>& m, std::size_t k, std::size_t rank, std::size_t block,
                         const std::vector<double>& values, const Buffer<T>& vectors) {
  RitzTriplets result;
  for (std::size_t i = 0; i < rank; ++i) {
    result.sigma.push_back(values[i] > kNegligible * kNegligible * values[0] ? std::sqrt(values[i]) : 0.0);
  }
  result.vectors.assign(k * values.size(), 0.0);
  std::copy(vectors.begin(), vectors.end(), result.vectors.begin());
  const double energy = std::accumulate(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank), 0.0);
  if (k < rank + 2 * block || !(energy > 0)) return result;
  const double gained = energy_of_last(m, k, vectors, block, rank, values);
  const double before = std::max(energy_of_last(m, k, vectors, 2 * block, rank, values) - gained, 1e-300);
  // The gains of a converging Krylov method shrink; a ratio near one only says that it is too early to tell.
  const double ratio = std::clamp(gained / before, 0.05, 0.9);
  result.convergence = ratio;
  result.estimated_deficit = std::max(0.0, gained * ratio / (1 - ratio) / energy);
  return result;
}

template <class T>
RitzTriplets solve(const Kernels& kernels, ThreadPool& pool, const Buffer<T>& m, std::size_t k, std::size_t rank,
                   std::size_t block) {
  const std::size_t found = std::min(rank, k);
  std::vector<double> values(rank, 0.0);
  Buffer<T> vectors(pool.scratch(), k * found);
  if (!largest_eigenpairs(kernels, pool, k, m.data(), found, values.data(), vectors.data())) {
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  return triplets_of(m, k, rank, block, values, vectors);
}

}  // namespace

RitzTriplets ritz_triplets(const Buffer<double>& gram, std::size_t k, std::size_t rank, std::size_t block,
                           const std::vector<double>& values, const Buffer<double>& vectors) {
  return triplets_of(gram, k, rank, block, values, vectors);
}

RitzTriplets rayleigh_ritz(const Kernels& kernels, ThreadPool& pool, Buffer<double> gram, std::size_t k,
                           std::size_t rank, std::size_t block, bool exact) {
  if (exact) return solve(kernels, pool, gram, k, rank, block);
  Buffer<float> narrow(pool.scratch(), k * k);
  std::transform(gram.begin(), gram.end(), narrow.begin(), [](double value) { return static_cast<float>(value); });
  return solve(kernels, pool, narrow, k, rank, block);
}

}  // namespace pissa
