#include "orthonormalize.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lapack.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// In float, a Gram matrix carries relative errors of 1e-7, and so a Cholesky factor of columns scaled to length one
// is meaningful down to a diagonal of about the square root of it.
constexpr double kSmallestDiagonal = 1e-2;
// What projection leaves of a block that lies in the basis: the rounding of float.
constexpr double kExhausted = 3e-6;

// z = q·r by Cholesky QR; r (k × k upper). False where the columns are too dependent for it; z is then unchanged.
bool cholesky_qr(ThreadPool& pool, std::size_t n, float* z, std::size_t k, double* r) {
  std::vector<double> gram(k * k);
  cross_product(pool, n, z, k, z, k, false, gram.data());
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
  std::vector<float> factor(k * k, 0.0f);
  for (std::size_t j = 0; j < k; ++j) {
    if (gram[j * k + j] < kSmallestDiagonal) return false;
    for (std::size_t i = 0; i < k; ++i) {
      r[j * k + i] = i <= j ? gram[j * k + i] * length[j] : 0.0;
      factor[j * k + i] = static_cast<float>(r[j * k + i]);
    }
  }
  constexpr std::size_t kRows = 512;
  pool.run((n + kRows - 1) / kRows, [&](std::size_t block) {
    const std::size_t begin = block * kRows;
    lapack::solve_right(std::min(kRows, n - begin), k, factor.data(), k, z + begin, n);
  });
  return true;
}

void householder_qr(std::size_t n, float* z, std::size_t k, double* r) {
  const int rows = lapack::narrow(n), columns = lapack::narrow(k);
  std::vector<float> tau(k), work(64 * k);
  const int size = lapack::narrow(work.size());
  int info = 0;
  lapack::scipy_sgeqrf_(&rows, &columns, z, &rows, tau.data(), work.data(), &size, &info);
  for (std::size_t j = 0; j < k; ++j) {
    for (std::size_t i = 0; i < k; ++i) r[j * k + i] = i <= j ? static_cast<double>(z[j * n + i]) : 0.0;
  }
  lapack::scipy_sorgqr_(&rows, &columns, &columns, z, &rows, tau.data(), work.data(), &size, &info);
}

void project_out(ThreadPool& pool, std::size_t n, const float* basis, std::size_t p, float* z, std::size_t k,
                 double* coefficients) {
  if (p == 0) return;
  cross_product(pool, n, basis, p, z, k, false, coefficients);
  std::vector<float> rounded(coefficients, coefficients + p * k);
  multiply(pool, n, -1.0f, basis, p, rounded.data(), k, 1.0f, z);
}

std::vector<double> squared_lengths(ThreadPool& pool, std::size_t n, const float* z, std::size_t k) {
  std::vector<double> squares(k);
  pool.run(k, [&](std::size_t j) {
    double sums[8] = {};  // independent, so that the additions do not wait for each other
    const float* column = z + j * n;
    const std::size_t whole = n - n % 8;
    for (std::size_t i = 0; i < whole; i += 8) {
      for (std::size_t lane = 0; lane < 8; ++lane) {
        sums[lane] += static_cast<double>(column[i + lane]) * static_cast<double>(column[i + lane]);
      }
    }
    for (std::size_t i = whole; i < n; ++i) sums[0] += static_cast<double>(column[i]) * static_cast<double>(column[i]);
    for (const double sum : sums) squares[j] += sum;
  });
  return squares;
}

}  // namespace

Extension extend_basis(ThreadPool& pool, std::size_t n, const float* basis, std::size_t p, float* z, std::size_t k) {
  Extension result;
  result.projection.assign(p * k, 0.0);
  result.remainder.assign(k * k, 0.0);
  const std::vector<double> before = squared_lengths(pool, n, z, k);
  project_out(pool, n, basis, p, z, k, result.projection.data());
  const std::vector<double> after = squared_lengths(pool, n, z, k);
  const double total_before = std::accumulate(before.begin(), before.end(), 0.0);
  const double total_after = std::accumulate(after.begin(), after.end(), 0.0);
  if (total_after <= kExhausted * kExhausted * total_before) {
    result.exhausted = true;
    return result;
  }
  std::vector<double> first(k * k), second(k * k), correction(p * k, 0.0);
  const auto orthonormalize = [&](double* r) {
    if (cholesky_qr(pool, n, z, k, r)) return;
    householder_qr(n, z, k, r);
    result.householder = true;
  };
  orthonormalize(first.data());
  // Without the second projection the loss of orthogonality grows from pass to pass, and copies of converged singular
  // values appear.
  project_out(pool, n, basis, p, z, k, correction.data());
  orthonormalize(second.data());
  // z_before = basis·(projection + correction·first) + z·(second·first)
  if (p > 0) {
    lapack::gemm('N', 'N', p, k, k, 1.0, correction.data(), p, first.data(), k, 1.0, result.projection.data(), p);
  }
  lapack::gemm('N', 'N', k, k, k, 1.0, second.data(), k, first.data(), k, 0.0, result.remainder.data(), k);
  return result;
}

}  // namespace pissa
