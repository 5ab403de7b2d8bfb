// The kernels, written once over a small set of vector operations that each instruction set defines.
//
// Included by one translation unit per instruction set, each compiled for its own: everything here has internal
// linkage, so that the linker can never merge a function compiled for one CPU with that of another.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernels.hpp"
#include "kernels/scalar.hpp"

namespace pissa {
namespace {

// The loops over the tile are unrolled early, for the compiler to keep the sums in registers from the start. Tiles of
// one vector have two chains of sums, over even and odd steps, to hide the latency of the instruction; more rows would
// do so too, but the rows of a weight often lie a power of two apart, where the first-level cache holds but eight.
template <class Op, std::size_t Rows, std::size_t Vectors, bool Adds>
void multiply_tile(const void* a_begin, std::size_t a_row, std::size_t a_step, const void* b_begin, std::size_t steps,
                   void* c_begin, std::size_t c_row) {
  constexpr std::size_t kChains = Vectors == 1 ? 2 : 1;
  constexpr std::size_t kBStep = Vectors * Op::kWidth * Op::kDepth;
  const auto* a = static_cast<const typename Op::Element*>(a_begin);
  const auto* b = static_cast<const typename Op::Element*>(b_begin);
  auto* c = static_cast<typename Op::Sum*>(c_begin);
  typename Op::Register sum[kChains][Rows][Vectors];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < Vectors; ++v) {
      sum[0][i][v] = Adds ? Op::load_sum(c + i * c_row + v * Op::kWidth) : Op::zero();
      if constexpr (kChains > 1) sum[1][i][v] = Op::zero();
    }
  }
  const auto step = [&](std::size_t chain) {
    typename Op::Operand column[Vectors];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < Vectors; ++v) column[v] = Op::load(b + (v * Op::kWidth) * Op::kDepth);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Rows; ++i) {
      const typename Op::Operand row = Op::broadcast(a + i * a_row);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < Vectors; ++v) sum[chain][i][v] = Op::multiply_add(row, column[v], sum[chain][i][v]);
    }
    a += a_step;
    b += kBStep;
  };
  std::size_t s = kChains;
  for (; s <= steps; s += kChains) {
    step(0);
    if constexpr (kChains > 1) step(1);
  }
  if (kChains > 1 && s == steps + 1) step(0);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < Vectors; ++v) {
      if constexpr (kChains > 1) sum[0][i][v] = Op::add(sum[0][i][v], sum[1][i][v]);
      Op::store_sum(c + i * c_row + v * Op::kWidth, sum[0][i][v]);
    }
  }
}

using TileFunction = void (*)(const void*, std::size_t, std::size_t, const void*, std::size_t, void*, std::size_t);

template <class Op, std::size_t Vectors, bool Adds, std::size_t... Index>
constexpr std::array<TileFunction, sizeof...(Index)> tiles_of_rows(std::index_sequence<Index...>) {
  return {multiply_tile<Op, Index + 1, Vectors, Adds>...};
}

template <class Op, std::size_t Rows, std::size_t Vectors, bool Adds>
void multiply_rows(const void* a, std::size_t a_row, std::size_t a_step, const void* b, std::size_t steps, void* c,
                   std::size_t c_row, std::size_t rows) {
  static constexpr auto kTiles = tiles_of_rows<Op, Vectors, Adds>(std::make_index_sequence<Rows>());
  for (std::size_t i = 0; i < rows; i += Rows) {
    const std::size_t count = rows - i < Rows ? rows - i : Rows;
    kTiles[count - 1](static_cast<const typename Op::Element*>(a) + i * a_row, a_row, a_step, b, steps,
                      static_cast<typename Op::Sum*>(c) + i * c_row, c_row);
  }
}

template <class Op, std::size_t Rows, std::size_t Vectors, bool Adds>
void multiply_strip(const void* a, std::size_t a_row, std::size_t a_step, const void* b, std::size_t steps, void* c,
                    std::size_t c_row, std::size_t rows, std::size_t vectors) {
  static_assert(Vectors == 2 || Vectors == 3);
  if (vectors == 1) {
    multiply_rows<Op, Rows, 1, Adds>(a, a_row, a_step, b, steps, c, c_row, rows);
  } else if (vectors == 2) {
    multiply_rows<Op, Rows, 2, Adds>(a, a_row, a_step, b, steps, c, c_row, rows);
  } else {
    multiply_rows<Op, Rows, Vectors, Adds>(a, a_row, a_step, b, steps, c, c_row, rows);
  }
}

// Two vectors of columns of a row, or of the pairs that it makes with the next one (null: zeros).
template <class Op>
void load_columns(const typename Op::Element* row, const typename Op::Element* next, typename Op::Operand (&out)[2]) {
  if constexpr (Op::kDepth == 1) {
    out[0] = Op::load(row);
    out[1] = Op::load(row + Op::kWidth);
  } else {
    Op::load_pairs(row, next, out);
  }
}

constexpr std::size_t kMaxTransposedRows = 128;  // of B at a time

// Rows of C that are two vectors wide: B's rows are the vectors, A's elements are broadcast. The first tile of a strip
// leaves B's vectors in `strip` for the others: rows of B often lie a power of two apart, where the first-level cache
// holds but eight of them.
template <class Op, std::size_t Rows, bool First>
void transposed_tile(const typename Op::Element* a, std::size_t a_step, const typename Op::Element* b,
                     std::size_t b_row, std::size_t rows, typename Op::Element* strip, typename Op::Sum* c,
                     std::size_t c_row) {
  typename Op::Register sum[Rows][2];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
    sum[i][0] = Op::load_sum(c + i * c_row);
    sum[i][1] = Op::load_sum(c + i * c_row + Op::kWidth);
  }
  const auto step = [&](const typename Op::Element* next) {
    typename Op::Operand column[2];
    if constexpr (First) {
      load_columns<Op>(b, next, column);
      Op::store(strip, column[0]);
      Op::store(strip + Op::kWidth * Op::kDepth, column[1]);
    } else {
      column[0] = Op::load(strip);
      column[1] = Op::load(strip + Op::kWidth * Op::kDepth);
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Rows; ++i) {
      const typename Op::Operand row = Op::broadcast(a + i * Op::kDepth);
      sum[i][0] = Op::multiply_add(row, column[0], sum[i][0]);
      sum[i][1] = Op::multiply_add(row, column[1], sum[i][1]);
    }
    a += a_step;
    b += Op::kDepth * b_row;
    strip += 2 * Op::kWidth * Op::kDepth;
  };
  for (std::size_t s = 0; s < rows / Op::kDepth; ++s) step(b + b_row);
  if (rows % Op::kDepth != 0) step(nullptr);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
    Op::store_sum(c + i * c_row, sum[i][0]);
    Op::store_sum(c + i * c_row + Op::kWidth, sum[i][1]);
  }
}

template <class Op, bool First, std::size_t... Index>
constexpr auto transposed_tiles_of_rows(std::index_sequence<Index...>) {
  return std::array{transposed_tile<Op, Index + 1, First>...};
}

template <class Op, std::size_t Rows>
void add_transposed(const void* a_begin, std::size_t k, const void* b_begin, std::size_t b_row, std::size_t rows,
                    std::size_t columns, void* c_begin, std::size_t c_row) {
  static constexpr auto kFirst = transposed_tiles_of_rows<Op, true>(std::make_index_sequence<Rows>());
  static constexpr auto kOther = transposed_tiles_of_rows<Op, false>(std::make_index_sequence<Rows>());
  constexpr std::size_t kWide = 2 * Op::kWidth;
  alignas(64) typename Op::Element strip[kMaxTransposedRows * kWide];
  const auto* a = static_cast<const typename Op::Element*>(a_begin);
  const auto* b = static_cast<const typename Op::Element*>(b_begin);
  auto* c = static_cast<typename Op::Sum*>(c_begin);
  const std::size_t groups = (k + Rows - 1) / Rows;
  for (std::size_t done = 0; done < rows; done += kMaxTransposedRows) {
    const std::size_t count = rows - done < kMaxTransposedRows ? rows - done : kMaxTransposedRows;
    for (std::size_t j = 0; j < columns; j += kWide) {
      for (std::size_t group = 0; group < groups; ++group) {
        const std::size_t begin = k * group / groups, end = k * (group + 1) / groups;
        const auto tile = (group == 0 ? kFirst : kOther)[end - begin - 1];
        tile(a + done * k + begin * Op::kDepth, k * Op::kDepth, b + done * b_row + j, b_row, count, strip,
             c + begin * c_row + j, c_row);
      }
    }
  }
}

template <class Op, std::size_t Rows, std::size_t Vectors, std::size_t TransposedRows>
constexpr Tile make_tile() {
  return {Op::kDepth,
          Op::kWidth,
          Rows,
          Vectors,
          1,
          multiply_strip<Op, Rows, Vectors, false>,
          multiply_strip<Op, Rows, Vectors, true>,
          2 * Op::kWidth,
          add_transposed<Op, TransposedRows>};
}

// The rest is written for one value and left to the compiler, which has the instruction set's vectors.

inline float widen_one(const void* src, DType dtype, std::size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(src)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(src)[i];
  return dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// One row piece of the residual. `Convert` turns stored bits into float and back.
template <class Convert, class Product>
void subtract_as(typename Convert::Bits* w, const Product* product, std::size_t count, float scale, TileNorms& norms) {
  constexpr std::size_t kLanes = 16;  // independent sums, so that the loop has no serial dependence
  Product weight[kLanes] = {};
  Product error[kLanes] = {};
  const std::size_t whole = count - count % kLanes;
  const auto one = [&](std::size_t j, std::size_t lane) {
    const Product before = static_cast<Product>(Convert::widen(w[j]));
    const Product exact = before - product[j];
    w[j] = Convert::round(static_cast<float>(exact));
    const Product scaled = before * static_cast<Product>(scale);
    const Product rounding = (static_cast<Product>(Convert::widen(w[j])) - exact) * static_cast<Product>(scale);
    weight[lane] += scaled * scaled;
    error[lane] += rounding * rounding;
  };
  for (std::size_t j = 0; j < whole; j += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) one(j + lane, lane);
  }
  for (std::size_t j = whole; j < count; ++j) one(j, j - whole);
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    norms.weight += static_cast<double>(weight[lane]);
    norms.error += static_cast<double>(error[lane]);
  }
}

struct ConvertBf16 {
  using Bits = std::uint16_t;
  static float widen(Bits bits) { return bf16_to_float(bits); }
  static Bits round(float value) { return float_to_bf16(value); }
};

struct ConvertF32 {
  using Bits = float;
  static float widen(Bits value) { return value; }
  static Bits round(float value) { return value; }
};

float max_magnitude(const void* src, DType dtype, std::size_t count) {
  // On the bit patterns: magnitudes order like their bits, and NaN and infinity come out on top.
  if (dtype == DType::f32) {
    std::uint32_t top = 0;
    for (std::size_t i = 0; i < count; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, static_cast<const float*>(src) + i, 4);
      bits &= 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    float value;
    std::memcpy(&value, &top, 4);
    return top >= 0x7f800000u ? std::numeric_limits<float>::infinity() : value;
  }
  std::uint16_t top = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint16_t bits = static_cast<const std::uint16_t*>(src)[i] & 0x7fffu;
    top = bits > top ? bits : top;
  }
  if (dtype == DType::bf16) return top >= 0x7f80u ? std::numeric_limits<float>::infinity() : bf16_to_float(top);
  return top >= 0x7c00u ? std::numeric_limits<float>::infinity() : f16_to_float(top);
}

}  // namespace
}  // namespace pissa
