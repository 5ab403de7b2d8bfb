// What the two AVX-512 tables share. Internal linkage: see tiles.hpp.
#pragma once

#include <immintrin.h>

#include "kernels/blocks.hpp"
#include "kernels/tiles.hpp"

namespace pissa {
namespace {

struct Float16 {
  using Element = float;
  using Sum = float;
  using Register = __m512;
  using Operand = __m512;
  static constexpr std::size_t kDepth = 1;
  static constexpr std::size_t kWidth = 16;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register add(Register x, Register y) { return _mm512_add_ps(x, y); }
  static Register load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Register r) { _mm512_storeu_ps(p, r); }
  static Operand load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Operand x) { _mm512_storeu_ps(p, x); }
  static Operand broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Double8 {
  using Element = double;
  using Sum = double;
  using Register = __m512d;
  using Operand = __m512d;
  static constexpr std::size_t kDepth = 1;
  static constexpr std::size_t kWidth = 8;
  static Register zero() { return _mm512_setzero_pd(); }
  static Register add(Register x, Register y) { return _mm512_add_pd(x, y); }
  static Register load_sum(const double* p) { return _mm512_loadu_pd(p); }
  static void store_sum(double* p, Register r) { _mm512_storeu_pd(p, r); }
  static Operand load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Operand x) { _mm512_storeu_pd(p, x); }
  static Operand broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm512_fmadd_pd(a, b, c); }
};

inline __mmask16 first_lanes(std::size_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

inline __m512 load_half(const std::uint16_t* p, DType dtype, __mmask16 lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, p);
  if (dtype == DType::f16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 2-byte values as operands of Float16.
template <DType dtype>
struct From16 {
  using Element = std::uint16_t;
  static __m512 load(const Element* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (dtype == DType::f16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

inline __m256i round_half(__m512 value, DType dtype) {
  if (dtype == DType::f16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // Integer rounding instead of VCVTNEPS2BF16, which flushes denormals.
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet_nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet_nan), 16));
}

void widen(const void* src, DType dtype, float* dst, std::size_t count) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, count * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const std::uint16_t*>(src);
  std::size_t i = 0;
  if (dtype == DType::f16) {
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(dst + i, From16<DType::f16>::load(bits + i));
  } else {
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(dst + i, From16<DType::bf16>::load(bits + i));
  }
  if (i == count) return;
  const __mmask16 lanes = first_lanes(count - i);
  _mm512_mask_storeu_ps(dst + i, lanes, load_half(bits + i, dtype, lanes));
}

void subtract_half(std::uint16_t* w, DType dtype, const float* product, std::size_t count, float scale,
                   TileNorms& norms) {
  __m512 weight = _mm512_setzero_ps();
  __m512 error = _mm512_setzero_ps();
  const __m512 factor = _mm512_set1_ps(scale);
  for (std::size_t j = 0; j < count; j += 16) {
    const __mmask16 lanes = first_lanes(count - j);
    const __m512 before = load_half(w + j, dtype, lanes);
    const __m512 exact = _mm512_sub_ps(before, _mm512_maskz_loadu_ps(lanes, product + j));
    const __m256i stored = round_half(exact, dtype);
    _mm256_mask_storeu_epi16(w + j, lanes, stored);
    const __m512 after = dtype == DType::f16
                             ? _mm512_cvtph_ps(stored)
                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    const __m512 scaled = _mm512_mul_ps(before, factor);
    const __m512 rounding = _mm512_mul_ps(_mm512_sub_ps(after, exact), factor);
    weight = _mm512_fmadd_ps(scaled, scaled, weight);
    error = _mm512_fmadd_ps(rounding, rounding, error);
  }
  norms.weight += static_cast<double>(_mm512_reduce_add_ps(weight));
  norms.error += static_cast<double>(_mm512_reduce_add_ps(error));
}

void subtract(void* w, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms) {
  if (dtype == DType::f32) {
    subtract_as<ConvertF32>(static_cast<float*>(w), static_cast<const double*>(product), count, scale, norms);
  } else {
    subtract_half(static_cast<std::uint16_t*>(w), dtype, static_cast<const float*>(product), count, scale, norms);
  }
}

constexpr Tile kFloatTile = make_tile<Float16, 8, 3, 12>();
constexpr Tile kDoubleTile = make_tile<Double8, 8, 3, 12>();
template <class From>
constexpr RowKernels kRows = {multiply_stored<Float16, From, 3, 8, 16>, add_transposed<Float16, From, 12>};

inline __m512 load_values(const void* src, DType dtype, std::size_t i) {
  if (dtype == DType::f32) return _mm512_loadu_ps(static_cast<const float*>(src) + i);
  return load_half(static_cast<const std::uint16_t*>(src) + i, dtype, first_lanes(16));
}

// The same as quantise_with, for NF4: its codes are the places among the sorted values, and the place of a value is
// looked up by the one of 32 equal cells of [−1, 1] that it lies in, where there is at most one bound.
bool quantise(const void* src, DType dtype, std::size_t count, const FourBitCode& code, std::uint8_t* packed,
              float* absmax) {
  if (!code.by_cells) return quantise_with(widen, src, dtype, count, code, packed, absmax);
  constexpr std::size_t kVectors = kFourBitBlock / 16;
  const __m512 bound[2] = {_mm512_loadu_ps(code.cell_bounds), _mm512_loadu_ps(code.cell_bounds + 16)};
  const __m512i below[2] = {_mm512_loadu_si512(code.cell_places), _mm512_loadu_si512(code.cell_places + 16)};
  const std::size_t whole = count / kFourBitBlock * kFourBitBlock;
  __m512i top = _mm512_setzero_si512();
  for (std::size_t at = 0; at < whole; at += kFourBitBlock) {
    __m512 x[kVectors];
    // Magnitudes order like their bits, and NaN and infinity come out on top.
    __m512i largest = _mm512_setzero_si512();
    for (std::size_t v = 0; v < kVectors; ++v) {
      x[v] = load_values(src, dtype, at + 16 * v);
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(x[v])));
    }
    top = _mm512_max_epu32(top, largest);
    const std::uint32_t bits = _mm512_reduce_max_epu32(largest);
    std::memcpy(absmax, &bits, sizeof bits);
    const __m512 factor = _mm512_set1_ps(1.0f / std::max(*absmax++, kSmallestAbsmax));
    for (std::size_t v = 0; v < kVectors; ++v) {
      const __m512 value = _mm512_mul_ps(x[v], factor);
      const __m512i cell = _mm512_min_epi32(
          _mm512_max_epi32(_mm512_cvttps_epi32(_mm512_fmadd_ps(value, _mm512_set1_ps(kFourBitCells / 2),
                                                               _mm512_set1_ps(kFourBitCells / 2))),
                           _mm512_setzero_si512()),
          _mm512_set1_epi32(kFourBitCells - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(value, _mm512_permutex2var_ps(bound[0], cell, bound[1]), _CMP_GT_OQ);
      const __m512i place = _mm512_permutex2var_epi32(below[0], cell, below[1]);
      const __m512i code_place = _mm512_mask_add_epi32(place, above, place, _mm512_set1_epi32(1));
      // The first of a pair of values in the upper half of its byte.
      const __m512i pair = _mm512_or_si512(_mm512_slli_epi32(code_place, 4), _mm512_srli_epi64(code_place, 32));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pair));
      packed += 8;
    }
  }
  const bool finite = _mm512_reduce_max_epu32(top) < 0x7f800000u;
  const char* rest = static_cast<const char*>(src) + whole * size_of(dtype);
  return quantise_with(widen, rest, dtype, count - whole, code, packed, absmax) && finite;
}

inline __m512 rounded(__m512 values, DType dtype) {
  if (dtype == DType::f32) return values;
  const __m256i bits = round_half(values, dtype);
  if (dtype == DType::f16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void read_codes(const std::uint8_t* packed, const float* absmax, std::size_t count, const FourBitCode& code,
                DType dtype, float* q) {
  const __m512 values = _mm512_loadu_ps(code.values);
  const std::size_t whole = count / kFourBitBlock * kFourBitBlock;
  for (std::size_t at = 0; at < whole; at += kFourBitBlock, ++absmax) {
    const __m512 scaled = rounded(_mm512_mul_ps(values, _mm512_set1_ps(*absmax)), dtype);
    for (std::size_t i = at; i < at + kFourBitBlock; i += 16, packed += 8) {
      // Each byte in the two halves of 64 bits: the lookup takes their lowest four bits.
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      _mm512_storeu_ps(q + i, _mm512_permutexvar_ps(codes, scaled));
    }
  }
  read_codes_one_by_one(packed, absmax, count - whole, code, dtype, q + whole);
}

}  // namespace
}  // namespace pissa
