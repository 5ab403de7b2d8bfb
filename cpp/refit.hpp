// The leading singular triplets of a matrix near one whose triplets are known.
#pragma once

#include <cstddef>
#include <optional>

#include "factorize.hpp"
#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// Subspace iteration on a float matrix, from the singular directions that the request's `a` and `b` hold (Halko,
// Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 5.1 from a given basis): Y = W·X and Z = Wᵀ·Y in one sweep, and
// the triplets of (U·Uᵀ)·W for an orthonormal U that spans Y. Each pass multiplies what is missing by
// (σ_{r+1} / σ_r)², and is the last where it gained no more than a split may miss. Of a W with more rows than columns
// it is the transpose that this is done to: what the triplets leave is orthogonal to those of the shorter side.
//
// None where W has no `rank` directions, or too many passes would be needed: W is then not near.
std::optional<Factors> follow(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                              SplitResult& result);

std::size_t follow_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads);

}  // namespace pissa
