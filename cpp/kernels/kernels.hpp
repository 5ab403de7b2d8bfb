// The inner kernels, one table per instruction set, and the choice among them at run time.
//
// All heavy work of a split is one operation, C += A·B on a tile of C that stays in registers: the products W·X and
// Wᵀ·Y of a power step and the product of the factors in the residual. `Tile` is that operation for one operand type;
// sweep.cpp and residual.cpp cut the matrices into tiles and never look at the instruction set.
//
// A new instruction set (NEON) is a new file that fills a `Kernels` and a line in dispatch.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "four_bit.hpp"
#include "kernels/int8.hpp"
#include "weight.hpp"

namespace pissa {

// C = A·B, or C += A·B, for a strip of `rows` × (`vectors`·`width`) elements of C, done in tiles that stay in
// registers.
using StripFunction = void (*)(const void* a, std::size_t a_row, std::size_t a_step, const void* b, std::size_t steps,
                               void* c, std::size_t c_row, std::size_t rows, std::size_t vectors);

// C += Aᵀ·B, C being k × `columns` and A and B having `rows` rows: A is packed as [step][column][depth] with zeros past
// the last row, and B's rows lie as they are, `b_row` apart. A little beyond B and C is prefetched, but not read.
using TransposedFunction = void (*)(const void* a, std::size_t k, const void* b, std::size_t b_row, std::size_t rows,
                                    std::size_t columns, void* c, std::size_t c_row);

// The inner dimension advances `depth` elements at a time (2 where an instruction multiplies pairs of bf16). An
// operand element of A for row i and step s lies at a[i·a_row + s·a_step] (and the `depth - 1` after it); B is packed
// as [step][column][depth]; C is float, or double for the operand type double.
struct Tile {
  std::size_t depth;
  std::size_t width;    // columns per vector
  std::size_t rows;     // of a tile; strips may have any number
  std::size_t vectors;  // at most
  std::size_t steps;    // fewer take as long: a multiple, padded with zeros, is fastest
  StripFunction assign;
  StripFunction accumulate;
  std::size_t wide;  // add_transposed's columns of B and C come in multiples of it
  TransposedFunction add_transposed;
};

// Products of float with a weight's rows as they are stored, which are made float on the way: tile_f32's `assign`
// (where a_step is 1) with them as A, and `add_transposed` with them as B.
struct RowKernels {
  StripFunction assign;
  TransposedFunction add_transposed;
};

// Sums of squares are of values times `scale`, a power of two near 1/σ₁ that keeps them inside float's range.
struct TileNorms {
  double weight = 0;
  double error = 0;
};

// For instruction sets that multiply pairs of bf16.
struct Bf16Kernels {
  Tile tile;
  // dst = src (rows × columns, contiguous) as bf16, to nearest even, its rows `stride` apart.
  void (*narrow)(const float* src, std::size_t rows, std::size_t columns, std::uint16_t* dst, std::size_t stride);
  // The same of a weight's values times `scale`; denormals may become zero. bf16 itself is not scaled.
  void (*round_weight)(const void* src, DType dtype, float scale, std::uint16_t* dst, std::size_t count);
  // A row of float as its bits rounded to 16, halves away from zero, and after them the differences; and back. `rest`
  // is room for `count`.
  void (*take_apart)(float* row, std::size_t count, std::uint16_t* rest);
  void (*put_together)(float* row, std::size_t count, std::uint16_t* rest);
  // [rows][columns] with row stride → [(rows+1)/2][columns][2], zero past the last row. `columns` is a multiple of 16.
  void (*pack_pairs)(const std::uint16_t* src, std::size_t stride, std::size_t rows, std::size_t columns,
                     std::uint16_t* dst);
  // w (a multiple of the tile's rows × strips·vectors·width, its rows `stride` apart) ← round(w − scaling·A·B), strip
  // by strip; adds to the norms. A and B are packed as for `tile.assign`. Null where it would be no faster in one.
  void (*subtract_product)(std::uint16_t* w, std::size_t stride, std::size_t rows, std::size_t strips,
                           const std::uint16_t* a, const std::uint16_t* b, std::size_t steps, float scaling,
                           float norm_scale, TileNorms& norms);
};

constexpr std::size_t kLargestCache = 2u << 20;  // of any table

struct Kernels {
  const char* name;
  std::size_t cache;  // bytes of a core's second-level cache on CPUs with these instructions, at least
  Tile tile_f32;
  Tile tile_f64;
  RowKernels f32_rows, f16_rows, bf16_rows;
  const Bf16Kernels* bf16;  // null where there is none: 2-byte weights are then widened to float
  const Int8Kernels* int8;  // null where there is none

  const RowKernels& rows(DType dtype) const {
    return dtype == DType::f32 ? f32_rows : dtype == DType::f16 ? f16_rows : bf16_rows;
  }

  // dst[i] = src[i] as float, exact.
  void (*widen)(const void* src, DType dtype, float* dst, std::size_t count);
  // w[j] ← round(w[j] - product[j]); adds to the norms. `product` is float for 2-byte weights and double for f32.
  void (*subtract)(void* w, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms);
  // Largest magnitude of `count` values; infinity where any is not finite.
  float (*max_magnitude)(const void* src, DType dtype, std::size_t count);
  // 4-bit codes and absmaxes of `count` values, blocks of 64 from the first on (four_bit.hpp). False where one is not
  // finite.
  bool (*quantise)(const void* src, DType dtype, std::size_t count, const FourBitCode& code, std::uint8_t* packed,
                   float* absmax);
  // The inverse, from the start of a block on: q[i] is the stored value, rounded to the dtype.
  void (*read_codes)(const std::uint8_t* packed, const float* absmax, std::size_t count, const FourBitCode& code,
                     DType dtype, float* q);
  // Symmetric a (n × n, and zeros up to `stride` × `stride`, a multiple of 16) as Q·T·Qᵀ with T tridiagonal, its
  // diagonal and what is beside it. Q is left in a and tau as LAPACK's sytrd leaves it ("L"). `work` is 4 × stride. The
  // largest element should be of order one.
  void (*tridiagonalize)(float* a, std::size_t n, std::size_t stride, float* diagonal, float* beside, float* tau,
                         float* work);
};

// The best the CPU has, or the one that the environment variable PISSA_CONVERT_KERNEL names.
// Throws std::invalid_argument when that is unknown or this CPU lacks it.
const Kernels& select_kernels();

// Every table this CPU can run, from the portable one to the best.
std::vector<const Kernels*> available_kernels();

extern const Kernels kPortable;
#if defined(PISSA_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmxBf16;
#endif

}  // namespace pissa
