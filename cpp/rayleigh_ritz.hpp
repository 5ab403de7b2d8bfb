// The best approximation to W's leading singular triplets within a Krylov basis, and how good it is.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"

namespace pissa {

// With X orthonormal and Y = W·X, the vectors v of the largest eigenvalues σ² of YᵀY give W's triplets: X·v to the
// right, Y·v/σ to the left.
struct RitzTriplets {
  std::vector<double> sigma;    // descending; zero where it is not above the rounding of Y
  std::vector<double> vectors;  // k × rank, column-major
  // Estimate of 1 − Σσ̂²/Σσ² against an exact SVD: how fast the captured energy grew over the last two passes,
  // continued as a geometric series.
  double estimated_deficit = 1;
  double convergence = 1;  // by which factor a further pass is expected to reduce it
};

// `gram` is YᵀY (k × k, destroyed), each pass having added `block` columns. Vectors are zero where there are fewer than
// `rank`. `exact` solves in double. Throws std::runtime_error where LAPACK fails.
RitzTriplets rayleigh_ritz(const Kernels& kernels, ThreadPool& pool, Buffer<double> gram, std::size_t k,
                           std::size_t rank, std::size_t block, bool exact);

// The same where the eigenpairs are known: `values` (rank, descending) and `vectors` (k × rank, column-major).
RitzTriplets ritz_triplets(const Buffer<double>& gram, std::size_t k, std::size_t rank, std::size_t block,
                           const std::vector<double>& values, const Buffer<double>& vectors);

}  // namespace pissa
