#include "refit.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "clock.hpp"
#include "lapack.hpp"
#include "norms.hpp"
#include "orthonormalize.hpp"
#include "packing.hpp"
#include "sweep.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

constexpr std::size_t kMaxPasses = 4;

// A's rows as columns of length one, and zeros beside them: cols × width.
Buffer<float> columns_of_a(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, std::size_t width) {
  const std::size_t cols = request.weight.cols;
  Buffer<float> x(pool.scratch(), cols * width), row(pool.scratch(), cols);
  std::fill(x.begin(), x.end(), 0.0f);
  for (std::size_t i = 0; i < request.rank; ++i) {
    kernels.widen(static_cast<const char*>(request.a) + i * cols * size_of(request.adapter_dtype),
                  request.adapter_dtype, row.data(), cols);
    const double square = std::inner_product(row.begin(), row.end(), row.begin(), 0.0);
    const auto scale = static_cast<float>(square > 0 ? 1 / std::sqrt(square) : 0.0);
    for (std::size_t j = 0; j < cols; ++j) x[j * width + i] = row[j] * scale;
  }
  return x;
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
std::optional<Triplets> triplets_of(const Kernels& kernels, Scratch& scratch, std::vector<double>& y_gram,
                                    const std::vector<double>& z_gram, std::size_t rank) {
  std::vector<double> r(rank * rank), inverse(rank * rank), half(rank * rank), inner(rank * rank), vectors(rank * rank);
  if (!cholesky(rank, y_gram, r, inverse)) return std::nullopt;
  lapack::gemm('N', 'N', rank, rank, rank, 1.0, z_gram.data(), rank, inverse.data(), rank, 0.0, half.data(), rank);
  lapack::gemm('T', 'N', rank, rank, rank, 1.0, inverse.data(), rank, half.data(), rank, 0.0, inner.data(), rank);
  Triplets found;
  found.squares.resize(rank);
  found.to_basis.resize(rank * rank);
  if (!lapack::largest_eigenpairs(kernels, scratch, rank, inner.data(), rank, found.squares.data(), vectors.data()) ||
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
  const double norm = frobenius_norm(kernels, pool, weight);
  if (!(norm > 0) || !std::isfinite(norm)) return std::nullopt;
  const int exponent = std::clamp(std::ilogb(norm), -120, 120);
  const float scale = std::ldexp(1.0f, -exponent);
  Sweep<float> sweep(kernels, pool, weight, width);
  Buffer<float> x = columns_of_a(kernels, pool, request, width);
  Buffer<float> y(pool.scratch(), weight.rows * width + kReadBeyond);
  Buffer<float> z(pool.scratch(), weight.cols * width + kReadBeyond);
  for (result.passes = 1; result.passes <= kMaxPasses; ++result.passes) {
    sweep.power_step(x.data(), width, width, scale, y.data(), width, scale, z.data());
    std::vector<double> y_gram = gram_of(kernels, pool, y, weight.rows, width, rank);
    double before = 0;
    for (std::size_t i = 0; i < rank; ++i) before += y_gram[i * rank + i];
    const std::vector<double> z_gram = gram_of(kernels, pool, z, weight.cols, width, rank);
    const std::optional<Triplets> found = triplets_of(kernels, pool.scratch(), y_gram, z_gram, rank);
    if (!found) return std::nullopt;
    Factors factors;
    factors.right = multiply(kernels, pool, weight.cols, z.data(), width, rank, found->to_basis.data(), rank);
    for (const double square : found->squares) factors.length.push_back(std::sqrt(square));
    const double energy = std::accumulate(found->squares.begin(), found->squares.end(), 0.0);
    result.estimated_deficit = std::max(0.0, 1 - before / energy);
    if (result.estimated_deficit <= kTargetDeficit) {
      factors.stride = width;
      factors.left = multiply(kernels, pool, weight.rows, y.data(), width, rank, found->to_basis.data(), rank);
      for (const double length : factors.length) factors.sigma.push_back(std::ldexp(length, exponent));
      factors.order.resize(rank);
      std::iota(factors.order.begin(), factors.order.end(), 0);
      result.sweep_seconds += seconds_since(start);
      return factors;
    }
    for (std::size_t j = 0; j < weight.cols; ++j) {
      for (std::size_t i = 0; i < rank; ++i) {
        x[j * width + i] = static_cast<float>(static_cast<double>(factors.right[j * width + i]) / factors.length[i]);
      }
    }
  }
  return std::nullopt;
}

std::size_t follow_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  const std::size_t width = round_up(rank, 16);
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * (n * width + kReadBeyond)); };
  return 2 * tall(weight.rows) + 3 * tall(weight.cols) + sizeof(double) * 10 * width * width +
         Sweep<float>::workspace_bytes(weight, width, threads);
}

}  // namespace pissa
