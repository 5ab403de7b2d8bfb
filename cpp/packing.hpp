// How operands are laid out for the tile kernels: [step][column][depth], where a step is `depth` rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.hpp"
#include "kernels/scalar.hpp"

namespace pissa {

// An operand of the range finder is float, or the bits of a bf16 where the kernels multiply pairs of bf16.
template <class Element>
constexpr bool kIsBf16 = std::is_same_v<Element, std::uint16_t>;

template <class Element>
const Tile& tile_for(const Kernels& kernels) {
  if constexpr (kIsBf16<Element>) {
    return kernels.bf16->tile;
  } else {
    return kernels.tile_f32;
  }
}

inline std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

// `columns`, a multiple of 16 (and so of every tile's width), in groups of as many vectors as a tile takes.
struct Groups {
  Groups(std::size_t columns, const Tile& tile)
      : width(tile.width),
        vectors((columns + tile.width - 1) / tile.width),
        count((vectors + tile.vectors - 1) / tile.vectors) {}
  std::size_t vectors_of(std::size_t group) const { return vectors * (group + 1) / count - vectors * group / count; }
  std::size_t begin(std::size_t group) const { return vectors * group / count * width; }
  std::size_t size(std::size_t group) const { return vectors_of(group) * width; }
  std::size_t width, vectors, count;
};

inline float to_float(float value) { return value; }
inline float to_float(std::uint16_t bits) { return bf16_to_float(bits); }

template <class Element>
Element to_element(float value) {
  if constexpr (kIsBf16<Element>) {
    return float_to_bf16(value);
  } else {
    return value;
  }
}

// dst = src (rows × columns, contiguous), rounded to the element, its rows `stride` apart.
inline void round_to(const Kernels& kernels, const float* src, std::size_t rows, std::size_t columns,
                     std::uint16_t* dst, std::size_t stride) {
  kernels.bf16->narrow(src, rows, columns, dst, stride);
}
inline void round_to(const Kernels&, const float* src, std::size_t rows, std::size_t columns, float* dst,
                     std::size_t stride) {
  for (std::size_t i = 0; i < rows; ++i) std::copy_n(src + i * columns, columns, dst + i * stride);
}

// [row / depth][column][depth], zero past the last row. `columns` is a multiple of 16.
inline void pack(const Kernels& kernels, const std::uint16_t* src, std::size_t stride, std::size_t rows,
                 std::size_t columns, std::uint16_t* dst) {
  kernels.bf16->pack_pairs(src, stride, rows, columns, dst);
}
inline void pack(const Kernels&, const float* src, std::size_t stride, std::size_t rows, std::size_t columns,
                 float* dst) {
  for (std::size_t i = 0; i < rows; ++i) std::memcpy(dst + i * columns, src + i * stride, columns * sizeof(float));
}

}  // namespace pissa
