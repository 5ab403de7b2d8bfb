#include "norms.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "buffer.hpp"
#include "lapack.hpp"

namespace pissa {
namespace {

constexpr std::size_t kPiece = 4096;
constexpr std::size_t kColumns = 512;  // of the larger side, in a product

const char* place(const Weight& weight, std::size_t row, std::size_t col) {
  return static_cast<const char*>(weight.data) + (row * weight.cols + col) * size_of(weight.dtype);
}

}  // namespace

double frobenius_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  const std::size_t count = weight.rows * weight.cols;
  std::vector<double> sums((count + kPiece - 1) / kPiece);
  pool.run(sums.size(), [&](std::size_t task) {
    alignas(64) float values[kPiece];
    const std::size_t size = std::min(kPiece, count - task * kPiece);
    kernels.widen(place(weight, 0, task * kPiece), weight.dtype, values, size);
    double sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    sums[task] = sum;
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return std::sqrt(sum);
}

double nuclear_norm(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  const bool wide = weight.rows <= weight.cols;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  Buffer<double> piece(pool.scratch(), small * kColumns), gram(pool.scratch(), small * small);
  std::vector<float> values(std::max(small, kColumns));
  for (std::size_t at = 0; at < large; at += kColumns) {
    const std::size_t count = std::min(kColumns, large - at);
    // Column-major small × count.
    for (std::size_t i = 0; i < (wide ? small : count); ++i) {
      kernels.widen(wide ? place(weight, i, at) : place(weight, at + i, 0), weight.dtype, values.data(),
                    wide ? count : small);
      if (wide) {
        for (std::size_t j = 0; j < count; ++j) piece[j * small + i] = static_cast<double>(values[j]);
      } else {
        std::copy_n(values.data(), small, piece.data() + i * small);
      }
    }
    lapack::rank_update(small, count, piece.data(), at == 0 ? 0.0 : 1.0, gram.data());
  }
  std::vector<double> squares(small);
  if (!lapack::eigenvalues(small, gram.data(), squares.data()))
    throw std::runtime_error("LAPACK sterf did not converge");
  double sum = 0;
  for (const double square : squares) sum += std::sqrt(std::max(0.0, square));
  return sum;
}

std::size_t nuclear_norm_workspace_bytes(const Weight& weight) {
  const std::size_t small = std::min(weight.rows, weight.cols);
  return sizeof(double) * small * (small + kColumns + 128);
}

}  // namespace pissa
