#include "range_finder.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "orthonormalize.hpp"
#include "packing.hpp"
#include "philox.hpp"
#include "residual.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// Norms of the sketch between which products and squares of float stay in range.
constexpr double kSmallNorm = 1e-15;
constexpr double kLargeNorm = 1e15;

// Rows must not be whole pages apart: the columns of a tile would fall into the same few lines of the cache.
std::size_t stride_for(std::size_t block, std::size_t max_passes) {
  const std::size_t columns = (max_passes + 1) * block;
  return columns % 256 == 0 ? columns + 32 : columns;
}

}  // namespace

template <class Element>
RangeFinder<Element>::RangeFinder(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t block,
                                  std::size_t max_passes, std::uint64_t key)
    : kernels_(kernels),
      pool_(pool),
      weight_(weight),
      max_passes_(max_passes),
      key_(key),
      sweep_(kernels, pool, weight, block),
      stride_(stride_for(block, max_passes)),
      x_(pool.scratch(), weight.cols * stride_),
      y_(pool.scratch(), weight.rows * stride_),
      z_(pool.scratch(), weight.cols * block) {
  basis_.block = block;
  basis_.h_rows = (max_passes + 1) * block;
  basis_.h = Buffer<double>(pool.scratch(), basis_.h_rows * block * max_passes);
  gram_ = Buffer<double>(pool.scratch(), basis_.h_rows * block * max_passes);
  double norm = sketch(1.0f, key);
  if (!(norm > kSmallNorm && norm < kLargeNorm)) {
    // Also where a value is not finite: it leaves no finite norm. The sketch is repeated at the weight's own scale.
    const float largest = max_magnitude(kernels, pool, weight);
    if (!std::isfinite(largest)) throw std::domain_error("holds NaN or infinity");
    zero_ = largest == 0.0f;
    out_of_range_ = !zero_ && kIsBf16<Element>;
    if (zero_ || out_of_range_) return;
    const int magnitude = std::clamp(std::ilogb(largest), -120, 120);
    norm = std::ldexp(sketch(std::ldexp(1.0f, -magnitude), key), magnitude);
  }
  basis_.exponent = std::clamp(std::ilogb(norm / std::sqrt(static_cast<double>(block))), -120, 120);
  basis_.householder = extend_basis(kernels, pool, weight.cols, x_.data(), stride_, 0, 0, z_.data(), block).householder;
}

// z = Wᵀ·S; returns its norm. Every row of S has one entry, a random sign of the given magnitude: where rows share a
// direction, such a sketch finds it as a dense one does, for one reading of W.
template <class Element>
double RangeFinder<Element>::sketch(float magnitude, std::uint64_t key) {
  Buffer<float> signs(pool_.scratch(), weight_.rows);
  random_signs(key, 0, weight_.rows, signs.data());
  for (float& sign : signs) sign *= magnitude;
  sweep_.sketch(signs.data(), basis_.block, z_.data());
  double sum = 0;
  for (const float value : z_) sum += static_cast<double>(value) * static_cast<double>(value);
  return std::sqrt(sum);
}

template <class Element>
bool RangeFinder<Element>::advance() {
  KrylovBasis& b = basis_;
  if (zero_ || b.exhausted || b.passes == max_passes_) return false;
  const std::size_t k = b.columns();
  const std::size_t next = k + b.block;
  const float scale = std::ldexp(1.0f, -b.exponent);
  sweep_.power_step(x_.data() + k, stride_, b.block, scale, y_.data() + k, stride_, scale, z_.data());
  // In exact arithmetic z is orthogonal to all of X but its last two blocks.
  const std::size_t recent = std::min(next, 2 * b.block);
  Extension step = extend_basis(kernels_, pool_, weight_.cols, x_.data(), stride_, next, recent, z_.data(), b.block);
  if (step.exhausted) {
    // X spans a space that W maps into itself and back. What W has beyond it, as with singular values repeated more
    // often than the block is wide, is found from a new start; if there is nothing, the basis holds all of W.
    std::fill(step.remainder.begin(), step.remainder.end(), 0.0);
    sketch(std::ldexp(1.0f, -b.exponent), key_ + b.passes + 1);
    const Extension fresh =
        extend_basis(kernels_, pool_, weight_.cols, x_.data(), stride_, next, next, z_.data(), b.block);
    b.exhausted = fresh.exhausted;
    b.householder |= fresh.householder;
  }
  for (std::size_t c = 0; c < b.block; ++c) {
    double* column = b.h.data() + (k + c) * b.h_rows;
    std::copy_n(step.projection.data() + c * next, next, column);
    std::copy_n(step.remainder.data() + c * b.block, b.block, column + next);
    std::fill(column + next + b.block, column + b.h_rows, 0.0);
  }
  b.householder |= step.householder;
  ++b.passes;
  return true;
}

template <class Element>
Buffer<double> RangeFinder<Element>::gram(bool exact) {
  const std::size_t k = basis_.columns(), block = basis_.block, ld = basis_.h_rows;
  std::vector<double> product;
  for (std::size_t at = gram_columns_; at < k; at += block) {
    const Element* columns = y_.data() + at;
    product.resize((at + block) * block);
    if constexpr (!kIsBf16<Element>) {
      if (exact)
        exact_cross_product(pool_, weight_.rows, y_.data(), at + block, columns, block, stride_, product.data());
    }
    if (!exact) {
      cross_product(kernels_, pool_, weight_.rows, y_.data(), at + block, columns, block, stride_, product.data());
    }
    for (std::size_t c = 0; c < block; ++c) {
      std::copy_n(product.data() + c * (at + block), at + block, gram_.data() + (at + c) * ld);
    }
  }
  gram_columns_ = k;
  Buffer<double> result(pool_.scratch(), k * k);
  for (std::size_t j = 0; j < k; ++j)
    std::copy_n(gram_.data() + j * ld, j / block * block + block, result.data() + j * k);
  return result;
}

template <class Element>
Buffer<float> RangeFinder<Element>::combine_y(const std::vector<double>& c, std::size_t rank) const {
  // Y's columns may be nearly dependent: their coefficients cancel, and must be known to float's precision.
  return multiply<float>(kernels_, pool_, weight_.rows, y_.data(), stride_, basis_.columns(), c.data(), rank);
}

template <class Element>
Buffer<float> RangeFinder<Element>::combine_x(const std::vector<double>& c, std::size_t rank) const {
  return multiply<Element>(kernels_, pool_, weight_.cols, x_.data(), stride_, basis_.x_columns(), c.data(), rank);
}

template <class Element>
std::size_t RangeFinder<Element>::workspace_bytes(const Weight& weight, std::size_t block, std::size_t max_passes,
                                                  unsigned threads) {
  const std::size_t columns = block * max_passes;
  return sizeof(Element) * (weight.rows + weight.cols) * stride_for(block, max_passes) +
         sizeof(float) * weight.cols * block + 2 * sizeof(double) * (columns + block) * columns +
         Sweep<Element>::workspace_bytes(weight, block, threads);
}

template class RangeFinder<float>;
template class RangeFinder<std::uint16_t>;

}  // namespace pissa
