// How a weight's leading singular triplets are found.
#pragma once

#include <cstddef>

#include "factors.hpp"
#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// Stop when the estimate says that a full SVD would capture at most this much more of the leading energy.
constexpr double kTargetDeficit = 2.5e-3;

// Where σ_r is less of σ₁, products in bf16 and sums in float would cost the last directions accuracy.
constexpr double kPrecise = 2e-2;

// Whether the weight is multiplied in bf16.
bool uses_bf16(const Kernels& kernels, const Weight& weight);

// The request's weight to its rank: by block Krylov iteration, or exactly where that is cheaper. Notes in `result` what
// it took. Throws std::domain_error where the weight holds a value that is not finite.
Factors factorize(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, SplitResult& result);

// Bytes that it takes, the factors apart.
std::size_t factorize_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads);

}  // namespace pissa
