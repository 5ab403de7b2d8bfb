#include "factors.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "eigenpairs.hpp"
#include "lapack.hpp"
#include "orthonormalize.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

constexpr std::size_t kGroup = 16;    // rows that are turned at a time
constexpr std::size_t kPiece = 1024;  // rows that one task looks at

// Calls task(number, first row, row beyond the last) for pieces of n rows.
template <class Task>
void for_each_piece(ThreadPool& pool, std::size_t n, const Task& task) {
  pool.run((n + kPiece - 1) / kPiece,
           [&](std::size_t piece) { task(piece, piece * kPiece, std::min(n, (piece + 1) * kPiece)); });
}

}  // namespace

std::vector<double> column_lengths(ThreadPool& pool, const Buffer<float>& a, std::size_t n, std::size_t stride,
                                   std::size_t columns) {
  const std::size_t pieces = (n + kPiece - 1) / kPiece;
  std::vector<double> parts(pieces * columns, 0.0), length(columns, 0.0);
  for_each_piece(pool, n, [&](std::size_t piece, std::size_t begin, std::size_t end) {
    double* part = parts.data() + piece * columns;
    for (std::size_t j = begin; j < end; ++j) {
      const float* row = a.data() + j * stride;
      for (std::size_t i = 0; i < columns; ++i) part[i] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    }
  });
  for (std::size_t piece = 0; piece < pieces; ++piece) {
    for (std::size_t i = 0; i < columns; ++i) length[i] += parts[piece * columns + i];
  }
  for (double& value : length) value = std::sqrt(value);
  return length;
}

std::vector<float> largest_of_columns(ThreadPool& pool, const Buffer<float>& a, std::size_t n, std::size_t stride,
                                      std::size_t columns) {
  const std::size_t pieces = (n + kPiece - 1) / kPiece;
  std::vector<float> parts(pieces * columns, 0.0f), largest(columns, 0.0f);
  const auto take = [columns](const float* row, float* best) {
    for (std::size_t i = 0; i < columns; ++i) best[i] = std::fabs(row[i]) > std::fabs(best[i]) ? row[i] : best[i];
  };
  for_each_piece(pool, n, [&](std::size_t piece, std::size_t begin, std::size_t end) {
    for (std::size_t j = begin; j < end; ++j) take(a.data() + j * stride, parts.data() + piece * columns);
  });
  for (std::size_t piece = 0; piece < pieces; ++piece) take(parts.data() + piece * columns, largest.data());
  return largest;
}

void scale_columns(ThreadPool& pool, Buffer<float>& a, std::size_t n, std::size_t stride,
                   const std::vector<double>& factors) {
  const std::vector<float> narrow(factors.begin(), factors.end());
  for_each_piece(pool, n, [&](std::size_t, std::size_t begin, std::size_t end) {
    for (std::size_t j = begin; j < end; ++j) {
      float* row = a.data() + j * stride;
      for (std::size_t i = 0; i < narrow.size(); ++i) row[i] *= narrow[i];
    }
  });
}

Buffer<float> columns_of_a(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, std::size_t width) {
  const std::size_t n = request.weight.cols;
  Buffer<float> columns(pool.scratch(), n * width + kReadBeyond);
  pool.run(width / kGroup, [&](std::size_t group) {
    Buffer<float> rows(pool.scratch(), kGroup * n);
    std::fill(rows.begin(), rows.end(), 0.0f);
    const std::size_t first = group * kGroup, end = std::min(request.rank, first + kGroup);
    const char* stored = static_cast<const char*>(request.a) + first * n * size_of(request.adapter_dtype);
    kernels.widen(stored, request.adapter_dtype, rows.data(), (end - first) * n);
    for (std::size_t j = 0; j < n; ++j) {
      for (std::size_t i = 0; i < kGroup; ++i) columns[j * width + first + i] = rows[i * n + j];
    }
  });
  return columns;
}

Buffer<float> columns_of_b(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, std::size_t width) {
  Buffer<float> columns(pool.scratch(), request.weight.rows * width + kReadBeyond);
  for (std::size_t i = 0; i < request.weight.rows; ++i) {
    const char* stored = static_cast<const char*>(request.b) + i * request.rank * size_of(request.adapter_dtype);
    kernels.widen(stored, request.adapter_dtype, columns.data() + i * width, request.rank);
    std::fill(columns.data() + i * width + request.rank, columns.data() + (i + 1) * width, 0.0f);
  }
  return columns;
}

Factors in_descending_order(std::size_t stride, Buffer<float> left, Buffer<float> right,
                            const std::vector<double>& length, const std::vector<double>& sigma) {
  Factors factors;
  factors.stride = stride;
  factors.left = std::move(left);
  factors.right = std::move(right);
  factors.order.resize(sigma.size());
  std::iota(factors.order.begin(), factors.order.end(), 0);
  std::stable_sort(factors.order.begin(), factors.order.end(),
                   [&](std::size_t i, std::size_t j) { return sigma[i] > sigma[j]; });
  for (const std::size_t column : factors.order) {
    factors.sigma.push_back(sigma[column]);
    factors.length.push_back(length[column]);
  }
  return factors;
}

// With L·D·Rᵀ the product, and C the Cholesky factor of RᵀR: R·C⁻¹ is orthonormal, and the singular values of L·D·Cᵀ,
// from its Gram matrix, are the product's.
Factors in_singular_form(const Kernels& kernels, ThreadPool& pool, Factors factors) {
  const std::size_t rank = factors.sigma.size(), stride = factors.stride;
  const std::size_t rows = factors.left.size() / stride, cols = factors.right.size() / stride;
  const auto gram_of = [&](const Buffer<float>& a, std::size_t n) {
    std::vector<double> all(stride * stride), gram(rank * rank);
    exact_cross_product(pool, n, a.data(), stride, a.data(), stride, stride, all.data());
    for (std::size_t j = 0; j < rank; ++j) {
      for (std::size_t i = 0; i < rank; ++i) gram[j * rank + i] = all[factors.order[j] * stride + factors.order[i]];
    }
    return gram;
  };
  const std::vector<double> left_gram = gram_of(factors.left, rows);
  std::vector<double> right_gram = gram_of(factors.right, cols), c(rank * rank), inverse(rank * rank);
  if (!cholesky(rank, right_gram, c, inverse)) return factors;
  std::vector<double> inner(rank * rank), half(rank * rank), gram(rank * rank), values(rank), v(rank * rank);
  for (std::size_t j = 0; j < rank; ++j) {  // D·Cᵀ
    for (std::size_t i = 0; i < rank; ++i) inner[j * rank + i] = factors.sigma[i] / factors.length[i] * c[i * rank + j];
  }
  const double scale = 1 / factors.sigma[0];
  lapack::gemm('N', 'N', rank, rank, rank, scale, left_gram.data(), rank, inner.data(), rank, 0.0, half.data(), rank);
  lapack::gemm('T', 'N', rank, rank, rank, scale, inner.data(), rank, half.data(), rank, 0.0, gram.data(), rank);
  if (!largest_eigenpairs(kernels, pool, rank, gram.data(), rank, values.data(), v.data()) || !(values.back() > 0)) {
    return factors;
  }
  std::vector<double> to_left(stride * rank), to_right(stride * rank), left(rank * rank), right(rank * rank);
  lapack::gemm('N', 'N', rank, rank, rank, 1.0, inner.data(), rank, v.data(), rank, 0.0, left.data(), rank);
  lapack::gemm('N', 'N', rank, rank, rank, 1.0, inverse.data(), rank, v.data(), rank, 0.0, right.data(), rank);
  Factors result;
  result.stride = stride;
  result.order.resize(rank);
  std::iota(result.order.begin(), result.order.end(), 0);
  for (std::size_t j = 0; j < rank; ++j) {
    const double sigma = std::sqrt(values[j]) / scale;
    result.sigma.push_back(sigma);
    for (std::size_t i = 0; i < rank; ++i) {
      to_left[j * stride + factors.order[i]] = left[j * rank + i] / sigma;
      to_right[j * stride + factors.order[i]] = right[j * rank + i];
    }
  }
  result.length.assign(rank, 1.0);
  result.left = multiply(kernels, pool, rows, factors.left.data(), stride, stride, to_left.data(), rank);
  result.right = multiply(kernels, pool, cols, factors.right.data(), stride, stride, to_right.data(), rank);
  return result;
}

}  // namespace pissa
