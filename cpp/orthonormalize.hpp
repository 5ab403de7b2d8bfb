// Extending an orthonormal basis by a block of columns.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.hpp"
#include "thread_pool.hpp"

namespace pissa {

struct Extension {
  bool householder = false;  // Cholesky would have lost too much and was replaced
  bool exhausted = false;    // the block lies in the basis: there is no new direction
};

// x (n × …, row-major, and kReadBeyond more: see tall.hpp) holds an orthonormal basis in its first p columns and gets a
// block of k more: together they span z (n × k, row-major, contiguous), which is destroyed. `recent` says how many of
// the basis' last columns z is known to have components in, up to rounding: a first projection need not take the
// others.
//
// Block Gram–Schmidt twice with a Cholesky QR after each projection (BCGS2 with CholeskyQR2; Stathopoulos & Wu 2002,
// Yamamoto et al. 2015). Deviations: a QR whose triangle is ill-conditioned is done by Householder reflections; and
// with bf16 elements the basis is rounded, so that it is orthonormal to about 1e-3 in norm and 1e-5 in each product:
// what a Ritz vector is off by through that costs the square of it in energy.
template <class Element>
Extension extend_basis(const Kernels& kernels, ThreadPool& pool, std::size_t n, Element* x, std::size_t stride,
                       std::size_t p, std::size_t recent, float* z, std::size_t k);

// gram (k × k, destroyed) = rᵀ·r, r upper triangular, and r's inverse. False where the columns are too dependent for
// it.
bool cholesky(std::size_t k, std::vector<double>& gram, std::vector<double>& r, std::vector<double>& inverse);

}  // namespace pissa
