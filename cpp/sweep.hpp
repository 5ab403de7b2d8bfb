// Power steps over a weight in its own dtype: Y = W·X and Z = Wᵀ·Y while a panel of W's rows is in cache, so that W
// is read from memory once for the two products.
#pragma once

#include <cstddef>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Dense operands are column-major float, LAPACK's layout, without padding between columns.
//
// Every element is summed in an order that depends only on the shapes and the kernel: a row's dot product by one
// task, and Z's columns by one task each over the panels in order. So results are the same for any number of threads.
class Sweep {
 public:
  // `safe` avoids bf16 operands (whose instruction flushes denormals) for weights of extreme scale.
  Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block, bool safe = false);

  static std::size_t workspace_bytes(const Weight& weight, std::size_t max_block);

  // y (rows × k) = round(W·x·x_scale) and z (cols × k) = Wᵀ·y, where x is cols × k. The rounding is to bf16 where the
  // kernel multiplies bf16, else none; x is rounded likewise. z belongs to exactly the y that is returned.
  void power_step(const float* x, std::size_t k, float x_scale, float* y, float* z);

  // y (rows × k) is rounded in place; z (cols × k) = Wᵀ·y.
  void transposed_product(float* y, std::size_t k, float* z);

 private:
  template <class Element>
  void run(const float* x, std::size_t k, float x_scale, float* y, float* z);
  template <class Element>
  void pack_x(const float* x, std::size_t k, float x_scale);
  template <class Element>
  void multiply_rows(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k);
  template <class Element>
  void pack_y(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k, float* y, bool computed);
  template <class Element>
  void pack_strips(const Element* data, std::size_t stride, std::size_t rows, std::size_t columns,
                   Element* packed) const;
  template <class Element>
  void multiply_columns(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k, float* z) const;
  const void* panel_data(std::size_t panel, std::size_t row, std::size_t& stride) const;

  const Kernels& kernels_;
  ThreadPool& pool_;
  Weight weight_;
  const Tile& tile_;
  std::size_t panel_rows_;
  std::size_t padded_cols_;  // of x's packed form, a multiple of the tile's depth
  Buffer<float> panel_;      // widened rows, where the operands are float and the weight is not
  Buffer<float> packed_x_;
  Buffer<float> packed_y_;
  Buffer<float> sums_;
};

}  // namespace pissa
