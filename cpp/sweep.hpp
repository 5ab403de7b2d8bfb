// Power steps over a weight in its own dtype: Y = W·X and Z = Wᵀ·Y while a block of W's rows is in cache, so that W
// is read from memory once for the two products.
#pragma once

#include <cstddef>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "lane_sums.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Dense operands are row-major; `Element` is float, or the bits of bf16 (see packing.hpp), to which a weight of another
// dtype is converted block by block. The number of columns k is a multiple of 16.
//
// Every element is summed in an order that depends only on the shapes and the kernel: a row's dot product by one
// task, and Z as parts over fixed ranges of rows, which are added in their order. So results are the same for any
// number of threads.
template <class Element>
class Sweep {
 public:
  Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block);

  static std::size_t workspace_bytes(const Weight& weight, std::size_t max_block, unsigned threads);

  // From now on W stands for W·scale, a power of two: only where W is rounded to bf16 from another dtype.
  void scale_weight(float scale) { weight_scale_ = scale; }

  // From now on W is read as what Halves has made of it. Where this can be, W need not be converted by each product.
  bool can_read_halves() const;
  void read_halves();

  // y (rows × k) = round(W·x·x_scale), z (cols × k, contiguous) = Wᵀ·y·z_scale for exactly the y that is returned.
  // x is cols × k; the scales are powers of two.
  void power_step(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                  std::size_t y_stride, float z_scale, float* z);

  // The same in two halves: y = round(W·x·x_scale), and z = Wᵀ·y·z_scale, whose rows are z_stride apart. Only the first
  // needs a max_block.
  void product(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y, std::size_t y_stride);
  void transposed_product(const Element* y, std::size_t y_stride, std::size_t k, float z_scale, float* z,
                          std::size_t z_stride);

  // z (cols × k, contiguous): column c is the sum of the rows i ≡ c (mod k) of W, each times signs[i], a power of two
  // or minus one.
  void sketch(const float* signs, std::size_t k, float* z);

 private:
  struct Lane;  // what one task works with
  // Calls add(first row, rows, lane, part of zᵀ) for all rows, so many at a time.
  template <class Add>
  void add_up(std::size_t k, float z_scale, float* z, std::size_t z_stride, std::size_t rows, const Add& add);
  void load_rows(std::size_t begin, std::size_t count, Lane& lane) const;
  void add_columns(const Element* factors, std::size_t k, const char* rows, std::size_t stride, std::size_t count,
                   float* part) const;
  void pack_x(const Element* x, std::size_t stride, std::size_t k, float x_scale);
  void multiply_rows(std::size_t begin, std::size_t count, std::size_t k, float x_scale, Lane& lane, Element* y,
                     std::size_t y_stride) const;
  void multiply_columns(std::size_t begin, std::size_t count, std::size_t k, Lane& lane, const Element* y,
                        std::size_t y_stride, float* part) const;

  const Kernels& kernels_;
  ThreadPool& pool_;
  Weight weight_;
  float weight_scale_ = 1;
  const Tile& tile_;
  std::size_t block_rows_;
  std::size_t steps_;                    // of a row's dot product
  bool direct_;                          // the weight's rows are read as they lie, by kernels for its dtype
  std::size_t row_stride_, read_bytes_;  // of rows as they are read: in elements, and those of an element
  RowKernels row_kernels_;               // for rows as they are read
  LaneSums sums_;
  Buffer<Element> packed_x_;  // [group][step][column of the group][depth]
};

}  // namespace pissa
