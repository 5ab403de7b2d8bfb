#include "root_trace.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace pissa {
namespace {

constexpr double kStep = 0.5;    // of ln t: the rule's relative error is 2·exp(−π²/kStep) = 5e-9
constexpr double kBeyond = 100;  // nodes reach so many times beyond the roots; the rest is added up to first order

// At least the spectral norm: Gershgorin's discs.
double norm_bound(const TridiagonalMatrix& matrix) {
  const std::size_t n = matrix.diagonal.size();
  double bound = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double before = i > 0 ? std::abs(matrix.beside[i - 1]) : 0;
    const double after = i + 1 < n ? std::abs(matrix.beside[i]) : 0;
    bound = std::max(bound, before + std::abs(matrix.diagonal[i]) + after);
  }
  return bound;
}

// The traces of (matrix + shift)⁻¹ for all shifts side by side. False where a pivot is not positive.
bool inverse_traces(const TridiagonalMatrix& matrix, const std::vector<double>& shifts, std::vector<double>& traces) {
  const std::size_t count = shifts.size();
  std::vector<double> inverse(count), slope(count);  // 1/pivot, and the derivative of the pivot's logarithm
  double lowest = std::numeric_limits<double>::infinity();
  traces.assign(count, 0.0);
  for (std::size_t i = 0; i < matrix.diagonal.size(); ++i) {
    const double along = matrix.diagonal[i], beside = i > 0 ? matrix.beside[i - 1] : 0, square = beside * beside;
    for (std::size_t k = 0; k < count; ++k) {
      const double ratio = square * inverse[k];
      inverse[k] = 1 / (along + shifts[k] - ratio);
      slope[k] = (1 + ratio * slope[k]) * inverse[k];
      traces[k] += slope[k];
    }
    lowest = std::min(lowest, *std::min_element(inverse.begin(), inverse.end()));
  }
  return lowest > 0;
}

}  // namespace

RootTrace root_trace(const TridiagonalMatrix& matrix, double relative_shift, std::size_t zeros) {
  const double bound = norm_bound(matrix);
  if (bound == 0) return {0, 0};
  const double shift = relative_shift * bound, first = std::sqrt(shift) / kBeyond, last = std::sqrt(bound) * kBeyond;
  std::vector<double> nodes, shifts, traces;
  for (double node = first; nodes.empty() || nodes.back() < last; node *= std::exp(kStep)) {
    nodes.push_back(node);
    shifts.push_back(node * node + shift);
  }
  if (!std::isfinite(bound) || !inverse_traces(matrix, shifts, traces)) {
    return {0, std::numeric_limits<double>::infinity()};
  }
  const auto size = static_cast<double>(matrix.diagonal.size());
  const double trace = std::accumulate(matrix.diagonal.begin(), matrix.diagonal.end(), 0.0);
  // Below the first node the integrands are what they are there; above the last one λ/t² and 1/t².
  const double rest = 1 / std::expm1(kStep);
  double value = rest * (nodes.front() * (size - shifts.front() * traces.front()) + trace / nodes.back());
  double inverse_roots = rest * (nodes.front() * traces.front() + size / nodes.back());
  for (std::size_t k = 0; k < nodes.size(); ++k) {
    value += nodes[k] * (size - shifts[k] * traces[k]);
    inverse_roots += nodes[k] * traces[k];
  }
  const double weight = kStep * 2 / std::acos(-1.0);
  // Eigenvalues far below the shift count as one each. Errors of them up to about a quarter of it cancel but for their
  // squares, which take away less than a sixteenth of what any value of that size could.
  const double left_out = 15.0 / 16 * std::min(static_cast<double>(zeros), shift * traces.front());
  const double uncertainty = (weight * inverse_roots * shift - left_out * std::sqrt(shift)) / 2;
  return {weight * value, std::max(0.0, uncertainty)};
}

}  // namespace pissa
