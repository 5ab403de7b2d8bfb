// Norms of a whole matrix.
#pragma once

#include <cstddef>

#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Frobenius; the number of threads changes no bit.
double frobenius_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight);

struct NuclearNorm {
  double value;
  bool estimated;
};

// The sum of the singular values. Where the smaller side is short, from its Gram matrix, within 2e-5: in float where
// that is enough, else in double, at three times the time. `zeros` of the values, or more, are known to be zero but for
// rounding: float's errors in their place are then no reason for double, unless they were too many; and next to never
// one, where it is said what these directions are: a matrix with no more rows than columns is orthogonal to the columns
// of `outside` (rows × zeros, row-major), and another to its rows (zeros × cols), which is checked. They themselves are
// orthogonal.
//
// Else an estimate within about 1 %: the trace of the Gram matrix's square root, by stochastic Lanczos quadrature
// (Ubaru, Chen, Saad 2017) from the same random signs whatever the matrix, so that those of two matrices can be
// compared. Throws std::runtime_error where LAPACK fails.
NuclearNorm nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t zeros = 0,
                         const float* outside = nullptr);

// The estimate, for any size of at least 16 × 16.
double estimate_nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight);

std::size_t nuclear_norm_workspace_bytes(const Weight& weight, unsigned threads, std::size_t zeros);

}  // namespace pissa
