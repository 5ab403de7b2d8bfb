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

// Columns of Y's Gram matrix at a time: more would fill too much of what is known by symmetry.
constexpr std::size_t kGramColumns = 48;

// Rows must not be whole pages apart: the columns of a tile would fall into the same few lines of the cache.
std::size_t stride_for(std::size_t block, std::size_t max_passes) {
  const std::size_t columns = round_up(block * max_passes, 32);
  return columns % 256 == 0 ? columns + 32 : columns;
}

}  // namespace

template <class Element>
RangeFinder<Element>::RangeFinder(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t block,
                                  std::size_t max_passes, std::uint64_t key, bool int8)
    : kernels_(kernels),
      pool_(pool),
      weight_(weight),
      max_passes_(max_passes),
      key_(key),
      sweep_(kernels, pool, weight, block),
      stride_(stride_for(block, max_passes)),
      x_(pool.scratch(), weight.cols * stride_ + kReadBeyond),
      y_(pool.scratch(), weight.rows * stride_ + kReadBeyond),
      z_(pool.scratch(), weight.cols * block) {
  basis_.block = block;
  gram_ = Buffer<double>(pool.scratch(), max_columns() * max_columns());
  double norm = sketch(1.0f, key);
  if (!(norm > kSmallNorm && norm < kLargeNorm)) {
    // Also where a value is not finite: it leaves no finite norm. The sketch is repeated at the weight's own scale.
    const float largest = max_magnitude(kernels, pool, weight);
    if (!std::isfinite(largest)) throw std::domain_error("holds NaN or infinity");
    zero_ = largest == 0.0f;
    out_of_range_ = !zero_ && kIsBf16<Element> && weight.dtype == DType::bf16;
    if (zero_ || out_of_range_) return;
    int8 = false;
    const int magnitude = std::clamp(std::ilogb(largest), -120, 120);
    if (kIsBf16<Element>) {
      basis_.weight_exponent = magnitude;
      sweep_.scale_weight(std::ldexp(1.0f, -magnitude));
      norm = sketch(1.0f, key);
    } else {
      norm = std::ldexp(sketch(std::ldexp(1.0f, -magnitude), key), magnitude);
    }
  }
  if (int8) {
    int8_.emplace(kernels, pool, weight, block);
  } else if (basis_.weight_exponent == 0 && sweep_.can_read_halves()) {
    halves_.emplace(kernels, pool, weight);
    sweep_.read_halves();
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
void RangeFinder<Element>::advance_to(std::size_t passes, bool last) {
  if (int8_) {
    advance_by(*int8_, passes, last);
  } else {
    advance_by(sweep_, passes, last);
  }
}

template <class Element>
template <class Products>
void RangeFinder<Element>::advance_by(Products& products, std::size_t passes, bool last) {
  KrylovBasis& b = basis_;
  const float scale = std::ldexp(1.0f, -b.exponent);
  while (!zero_ && b.passes < passes) {
    if (b.passes > 0) {
      if (!multiplied_) {
        products.transposed_product(y_.data() + b.columns() - b.block, stride_, b.block, scale, z_.data(), b.block);
      }
      if (!extend()) return;
    }
    const Element* x = x_.data() + b.columns();
    Element* y = y_.data() + b.columns();
    ++b.passes;
    multiplied_ = b.passes < passes || !last;
    if (multiplied_) {
      products.power_step(x, stride_, b.block, scale, y, stride_, scale, z_.data());
    } else {
      products.product(x, stride_, b.block, scale, y, stride_);
    }
  }
}

// A further block of X from z. False where there is none.
template <class Element>
bool RangeFinder<Element>::extend() {
  KrylovBasis& b = basis_;
  const std::size_t k = b.columns();
  // In exact arithmetic z is orthogonal to all of X but its last two blocks.
  const std::size_t recent = std::min(k, 2 * b.block);
  Extension step = extend_basis(kernels_, pool_, weight_.cols, x_.data(), stride_, k, recent, z_.data(), b.block);
  if (step.exhausted) {
    // X spans a space that W maps into itself and back. What W has beyond it, as with singular values repeated more
    // often than the block is wide, is found from a new start; if there is nothing, the basis holds all of W.
    sketch(std::ldexp(1.0f, -b.exponent), key_ + b.passes);
    step = extend_basis(kernels_, pool_, weight_.cols, x_.data(), stride_, k, k, z_.data(), b.block);
  }
  b.exhausted = step.exhausted;
  b.householder |= step.householder;
  return !b.exhausted;
}

template <class Element>
Buffer<double> RangeFinder<Element>::gram(bool exact) {
  const std::size_t k = basis_.columns(), block = basis_.block, ld = max_columns();
  std::vector<double> product;
  for (std::size_t begin = gram_columns_, end = begin; begin < k; begin = end) {
    end = std::min(k, begin + kGramColumns);
    const std::size_t count = end - begin;
    const Element* columns = y_.data() + begin;
    product.resize(end * count);
    if constexpr (!kIsBf16<Element>) {
      if (exact) exact_cross_product(pool_, weight_.rows, y_.data(), end, columns, count, stride_, product.data());
    }
    if (!exact) {
      cross_product(kernels_, pool_, weight_.rows, y_.data(), end, columns, count, stride_, product.data());
    }
    for (std::size_t c = 0; c < count; ++c) {
      std::copy_n(product.data() + c * end, end, gram_.data() + (begin + c) * ld);
    }
  }
  gram_columns_ = k;
  Buffer<double> result(pool_.scratch(), k * k);
  for (std::size_t j = 0; j < k; ++j)
    std::copy_n(gram_.data() + j * ld, j / block * block + block, result.data() + j * k);
  return result;
}

template <class Element>
Buffer<float> RangeFinder<Element>::combine(const Buffer<Element>& basis, std::size_t n, const std::vector<double>& c,
                                            std::size_t rank, bool precise) const {
  if constexpr (kIsBf16<Element>) {
    if (precise) return multiply_widened(kernels_, pool_, n, basis.data(), stride_, basis_.columns(), c.data(), rank);
  }
  return multiply(kernels_, pool_, n, basis.data(), stride_, basis_.columns(), c.data(), rank);
}

template <class Element>
Buffer<float> RangeFinder<Element>::combine_y(const std::vector<double>& c, std::size_t rank, bool precise) const {
  return combine(y_, weight_.rows, c, rank, precise);
}

template <class Element>
Buffer<float> RangeFinder<Element>::combine_x(const std::vector<double>& c, std::size_t rank, bool precise) const {
  return combine(x_, weight_.cols, c, rank, precise);
}

template <class Element>
std::size_t RangeFinder<Element>::workspace_bytes(const Weight& weight, std::size_t block, std::size_t max_passes,
                                                  bool int8, unsigned threads) {
  const std::size_t columns = block * max_passes, stride = sizeof(Element) * stride_for(block, max_passes);
  return Scratch::rounded(weight.rows * stride) + Scratch::rounded(weight.cols * stride) +
         2 * Scratch::rounded(sizeof(float) * weight.cols * block) +
         2 * Scratch::rounded(sizeof(double) * columns * columns) +
         Sweep<Element>::workspace_bytes(weight, block, threads) +
         (int8 ? Int8Sweep<Element>::workspace_bytes(weight, block, threads) : Halves::workspace_bytes(weight));
}

template class RangeFinder<float>;
template class RangeFinder<std::uint16_t>;

}  // namespace pissa
