// The residual, written over the weight.
#pragma once

#include <cstddef>

#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Frobenius norms. `error` is of (stored residual − exact residual): what rounding to the weight's dtype costs.
// `finite` is false where a stored value is not, which only a 2-byte float of its largest magnitudes can do.
struct ResidualNorms {
  double weight;
  double error;
  bool finite;
};

// Of the product for a float weight: with sums in `single` precision it loses as much as storing the residual does, and
// with factors rounded to bf16, where there are kernels for that, it is `coarse`, and the norms are zero.
enum class Precision { of_weight, single, coarse };

// W ← round(W − scaling·left·right), left rows × rank and right rank × cols, both row-major. The factors of a bf16
// weight must be representable in bf16, so that they can be multiplied as such without a further error.
//
// The product is summed in float for 2-byte weights and in double for f32, where float sums would add an error as
// large as the rounding itself, unless less is asked for. `norm_scale` is a power of two near 1/‖W‖₂ for the
// norms' range.
ResidualNorms subtract_product(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* left,
                               const float* right, std::size_t rank, double scaling, float norm_scale,
                               Precision precision = Precision::of_weight);

std::size_t residual_workspace_bytes(const Weight& weight, std::size_t rank);

// Largest magnitude in the weight; infinity where any value is not finite.
float max_magnitude(const Kernels& kernels, ThreadPool& pool, const Weight& weight);

}  // namespace pissa
