// The leading triplets of a weight from directions that were found with less precision than it has.
#pragma once

#include <cstddef>

#include "buffer.hpp"
#include "factors.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Directions to find in less precision, for the leading `rank` to be among them.
inline std::size_t with_spare(std::size_t rank) { return (rank + 15) / 16 * 16 + 16; }

// With U an orthonormal basis of the columns of `left` (rows × k, row-major, contiguous, destroyed; k a multiple of
// 16), Rayleigh–Ritz on Z = Wᵀ·U·2^-exponent, all in float: what the columns were off by costs the square of it in
// energy, and nothing in how well the triplets fit W. Z being a further half of a power step, it captures more than
// was known when the columns were found. Only Z's Gram matrix is summed in double. W's scale, 2^exponent, has to be one
// whose square float holds.
//
// No factors come back where the columns have no basis.
Factors project(const Kernels& kernels, ThreadPool& pool, const Weight& weight, Buffer<float> left, std::size_t k,
                std::size_t rank, int exponent);

std::size_t projection_workspace_bytes(const Weight& weight, std::size_t k, unsigned threads);

}  // namespace pissa
