#include "residual.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "buffer.hpp"
#include "packing.hpp"

namespace pissa {
namespace {

// A task's rows pass block by block over a piece of the right factor that stays in the second-level cache.
constexpr std::size_t kBlockRows = 32, kMaxBlocks = 4, kMinTasks = 8;
constexpr std::size_t kFactorBytes = 1u << 20;
constexpr std::size_t kStripsPerPiece = 8;
constexpr std::size_t kMaxProduct = 32 * kStripsPerPiece * 32;  // of a tile's rows with a piece's columns
constexpr std::size_t kMaxColumns = 64 * kStripsPerPiece;       // of a piece

// A row of a factor as operands, each times `folded`: for bf16, which they fit exactly, one.
template <class Element>
void convert(const Kernels& kernels, const float* src, double folded, Element* dst, std::size_t count) {
  if constexpr (kIsBf16<Element>) {
    round_to(kernels, src, 1, count, dst, count);
  } else {
    for (std::size_t i = 0; i < count; ++i) dst[i] = static_cast<Element>(folded * static_cast<double>(src[i]));
  }
}

// Element is the operand type, Sum that of the product.
template <class Element, class Sum>
ResidualNorms subtract_with(const Kernels& kernels, const Tile& tile, ThreadPool& pool, const Weight& weight,
                            const float* left, const float* right, std::size_t rank, double scaling, float norm_scale) {
  const std::size_t depth = tile.depth;
  const std::size_t strip = tile.vectors * tile.width, strips = (weight.cols + strip - 1) / strip;
  const std::size_t steps = round_up((rank + depth - 1) / depth, tile.steps);
  Buffer<Element> packed(pool.scratch(), strips * steps * depth * strip);  // [strip][step][column][depth]
  pool.run(strips, [&](std::size_t s) {
    const std::size_t columns = std::min(strip, weight.cols - s * strip);
    Element* out = packed.data() + s * steps * depth * strip;
    std::fill(out, out + steps * depth * strip, Element{0});
    Buffer<Element> rows(pool.scratch(), depth > 1 ? rank * strip : 0);
    std::fill(rows.begin(), rows.end(), Element{0});
    for (std::size_t t = 0; t < rank; ++t) {
      convert(kernels, right + t * weight.cols + s * strip, 1.0, (depth > 1 ? rows.data() : out) + t * strip, columns);
    }
    if constexpr (kIsBf16<Element>) pack(kernels, rows.data(), strip, rank, strip, out);
  });
  // Operands of a bf16 product are exact as they are; the others can take the scaling with them.
  const double folded = kIsBf16<Element> ? 1.0 : scaling;
  const auto unfolded = static_cast<Sum>(kIsBf16<Element> ? scaling : 1.0);
  // Rows [begin, end) of the weight, whose left factor is packed in `a`, and strips [first, last).
  const auto subtract_block = [&](const Element* a, std::size_t begin, std::size_t end, std::size_t first,
                                  std::size_t last, TileNorms& norms) {
    alignas(64) Sum product[kMaxProduct];
    if constexpr (kIsBf16<Element>) {
      if (weight.dtype == DType::bf16 && kernels.bf16->subtract_product != nullptr && (end - begin) % tile.rows == 0) {
        const std::size_t whole = std::min(last, weight.cols / strip);
        auto* place = static_cast<std::uint16_t*>(weight.data) + begin * weight.cols + first * strip;
        kernels.bf16->subtract_product(place, weight.cols, end - begin, whole - first, a,
                                       packed.data() + first * steps * depth * strip, steps,
                                       static_cast<float>(scaling), norm_scale, norms);
        first = whole;
      }
    }
    for (std::size_t s = first; s < last; s += kStripsPerPiece) {
      const std::size_t piece = std::min(kStripsPerPiece, last - s);
      const std::size_t left_column = s * strip;
      const std::size_t columns = std::min(piece * strip, weight.cols - left_column);
      for (std::size_t i = begin; i < end; i += tile.rows) {
        const std::size_t rows = std::min(tile.rows, end - i);
        const auto place = [&](std::size_t row) {
          return static_cast<char*>(weight.data) + ((i + row) * weight.cols + left_column) * size_of(weight.dtype);
        };
        for (std::size_t row = 0; row < rows; ++row) {  // to arrive while the product is computed
          for (std::size_t at = 0; at < columns * size_of(weight.dtype); at += 64)
            __builtin_prefetch(place(row) + at, 1);
        }
        for (std::size_t p = 0; p < piece; ++p) {
          const Element* b = packed.data() + (s + p) * steps * depth * strip;
          tile.assign(a + (i - begin) * steps * depth, steps * depth, depth, b, steps, product + p * strip,
                      piece * strip, rows, tile.vectors);
        }
        if (unfolded != Sum{1}) {
          for (std::size_t j = 0; j < rows * piece * strip; ++j) product[j] *= unfolded;
        }
        for (std::size_t row = 0; row < rows; ++row) {
          const Sum* values = product + row * piece * strip;
          if (kIsBf16<Element> && weight.dtype == DType::f32) {  // coarse: there is no rounding error to speak of
            auto* w = reinterpret_cast<float*>(place(row));
            for (std::size_t j = 0; j < columns; ++j) w[j] -= static_cast<float>(values[j]);
          } else if (std::is_same_v<Sum, float> && weight.dtype == DType::f32) {
            double wide[kMaxColumns];
            std::copy_n(values, columns, wide);
            kernels.subtract(place(row), weight.dtype, wide, columns, norm_scale, norms);
          } else {
            kernels.subtract(place(row), weight.dtype, values, columns, norm_scale, norms);
          }
        }
      }
    }
  };
  const std::size_t blocks = (weight.rows + kBlockRows - 1) / kBlockRows;
  const std::size_t task_rows = std::clamp<std::size_t>(blocks / kMinTasks, 1, kMaxBlocks) * kBlockRows;
  const std::size_t pieces = (packed.size() * sizeof(Element) + kFactorBytes - 1) / kFactorBytes;
  std::vector<TileNorms> norms((weight.rows + task_rows - 1) / task_rows);
  pool.run(norms.size(), [&](std::size_t task) {
    const std::size_t begin = task * task_rows, end = std::min(weight.rows, begin + task_rows);
    Buffer<Element> a(pool.scratch(), kBlockRows * steps * depth);
    std::fill(a.begin(), a.end(), Element{0});
    for (std::size_t piece = 0; piece < pieces; ++piece) {
      for (std::size_t first = begin; first < end; first += kBlockRows) {
        const std::size_t last = std::min(end, first + kBlockRows);
        for (std::size_t i = first; i < last; ++i) {
          convert(kernels, left + i * rank, folded, a.data() + (i - first) * steps * depth, rank);
        }
        subtract_block(a.data(), first, last, strips * piece / pieces, strips * (piece + 1) / pieces, norms[task]);
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

// Within these, no product of bf16 factors comes near the denormals that the instruction flushes.
constexpr float kSmallScale = 0x1p-60f, kLargeScale = 0x1p60f;

}  // namespace

ResidualNorms subtract_product(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* left,
                               const float* right, std::size_t rank, double scaling, float norm_scale,
                               Precision precision) {
  if (weight.dtype == DType::f32 && precision == Precision::of_weight) {
    return subtract_with<double, double>(kernels, kernels.tile_f64, pool, weight, left, right, rank, scaling,
                                         norm_scale);
  }
  const bool fits = weight.dtype == DType::bf16 || precision == Precision::coarse;
  if (fits && kernels.bf16 != nullptr && norm_scale > kSmallScale && norm_scale < kLargeScale) {
    return subtract_with<std::uint16_t, float>(kernels, kernels.bf16->tile, pool, weight, left, right, rank, scaling,
                                               norm_scale);
  }
  return subtract_with<float, float>(kernels, kernels.tile_f32, pool, weight, left, right, rank, scaling, norm_scale);
}

std::size_t residual_workspace_bytes(const Weight& weight, std::size_t rank) {
  const std::size_t element = weight.dtype == DType::f32 ? sizeof(double) : sizeof(float);
  return Scratch::rounded((weight.cols + 64) * round_up(rank, 32) * element);
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
