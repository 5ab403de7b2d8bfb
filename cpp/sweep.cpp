#include "sweep.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/scalar.hpp"

namespace pissa {
namespace {

// A panel stays in the last-level cache between its two products; more rows per panel mean fewer passes over Z.
constexpr std::size_t kPanelBytes = 4u << 20;
constexpr std::size_t kMaxPanelRows = 256;
constexpr std::size_t kMinPanelRows = 64;
// A block of packed x that stays in the first-level cache while the rows of a task pass over it.
constexpr std::size_t kXBlockBytes = 32u << 10;
constexpr std::size_t kRowsPerTask = 32;
constexpr std::size_t kStripsPerTask = 8;
constexpr std::size_t kStripsPerPack = 4;
constexpr std::size_t kMaxStripWidth = 64;
constexpr std::size_t kPackedStrip = (kMaxPanelRows + 2) * kMaxStripWidth;
constexpr std::size_t kMaxTileRows = 16;

std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

std::size_t choose_panel_rows(const Weight& weight) {
  const std::size_t fitting = kPanelBytes / std::max<std::size_t>(1, weight.cols * size_of(weight.dtype));
  const std::size_t rows = std::clamp(fitting, kMinPanelRows, kMaxPanelRows);
  return std::min(round_up(rows, kRowsPerTask), round_up(weight.rows, 2));
}

// k columns as vectors, split as evenly as the tile's width allows.
struct Groups {
  Groups(std::size_t k, const Tile& tile)
      : vectors((k + tile.width - 1) / tile.width), count((vectors + tile.vectors - 1) / tile.vectors) {}
  std::size_t begin(std::size_t group) const { return vectors * group / count; }
  std::size_t size(std::size_t group) const { return begin(group + 1) - begin(group); }
  std::size_t vectors;
  std::size_t count;
};

template <class Element>
Element to_element(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    return float_to_bf16(value);
  }
}

}  // namespace

Sweep::Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block, bool safe)
    : kernels_(kernels),
      pool_(pool),
      weight_(weight),
      tile_(weight.dtype == DType::bf16 && kernels.tile_bf16 != nullptr && !safe ? *kernels.tile_bf16
                                                                                 : kernels.tile_f32),
      panel_rows_(choose_panel_rows(weight)),
      padded_cols_(round_up(weight.cols, tile_.depth)) {
  const std::size_t width = round_up(max_block, 16);
  if (tile_.depth == 1 && weight.dtype != DType::f32)
    panel_ = Buffer<float>(pool.scratch(), panel_rows_ * (weight.cols + 16));
  packed_x_ = Buffer<float>(pool.scratch(), padded_cols_ * width / tile_.depth);
  packed_y_ = Buffer<float>(pool.scratch(), panel_rows_ * width);
  sums_ = Buffer<float>(pool.scratch(), panel_rows_ * width);
}

std::size_t Sweep::workspace_bytes(const Weight& weight, std::size_t max_block) {
  const std::size_t width = round_up(max_block, 16);
  const std::size_t rows = choose_panel_rows(weight);
  return sizeof(float) * (rows * (weight.cols + 16) + (weight.cols + 1) * width + 2 * rows * width);
}

const void* Sweep::panel_data(std::size_t panel, std::size_t row, std::size_t& stride) const {
  if (!panel_.empty()) {
    stride = weight_.cols + 16;
    return panel_.data() + row * stride;
  }
  stride = weight_.cols;
  return static_cast<const char*>(weight_.data) + (panel + row) * stride * size_of(weight_.dtype);
}

void Sweep::power_step(const float* x, std::size_t k, float x_scale, float* y, float* z) {
  tile_.depth == 2 ? run<std::uint16_t>(x, k, x_scale, y, z) : run<float>(x, k, x_scale, y, z);
}

void Sweep::transposed_product(float* y, std::size_t k, float* z) {
  tile_.depth == 2 ? run<std::uint16_t>(nullptr, k, 1, y, z) : run<float>(nullptr, k, 1, y, z);
}

template <class Element>
void Sweep::run(const float* x, std::size_t k, float x_scale, float* y, float* z) {
  if (x != nullptr) pack_x<Element>(x, k, x_scale);
  std::memset(z, 0, sizeof(float) * weight_.cols * k);
  const std::size_t strip = tile_.vectors * tile_.width;
  const std::size_t strips = (weight_.cols + strip - 1) / strip;
  for (std::size_t panel = 0; panel < weight_.rows; panel += panel_rows_) {
    const std::size_t rows = std::min(panel_rows_, weight_.rows - panel);
    pool_.run((rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::size_t task) {
      const std::size_t begin = task * kRowsPerTask;
      const std::size_t end = std::min(rows, begin + kRowsPerTask);
      if (!panel_.empty()) {
        for (std::size_t i = begin; i < end; ++i) {
          const char* row =
              static_cast<const char*>(weight_.data) + (panel + i) * weight_.cols * size_of(weight_.dtype);
          kernels_.widen(row, weight_.dtype, panel_.data() + i * (weight_.cols + 16), weight_.cols);
        }
      }
      if (x != nullptr) multiply_rows<Element>(panel, begin, end, k);
      pack_y<Element>(panel, begin, end, k, y, x != nullptr);
    });
    pool_.run((strips + kStripsPerTask - 1) / kStripsPerTask, [&](std::size_t task) {
      const std::size_t begin = task * kStripsPerTask * strip;
      multiply_columns<Element>(panel, begin, std::min(weight_.cols, begin + kStripsPerTask * strip), k, z);
    });
  }
}

// x → [group][column / depth][vector lanes of the group][depth], zero beyond its k columns and the last column.
template <class Element>
void Sweep::pack_x(const float* x, std::size_t k, float x_scale) {
  const Groups groups(k, tile_);
  const std::size_t depth = tile_.depth;
  auto* packed = reinterpret_cast<Element*>(packed_x_.data());
  constexpr std::size_t kChunk = 512;
  pool_.run((padded_cols_ + kChunk - 1) / kChunk, [&](std::size_t task) {
    const std::size_t begin = task * kChunk;
    const std::size_t end = std::min(padded_cols_, begin + kChunk);
    for (std::size_t group = 0; group < groups.count; ++group) {
      const std::size_t first = groups.begin(group) * tile_.width;
      const std::size_t lanes = groups.size(group) * tile_.width;
      Element* out = packed + first * padded_cols_;
      for (std::size_t lane = 0; lane < lanes; ++lane) {
        const float* column = x + (first + lane) * weight_.cols;
        for (std::size_t j = begin; j < end; ++j) {
          const bool inside = first + lane < k && j < weight_.cols;
          out[(j / depth * lanes + lane) * depth + j % depth] =
              inside ? to_element<Element>(column[j] * x_scale) : Element{0};
        }
      }
    }
  });
}

template <class Element>
void Sweep::multiply_rows(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k) {
  const Groups groups(k, tile_);
  const std::size_t depth = tile_.depth;
  const std::size_t width = groups.vectors * tile_.width;
  std::size_t stride = 0;
  const auto* rows = static_cast<const Element*>(panel_data(panel, 0, stride));
  const auto* packed = reinterpret_cast<const Element*>(packed_x_.data());
  // An odd last column has no partner in its row: its products are added one by one below.
  const std::size_t steps = weight_.cols / depth;
  const std::size_t block = std::max<std::size_t>(16, kXBlockBytes / (width * depth * sizeof(Element)));
  std::fill(sums_.data() + begin * width, sums_.data() + end * width, 0.0f);
  for (std::size_t at = 0; at < steps; at += block) {
    const std::size_t count = std::min(block, steps - at);
    for (std::size_t group = 0; group < groups.count; ++group) {
      const std::size_t first = groups.begin(group) * tile_.width;
      const std::size_t lanes = groups.size(group) * tile_.width;
      const Element* b = packed + first * padded_cols_ + at * lanes * depth;
      for (std::size_t i = begin; i < end; i += tile_.rows) {
        tile_.accumulate(rows + i * stride + at * depth, stride, depth, b, count, sums_.data() + i * width + first,
                         width, std::min(tile_.rows, end - i), groups.size(group));
      }
    }
  }
  if (steps * depth == weight_.cols) return;
  if constexpr (std::is_same_v<Element, std::uint16_t>) {
    const std::size_t last = weight_.cols - 1;
    for (std::size_t i = begin; i < end; ++i) {
      const float w = bf16_to_float(rows[i * stride + last]);
      for (std::size_t group = 0; group < groups.count; ++group) {
        const std::size_t first = groups.begin(group) * tile_.width;
        const std::size_t lanes = groups.size(group) * tile_.width;
        const Element* b = packed + first * padded_cols_ + steps * lanes * depth;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
          sums_[i * width + first + lane] += w * bf16_to_float(b[lane * depth]);
        }
      }
    }
  }
}

// The rows' y, rounded to the operand type, both to the caller and as [row / depth][column][depth] for the second
// product. `computed` says whether it comes from the first product or from the caller.
template <class Element>
void Sweep::pack_y(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k, float* y, bool computed) {
  const std::size_t depth = tile_.depth;
  const std::size_t width = Groups(k, tile_).vectors * tile_.width;
  auto* packed = reinterpret_cast<Element*>(packed_y_.data());
  const std::size_t padded_end = round_up(end, depth);
  for (std::size_t c = 0; c < width; ++c) {
    for (std::size_t i = begin; i < padded_end; ++i) {
      Element element{0};
      if (i < end && c < k) {
        float& value = y[c * weight_.rows + panel + i];
        element = to_element<Element>(computed ? sums_[i * width + c] : value);
        if constexpr (std::is_same_v<Element, float>) {
          value = element;
        } else {
          value = bf16_to_float(element);
        }
      }
      packed[(i / depth * width + c) * depth + i % depth] = element;
    }
  }
}

// Columns of a panel's rows as strips of [row / depth][column][depth], zero beyond the last row and column.
template <class Element>
void Sweep::pack_strips(const Element* data, std::size_t stride, std::size_t rows, std::size_t columns,
                        Element* packed) const {
  const std::size_t strip = tile_.vectors * tile_.width;
  for (std::size_t i = 0; i < rows; i += tile_.depth) {
    for (std::size_t j = 0, slot = 0; j < columns; j += strip, ++slot) {
      const std::size_t count = std::min(strip, columns - j);
      Element* out = packed + slot * kPackedStrip + i * strip;
      if constexpr (std::is_same_v<Element, std::uint16_t>) {
        kernels_.pack_pairs(data + i * stride + j, stride, std::min<std::size_t>(2, rows - i), count, strip, out);
      } else {
        std::memcpy(out, data + i * stride + j, count * sizeof(float));
        std::fill(out + count, out + strip, 0.0f);
      }
    }
  }
}

template <class Element>
void Sweep::multiply_columns(std::size_t panel, std::size_t begin, std::size_t end, std::size_t k, float* z) const {
  const std::size_t depth = tile_.depth;
  const std::size_t width = Groups(k, tile_).vectors * tile_.width;
  const std::size_t strip = tile_.vectors * tile_.width;
  const std::size_t rows = std::min(panel_rows_, weight_.rows - panel);
  const std::size_t steps = (rows + depth - 1) / depth;
  std::size_t stride = 0;
  const auto* data = static_cast<const Element*>(panel_data(panel, 0, stride));
  const auto* packed = reinterpret_cast<const Element*>(packed_y_.data());
  // Several strips are packed together: a row's piece is then long enough for the hardware to fetch ahead.
  alignas(64) Element packed_w[kStripsPerPack][kPackedStrip];
  alignas(64) float edge[kMaxTileRows * kMaxStripWidth];
  for (std::size_t j = begin; j < end; j += strip) {
    const std::size_t slot = (j - begin) / strip % kStripsPerPack;
    if (slot == 0) pack_strips(data + j, stride, rows, std::min(kStripsPerPack * strip, end - j), packed_w[0]);
    const Element* b = packed_w[slot];
    const std::size_t columns = std::min(strip, end - j);
    for (std::size_t c = 0; c < k; c += tile_.rows) {
      const std::size_t count = std::min(tile_.rows, k - c);
      float* out = z + c * weight_.cols + j;
      if (columns == strip) {
        tile_.accumulate(packed + c * depth, depth, width * depth, b, steps, out, weight_.cols, count, tile_.vectors);
        continue;
      }
      std::fill(edge, edge + count * strip, 0.0f);
      tile_.accumulate(packed + c * depth, depth, width * depth, b, steps, edge, strip, count, tile_.vectors);
      for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t lane = 0; lane < columns; ++lane) out[i * weight_.cols + lane] += edge[i * strip + lane];
      }
    }
  }
}

}  // namespace pissa
