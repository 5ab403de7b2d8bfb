#include "residual.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.hpp"

namespace pissa {
namespace {

constexpr std::size_t kRowsPerTask = 32;
constexpr std::size_t kStripsPerPiece = 8;
constexpr std::size_t kMaxPiece = 8 * 64;
constexpr std::size_t kMaxTileRows = 16;

template <class Sum>
ResidualNorms subtract_with(const Kernels& kernels, const Tile& tile, ThreadPool& pool, const Weight& weight,
                            const float* left, const float* right, std::size_t rank, double scaling, float norm_scale) {
  const std::size_t strip = tile.vectors * tile.width;
  const std::size_t strips = (weight.cols + strip - 1) / strip;
  Buffer<Sum> packed(pool.scratch(), strips * rank * strip);  // [strip][rank][column], as the tile reads it
  pool.run(strips, [&](std::size_t s) {
    for (std::size_t t = 0; t < rank; ++t) {
      for (std::size_t lane = 0; lane < strip; ++lane) {
        const std::size_t j = s * strip + lane;
        packed[(s * rank + t) * strip + lane] = j < weight.cols ? static_cast<Sum>(right[t * weight.cols + j]) : Sum{0};
      }
    }
  });
  const std::size_t tasks = (weight.rows + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<TileNorms> norms(tasks);
  pool.run(tasks, [&](std::size_t task) {
    alignas(64) Sum product[kMaxTileRows * kMaxPiece];
    const std::size_t begin = task * kRowsPerTask;
    const std::size_t end = std::min(weight.rows, begin + kRowsPerTask);
    Buffer<Sum> a(pool.scratch(), (end - begin) * rank);
    for (std::size_t i = 0; i < a.size(); ++i)
      a[i] = static_cast<Sum>(scaling * static_cast<double>(left[begin * rank + i]));
    for (std::size_t s = 0; s < strips; s += kStripsPerPiece) {
      const std::size_t piece = std::min(kStripsPerPiece, strips - s);
      const std::size_t first = s * strip;
      const std::size_t columns = std::min(piece * strip, weight.cols - first);
      for (std::size_t i = begin; i < end; i += tile.rows) {
        const std::size_t rows = std::min(tile.rows, end - i);
        std::fill(product, product + rows * piece * strip, Sum{0});
        for (std::size_t p = 0; p < piece; ++p) {
          tile.accumulate(a.data() + (i - begin) * rank, rank, 1, packed.data() + (s + p) * rank * strip, rank,
                          product + p * strip, piece * strip, rows, tile.vectors);
        }
        for (std::size_t row = 0; row < rows; ++row) {
          char* w = static_cast<char*>(weight.data) + ((i + row) * weight.cols + first) * size_of(weight.dtype);
          kernels.subtract(w, weight.dtype, product + row * piece * strip, columns, norm_scale, norms[task]);
        }
      }
    }
  });
  TileNorms sum;
  for (const TileNorms& part : norms) {
    sum.weight += part.weight;
    sum.error += part.error;
  }
  const double unscale = 1.0 / static_cast<double>(norm_scale);
  return {std::sqrt(sum.weight) * unscale, std::sqrt(sum.error) * unscale, std::isfinite(sum.error)};
}

}  // namespace

ResidualNorms subtract_product(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* left,
                               const float* right, std::size_t rank, double scaling, float norm_scale) {
  return weight.dtype == DType::f32
             ? subtract_with<double>(kernels, kernels.tile_f64, pool, weight, left, right, rank, scaling, norm_scale)
             : subtract_with<float>(kernels, kernels.tile_f32, pool, weight, left, right, rank, scaling, norm_scale);
}

std::size_t residual_workspace_bytes(const Weight& weight, std::size_t rank) {
  const std::size_t element = weight.dtype == DType::f32 ? sizeof(double) : sizeof(float);
  return (weight.cols + 64) * rank * element;
}

float max_magnitude(const Kernels& kernels, ThreadPool& pool, const Weight& weight) {
  std::vector<float> largest(weight.rows);
  pool.run(weight.rows, [&](std::size_t i) {
    const char* row = static_cast<const char*>(weight.data) + i * weight.cols * size_of(weight.dtype);
    largest[i] = kernels.max_magnitude(row, weight.dtype, weight.cols);
  });
  return *std::max_element(largest.begin(), largest.end());
}

}  // namespace pissa
