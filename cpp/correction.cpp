#include "correction.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "factorize.hpp"
#include "lapack.hpp"
#include "norms.hpp"
#include "packing.hpp"
#include "sweep.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

// Of a Cholesky factor's diagonal, for columns of length one: below it they are too dependent for an inverse in bf16.
constexpr double kIndependent = 0.25;

template <class Element>
class Corrector {
 public:
  Corrector(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, double norm)
      : kernels_(kernels),
        pool_(pool),
        request_(request),
        rows_(request.weight.rows),
        cols_(request.weight.cols),
        rank_(request.rank),
        width_(round_up(rank_, 16)),
        exponent_(std::clamp(std::ilogb(norm), -120, 120)),
        scale_(std::ldexp(1.0f, -exponent_)),
        sweep_(kernels, pool, request.weight, width_) {
    if (kIsBf16<Element>) {
      sweep_.scale_weight(scale_);
      scale_ = 1;
    }
  }

  // In what follows E stands for E·2^-exponent; x holds A's rows as columns of length one, and y B·s·2^-exponent, times
  // these lengths.
  std::optional<Correction> run() {
    Buffer<float> x = columns_of_a(kernels_, pool_, request_, width_);
    Buffer<float> y = columns_of_b(kernels_, pool_, request_, width_);
    std::vector<double> length = column_lengths(x, cols_, width_, rank_), to_x(rank_), to_y(rank_);
    for (std::size_t c = 0; c < rank_; ++c) {
      to_x[c] = length[c] > 0 ? 1 / length[c] : 0;
      to_y[c] = std::ldexp(length[c] * request_.scaling, -exponent_);
    }
    scale_columns(x, cols_, width_, to_x);
    scale_columns(y, rows_, width_, to_y);
    const Buffer<Element> old_x = rounded(x, cols_);
    const std::optional<std::vector<double>> x_inverse = inverse(gram(old_x, old_x, cols_));
    if (!x_inverse) return std::nullopt;
    Buffer<Element> product(pool_.scratch(), rows_ * width_ + kReadBeyond);
    sweep_.product(old_x.data(), width_, width_, scale_, product.data(), width_);
    const Buffer<float> y_step = times(product, rows_, *x_inverse);
    product = Buffer<Element>();
    add(y, y_step, 1);
    const Buffer<Element> new_y = rounded(y, rows_);
    const std::optional<std::vector<double>> y_inverse = inverse(gram(new_y, new_y, rows_));
    if (!y_inverse) return std::nullopt;
    Buffer<float> back(pool_.scratch(), cols_ * width_ + kReadBeyond);
    sweep_.transposed_product(new_y.data(), width_, width_, scale_, back.data(), width_);
    add(back, times(old_x, cols_, gram(rounded(y_step, rows_), new_y, rows_)), -1);
    const Buffer<float> x_step = times(rounded(back, cols_), cols_, *y_inverse);
    Correction result;
    result.change = change(x, y, x_step, y_step);
    add(x, x_step, 1);
    result.factors = factors(std::move(x), std::move(y));
    return result;
  }

 private:
  Buffer<Element> rounded(const Buffer<float>& values, std::size_t n) {
    Buffer<Element> result(pool_.scratch(), n * width_ + kReadBeyond);
    round_to(kernels_, values.data(), result.data(), n * width_);
    return result;
  }

  // aᵀ·b, width × width.
  std::vector<double> gram(const Buffer<Element>& a, const Buffer<Element>& b, std::size_t n) {
    std::vector<double> result(width_ * width_);
    cross_product(kernels_, pool_, n, a.data(), width_, b.data(), width_, width_, result.data());
    return result;
  }

  // Of its leading rank × rank part, with zeros around it; by Cholesky at the scale of columns of length one.
  std::optional<std::vector<double>> inverse(std::vector<double> gram) {
    std::vector<double> inverse_length(rank_);
    for (std::size_t j = 0; j < rank_; ++j) {
      if (!(gram[j * width_ + j] > 0)) return std::nullopt;
      inverse_length[j] = 1 / std::sqrt(gram[j * width_ + j]);
    }
    const auto scale = [&] {
      for (std::size_t j = 0; j < rank_; ++j) {
        for (std::size_t i = 0; i <= j; ++i) gram[j * width_ + i] *= inverse_length[i] * inverse_length[j];
      }
    };
    scale();
    const int size = lapack::narrow(rank_), stride = lapack::narrow(width_);
    int info = 0;
    lapack::scipy_dpotrf_("U", &size, gram.data(), &stride, &info);
    for (std::size_t j = 0; info == 0 && j < rank_; ++j) info = gram[j * width_ + j] < kIndependent;
    if (info == 0) lapack::scipy_dpotri_("U", &size, gram.data(), &stride, &info);
    if (info != 0) return std::nullopt;
    scale();
    for (std::size_t j = 0; j < width_; ++j) {
      for (std::size_t i = 0; i < j; ++i) gram[i * width_ + j] = gram[j * width_ + i];
      if (j < rank_) continue;
      for (std::size_t i = 0; i < width_; ++i) gram[j * width_ + i] = gram[i * width_ + j] = 0;
    }
    return gram;
  }

  Buffer<float> times(const Buffer<Element>& a, std::size_t n, const std::vector<double>& b) {
    return multiply(kernels_, pool_, n, a.data(), width_, width_, b.data(), width_);
  }

  void add(Buffer<float>& sum, const Buffer<float>& part, float factor) {
    for (std::size_t i = 0; i < part.size(); ++i) sum[i] += factor * part[i];
  }

  // By (y + Δy)·(x + Δx)ᵀ − y·xᵀ = Δy·xᵀ + (y + Δy)·Δxᵀ.
  Change change(const Buffer<float>& x, const Buffer<float>& y, const Buffer<float>& x_step,
                const Buffer<float>& y_step) {
    Change result;
    result.depth = 2 * width_;
    result.scaling = std::ldexp(1.0, exponent_);
    result.left = Buffer<float>(pool_.scratch(), rows_ * result.depth);
    for (std::size_t i = 0; i < rows_; ++i) {
      std::copy_n(y_step.data() + i * width_, width_, result.left.data() + i * result.depth);
      std::copy_n(y.data() + i * width_, width_, result.left.data() + i * result.depth + width_);
    }
    result.right = Buffer<float>(pool_.scratch(), result.depth * cols_);
    turn(x, result.right.data());
    turn(x_step, result.right.data() + width_ * cols_);
    return result;
  }

  // Columns (cols × width) as rows, so many at a time that their lines stay in the first-level cache.
  void turn(const Buffer<float>& columns, float* rows) {
    constexpr std::size_t kColumns = 64;
    pool_.run((cols_ + kColumns - 1) / kColumns, [&](std::size_t task) {
      const std::size_t begin = task * kColumns, end = std::min(cols_, begin + kColumns);
      for (std::size_t c = 0; c < width_; ++c) {
        for (std::size_t j = begin; j < end; ++j) rows[c * cols_ + j] = columns[j * width_ + c];
      }
    });
  }

  Factors factors(Buffer<float> x, Buffer<float> y) {
    const std::vector<double> y_length = column_lengths(y, rows_, width_, rank_),
                              x_length = column_lengths(x, cols_, width_, rank_);
    Factors result;
    std::vector<double> unit;
    for (std::size_t c = 0; c < rank_; ++c) {
      unit.push_back(1 / y_length[c]);
      result.sigma.push_back(std::ldexp(x_length[c] * y_length[c], exponent_));
    }
    scale_columns(y, rows_, width_, unit);
    result.stride = width_;
    result.left = std::move(y);
    result.right = std::move(x);
    result.length = x_length;
    result.order.resize(rank_);
    std::iota(result.order.begin(), result.order.end(), 0);
    return result;
  }

  const Kernels& kernels_;
  ThreadPool& pool_;
  const SplitRequest& request_;
  std::size_t rows_, cols_, rank_, width_;
  int exponent_;
  float scale_;
  Sweep<Element> sweep_;
};

}  // namespace

std::optional<Correction> find_correction(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request) {
  const double norm = frobenius_norm(kernels, pool, request.weight);
  if (!(norm > 0) || !std::isfinite(norm)) return std::nullopt;
  return uses_bf16(kernels, request.weight) ? Corrector<std::uint16_t>(kernels, pool, request, norm).run()
                                            : Corrector<float>(kernels, pool, request, norm).run();
}

std::size_t correction_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads) {
  const std::size_t width = round_up(rank, 16);
  const auto tall = [&](std::size_t n) { return Scratch::rounded(sizeof(float) * (n * width + kReadBeyond)); };
  return 7 * (tall(weight.rows) + tall(weight.cols)) + sizeof(double) * 6 * width * width +
         Sweep<float>::workspace_bytes(weight, width, threads);
}

}  // namespace pissa
