// Blockwise 4-bit quantisation, to the bit as bitsandbytes 0.50 does it on a CPU (Dettmers et al. 2023, arXiv
// 2305.14314; for the statistics' 8 bits, Dettmers et al. 2022, arXiv 2110.02861).
//
// A block of 64 consecutive values is stored as its largest magnitude, absmax, and for each value the 4-bit code of the
// nearest of 16 multiples of it. With double quantisation the absmaxes, less their mean, are stored in 8 bits each,
// in blocks of 256 with a largest magnitude of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.hpp"

namespace pissa {

struct Kernels;
class ThreadPool;

constexpr std::size_t kFourBitBlock = 64;
constexpr std::size_t kFourBitCodes = 16;
constexpr std::size_t kFourBitCells = 32;
constexpr std::size_t kNestedBlock = 256;
constexpr float kSmallestAbsmax = 1e-38f;

// The 16 multiples, and what the kernels look up of them.
struct FourBitCode {
  float values[kFourBitCodes];      // by code
  float bounds[kFourBitCodes - 1];  // midpoints of the sorted values
  // Of each of so many equal cells of [−1, 1]: the bound in it, or infinity, and how many lie before it.
  float cell_bounds[kFourBitCells];
  std::int32_t cell_places[kFourBitCells];
  bool by_cells;            // the code is sorted, and there is no more than one bound in a cell
  bool sorted;              // a code is its value's place among the sorted values
  std::uint8_t pairs[256];  // the byte of two codes, by the byte of their values' places
};

const FourBitCode& nf4_code();
const FourBitCode& fp4_code();

// The 256 values that statistics are stored as, ascending (bitsandbytes' signed dynamic map).
const float* dynamic_map();

inline std::size_t four_bit_blocks(std::size_t count) { return (count + kFourBitBlock - 1) / kFourBitBlock; }

// A quantised matrix of `count` values.
struct FourBit {
  const FourBitCode* code;
  std::uint8_t* packed;  // (count + 1) / 2: the first of two values in the upper half
  float* absmax;         // of each block
};

// Fills `to`. False where a value is not finite.
bool quantise(const Kernels& kernels, ThreadPool& pool, const void* values, DType dtype, std::size_t count,
              const FourBit& to);

// Stores `blocks` absmaxes in 8 bits, and puts what those mean in the place of each. Returns their mean, which is added
// up as torch does in one thread.
float nest_absmax(float* absmax, std::size_t blocks, std::uint8_t* codes, float* nested_absmax);

// The inverse: `absmax` from what nest_absmax has stored.
void unnest_absmax(const std::uint8_t* codes, const float* nested_absmax, float mean, std::size_t blocks,
                   float* absmax);

// All of these work on `count` values of the given dtype; Q is what is stored, rounded to that dtype.

// out ← Q
void dequantise(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                void* out);
// out ← values − Q, for values of that dtype or float ones, which may lie in `out`
void subtract_stored(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                     const void* values, DType values_dtype, float* out);
// difference ← difference + Q, and target ← target + relaxation·(difference − target)
void relax_towards(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                   float* difference, float relaxation, void* target);

}  // namespace pissa
