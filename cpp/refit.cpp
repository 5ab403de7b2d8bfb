#include "refit.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "clock.hpp"
#include "eigenpairs.hpp"
#include "lapack.hpp"
#include "norms.hpp"
#include "orthonormalize.hpp"
#include "packing.hpp"
#include "sweep.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

constexpr std::size_t kMaxPasses = 4;

std::vector<double> inverses(std::vector<double> values) {
  for (double& value : values) value = value > 0 ? 1 / value : 0;
  return values;
}

// The leading rank × rank part of aᵀ·a.
std::vector<double> gram_of(const Kernels& kernels, ThreadPool& pool, const Buffer<float>& a, std::size_t rows,
                            std::size_t width, std::size_t rank) {
  std::vector<double> whole(width * width), gram(rank * rank);
  cross_product(kernels, pool, rows, a.data(), width, a.data(), width, width, whole.data());
  for (std::size_t j = 0; j < rank; ++j) std::copy_n(whole.data() + j * width, rank, gram.data() + j * rank);
  return gram;
}

struct Triplets {
  std::vector<double> squares;   // σ², descending
  std::vector<double> to_basis;  // Y times it has the left vectors, Z times it the right ones times σ; rank × rank
};

// From YᵀY and ZᵀZ. None where Y's columns are dependent.
std::optional<Triplets> triplets_of(const Kernels& kernels, ThreadPool& pool, std::vector<double>& y_gram,
                                    const std::vector<double>& z_gram, std::size_t rank) {
  std::vector<double> r(rank * rank), inverse(rank * rank), half(rank * rank), inner(rank * rank), vectors(rank * rank);
  if (!cholesky(rank, y_gram, r, inverse)) return std::nullopt;
  lapack::gemm('N', 'N', rank, rank, rank, 1.0, z_gram.data(), rank, inverse.data(), rank, 0.0, half.data(), rank);
  lapack::gemm('T', 'N', rank, rank, rank, 1.0, inverse.data(), rank, half.data(), rank, 0.0, inner.data(), rank);
  Triplets found;
  found.squares.resize(rank);
  found.to_basis.resize(rank * rank);
  if (!largest_eigenpairs(kernels, pool, rank, inner.data(), rank, found.squares.data(), vectors.data()) ||
      !(found.squares.back() > 0)) {
    return std::nullopt;
  }
  lapack::gemm('N', 'N', rank, rank, rank, 1.0, inverse.data(), rank, vectors.data(), rank, 0.0, found.to_basis.data(),
               rank);
  return found;
}

}  // namespace

std::optional<Factors> follow(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                              SplitResult& result) {
  const auto start = Clock::now();
  const Weight& weight = request.weight;
  const std::size_t rank = request.rank, width = round_up(rank, 16);
  const bool wide = weight.rows <= weight.cols;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  const double norm = frobenius_norm(kernels, pool, weight);
  if (!(norm > 0) || !std::isfinite(norm)) return std::nullopt;
  const int exponent = std::clamp(std::ilogb(norm), -120, 120);
  const float scale = std::ldexp(1.0f, -exponent);
  Sweep<float> sweep(kernels, pool, weight, width);
  Buffer<float> x = wide ? columns_of_a(kernels, pool, request, width) : columns_of_b(kernels, pool, request, width);
  scale_columns(pool, x, large, width, inverses(column_lengths(pool, x, large, width, rank)));
  Buffer<float> y(pool.scratch(), small * width + kReadBeyond);
  Buffer<float> z(pool.scratch(), large * width + kReadBeyond);
  for (result.passes = 1; result.passes <= kMaxPasses; ++result.passes) {
    if (wide) {
      sweep.power_step(x.data(), width, width, scale, y.data(), width, scale, z.data());
    } else {
      sweep.transposed_product(x.data(), width, width, scale, y.data(), width);
      sweep.product(y.data(), width, width, scale, z.data(), width);
    }
    std::vector<double> y_gram = gram_of(kernels, pool, y, small, width, rank);
    double before = 0;
    for (std::size_t i = 0; i < rank; ++i) before += y_gram[i * rank + i];
    const std::vector<double> z_gram = gram_of(kernels, pool, z, large, width, rank);
    const std::optional<Triplets> found = triplets_of(kernels, pool, y_gram, z_gram, rank);
    if (!found) return std::nullopt;
    std::vector<double> length;
    for (const double square : found->squares) length.push_back(std::sqrt(square));
    Buffer<float> other = multiply(kernels, pool, large, z.data(), width, rank, found->to_basis.data(), rank);
    const double energy = std::accumulate(found->squares.begin(), found->squares.end(), 0.0);
    result.estimated_deficit = std::max(0.0, 1 - before / energy);
    if (result.estimated_deficit <= kTargetDeficit) {
      Buffer<float> basis = multiply(kernels, pool, small, y.data(), width, rank, found->to_basis.data(), rank);
      Factors factors;
      factors.stride = width;
      for (const double value : length) factors.sigma.push_back(std::ldexp(value, exponent));
      factors.order.resize(rank);
      std::iota(factors.order.begin(), factors.order.end(), 0);
      if (!wide) scale_columns(pool, other, large, width, inverses(length));
      factors.left = std::move(wide ? basis : other);
      factors.right = std::move(wide ? other : basis);
      factors.length = wide ? std::move(length) : std::vector<double>(rank, 1.0);
      result.sweep_seconds += seconds_since(start);
      return factors;
    }
    scale_columns(pool, other, large, width, inverses(length));
    std::copy(other.begin(), other.end(), x.begin());
  }
  return std::nullopt;
}

std::size_t follow_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  const std::size_t width = round_up(rank, 16);
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * (n * width + kReadBeyond)); };
  const std::size_t most = std::max(tall(weight.rows), tall(weight.cols));
  return tall(weight.rows) + tall(weight.cols) + 3 * most + sizeof(double) * 10 * width * width +
         Sweep<float>::workspace_bytes(weight, width, threads);
}

}  // namespace pissa
