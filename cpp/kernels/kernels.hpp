// The inner kernels, one table per instruction set, and the choice among them at run time.
//
// All heavy work of a split is one operation, C += A·B on a tile of C that stays in registers: the products W·X and
// Wᵀ·Y of a power step and the product of the factors in the residual. `Tile` is that operation for one operand type;
// sweep.cpp and residual.cpp cut the matrices into tiles and never look at the instruction set.
//
// A new instruction set (AMX-BF16, NEON) is a new file that fills a `Kernels` and a line in dispatch.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "weight.hpp"

namespace pissa {

// C += A·B for a tile of at most `rows` × (`vectors`·`width`) elements of C.
//
// The inner dimension advances `depth` elements at a time (2 where an instruction multiplies pairs of bf16). An
// operand element of A for row i and step s lies at a[i·a_row + s·a_step] (and the `depth - 1` after it); B is packed
// as [step][column][depth]; C is float, or double for the operand type double.
struct Tile {
  std::size_t depth;
  std::size_t width;  // columns per vector
  std::size_t rows;   // largest tile
  std::size_t vectors;
  void (*accumulate)(const void* a, std::size_t a_row, std::size_t a_step, const void* b, std::size_t steps, void* c,
                     std::size_t c_row, std::size_t rows, std::size_t vectors);
};

// Sums of squares are of values times `scale`, a power of two near 1/σ₁ that keeps them inside float's range.
struct TileNorms {
  double weight = 0;
  double error = 0;
};

struct Kernels {
  const char* name;
  Tile tile_f32;
  Tile tile_f64;
  const Tile* tile_bf16;  // null where bf16 weights are widened to float instead

  // dst[i] = src[i] as float, exact.
  void (*widen)(const void* src, DType dtype, float* dst, std::size_t count);
  // [rows][columns] with row stride → [(rows+1)/2][width][2]; rows past the end and columns past `columns` are zero.
  void (*pack_pairs)(const std::uint16_t* src, std::size_t stride, std::size_t rows, std::size_t columns,
                     std::size_t width, std::uint16_t* dst);
  // w[j] ← round(w[j] - product[j]); adds to the norms. `product` is float for 2-byte weights and double for f32.
  void (*subtract)(void* w, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms);
  // Largest magnitude of `count` values; infinity where any is not finite.
  float (*max_magnitude)(const void* src, DType dtype, std::size_t count);
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
extern const Kernels kAvx512Bf16;
#endif

}  // namespace pissa
