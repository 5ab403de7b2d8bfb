// The best approximation to W's leading singular triplets within a Krylov basis, and how good it is.
#pragma once

#include <cstddef>
#include <vector>

#include "range_finder.hpp"

namespace pissa {

struct RitzTriplets {
  std::vector<double> sigma;           // descending, in units of 2^exponent
  std::vector<double> y_coefficients;  // k × rank: left singular vectors U = Y·y_coefficients, orthonormal
  std::vector<double> x_coefficients;  // (k + block) × rank: Wᵀ·U = X·x_coefficients, in units of 2^exponent
  // Estimate of 1 − Σσ̂²/Σσ² against an exact SVD: how fast the captured energy grew over the last two passes,
  // continued as a geometric series.
  double estimated_deficit = 0;
  double convergence = 0;  // by which factor a further pass is expected to reduce it
};

// `exact` sums Y's Gram matrix and solves in double, for weights whose own precision is float's.
// Throws std::runtime_error where LAPACK fails.
RitzTriplets rayleigh_ritz(ThreadPool& pool, const KrylovBasis& basis, std::size_t rows, std::size_t rank, bool exact);

}  // namespace pissa
