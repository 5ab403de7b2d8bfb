#include "split.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "buffer.hpp"
#include "clock.hpp"
#include "correction.hpp"
#include "factorize.hpp"
#include "kernels/scalar.hpp"
#include "packing.hpp"
#include "refit.hpp"
#include "residual.hpp"

namespace pissa {
namespace {

struct StoredFactors {
  Buffer<float> left;   // rows × rank, row-major
  Buffer<float> right;  // rank × cols, row-major
  bool finite = true;
};

// Each value as the dtype holds it.
void round_values(const Kernels& kernels, DType dtype, Buffer<float>& values) {
  if (dtype == DType::bf16 && kernels.bf16 != nullptr) {
    std::uint16_t rounded[256];
    for (std::size_t at = 0; at < values.size(); at += std::size(rounded)) {
      const std::size_t count = std::min(std::size(rounded), values.size() - at);
      round_to(kernels, values.data() + at, 1, count, rounded, count);
      kernels.widen(rounded, dtype, values.data() + at, count);
    }
  } else if (dtype != DType::f32) {
    for (float& value : values) value = rounded_to(dtype, value);
  }
}

// Shares σ/s out as a square root to both sides, fixes signs, and rounds to the adapter's dtype. The largest entry of
// each row of A is positive (the first of equals).
//
// The factors of a bf16 weight keep its 8 bits whatever dtype they are stored in. That costs 1e-5 of their energy,
// which the residual takes up; the residual is then an exact product of bf16, at twice the speed of float.
StoredFactors store_factors(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                            const Factors& factors) {
  const std::size_t rows = request.weight.rows, cols = request.weight.cols, rank = request.rank;
  const bool transposed = request.fan_in_fan_out;
  StoredFactors stored;
  stored.left = Buffer<float>(pool.scratch(), rows * rank);
  stored.right = Buffer<float>(pool.scratch(), rank * cols);
  const Buffer<float>& a_side = transposed ? factors.left : factors.right;
  const std::vector<float> largest =
      largest_of_columns(pool, a_side, transposed ? rows : cols, factors.stride, factors.stride);
  std::vector<double> left_scale(rank), right_scale(rank);
  for (std::size_t i = 0; i < rank; ++i) {
    const double sign = largest[factors.order[i]] < 0 ? -1 : 1;
    const double shared = factors.sigma[i] / request.scaling;
    left_scale[i] = sign * std::sqrt(shared);
    right_scale[i] = shared > 0 ? sign * std::sqrt(shared) / factors.length[i] : 0;
  }
  constexpr std::size_t kPiece = 64;
  const std::size_t left_tasks = (rows + kPiece - 1) / kPiece, right_tasks = (cols + kPiece - 1) / kPiece;
  std::vector<unsigned char> finite(left_tasks + right_tasks, 1);
  pool.run(finite.size(), [&](std::size_t task) {
    const bool is_left = task < left_tasks;
    const std::size_t n = is_left ? rows : cols;
    const std::size_t begin = (is_left ? task : task - left_tasks) * kPiece, count = std::min(kPiece, n - begin);
    const double* scale = (is_left ? left_scale : right_scale).data();
    Buffer<float> values(pool.scratch(), count * rank);
    for (std::size_t j = 0; j < count; ++j) {
      const float* row = (is_left ? factors.left : factors.right).data() + (begin + j) * factors.stride;
      for (std::size_t i = 0; i < rank; ++i) {
        values[j * rank + i] = static_cast<float>(static_cast<double>(row[factors.order[i]]) * scale[i]);
      }
    }
    if (request.weight.dtype == DType::bf16) round_values(kernels, DType::bf16, values);
    round_values(kernels, request.adapter_dtype, values);
    finite[task] = std::isfinite(kernels.max_magnitude(values.data(), DType::f32, values.size()));
    const auto store = [&](bool as_columns, DType dtype, void* factor) {
      auto* place = static_cast<char*>(factor);
      if (!as_columns) return store_as(dtype, values.data(), count * rank, place + begin * rank * size_of(dtype));
      float column[kPiece];
      for (std::size_t i = 0; i < rank; ++i) {
        for (std::size_t j = 0; j < count; ++j) column[j] = values[j * rank + i];
        store_as(dtype, column, count, place + (i * n + begin) * size_of(dtype));
      }
    };
    store(!is_left, DType::f32, (is_left ? stored.left : stored.right).data());
    // B is the left factor and A the right one; a transposed weight swaps them and their layouts.
    store(is_left == transposed, request.adapter_dtype, is_left == transposed ? request.a : request.b);
  });
  stored.finite = std::all_of(finite.begin(), finite.end(), [](unsigned char good) { return good != 0; });
  return stored;
}

// Writes A, B and what they leave.
SplitResult finish(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, Factors factors,
                   SplitResult result, Precision precision) {
  auto phase = Clock::now();
  const StoredFactors stored = store_factors(kernels, pool, request, factors);
  if (!stored.finite) throw std::domain_error("gives adapter factors that overflow the adapter's dtype");
  result.sigma = std::move(factors.sigma);
  factors = Factors{};
  result.ritz_seconds += seconds_since(phase);
  phase = Clock::now();
  const int exponent = result.sigma[0] > 0 ? std::clamp(std::ilogb(result.sigma[0]), -120, 120) : 0;
  const ResidualNorms norms = subtract_product(kernels, pool, request.weight, stored.left.data(), stored.right.data(),
                                               request.rank, request.scaling, std::ldexp(1.0f, -exponent), precision);
  if (!norms.finite) throw std::overflow_error("has a residual that overflows its dtype");
  result.weight_norm = norms.weight;
  result.rounding_error = norms.error;
  result.residual_seconds = seconds_since(phase);
  return result;
}

}  // namespace

SplitResult split(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request) {
  SplitResult result;
  Factors factors = factorize(kernels, pool, request, result);
  return finish(kernels, pool, request, std::move(factors), std::move(result),
                request.precise ? Precision::of_weight : Precision::single);
}

SplitResult refit(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request) {
  SplitResult result;
  std::optional<Factors> factors = follow(kernels, pool, request, result);
  if (!factors) factors = factorize(kernels, pool, request, result);
  return finish(kernels, pool, request, std::move(*factors), std::move(result), Precision::single);
}

std::size_t split_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads) {
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * n * rank); };
  const std::size_t factors = 2 * (tall(weight.rows) + tall(weight.cols));
  return std::max(factorize_workspace_bytes(weight, rank, passes, threads) + factors / 2,
                  factors + residual_workspace_bytes(weight, rank)) +
         (4u << 20);
}

std::size_t refit_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  return std::max({follow_workspace_bytes(weight, rank, threads), correction_workspace_bytes(weight, rank, threads),
                   split_workspace_bytes(weight, rank, 0, threads)});
}

}  // namespace pissa
