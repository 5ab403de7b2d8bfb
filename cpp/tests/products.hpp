// What the tests of the two kinds of sweep share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.hpp"
#include "kernels/kernels.hpp"
#include "matrices.hpp"
#include "thread_pool.hpp"

namespace pissa {

// Shapes with remainders of every kind.
struct Shape {
  std::size_t rows, cols, k, rank;
};

inline const Shape kShapes[] = {{1, 1, 16, 1},      {1, 70, 32, 3},     {70, 1, 16, 2},     {2, 2, 48, 8},
                                {33, 65, 16, 16},   {64, 48, 64, 17},   {65, 129, 32, 32},  {131, 97, 48, 40},
                                {300, 259, 64, 64}, {259, 300, 16, 16}, {96, 1024, 32, 33}, {1100, 77, 112, 100}};
inline const DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

// How far `found` is from `expected`, in units of what may be.
inline double excess(double found, double expected, double allowed) {
  return std::fabs(found - expected) / (allowed + 1e-30);
}

// y and z of a power step by `Products`, Sweep or Int8Sweep, on x whose rows, as y's, are `stride` apart. No number of
// threads changes them, and they are those of the step's halves.
template <class Products, class Element>
void power_step(const Kernels& kernels, const TestWeight& w, const std::vector<Element>& x, std::size_t stride,
                std::size_t k, std::vector<Element>& y, std::vector<float>& z) {
  y.resize(w.weight.rows * stride);
  z.resize(w.weight.cols * k);
  const char* dtype = name_of(w.weight.dtype);
  for (unsigned threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    Products products(kernels, pool, w.weight, k);
    std::vector<Element> other_y(y.size());
    std::vector<float> other_z(z.size());
    products.power_step(x.data(), stride, k, 0.5f, other_y.data(), stride, 0.25f, other_z.data());
    if (threads == 1) {
      y = other_y;
      z = other_z;
    }
    CHECK(y == other_y && z == other_z, "%s %s: %u threads change it", kernels.name, dtype, threads);
    std::fill(other_y.begin(), other_y.end(), Element{0});
    products.product(x.data(), stride, k, 0.5f, other_y.data(), stride);
    products.transposed_product(other_y.data(), stride, k, 0.25f, other_z.data(), k);
    CHECK(y == other_y && z == other_z, "%s %s: its halves differ from a power step", kernels.name, dtype);
  }
}

}  // namespace pissa
