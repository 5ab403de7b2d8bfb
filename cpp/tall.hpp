// Products of matrices of many rows and few columns, row-major, parallel over fixed blocks of rows. `Element` is float
// or the bits of bf16 (see packing.hpp); column counts are multiples of 16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"

namespace pissa {

// Products read whole vectors: up to so many elements beyond a row, and so beyond the last one, must be there.
constexpr std::size_t kReadBeyond = 16;

// c (p × q, column-major) = aᵀ·b for a (n × p, and kReadBeyond) and b (n × q) of the same stride. Blocks are multiplied
// in float and added in double in the order of the rows, whatever the threads.
template <class Element>
void cross_product(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t p,
                   const Element* b, std::size_t q, std::size_t stride, double* c);

// The same in double throughout.
void exact_cross_product(ThreadPool& pool, std::size_t n, const float* a, std::size_t p, const float* b, std::size_t q,
                         std::size_t stride, double* c);

// A narrow matrix b (p × q, column-major), rounded to Element, as the right factor of products. Its columns are padded
// with zeros to `width`, a multiple of 16.
template <class Element>
class RightFactor {
 public:
  RightFactor(const Kernels& kernels, ThreadPool& pool, std::size_t p, const double* b, std::size_t q);
  std::size_t width() const { return width_; }

  // c (rows × width) = a·b, or c += a·b, for a (rows × p).
  void set_product(const Element* a, std::size_t a_stride, std::size_t rows, float* c, std::size_t c_stride) const {
    multiply(tile_.assign, a, a_stride, rows, c, c_stride);
  }
  void add_product(const Element* a, std::size_t a_stride, std::size_t rows, float* c, std::size_t c_stride) const {
    multiply(tile_.accumulate, a, a_stride, rows, c, c_stride);
  }

 private:
  void multiply(StripFunction function, const Element* a, std::size_t a_stride, std::size_t rows, float* c,
                std::size_t c_stride) const;

  const Tile& tile_;
  std::size_t p_, width_;
  Buffer<Element> packed_;  // [group][step][column][depth]
};

// Row ranges of products are done in tasks of so many.
constexpr std::size_t kRowsPerProduct = 64;

// a·b, row-major with stride q rounded up to 16, for a (n × p) and b (p × q, column-major).
template <class Element>
Buffer<float> multiply(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t a_stride,
                       std::size_t p, const double* b, std::size_t q);

// The same for a in bf16 and b not rounded: in float.
Buffer<float> multiply_widened(const Kernels& kernels, ThreadPool& pool, std::size_t n, const std::uint16_t* a,
                               std::size_t a_stride, std::size_t p, const double* b, std::size_t q);

}  // namespace pissa
