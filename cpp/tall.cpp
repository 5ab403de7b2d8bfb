#include "tall.hpp"

#include <algorithm>

#include "buffer.hpp"
#include "lapack.hpp"

namespace pissa {
namespace {

// Few enough that the partial products stay small beside the matrices, many enough to keep threads busy.
constexpr std::size_t kBlocks = 8;
constexpr std::size_t kRowsPerProduct = 512;

}  // namespace

void cross_product(ThreadPool& pool, std::size_t n, const float* a, std::size_t p, const float* b, std::size_t q,
                   bool exact, double* c) {
  const std::size_t rows = std::max<std::size_t>(64, (n + kBlocks - 1) / kBlocks);
  const std::size_t blocks = (n + rows - 1) / rows;
  Buffer<float> partial(pool.scratch(), exact ? 0 : blocks * p * q);
  Buffer<double> partial_exact(pool.scratch(), exact ? blocks * p * q : 0);
  pool.run(blocks, [&](std::size_t block) {
    const std::size_t begin = block * rows;
    const std::size_t count = std::min(rows, n - begin);
    if (!exact) {
      lapack::gemm('T', 'N', p, q, count, 1.0f, a + begin, n, b + begin, n, 0.0f, partial.data() + block * p * q, p);
      return;
    }
    constexpr std::size_t kPiece = 256;  // widened a little at a time
    Buffer<double> wide(pool.scratch(), kPiece * (p + q));
    for (std::size_t at = 0; at < count; at += kPiece) {
      const std::size_t size = std::min(kPiece, count - at);
      for (std::size_t j = 0; j < p + q; ++j) {
        const float* column = j < p ? a + j * n : b + (j - p) * n;
        std::copy_n(column + begin + at, size, wide.data() + j * kPiece);
      }
      lapack::gemm('T', 'N', p, q, size, 1.0, wide.data(), kPiece, wide.data() + p * kPiece, kPiece,
                   at == 0 ? 0.0 : 1.0, partial_exact.data() + block * p * q, p);
    }
  });
  std::fill(c, c + p * q, 0.0);
  for (std::size_t block = 0; block < blocks; ++block) {
    for (std::size_t i = 0; i < p * q; ++i) {
      c[i] += exact ? partial_exact[block * p * q + i] : static_cast<double>(partial[block * p * q + i]);
    }
  }
}

void multiply(ThreadPool& pool, std::size_t n, float alpha, const float* a, std::size_t p, const float* b,
              std::size_t q, float beta, float* c) {
  pool.run((n + kRowsPerProduct - 1) / kRowsPerProduct, [&](std::size_t block) {
    const std::size_t begin = block * kRowsPerProduct;
    const std::size_t count = std::min(kRowsPerProduct, n - begin);
    lapack::gemm('N', 'N', count, q, p, alpha, a + begin, n, b, p, beta, c + begin, n);
  });
}

}  // namespace pissa
