// The leading singular triplets of one matrix.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// Stop when the estimate says that a full SVD would capture at most this much more of the leading energy.
constexpr double kTargetDeficit = 2.5e-3;

// W ≈ Σ σᵢ·uᵢ·vᵢᵀ, with uᵢ the column order[i] of `left`, and vᵢ that of `right` divided by its length. Row-major with
// `stride`.
struct Factors {
  std::size_t stride = 0;
  Buffer<float> left;          // rows × rank, orthonormal
  Buffer<float> right;         // cols × rank
  std::vector<double> length;  // of right's columns
  std::vector<double> sigma;   // descending
  std::vector<std::size_t> order;
};

// The request's weight to its rank: by block Krylov iteration, or exactly where that is cheaper. Notes in `result` what
// it took. Throws std::domain_error where the weight holds a value that is not finite.
Factors factorize(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, SplitResult& result);

// Bytes that it takes, the factors apart.
std::size_t factorize_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads);

}  // namespace pissa
