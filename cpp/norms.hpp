// Norms of a whole matrix.
#pragma once

#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Frobenius; the number of threads changes no bit.
double frobenius_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight);

// The sum of the singular values, from the eigenvalues of the smaller side's Gram matrix in double.
// Throws std::runtime_error where LAPACK fails.
double nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight);

std::size_t nuclear_norm_workspace_bytes(const Weight& weight);

}  // namespace pissa
