#include "range_finder.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "orthonormalize.hpp"
#include "philox.hpp"
#include "residual.hpp"

namespace pissa {
namespace {

double frobenius(const float* values, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return std::sqrt(sum);
}

// Norms of the sketch between which products and squares of float stay in range.
constexpr double kSmallNorm = 1e-15;
constexpr double kLargeNorm = 1e15;

}  // namespace

RangeFinder::RangeFinder(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t block,
                         std::size_t max_passes, std::uint64_t key)
    : pool_(pool), weight_(weight), max_passes_(max_passes) {
  sweep_.emplace(kernels, pool, weight, block);
  basis_.block = block;
  basis_.h_rows = (max_passes + 1) * block;
  basis_.x = Buffer<float>(pool.scratch(), weight.cols * basis_.h_rows);
  basis_.y = Buffer<float>(pool.scratch(), weight.rows * block * max_passes);
  basis_.h = Buffer<double>(pool.scratch(), basis_.h_rows * block * max_passes);
  double norm = sketch(1.0f, key);
  if (!(norm > kSmallNorm && norm < kLargeNorm)) {
    // Also where a value is not finite: it leaves no finite norm. The sketch is repeated at the weight's own scale.
    const float largest = max_magnitude(kernels, pool, weight);
    if (!std::isfinite(largest)) throw std::domain_error("holds NaN or infinity");
    zero_ = largest == 0.0f;
    if (zero_) return;
    const int magnitude = std::clamp(std::ilogb(largest), -120, 120);
    sweep_.emplace(kernels, pool, weight, block, true);
    norm = std::ldexp(sketch(std::ldexp(1.0f, -magnitude), key), magnitude);
  }
  basis_.exponent = std::clamp(std::ilogb(norm / std::sqrt(static_cast<double>(block))), -120, 120);
  const Extension first = extend_basis(pool, weight.cols, nullptr, 0, basis_.x.data(), block);
  basis_.householder = first.householder;
}

// x = Wᵀ·G, G random signs of the given magnitude; returns its norm.
double RangeFinder::sketch(float magnitude, std::uint64_t key) {
  float* g = basis_.y.data();
  pool_.run(basis_.block, [&](std::size_t c) {
    random_signs(key, c * weight_.rows, weight_.rows, g + c * weight_.rows);
    for (std::size_t i = 0; i < weight_.rows; ++i) g[c * weight_.rows + i] *= magnitude;
  });
  sweep_->transposed_product(g, basis_.block, basis_.x.data());
  return frobenius(basis_.x.data(), weight_.cols * basis_.block);
}

bool RangeFinder::advance() {
  KrylovBasis& b = basis_;
  if (zero_ || b.exhausted || b.passes == max_passes_) return false;
  const std::size_t k = b.columns();
  const std::size_t next = k + b.block;
  const float scale = std::ldexp(1.0f, -b.exponent);
  float* z = b.x.data() + weight_.cols * next;
  sweep_->power_step(b.x.data() + weight_.cols * k, b.block, scale, b.y.data() + weight_.rows * k, z);
  pool_.run(b.block, [&](std::size_t c) {
    for (std::size_t j = 0; j < weight_.cols; ++j) z[c * weight_.cols + j] *= scale;
  });
  const Extension step = extend_basis(pool_, weight_.cols, b.x.data(), next, z, b.block);
  for (std::size_t c = 0; c < b.block; ++c) {
    double* column = b.h.data() + (k + c) * b.h_rows;
    std::copy_n(step.projection.data() + c * next, next, column);
    std::copy_n(step.remainder.data() + c * b.block, b.block, column + next);
    std::fill(column + next + b.block, column + b.h_rows, 0.0);
  }
  b.householder |= step.householder;
  b.exhausted = step.exhausted;
  ++b.passes;
  return true;
}

std::size_t RangeFinder::workspace_bytes(const Weight& weight, std::size_t block, std::size_t max_passes) {
  const std::size_t columns = block * max_passes;
  return sizeof(float) * (weight.rows * columns + weight.cols * (columns + block)) +
         sizeof(double) * (columns + block) * columns + Sweep::workspace_bytes(weight, block);
}

}  // namespace pissa
