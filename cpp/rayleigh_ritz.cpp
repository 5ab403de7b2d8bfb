#include "rayleigh_ritz.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "lapack.hpp"
#include "packing.hpp"

namespace pissa {
namespace {

// Columns of Y (scaled to length one) that add less than this to those before are noise: that of a Gram matrix summed
// in float, and of Y itself in float where the matrix is summed in double.
constexpr double kDependent = 1e-3;
constexpr double kDependentExact = 1e-4;
// Above this the triangle is so well conditioned that solving in float loses nothing beside bf16 or f16.
constexpr double kWellConditioned = 3e-2;
// Columns this much shorter than the longest are what is left of a zero: nothing of them is accurate.
constexpr double kNegligible = 1e-5;
constexpr std::size_t kPanel = 64;  // columns or rows of a small matrix per task

// P = Y·R⁻¹ is orthonormal: R (k × k, upper, in the columns kept) from the Gram matrix of Y's columns, which are scaled
// to length one first.
struct OrthonormalColumns {
  std::vector<double> length;
  std::vector<std::size_t> kept;  // columns of Y in the order of R's
  Buffer<double> factor;          // R, leading dimension k
  bool full = false;              // all are kept, in their order
  double smallest = 0;            // of R's diagonal
};

OrthonormalColumns orthonormal_columns(Scratch& scratch, Buffer<double> gram, std::size_t k, double tolerance) {
  OrthonormalColumns result;
  std::vector<double>& length = result.length;
  length.resize(k);
  for (std::size_t j = 0; j < k; ++j) length[j] = std::sqrt(std::max(gram[j * k + j], 0.0));
  const double longest = *std::max_element(length.begin(), length.end());
  for (std::size_t j = 0; j < k; ++j) {
    if (length[j] <= kNegligible * longest) length[j] = INFINITY;  // to be dropped as dependent
    for (std::size_t i = 0; i <= j; ++i) gram[j * k + i] /= length[i] * length[j];
  }
  // Plain Cholesky keeps the order of the passes, which the estimate needs; pivoting finds the independent columns
  // where there are fewer than k.
  result.factor = Buffer<double>(scratch, k * k);
  std::copy(gram.begin(), gram.end(), result.factor.begin());
  const int size = lapack::narrow(k);
  int info = 0, independent = size;
  lapack::scipy_dpotrf_("U", &size, result.factor.data(), &size, &info);
  std::vector<int> order(k);
  std::iota(order.begin(), order.end(), 1);
  result.smallest = info == 0 ? 1 : 0;
  for (std::size_t j = 0; info == 0 && j < k; ++j)
    result.smallest = std::min(result.smallest, result.factor[j * k + j]);
  result.full = result.smallest > tolerance;
  if (!result.full) {
    std::copy(gram.begin(), gram.end(), result.factor.begin());
    std::vector<double> work(2 * k);
    const double drop = tolerance * tolerance;
    lapack::scipy_dpstrf_("U", &size, result.factor.data(), &size, order.data(), &independent, &drop, work.data(),
                          &info);
  }
  for (int i = 0; i < independent; ++i) result.kept.push_back(static_cast<std::size_t>(order[i] - 1));
  return result;
}

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

template <class T>
void estimate_deficit(ThreadPool& pool, const Buffer<T>& m, std::size_t n, const Buffer<T>& v, std::size_t rank,
                      std::size_t block, const std::vector<double>& values, RitzTriplets& result) {
  const double energy = std::accumulate(values.begin(), values.end(), 0.0);
  if (n < rank + 2 * block || !(energy > 0)) return;
  double gained[2];  // by the last pass, and by the last two
  pool.run(2, [&](std::size_t task) {
    gained[task] = energy - energy_without_last(pool.scratch(), m, n, v, (task + 1) * block, rank, values);
  });
  const double before = std::max(gained[1] - gained[0], 1e-300);
  // The gains of a converging Krylov method shrink; a ratio near one only says that it is too early to tell.
  const double ratio = std::clamp(gained[0] / before, 0.05, 0.9);
  result.convergence = ratio;
  result.estimated_deficit = std::max(0.0, gained[0] * ratio / (1 - ratio) / energy);
}

template <class T>
RitzTriplets solve(ThreadPool& pool, const KrylovBasis& basis, const OrthonormalColumns& columns, std::size_t rank,
                   double target) {
  Scratch& scratch = pool.scratch();
  const std::size_t k = basis.columns(), n = columns.kept.size(), rows = basis.x_columns();
  Buffer<T> factor(scratch, n * n);
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t i = 0; i < n; ++i) factor[j * n + i] = static_cast<T>(i <= j ? columns.factor[j * k + i] : 0.0);
  }
  // T = H·R⁻¹ over the kept columns: Wᵀ·P = X·T.
  Buffer<T> t(scratch, rows * n);
  for (std::size_t j = 0; j < n; ++j) {
    const double* h = basis.h.data() + columns.kept[j] * basis.h_rows;
    const double length = columns.length[columns.kept[j]];
    for (std::size_t i = 0; i < rows; ++i) t[j * rows + i] = static_cast<T>(h[i] / length);
  }
  pool.run((rows + kPanel - 1) / kPanel, [&](std::size_t task) {
    const std::size_t begin = task * kPanel;
    lapack::solve_right(std::min(kPanel, rows - begin), n, factor.data(), n, t.data() + begin, rows);
  });
  // M = Tᵀ·T, the largest panels first. T is block upper Hessenberg, as H is, where the columns are in their order.
  Buffer<T> m(scratch, n * n), destroyed(scratch, n * n);
  const std::size_t panels = (n + kPanel - 1) / kPanel;
  pool.run(panels, [&](std::size_t task) {
    const std::size_t begin = (panels - 1 - task) * kPanel, end = std::min(n, begin + kPanel);
    const std::size_t inner = columns.full ? std::min(rows, round_up(end, basis.block) + basis.block) : rows;
    lapack::gemm('T', 'N', end, end - begin, inner, T{1}, t.data(), rows, t.data() + begin * rows, rows, T{0},
                 m.data() + begin * n, n);
    std::copy_n(m.data() + begin * n, (end - begin) * n, destroyed.data() + begin * n);
  });
  const std::size_t found = std::min(rank, n);
  std::vector<double> values(rank, 0.0);
  Buffer<T> vectors(scratch, n * rank);
  std::fill(vectors.begin(), vectors.end(), T{0});
  if (!lapack::largest_eigenpairs(n, destroyed.data(), found, values.data(), vectors.data())) {
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  RitzTriplets result;
  for (double& value : values) {
    value = std::max(value, 0.0);
    result.sigma.push_back(std::sqrt(value));
  }
  if (columns.full && !basis.exhausted) estimate_deficit(pool, m, n, vectors, rank, basis.block, values, result);
  if (basis.exhausted || !columns.full) result.estimated_deficit = 0;  // the basis holds W's range to working precision
  if (result.estimated_deficit > target) return result;
  result.x_coefficients.resize(rows * rank);
  result.y_coefficients.assign(k * rank, 0.0);
  pool.run((rank + kPanel - 1) / kPanel, [&](std::size_t task) {
    const std::size_t begin = task * kPanel, count = std::min(kPanel, rank - begin);
    T* v = vectors.data() + begin * n;
    Buffer<T> product(scratch, rows * count);
    lapack::gemm('N', 'N', rows, count, n, T{1}, t.data(), rows, v, n, T{0}, product.data(), rows);
    std::copy(product.begin(), product.end(), result.x_coefficients.data() + begin * rows);
    lapack::solve_left('N', n, count, factor.data(), n, v, n);
    for (std::size_t c = 0; c < count; ++c) {
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t column = columns.kept[i];
        result.y_coefficients[(begin + c) * k + column] = static_cast<double>(v[c * n + i]) / columns.length[column];
      }
    }
  });
  return result;
}

}  // namespace

RitzTriplets rayleigh_ritz(ThreadPool& pool, const KrylovBasis& basis, Buffer<double> gram, std::size_t rank,
                           double target, bool exact) {
  const OrthonormalColumns columns =
      orthonormal_columns(pool.scratch(), std::move(gram), basis.columns(), exact ? kDependentExact : kDependent);
  const bool well_conditioned = columns.full && columns.smallest > kWellConditioned;
  RitzTriplets result = exact || !well_conditioned ? solve<double>(pool, basis, columns, rank, target)
                                                   : solve<float>(pool, basis, columns, rank, target);
  result.well_conditioned = well_conditioned;
  return result;
}

}  // namespace pissa
