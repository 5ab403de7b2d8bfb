#include "tall.hpp"

#include <algorithm>
#include <cstring>

#include "lapack.hpp"
#include "packing.hpp"

namespace pissa {
namespace {

// Few enough that the partial products stay small beside the matrices, many enough to keep threads busy.
constexpr std::size_t kBlocks = 8;
constexpr std::size_t kRowsPerPiece = 128;  // packed at a time

std::size_t rows_per_block(std::size_t n) {
  return round_up(std::max<std::size_t>(64, (n + kBlocks - 1) / kBlocks), 2);
}

// c (p × q) = the sum of the blocks' partial products, in their order.
template <class T>
void add_up(ThreadPool& pool, const T* partial, std::size_t blocks, std::size_t p, std::size_t q, double* c) {
  pool.run((q + 7) / 8, [&](std::size_t task) {
    const std::size_t begin = task * 8 * p, end = std::min(q, (task + 1) * 8) * p;
    std::fill(c + begin, c + end, 0.0);
    for (std::size_t block = 0; block < blocks; ++block) {
      for (std::size_t i = begin; i < end; ++i) c[i] += static_cast<double>(partial[block * p * q + i]);
    }
  });
}

}  // namespace

template <class Element>
void cross_product(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t p,
                   const Element* b, std::size_t q, std::size_t stride, double* c) {
  const Tile& tile = tile_for<Element>(kernels);
  const std::size_t depth = tile.depth;
  const Groups groups(p, tile);
  const std::size_t rows = rows_per_block(n);
  const std::size_t blocks = (n + rows - 1) / rows;
  Buffer<float> partial(pool.scratch(), blocks * p * q);
  pool.run(blocks, [&](std::size_t block) {
    const std::size_t begin = block * rows;
    const std::size_t end = std::min(n, begin + rows);
    float* out = partial.data() + block * p * q;
    std::memset(out, 0, sizeof(float) * p * q);
    Buffer<Element> packed_a(pool.scratch(), kRowsPerPiece * p), packed_b(pool.scratch(), kRowsPerPiece * q);
    for (std::size_t at = begin; at < end; at += kRowsPerPiece) {
      const std::size_t count = std::min(kRowsPerPiece, end - at);
      const std::size_t steps = (count + depth - 1) / depth;
      pack(kernels, b + at * stride, stride, count, q, packed_b.data());
      for (std::size_t group = 0; group < groups.count; ++group) {
        const std::size_t lanes = groups.size(group);
        pack(kernels, a + at * stride + groups.begin(group), stride, count, lanes, packed_a.data());
        tile.accumulate(packed_b.data(), depth, q * depth, packed_a.data(), steps, out + groups.begin(group), p, q,
                        groups.vectors_of(group));
      }
    }
  });
  add_up(pool, partial.data(), blocks, p, q, c);
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
  add_up(pool, partial.data(), blocks, p, q, c);
}

template <class Operand>
RightFactor<Operand>::RightFactor(const Kernels& kernels, ThreadPool& pool, std::size_t p, const double* b,
                                  std::size_t q)
    : kernels_(kernels), pool_(pool), p_(p), width_(round_up(q, 16)), packed_(pool.scratch(), p * width_) {
  const Tile& tile = tile_for<Operand>(kernels);
  const std::size_t depth = tile.depth;
  const Groups groups(width_, tile);
  pool.run(groups.count, [&](std::size_t group) {
    const std::size_t lanes = groups.size(group);
    Operand* out = packed_.data() + p * groups.begin(group);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const std::size_t column = groups.begin(group) + lane;
      for (std::size_t i = 0; i < p; ++i) {
        const double value = column < q ? b[column * p + i] : 0;
        out[(i / depth * lanes + lane) * depth + i % depth] = to_element<Operand>(static_cast<float>(value));
      }
    }
  });
}

template <class Operand>
template <class Element>
void RightFactor<Operand>::add_product(const Element* a, std::size_t a_stride, std::size_t rows, float* c,
                                       std::size_t c_stride) const {
  constexpr bool kWidens = !std::is_same_v<Operand, Element>;
  const Tile& tile = tile_for<Operand>(kernels_);
  const Groups groups(width_, tile);
  Buffer<Operand> wide(pool_.scratch(), kWidens ? rows * p_ : 0);
  const Operand* operand = nullptr;
  if constexpr (kWidens) {
    for (std::size_t i = 0; i < rows; ++i) {
      kernels_.widen(a + i * a_stride, DType::bf16, wide.data() + i * p_, p_);
    }
    operand = wide.data();
    a_stride = p_;
  } else {
    operand = a;
  }
  for (std::size_t group = 0; group < groups.count; ++group) {
    tile.accumulate(operand, a_stride, tile.depth, packed_.data() + p_ * groups.begin(group), p_ / tile.depth,
                    c + groups.begin(group), c_stride, rows, groups.vectors_of(group));
  }
}

template <class Operand, class Element>
Buffer<float> multiply(const Kernels& kernels, ThreadPool& pool, std::size_t n, const Element* a, std::size_t a_stride,
                       std::size_t p, const double* b, std::size_t q) {
  const RightFactor<Operand> factor(kernels, pool, p, b, q);
  const std::size_t width = factor.width();
  Buffer<float> c(pool.scratch(), n * width);
  pool.run((n + kRowsPerProduct - 1) / kRowsPerProduct, [&](std::size_t task) {
    const std::size_t begin = task * kRowsPerProduct, rows = std::min(kRowsPerProduct, n - begin);
    std::fill_n(c.data() + begin * width, rows * width, 0.0f);
    factor.add_product(a + begin * a_stride, a_stride, rows, c.data() + begin * width, width);
  });
  return c;
}

template void cross_product(const Kernels&, ThreadPool&, std::size_t, const float*, std::size_t, const float*,
                            std::size_t, std::size_t, double*);
template void cross_product(const Kernels&, ThreadPool&, std::size_t, const std::uint16_t*, std::size_t,
                            const std::uint16_t*, std::size_t, std::size_t, double*);
template class RightFactor<float>;
template class RightFactor<std::uint16_t>;
template void RightFactor<float>::add_product(const float*, std::size_t, std::size_t, float*, std::size_t) const;
template void RightFactor<float>::add_product(const std::uint16_t*, std::size_t, std::size_t, float*,
                                              std::size_t) const;
template void RightFactor<std::uint16_t>::add_product(const std::uint16_t*, std::size_t, std::size_t, float*,
                                                      std::size_t) const;
template Buffer<float> multiply<float>(const Kernels&, ThreadPool&, std::size_t, const float*, std::size_t, std::size_t,
                                       const double*, std::size_t);
template Buffer<float> multiply<float>(const Kernels&, ThreadPool&, std::size_t, const std::uint16_t*, std::size_t,
                                       std::size_t, const double*, std::size_t);
template Buffer<float> multiply<std::uint16_t>(const Kernels&, ThreadPool&, std::size_t, const std::uint16_t*,
                                               std::size_t, std::size_t, const double*, std::size_t);

}  // namespace pissa
