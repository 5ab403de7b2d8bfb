// What the tables with AVX-512 VNNI share: products of unsigned bytes with signed ones, four at a time, are summed in
// integers. Internal linkage: see tiles.hpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/avx512.hpp"
#include "kernels/int8.hpp"

namespace pissa {
namespace {

// Below this, a row or column is nothing: its reciprocal would leave float's range.
constexpr float kSmallestScale = 1e-30f;

inline float inverse_scale(float largest, float& scale) {
  const bool nothing = !(largest > kSmallestScale);
  scale = nothing ? 0.0f : largest / kLargestByte;
  return nothing ? 0.0f : kLargestByte / largest;
}

void code_panel(const void* src, DType dtype, std::size_t columns, std::size_t rows, std::int8_t* codes, float* scale,
                float* squares, std::int32_t* offset, std::size_t stride) {
  const char* row[kPanelRows];
  __m512 factor[kPanelRows];
  for (std::size_t i = 0; i < kPanelRows; ++i) {
    row[i] = static_cast<const char*>(src) + std::min(i, rows - 1) * columns * size_of(dtype);
    scale[i] = 0;
    factor[i] = _mm512_setzero_ps();
    if (i < rows) factor[i] = _mm512_set1_ps(inverse_scale(max_magnitude(row[i], dtype, columns), scale[i]));
  }
  __m512 square[kPanelRows] = {};
  const __m512i by_columns = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (std::size_t begin = 0; begin < columns; begin += kPieceRows, offset += stride) {
    __m512i sum[kPanelRows] = {};
    const std::size_t end = std::min(columns, begin + kPieceRows);
    for (std::size_t j = begin; j < end; j += kGroupColumns, codes += kGroupStride) {
      const __mmask16 lanes = first_lanes(end - j);
      alignas(64) std::int8_t bytes[kGroupBytes];
      for (std::size_t i = 0; i < kPanelRows; ++i) {
        const __m512 value = dtype == DType::f32
                                 ? _mm512_maskz_loadu_ps(lanes, reinterpret_cast<const float*>(row[i]) + j)
                                 : load_half(reinterpret_cast<const std::uint16_t*>(row[i]) + j, dtype, lanes);
        const __m512 scaled = _mm512_mul_ps(value, factor[i]);
        const __m512i code = _mm512_cvtps_epi32(scaled);
        square[i] = _mm512_fmadd_ps(scaled, scaled, square[i]);
        sum[i] = _mm512_add_epi32(sum[i], code);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i * kGroupColumns), _mm512_cvtepi32_epi8(code));
      }
      _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(by_columns, _mm512_load_si512(bytes)));
    }
    for (std::size_t i = 0; i < kPanelRows; ++i) offset[i] = -128 * _mm512_reduce_add_epi32(sum[i]);
  }
  for (std::size_t i = 0; i < kPanelRows; ++i) squares[i] = _mm512_reduce_add_ps(square[i]);
}

// Returns the sum of each column's bytes; stores them `more` than they are.
inline __m512i code_operand(const float* src, std::size_t stride, std::size_t rows, int more, void* codes,
                            float* scale) {
  __m512 largest = _mm512_setzero_ps();
  for (std::size_t i = 0; i < rows; ++i) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(src + i * stride)));
  }
  const __mmask16 something = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kSmallestScale), _CMP_GT_OQ);
  const __m512 top = _mm512_set1_ps(kLargestByte);
  const __m512 factor = _mm512_maskz_div_ps(something, top, largest);
  _mm512_storeu_ps(scale, _mm512_maskz_div_ps(something, largest, top));
  __m512i sum = _mm512_setzero_si512();
  for (std::size_t i = 0; i < rows; i += 4) {
    __m512i four = _mm512_setzero_si512();
    for (std::size_t d = 0; d < std::min<std::size_t>(4, rows - i); ++d) {
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(src + (i + d) * stride), factor));
      sum = _mm512_add_epi32(sum, code);
      const __m512i byte = _mm512_and_si512(_mm512_add_epi32(code, _mm512_set1_epi32(more)), _mm512_set1_epi32(0xff));
      four = _mm512_or_si512(four, _mm512_sllv_epi32(byte, _mm512_set1_epi32(static_cast<int>(8 * d))));
    }
    _mm512_storeu_si512(static_cast<char*>(codes) + i / 4 * kOperandBytes, four);
  }
  return sum;
}

void code_x(const float* src, std::size_t stride, std::size_t rows, std::uint8_t* codes, float* scale) {
  code_operand(src, stride, rows, 128, codes, scale);
}

void code_y(const float* src, std::size_t stride, std::size_t rows, std::int8_t* codes, float* scale,
            std::int32_t* offset) {
  const __m512i sum = code_operand(src, stride, rows, 0, codes, scale);
  _mm512_storeu_si512(offset, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
}

// sum += the products of the unsigned bytes with four signed ones, the same for every lane. By the intrinsics, GCC 12
// loads the four by an instruction of its own, and what it can issue is what bounds these loops.
inline void add_products(__m512i& sum, __m512i bytes, const std::int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(*reinterpret_cast<const std::int32_t*>(four)));
}

template <std::size_t Panels>
void multiply_panels(const std::int8_t* codes, std::size_t groups, const std::int32_t* offset, const std::uint8_t* x,
                     const float* scale, bool add, float* sums, std::size_t stride) {
  constexpr std::size_t kRows = Panels * kPanelRows;
  __m512i sum[kRows];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kRows; ++i) sum[i] = _mm512_set1_epi32(offset[i]);
  for (std::size_t g = 0; g < groups; ++g, codes += kGroupStride) {
    fetch<2>(codes + kPieceGroups * kGroupStride, Panels * kGroupBytes);  // of the next piece
#pragma GCC unroll 4
    for (std::size_t step = 0; step < 4; ++step, x += kOperandBytes) {
      const __m512i columns = _mm512_loadu_si512(x);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kRows; ++i) {
        add_products(sum[i], columns, codes + i / kPanelRows * kGroupBytes + step * 16 + i % kPanelRows * 4);
      }
    }
  }
  const __m512 factor = _mm512_loadu_ps(scale);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kRows; ++i) {
    const __m512 before = add ? _mm512_loadu_ps(sums + i * stride) : _mm512_setzero_ps();
    _mm512_storeu_ps(sums + i * stride, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), factor, before));
  }
}

void multiply_int8(const std::int8_t* codes, std::size_t panels, std::size_t groups, const std::int32_t* offset,
                   const std::uint8_t* x, const float* scale, bool add, float* sums, std::size_t stride) {
  std::size_t p = 0;
  for (; p + 4 <= panels; p += 4) {
    multiply_panels<4>(codes + p * kGroupBytes, groups, offset + p * kPanelRows, x, scale, add,
                       sums + p * kPanelRows * stride, stride);
  }
  for (; p < panels; ++p) {
    multiply_panels<1>(codes + p * kGroupBytes, groups, offset + p * kPanelRows, x, scale, add,
                       sums + p * kPanelRows * stride, stride);
  }
}

void add_transposed_int8(const std::int8_t* codes, std::size_t panels, std::size_t block_stride, std::size_t groups,
                         const std::int8_t* y, const float* scale, const std::int32_t* offset, float* z,
                         std::size_t stride) {
  const __m512i by_columns = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  const __m512i sign = _mm512_set1_epi8(-128);
  for (std::size_t g = 0; g < groups; ++g, codes += kGroupStride, z += kGroupColumns) {
    __m512i sum[kOperandColumns];
#pragma GCC unroll 16
    for (std::size_t c = 0; c < kOperandColumns; ++c) sum[c] = _mm512_set1_epi32(offset[c]);
    const std::int8_t* four = y;
    for (std::size_t done = 0; done < panels; done += kBlockPanels) {
      const std::int8_t* block = codes + done / kBlockPanels * block_stride;
      const std::size_t count = std::min(kBlockPanels, panels - done);
      for (std::size_t p = 0; p < count; ++p, four += kOperandBytes) {
        // Each four bytes: a column's, of four rows.
        const __m512i w = _mm512_shuffle_epi8(_mm512_loadu_si512(block + p * kGroupBytes), by_columns);
        const __m512i bytes = _mm512_xor_si512(w, sign);
#pragma GCC unroll 16
        for (std::size_t c = 0; c < kOperandColumns; ++c) add_products(sum[c], bytes, four + c * 4);
      }
    }
#pragma GCC unroll 16
    for (std::size_t c = 0; c < kOperandColumns; ++c) {
      float* place = z + c * stride;
      const __m512 factor = _mm512_set1_ps(scale[c]);
      _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[c]), factor, _mm512_loadu_ps(place)));
    }
  }
}

constexpr Int8Kernels kInt8 = {code_panel, code_x, code_y, multiply_int8, add_transposed_int8};

}  // namespace
}  // namespace pissa
