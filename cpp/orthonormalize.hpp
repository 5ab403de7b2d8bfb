// Extending an orthonormal basis by a block of columns.
#pragma once

#include <cstddef>
#include <vector>

#include "thread_pool.hpp"

namespace pissa {

struct Extension {
  std::vector<double> projection;  // p × k: the block's components in the basis
  std::vector<double> remainder;   // k × k, upper triangular
  bool householder = false;        // Cholesky would have lost too much and was replaced
  bool exhausted = false;          // the block lies in the basis: there is no new direction
};

// z (n × k) becomes orthonormal and orthogonal to basis (n × p, orthonormal), such that
//   z_before = basis·projection + z_after·remainder.
//
// Block Gram–Schmidt twice with a Cholesky QR after each projection (BCGS2 with CholeskyQR2; Stathopoulos & Wu 2002,
// Yamamoto et al. 2015). Deviation: a QR whose triangle is ill-conditioned is done by Householder reflections.
Extension extend_basis(ThreadPool& pool, std::size_t n, const float* basis, std::size_t p, float* z, std::size_t k);

}  // namespace pissa
