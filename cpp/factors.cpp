#include "factors.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "tall.hpp"

namespace pissa {
namespace {

constexpr std::size_t kGroup = 16;  // rows that are turned at a time

}  // namespace

std::vector<double> column_lengths(const Buffer<float>& a, std::size_t n, std::size_t stride, std::size_t columns) {
  std::vector<double> length(columns, 0.0);
  for (std::size_t j = 0; j < n; ++j) {
    const float* row = a.data() + j * stride;
    for (std::size_t i = 0; i < columns; ++i) length[i] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  }
  for (double& value : length) value = std::sqrt(value);
  return length;
}

void scale_columns(Buffer<float>& a, std::size_t n, std::size_t stride, const std::vector<double>& factors) {
  const std::vector<float> narrow(factors.begin(), factors.end());
  for (std::size_t j = 0; j < n; ++j) {
    float* row = a.data() + j * stride;
    for (std::size_t i = 0; i < narrow.size(); ++i) row[i] *= narrow[i];
  }
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

}  // namespace pissa
