#include "tall.hpp"

#include <algorithm>
#include <cstring>

#include "lapack.hpp"
#include "packing.hpp"

namespace pissa {
namespace {

// Few enough that the partial products stay small beside the matrices, many enough to keep threads busy.
constexpr std::size_t kBlocks = 8, kMinRows = 192;
constexpr std::size_t kRowsPerPiece = 128;  // packed at a time

std::size_t rows_per_block(std::size_t n) { return round_up(std::max(kMinRows, (n + kBlocks - 1) / kBlocks), 32); }

// c (p × q) = the sum of the blocks' partial products, whose columns are p_stride apart, in their order.
template <class T>
void add_up(ThreadPool& pool, const T* partial, std::size_t blocks, std::size_t p, std::size_t p_stride, std::size_t q,
            double* c) {
  pool.run((q + 7) / 8, [&](std::size_t task) {
    const std::size_t begin = task * 8, end = std::min(q, begin + 8);
    std::fill(c + begin * p, c + end * p, 0.0);
    for (std::size_t block = 0; block < blocks; ++block) {
      for (std::size_t j = begin; j < end; ++j) {
        const T* column = partial + (block * q + j) * p_stride;
        for (std::size_t i = 0; i < p; ++i) c[j * p + i] += static_cast<double>(column[i]);
      }
    }
  });
}

}  // namespace

template <class Element>
void cross_product(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t p,
                   const Element* b, std::size_t q, std::size_t stride, double* c) {
  const Tile& tile = tile_for<Element>(kernels);
  const std::size_t rows = rows_per_block(n), blocks = (n + rows - 1) / rows;
  const std::size_t width = round_up(p, tile.wide);
  Buffer<float> partial(pool.scratch(), blocks * width * q);
  pool.run(blocks, [&](std::size_t block) {
    const std::size_t begin = block * rows, end = std::min(n, begin + rows);
    float* out = partial.data() + block * width * q;
    std::memset(out, 0, sizeof(float) * width * q);
    Buffer<Element> packed(pool.scratch(), kRowsPerPiece * q);
    for (std::size_t at = begin; at < end; at += kRowsPerPiece) {
      const std::size_t count = std::min(kRowsPerPiece, end - at);
      pack(kernels, b + at * stride, stride, count, q, packed.data());
      tile.add_transposed(packed.data(), q, a + at * stride, stride, count, width, out, width);
    }
  });
  add_up(pool, partial.data(), blocks, p, width, q, c);
}

void exact_cross_product(ThreadPool& pool, std::size_t n, const float* a, std::size_t p, const float* b, std::size_t q,
                         std::size_t stride, double* c) {
  const std::size_t rows = rows_per_block(n);
  const std::size_t blocks = (n + rows - 1) / rows;
  Buffer<double> partial(pool.scratch(), blocks * p * q);
  pool.run(blocks, [&](std::size_t block) {
    const std::size_t begin = block * rows;
    const std::size_t end = std::min(n, begin + rows);
    Buffer<double> wide(pool.scratch(), kRowsPerPiece * (p + q));
    for (std::size_t at = begin; at < end; at += kRowsPerPiece) {
      const std::size_t count = std::min(kRowsPerPiece, end - at);
      for (std::size_t i = 0; i < count; ++i) {
        std::copy_n(a + (at + i) * stride, p, wide.data() + i * (p + q));
        std::copy_n(b + (at + i) * stride, q, wide.data() + i * (p + q) + p);
      }
      // Row-major with stride p + q is column-major transposed: (p + q) × count.
      lapack::gemm('N', 'T', p, q, count, 1.0, wide.data(), p + q, wide.data() + p, p + q, at == begin ? 0.0 : 1.0,
                   partial.data() + block * p * q, p);
    }
  });
  add_up(pool, partial.data(), blocks, p, p, q, c);
}

template <class Element>
RightFactor<Element>::RightFactor(const Kernels& kernels, ThreadPool& pool, std::size_t p, const double* b,
                                  std::size_t q)
    : tile_(tile_for<Element>(kernels)), p_(p), width_(round_up(q, 16)), packed_(pool.scratch(), p * width_) {
  const Groups groups(width_, tile_);
  Buffer<float> values(pool.scratch(), p * width_);  // row-major
  Buffer<Element> rows(pool.scratch(), p * width_);
  constexpr std::size_t kTurned = 16;  // columns at a time
  for (std::size_t first = 0; first < width_; first += kTurned) {
    const std::size_t end = std::min(q, first + kTurned);
    for (std::size_t i = 0; i < p; ++i) {
      float* row = values.data() + i * width_ + first;
      std::fill_n(row, kTurned, 0.0f);
      for (std::size_t column = first; column < end; ++column) *row++ = static_cast<float>(b[column * p + i]);
    }
  }
  round_to(kernels, values.data(), p, width_, rows.data(), width_);
  for (std::size_t group = 0; group < groups.count; ++group) {
    pack(kernels, rows.data() + groups.begin(group), width_, p, groups.size(group),
         packed_.data() + p * groups.begin(group));
  }
}

template <class Element>
void RightFactor<Element>::multiply(StripFunction function, const Element* a, std::size_t a_stride, std::size_t rows,
                                    float* c, std::size_t c_stride) const {
  const Groups groups(width_, tile_);
  for (std::size_t group = 0; group < groups.count; ++group) {
    function(a, a_stride, tile_.depth, packed_.data() + p_ * groups.begin(group), p_ / tile_.depth,
             c + groups.begin(group), c_stride, rows, groups.vectors_of(group));
  }
}

template <class Element>
Buffer<float> multiply(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t a_stride,
                       std::size_t p, const double* b, std::size_t q) {
  const RightFactor<Element> factor(kernels, pool, p, b, q);
  const std::size_t width = factor.width();
  Buffer<float> c(pool.scratch(), n * width);
  pool.run((n + kRowsPerProduct - 1) / kRowsPerProduct, [&](std::size_t task) {
    const std::size_t begin = task * kRowsPerProduct, rows = std::min(kRowsPerProduct, n - begin);
    factor.set_product(a + begin * a_stride, a_stride, rows, c.data() + begin * width, width);
  });
  return c;
}

Buffer<float> multiply_widened(const Kernels& kernels, ThreadPool& pool, std::size_t n, const std::uint16_t* a,
                               std::size_t a_stride, std::size_t p, const double* b, std::size_t q) {
  const RightFactor<float> factor(kernels, pool, p, b, q);
  const std::size_t width = factor.width();
  Buffer<float> c(pool.scratch(), n * width);
  pool.run((n + kRowsPerProduct - 1) / kRowsPerProduct, [&](std::size_t task) {
    const std::size_t begin = task * kRowsPerProduct, rows = std::min(kRowsPerProduct, n - begin);
    Buffer<float> wide(pool.scratch(), rows * p);
    for (std::size_t i = 0; i < rows; ++i) {
      kernels.widen(a + (begin + i) * a_stride, DType::bf16, wide.data() + i * p, p);
    }
    factor.set_product(wide.data(), p, rows, c.data() + begin * width, width);
  });
  return c;
}

template void cross_product(const Kernels&, ThreadPool&, std::size_t, const float*, std::size_t, const float*,
                            std::size_t, std::size_t, double*);
template void cross_product(const Kernels&, ThreadPool&, std::size_t, const std::uint16_t*, std::size_t,
                            const std::uint16_t*, std::size_t, std::size_t, double*);
template class RightFactor<float>;
template class RightFactor<std::uint16_t>;
template Buffer<float> multiply(const Kernels&, ThreadPool&, std::size_t, const float*, std::size_t, std::size_t,
                                const double*, std::size_t);
template Buffer<float> multiply(const Kernels&, ThreadPool&, std::size_t, const std::uint16_t*, std::size_t,
                                std::size_t, const double*, std::size_t);

}  // namespace pissa
