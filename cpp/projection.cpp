#include "projection.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "orthonormalize.hpp"
#include "packing.hpp"
#include "rayleigh_ritz.hpp"
#include "sweep.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// Columns that are multiplied at a time: their sums stay in a core's second-level cache.
constexpr std::size_t kSlice = 80;

}  // namespace

Factors project(const Kernels& kernels, ThreadPool& pool, const Weight& weight, Buffer<float> left, std::size_t k,
                std::size_t rank, int exponent) {
  Buffer<float> u(pool.scratch(), weight.rows * k + kReadBeyond);
  if (extend_basis(kernels, pool, weight.rows, u.data(), k, 0, 0, left.data(), k).exhausted) return {};
  left = Buffer<float>();
  Buffer<float> z(pool.scratch(), weight.cols * k + kReadBeyond);
  {
    Sweep<float> sweep(kernels, pool, weight, 0);
    const std::size_t slices = (k + kSlice - 1) / kSlice;
    for (std::size_t i = 0; i < slices; ++i) {
      const std::size_t at = k / 16 * i / slices * 16, end = k / 16 * (i + 1) / slices * 16;
      sweep.transposed_product(u.data() + at, k, end - at, std::ldexp(1.0f, -exponent), z.data() + at, k);
    }
  }
  Buffer<double> gram(pool.scratch(), k * k);
  exact_cross_product(pool, weight.cols, z.data(), k, z.data(), k, k, gram.data());
  const RitzTriplets ritz = rayleigh_ritz(kernels, pool, std::move(gram), k, rank, k, true);
  Buffer<float> to_left = multiply(kernels, pool, weight.rows, u.data(), k, k, ritz.vectors.data(), rank);
  Buffer<float> to_right = multiply(kernels, pool, weight.cols, z.data(), k, k, ritz.vectors.data(), rank);
  const std::size_t stride = round_up(rank, 16);
  const std::vector<double> length = column_lengths(pool, to_right, weight.cols, stride, rank);
  std::vector<double> sigma(length);
  for (double& value : sigma) value = std::ldexp(value, exponent);
  return in_descending_order(stride, std::move(to_left), std::move(to_right), length, sigma);
}

std::size_t projection_workspace_bytes(const Weight& weight, std::size_t k, unsigned threads) {
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * (n * k + kReadBeyond)); };
  return 2 * (tall(weight.rows) + tall(weight.cols)) + 8 * sizeof(double) * k * k +
         Sweep<float>::workspace_bytes(weight, std::min(k, kSlice), threads);
}

}  // namespace pissa
