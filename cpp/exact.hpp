// All singular directions of a weight's shorter side, from its Gram matrix: for small weights, and for norms.
#pragma once

#include <cstddef>

#include "buffer.hpp"
#include "factors.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// W·Wᵀ or, where W has more rows than columns, Wᵀ·W: the lower triangle, summed in T (float or double).
template <class T>
Buffer<T> small_gram(const Kernels& kernels, ThreadPool& pool, const Weight& weight);
std::size_t small_gram_workspace_bytes(const Weight& weight);

// The leading triplets. The Gram matrix is in float where that is precise enough: then a float weight's triplets are
// those of its projection on the directions that were found, and a few more (projection.hpp), if they are to be
// precise. Throws std::domain_error where W is not finite, and std::runtime_error where LAPACK fails.
Factors factor_exactly(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t rank, bool precise);
std::size_t exact_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads);

}  // namespace pissa
