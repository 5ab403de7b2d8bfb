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

#include "kernels/householder.hpp"
#include "kernels/kernels.hpp"
#include "kernels/scalar.hpp"

namespace pissa {
namespace {

// The loops over the tile are unrolled early, for the compiler to keep the sums in registers from the start. Tiles of
// one vector and few rows have two chains of sums, over even and odd steps, to hide the latency of the instruction;
// more rows do so too, but the rows of a weight often lie a power of two apart, where the first-level cache holds but
// eight.
// Where `ARow` is given, it is a_row and a_step is 1: many rows then need few address registers.
template <class Op, std::size_t Rows, std::size_t Vectors, bool Adds, std::size_t ARow = 0>
void multiply_tile(const void* a_begin, std::size_t any_a_row, std::size_t any_a_step, const void* b_begin,
                   std::size_t steps, void* c_begin, std::size_t c_row) {
  const std::size_t a_row = ARow > 0 ? ARow : any_a_row, a_step = ARow > 0 ? 1 : any_a_step;
  constexpr std::size_t kChains = Vectors == 1 && Rows <= 8 ? 2 : 1;
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

template <class Op, std::size_t Vectors, bool Adds, std::size_t ARow = 0, std::size_t... Index>
constexpr std::array<TileFunction, sizeof...(Index)> tiles_of_rows(std::index_sequence<Index...>) {
  return {multiply_tile<Op, Index + 1, Vectors, Adds, ARow>...};
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

// Two vectors of columns of a row, or of the pairs that it makes with the next one (null: zeros). `From` is Op, or what
// makes its operands of values stored otherwise.
template <class Op, class From>
void load_columns(const typename From::Element* row, const typename From::Element* next,
                  typename Op::Operand (&out)[2]) {
  if constexpr (Op::kDepth == 1) {
    out[0] = From::load(row);
    out[1] = From::load(row + Op::kWidth);
  } else {
    Op::load_pairs(row, next, out);
  }
}

// Asks for the `bytes` from p on, in the cache of that level. They need not exist.
template <int Level = 1>
inline void fetch(const void* p, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, 0, 4 - Level);
}

// dst[i] = src[i] as an operand; up to a vector's width beyond.
template <class Op, class From>
void make_operands(const typename From::Element* src, std::size_t count, typename Op::Element* dst) {
  const std::size_t whole = count / Op::kWidth * Op::kWidth;
#pragma GCC unroll 4
  for (std::size_t i = 0; i < whole; i += Op::kWidth) Op::store(dst + i, From::load(src + i));
  if (whole == count) return;
  typename From::Element rest[Op::kWidth] = {};
  std::memcpy(rest, src + whole, (count - whole) * sizeof *src);
  Op::store(dst + whole, From::load(rest));
}

// multiply_strip (assigning, a_step 1) for rows of A that are stored as `From`'s elements: they are made operands piece
// by piece in the first-level cache, where they lie no power of two apart, and stay there beside their piece of B. The
// next but one is fetched in the meantime: the CPU does not foresee so many rows by itself.
template <class Op, class From, std::size_t Vectors, std::size_t Rows>
void multiply_pieces(const typename From::Element* a, std::size_t a_row, const typename Op::Element* b,
                     std::size_t steps, typename Op::Sum* c, std::size_t c_row, std::size_t rows) {
  constexpr std::size_t kSteps = 128, kStride = kSteps + 16;
  static constexpr auto kAssign = tiles_of_rows<Op, Vectors, false, kStride>(std::make_index_sequence<Rows>());
  static constexpr auto kAdd = tiles_of_rows<Op, Vectors, true, kStride>(std::make_index_sequence<Rows>());
  alignas(64) typename Op::Element piece[Rows * kStride];
  for (std::size_t at = 0; at < steps; at += kSteps) {
    const std::size_t count = steps - at < kSteps ? steps - at : kSteps;
    for (std::size_t i = 0; i < rows; i += Rows) {
      const std::size_t size = rows - i < Rows ? rows - i : Rows;
      for (std::size_t row = 0; row < size; ++row) {
        const typename From::Element* stored = a + (i + row) * a_row + at;
        fetch<2>(stored + 2 * kSteps, kSteps * sizeof *stored);
        make_operands<Op, From>(stored, count, piece + row * kStride);
      }
      (at == 0 ? kAssign : kAdd)[size - 1](piece, kStride, 1, b + at * Vectors * Op::kWidth, count, c + i * c_row,
                                           c_row);
    }
  }
}

template <class Op, class From, std::size_t Vectors, std::size_t Rows, std::size_t NarrowRows>
void multiply_stored(const void* a_begin, std::size_t a_row, std::size_t, const void* b_begin, std::size_t steps,
                     void* c_begin, std::size_t c_row, std::size_t rows, std::size_t vectors) {
  const auto* a = static_cast<const typename From::Element*>(a_begin);
  const auto* b = static_cast<const typename Op::Element*>(b_begin);
  auto* c = static_cast<typename Op::Sum*>(c_begin);
  if (vectors == 1) {
    multiply_pieces<Op, From, 1, NarrowRows>(a, a_row, b, steps, c, c_row, rows);
  } else if (vectors == 2) {
    multiply_pieces<Op, From, 2, Rows>(a, a_row, b, steps, c, c_row, rows);
  } else {
    multiply_pieces<Op, From, Vectors, Rows>(a, a_row, b, steps, c, c_row, rows);
  }
}

constexpr std::size_t kMaxTransposedRows = 128;  // of B at a time

// Rows of C that are two vectors wide: B's rows are the vectors, A's elements are broadcast. The first tile of a strip
// leaves B's vectors in `strip` for the others: rows of B often lie a power of two apart, where the first-level cache
// holds but eight of them. It asks for the next strip, too, a row of C at a step: with so many rows the CPU does not
// foresee that by itself.
template <class Op, class From, std::size_t Rows, bool First>
void transposed_tile(const typename Op::Element* a, std::size_t a_step, const typename From::Element* b,
                     std::size_t b_row, std::size_t rows, typename Op::Element* strip, typename Op::Sum* c,
                     std::size_t c_row) {
  constexpr std::size_t kWide = 2 * Op::kWidth;
  typename Op::Register sum[Rows][2];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
    sum[i][0] = Op::load_sum(c + i * c_row);
    sum[i][1] = Op::load_sum(c + i * c_row + Op::kWidth);
  }
  typename Op::Sum* wanted = c + kWide;
  const typename Op::Sum* const beyond = wanted + a_step / Op::kDepth * c_row;
  const auto step = [&](const typename From::Element* next) {
    typename Op::Operand column[2];
    if constexpr (First) {
      if (wanted < beyond) {
        fetch(wanted, kWide * sizeof *c);
        wanted += c_row;
      }
      for (std::size_t d = 0; d < Op::kDepth; ++d) fetch(b + d * b_row + kWide, kWide * sizeof *b);
      load_columns<Op, From>(b, next, column);
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
    strip += kWide * Op::kDepth;
  };
  for (std::size_t s = 0; s < rows / Op::kDepth; ++s) step(b + b_row);
  if (rows % Op::kDepth != 0) step(nullptr);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Rows; ++i) {
    Op::store_sum(c + i * c_row, sum[i][0]);
    Op::store_sum(c + i * c_row + Op::kWidth, sum[i][1]);
  }
}

template <class Op, class From, bool First, std::size_t... Index>
constexpr auto transposed_tiles_of_rows(std::index_sequence<Index...>) {
  return std::array{transposed_tile<Op, From, Index + 1, First>...};
}

template <class Op, class From, std::size_t Rows>
void add_transposed(const void* a_begin, std::size_t k, const void* b_begin, std::size_t b_row, std::size_t rows,
                    std::size_t columns, void* c_begin, std::size_t c_row) {
  static constexpr auto kFirst = transposed_tiles_of_rows<Op, From, true>(std::make_index_sequence<Rows>());
  static constexpr auto kOther = transposed_tiles_of_rows<Op, From, false>(std::make_index_sequence<Rows>());
  constexpr std::size_t kWide = 2 * Op::kWidth;
  alignas(64) typename Op::Element strip[kMaxTransposedRows * kWide];
  const auto* a = static_cast<const typename Op::Element*>(a_begin);
  const auto* b = static_cast<const typename From::Element*>(b_begin);
  auto* c = static_cast<typename Op::Sum*>(c_begin);
  // The first tile has the more to do for each vector of B: of as many rows as there are registers for, it hides that.
  const std::size_t first = k < Rows ? k : Rows, others = (k - first + Rows - 1) / Rows;
  for (std::size_t done = 0; done < rows; done += kMaxTransposedRows) {
    const std::size_t count = rows - done < kMaxTransposedRows ? rows - done : kMaxTransposedRows;
    for (std::size_t j = 0; j < columns; j += kWide) {
      const auto multiply = [&](const auto& tiles, std::size_t begin, std::size_t end) {
        tiles[end - begin - 1](a + done * k + begin * Op::kDepth, k * Op::kDepth, b + done * b_row + j, b_row, count,
                               strip, c + begin * c_row + j, c_row);
      };
      multiply(kFirst, 0, first);
      for (std::size_t i = 0; i < others; ++i) {
        multiply(kOther, first + (k - first) * i / others, first + (k - first) * (i + 1) / others);
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
          add_transposed<Op, Op, TransposedRows>};
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
