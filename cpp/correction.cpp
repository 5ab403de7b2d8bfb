#include "correction.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "factorize.hpp"
#include "factors.hpp"
#include "kernels/scalar.hpp"
#include "lapack.hpp"
#include "packing.hpp"
#include "residual.hpp"
#include "sweep.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// Of a Cholesky factor's diagonal, for columns of length one: below it they are too dependent for an inverse in bf16.
constexpr float kIndependent = 0.25f;

template <class Element>
class Corrector {
 public:
  Corrector(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request)
      : kernels_(kernels),
        pool_(pool),
        request_(request),
        rows_(request.weight.rows),
        cols_(request.weight.cols),
        rank_(request.rank),
        width_(round_up(rank_, 16)),
        sweep_(kernels, pool, request.weight, width_) {}

  bool run() {
    // E stands for E·2^-exponent; x holds A's rows as columns of length one, and y B·s·2^-exponent times these lengths.
    Buffer<float> x = columns_of_a(kernels_, pool_, request_, width_);
    Buffer<float> y = columns_of_b(kernels_, pool_, request_, width_);
    if (!normalize(x, y)) return false;
    const Buffer<Element> old_x = rounded(x, cols_);
    const std::optional<std::vector<double>> x_inverse = inverse(gram(old_x, old_x, cols_));
    if (!x_inverse) return false;
    Buffer<Element> product(pool_.scratch(), rows_ * width_ + kReadBeyond);
    sweep_.product(old_x.data(), width_, width_, scale_, product.data(), width_);
    Buffer<float> y_step = times(product, rows_, *x_inverse);
    product = Buffer<Element>();
    add(y, y_step, 1);
    const Buffer<Element> new_y = rounded(y, rows_);
    const std::optional<std::vector<double>> y_inverse = inverse(gram(new_y, new_y, rows_));
    if (!y_inverse) return false;
    Buffer<float> back(pool_.scratch(), cols_ * width_ + kReadBeyond);
    sweep_.transposed_product(new_y.data(), width_, width_, scale_, back.data(), width_);
    add(back, times(old_x, cols_, gram(rounded(y_step, rows_), new_y, rows_)), -1);
    Buffer<float> x_step = times(rounded(back, cols_), cols_, *y_inverse);
    back = Buffer<float>();
    const Buffer<float> left = beside(y_step, y), right = above(x, x_step);
    add(x, x_step, 1);
    x_step = Buffer<float>();
    y_step = Buffer<float>();
    if (!store(x, y)) return false;
    // (y + Δy)·(x + Δx)ᵀ − y·xᵀ is Δy·xᵀ + (y + Δy)·Δxᵀ.
    subtract_product(kernels_, pool_, request_.weight, left.data(), right.data(), 2 * width_, 1.0, 1.0f,
                     Precision::coarse);
    return true;
  }

 private:
  bool normalize(Buffer<float>& x, Buffer<float>& y) {
    std::vector<double> x_scale = column_lengths(pool_, x, cols_, width_, rank_),
                        y_scale = column_lengths(pool_, y, rows_, width_, rank_);
    double largest = 0;
    for (std::size_t c = 0; c < rank_; ++c) largest = std::max(largest, request_.scaling * x_scale[c] * y_scale[c]);
    if (!(largest > 0) || !std::isfinite(largest)) return false;
    exponent_ = std::clamp(std::ilogb(largest), -120, 120);
    scale_ = std::ldexp(1.0f, -exponent_);
    if (kIsBf16<Element>) {
      sweep_.scale_weight(scale_);
      scale_ = 1;
    }
    for (std::size_t c = 0; c < rank_; ++c) {
      y_scale[c] = std::ldexp(x_scale[c] * request_.scaling, -exponent_);
      x_scale[c] = x_scale[c] > 0 ? 1 / x_scale[c] : 0;
    }
    scale_columns(pool_, x, cols_, width_, x_scale);
    scale_columns(pool_, y, rows_, width_, y_scale);
    return true;
  }

  Buffer<Element> rounded(const Buffer<float>& values, std::size_t n) {
    Buffer<Element> result(pool_.scratch(), n * width_ + kReadBeyond);
    round_to(kernels_, values.data(), n, width_, result.data(), width_);
    return result;
  }

  // aᵀ·b, width × width.
  std::vector<double> gram(const Buffer<Element>& a, const Buffer<Element>& b, std::size_t n) {
    std::vector<double> result(width_ * width_);
    cross_product(kernels_, pool_, n, a.data(), width_, b.data(), width_, width_, result.data());
    return result;
  }

  // Of its leading rank × rank part, with zeros around it; by Cholesky at the scale of columns of length one.
  std::optional<std::vector<double>> inverse(const std::vector<double>& gram) {
    std::vector<double> scale(rank_), result(width_ * width_);
    for (std::size_t j = 0; j < rank_; ++j) {
      if (!(gram[j * width_ + j] > 0)) return std::nullopt;
      scale[j] = 1 / std::sqrt(gram[j * width_ + j]);
    }
    std::vector<float> scaled(rank_ * rank_);
    for (std::size_t j = 0; j < rank_; ++j) {
      for (std::size_t i = 0; i <= j; ++i) {
        scaled[j * rank_ + i] = static_cast<float>(gram[j * width_ + i] * scale[i] * scale[j]);
      }
    }
    const int size = lapack::narrow(rank_);
    int info = 0;
    lapack::scipy_spotrf_("U", &size, scaled.data(), &size, &info);
    for (std::size_t j = 0; info == 0 && j < rank_; ++j) info = !(scaled[j * rank_ + j] >= kIndependent);
    if (info == 0) lapack::scipy_spotri_("U", &size, scaled.data(), &size, &info);
    if (info != 0) return std::nullopt;
    for (std::size_t j = 0; j < rank_; ++j) {
      for (std::size_t i = 0; i <= j; ++i) {
        const double value = static_cast<double>(scaled[j * rank_ + i]) * scale[i] * scale[j];
        result[j * width_ + i] = result[i * width_ + j] = value;
      }
    }
    return result;
  }

  Buffer<float> times(const Buffer<Element>& a, std::size_t n, const std::vector<double>& b) {
    return multiply(kernels_, pool_, n, a.data(), width_, width_, b.data(), width_);
  }

  void add(Buffer<float>& sum, const Buffer<float>& part, float factor) {
    for (std::size_t i = 0; i < part.size(); ++i) sum[i] += factor * part[i];
  }

  // [a, b]·2^exponent, rows × 2·width.
  Buffer<float> beside(const Buffer<float>& a, const Buffer<float>& b) {
    Buffer<float> result(pool_.scratch(), rows_ * 2 * width_);
    const float scale = std::ldexp(1.0f, exponent_);
    for (std::size_t i = 0; i < rows_; ++i) {
      float* row = result.data() + i * 2 * width_;
      for (std::size_t c = 0; c < width_; ++c) row[c] = a[i * width_ + c] * scale;
      for (std::size_t c = 0; c < width_; ++c) row[width_ + c] = b[i * width_ + c] * scale;
    }
    return result;
  }

  // Columns a and b (cols × width) as rows, 2·width × cols.
  Buffer<float> above(const Buffer<float>& a, const Buffer<float>& b) {
    Buffer<float> result(pool_.scratch(), 2 * width_ * cols_);
    turn(a, width_, result.data());
    turn(b, width_, result.data() + width_ * cols_);
    return result;
  }

  // The first columns (cols × width) as rows, so many at a time that their lines stay in the first-level cache.
  void turn(const Buffer<float>& columns, std::size_t count, float* rows) {
    constexpr std::size_t kColumns = 64;
    pool_.run((cols_ + kColumns - 1) / kColumns, [&](std::size_t task) {
      const std::size_t begin = task * kColumns, end = std::min(cols_, begin + kColumns);
      for (std::size_t c = 0; c < count; ++c) {
        for (std::size_t j = begin; j < end; ++j) rows[c * cols_ + j] = columns[j * width_ + c];
      }
    });
  }

  // A and B with B's column as long as A's row. False where they overflow their dtype.
  bool store(Buffer<float>& x, Buffer<float>& y) {
    std::vector<double> x_scale = column_lengths(pool_, x, cols_, width_, rank_),
                        y_scale = column_lengths(pool_, y, rows_, width_, rank_);
    for (std::size_t c = 0; c < rank_; ++c) {
      const double ratio = x_scale[c] > 0 ? y_scale[c] / x_scale[c] : 1;
      x_scale[c] = std::sqrt(std::ldexp(ratio, exponent_) / request_.scaling);
      y_scale[c] = std::ldexp(1 / request_.scaling, exponent_) / x_scale[c];
    }
    scale_columns(pool_, x, cols_, width_, x_scale);
    scale_columns(pool_, y, rows_, width_, y_scale);
    Buffer<float> a(pool_.scratch(), rank_ * cols_), b(pool_.scratch(), rows_ * rank_);
    turn(x, rank_, a.data());
    for (std::size_t i = 0; i < rows_; ++i) std::copy_n(y.data() + i * width_, rank_, b.data() + i * rank_);
    if (!fits(a) || !fits(b)) return false;
    store_as(request_.adapter_dtype, a.data(), a.size(), request_.a);
    store_as(request_.adapter_dtype, b.data(), b.size(), request_.b);
    return true;
  }

  bool fits(const Buffer<float>& values) {
    const float largest = kernels_.max_magnitude(values.data(), DType::f32, values.size());
    return std::isfinite(largest) &&
           (request_.adapter_dtype != DType::f16 || std::isfinite(f16_to_float(float_to_f16(largest))));
  }

  const Kernels& kernels_;
  ThreadPool& pool_;
  const SplitRequest& request_;
  std::size_t rows_, cols_, rank_, width_;
  int exponent_ = 0;
  float scale_ = 1;
  Sweep<Element> sweep_;
};

}  // namespace

bool correct(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request) {
  return uses_bf16(kernels, request.weight) ? Corrector<std::uint16_t>(kernels, pool, request).run()
                                            : Corrector<float>(kernels, pool, request).run();
}

std::size_t correction_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  const std::size_t width = round_up(rank, 16);
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * (n * width + kReadBeyond)); };
  return 7 * (tall(weight.rows) + tall(weight.cols)) + sizeof(double) * 6 * width * width +
         Sweep<float>::workspace_bytes(weight, width, threads);
}

}  // namespace pissa
