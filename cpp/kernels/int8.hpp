// Products of bytes, for instruction sets that sum four of them at a time (AVX-512 VNNI).
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.hpp"

namespace pissa {

// The weight's rows come in panels of four, and these in blocks: [group of 16 columns][panel], each 64 bytes, zeros
// past the last column. These are [four columns][row][column of the four].
constexpr std::size_t kPanelRows = 4, kBlockPanels = 16, kGroupColumns = 16;
constexpr std::size_t kGroupBytes = kPanelRows * kGroupColumns, kGroupStride = kBlockPanels * kGroupBytes;
// X's rows are rounded piece by piece. The bytes of one, and those of the block that they are multiplied with, stay in
// the first-level cache, and no large values elsewhere make it coarse.
constexpr std::size_t kPieceGroups = 16, kPieceRows = kPieceGroups * kGroupColumns;
// An operand of 16 columns is packed as [4 rows][column][row].
constexpr std::size_t kOperandColumns = 16, kOperandBytes = 4 * kOperandColumns;
constexpr int kLargestByte = 127;

// The instruction takes one operand's bytes as unsigned: X's are 128 more than what they stand for, and in Wᵀ·Y those
// of W. What the sums are too large by, which the other operand alone tells, is where they begin: its negative is
// `offset`.
struct Int8Kernels {
  // A panel's rows (1 to 4, contiguous): row i stands for scale[i] times its bytes. Its offset in X's piece p goes to
  // offset[p·stride + i], and the sum of its values' squares, over scale[i]², to squares[i]. Values must be finite.
  void (*code_panel)(const void* src, DType dtype, std::size_t columns, std::size_t rows, std::int8_t* codes,
                     float* scale, float* squares, std::int32_t* offset, std::size_t stride);
  // src (rows × 16, its rows `stride` apart) as an operand, padded to whole steps of four rows: column c stands for
  // scale[c] times its bytes.
  void (*code_x)(const float* src, std::size_t stride, std::size_t rows, std::uint8_t* codes, float* scale);
  void (*code_y)(const float* src, std::size_t stride, std::size_t rows, std::int8_t* codes, float* scale,
                 std::int32_t* offset);
  // sums (4·panels rows × 16, `stride` apart) = or, with `add`, += W·X for panels of a block over so many groups of
  // columns, but for the scales of W's rows. `codes` are the first panel's of the first group.
  void (*multiply)(const std::int8_t* codes, std::size_t panels, std::size_t groups, const std::int32_t* offset,
                   const std::uint8_t* x, const float* scale, bool add, float* sums, std::size_t stride);
  // z (16 × 16·groups, its rows `stride` apart) += Yᵀ·W for panels of blocks that are block_stride apart.
  void (*add_transposed)(const std::int8_t* codes, std::size_t panels, std::size_t block_stride, std::size_t groups,
                         const std::int8_t* y, const float* scale, const std::int32_t* offset, float* z,
                         std::size_t stride);
};

}  // namespace pissa
