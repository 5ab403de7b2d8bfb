#include "factors.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace pissa {

std::vector<double> column_lengths(const Buffer<float>& a, std::size_t stride, std::size_t columns) {
  std::vector<double> length(columns, 0.0);
  for (std::size_t j = 0; j < a.size() / stride; ++j) {
    const float* row = a.data() + j * stride;
    for (std::size_t i = 0; i < columns; ++i) length[i] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  }
  for (double& value : length) value = std::sqrt(value);
  return length;
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
