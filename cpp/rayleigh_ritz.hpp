// The best approximation to W's leading singular triplets within a Krylov basis, and how good it is.
#pragma once

#include <cstddef>
#include <vector>

#include "range_finder.hpp"

namespace pissa {

struct RitzTriplets {
  std::vector<double> sigma;  // descending, in units of 2^exponent
  // Estimate of 1 − Σσ̂²/Σσ² against an exact SVD: how fast the captured energy grew over the last two passes,
  // continued as a geometric series.
  double estimated_deficit = 1;
  double convergence = 1;  // by which factor a further pass is expected to reduce it
  // Y's columns are far from dependent: what rounding X and Y to bf16 has done to them is not magnified.
  bool well_conditioned = false;
  std::vector<double> y_coefficients;  // k × rank: left singular vectors U = Y·y_coefficients, orthonormal
  std::vector<double> x_coefficients;  // (k + block) × rank: Wᵀ·U = X·x_coefficients, in units of 2^exponent
};

// `gram` is YᵀY (destroyed). The coefficients are left out where the estimate is above `target`. `exact` solves in
// double, for weights whose own precision is float's.
// Throws std::runtime_error where LAPACK fails.
RitzTriplets rayleigh_ritz(ThreadPool& pool, const KrylovBasis& basis, Buffer<double> gram, std::size_t rank,
                           double target, bool exact);

}  // namespace pissa
