// What the tables with AVX-512 BF16 share: pairs of bf16 are multiplied exactly and summed in float. Internal linkage:
// see tiles.hpp.
#pragma once

#include "kernels/avx512.hpp"

namespace pissa {
namespace {

struct Bf16Pair16 {
  using Element = std::uint16_t;
  using Sum = float;
  using Register = __m512;
  using Operand = __m512bh;
  static constexpr std::size_t kDepth = 2;
  static constexpr std::size_t kWidth = 16;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register add(Register x, Register y) { return _mm512_add_ps(x, y); }
  static Register load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Register r) { _mm512_storeu_ps(p, r); }
  static Operand load(const Element* p) { return reinterpret_cast<Operand>(_mm512_loadu_si512(p)); }
  static void store(Element* p, Operand x) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(x)); }
  static Operand broadcast(const Element* p) {
    std::int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<Operand>(_mm512_set1_epi32(pair));
  }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm512_dpbf16_ps(c, a, b); }
  // Which elements of two rows make up the pairs of columns [first, first + 16).
  static __m512i pairs_of(short first) {
    const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_add_epi16(pairs, _mm512_set1_epi16(first));
  }
  static void load_pairs(const Element* even, const Element* odd, Operand (&out)[2]) {
    const __m512i a = _mm512_loadu_si512(even);
    const __m512i b = odd != nullptr ? _mm512_loadu_si512(odd) : _mm512_setzero_si512();
    out[0] = reinterpret_cast<Operand>(_mm512_permutex2var_epi16(a, pairs_of(0), b));
    out[1] = reinterpret_cast<Operand>(_mm512_permutex2var_epi16(a, pairs_of(16), b));
  }
};

void pack_pairs(const std::uint16_t* src, std::size_t stride, std::size_t rows, std::size_t columns,
                std::uint16_t* dst) {
  for (std::size_t i = 0; i < rows; i += 2) {
    const std::uint16_t* even = src + i * stride;
    const bool whole = i + 1 < rows;
    std::size_t j = 0;
    for (; j + 32 <= columns; j += 32, dst += 64) {
      Bf16Pair16::Operand pairs[2];
      Bf16Pair16::load_pairs(even + j, whole ? even + stride + j : nullptr, pairs);
      _mm512_storeu_si512(dst, reinterpret_cast<__m512i>(pairs[0]));
      _mm512_storeu_si512(dst + 32, reinterpret_cast<__m512i>(pairs[1]));
    }
    if (j < columns) {
      const auto half = [](const std::uint16_t* p) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      };
      const __m512i odd = whole ? half(even + stride + j) : _mm512_setzero_si512();
      _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(half(even + j), Bf16Pair16::pairs_of(0), odd));
      dst += 32;
    }
  }
}

void narrow(const float* src, std::size_t rows, std::size_t columns, std::uint16_t* dst, std::size_t stride) {
  for (; rows > 0; --rows, src += columns, dst += stride) {
    for (std::size_t i = 0; i < columns; i += 16) {
      const __mmask16 lanes = first_lanes(columns - i);
      _mm256_mask_storeu_epi16(dst + i, lanes, round_half(_mm512_maskz_loadu_ps(lanes, src + i), DType::bf16));
    }
  }
}

// Sums of squares of W and of what rounding adds: two each, as one would wait for itself.
struct Squares {
  __m512 weight[2] = {}, error[2] = {};
  void add_to(TileNorms& norms) const {
    norms.weight += static_cast<double>(_mm512_reduce_add_ps(_mm512_add_ps(weight[0], weight[1])));
    norms.error += static_cast<double>(_mm512_reduce_add_ps(_mm512_add_ps(error[0], error[1])));
  }
};

// w[j] ← round(w[j] - scaling·product[j]) for 32 values, with the instruction for it, but where it would flush a
// denormal.
inline void subtract_32(std::uint16_t* w, const float* product, __m512 scaling, __m512 scale, Squares& squares) {
  constexpr int kDenormal = 0x20;
  const auto widened = [](__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  };
  __m512 before[2], exact[2];
  for (std::size_t half = 0; half < 2; ++half) {
    before[half] = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16 * half)));
    exact[half] = _mm512_fnmadd_ps(scaling, _mm512_loadu_ps(product + 16 * half), before[half]);
  }
  __m256i stored[2];
  if ((_mm512_fpclass_ps_mask(exact[0], kDenormal) | _mm512_fpclass_ps_mask(exact[1], kDenormal)) != 0) {
    for (std::size_t half = 0; half < 2; ++half) stored[half] = round_half(exact[half], DType::bf16);
  } else {
    for (std::size_t half = 0; half < 2; ++half) {
      stored[half] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(exact[half]));
    }
  }
  for (std::size_t half = 0; half < 2; ++half) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + 16 * half), stored[half]);
    const __m512 scaled = _mm512_mul_ps(before[half], scale);
    const __m512 rounding = _mm512_mul_ps(_mm512_sub_ps(widened(stored[half]), exact[half]), scale);
    squares.weight[half] = _mm512_fmadd_ps(scaled, scaled, squares.weight[half]);
    squares.error[half] = _mm512_fmadd_ps(rounding, rounding, squares.error[half]);
  }
}

void subtract_bf16(void* weight, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms) {
  auto* w = static_cast<std::uint16_t*>(weight);
  const std::size_t done = dtype == DType::bf16 ? count / 32 * 32 : 0;
  Squares squares;
  for (std::size_t j = 0; j < done; j += 32) {
    subtract_32(w + j, static_cast<const float*>(product) + j, _mm512_set1_ps(1), _mm512_set1_ps(scale), squares);
  }
  squares.add_to(norms);
  if (done == count) return;
  if (dtype == DType::f32) return subtract(weight, dtype, product, count, scale, norms);
  subtract_half(w + done, dtype, static_cast<const float*>(product) + done, count - done, scale, norms);
}

// Rows are converted as they come from memory, faster than the CPU would fetch them by itself.
constexpr std::size_t kFetchAhead = 4096;  // bytes

template <class Stored, class Load>
void round_values(const Stored* src, std::uint16_t* dst, std::size_t count, const Load& load) {
  constexpr std::size_t kStep = 64 / sizeof(Stored);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    _mm_prefetch(reinterpret_cast<const char*>(src + i) + kFetchAhead, _MM_HINT_T0);
    for (std::size_t j = i; j < i + kStep; j += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + j),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(src + j, first_lanes(16)))));
    }
  }
  for (; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    _mm256_mask_storeu_epi16(dst + i, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(src + i, lanes))));
  }
}

void round_weight(const void* src, DType dtype, float scale, std::uint16_t* dst, std::size_t count) {
  const __m512 factor = _mm512_set1_ps(scale);
  if (dtype == DType::f32) {
    round_values(static_cast<const float*>(src), dst, count, [&](const float* p, __mmask16 lanes) {
      return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, p), factor);
    });
  } else if (dtype == DType::f16) {
    round_values(static_cast<const std::uint16_t*>(src), dst, count, [&](const std::uint16_t* p, __mmask16 lanes) {
      return _mm512_mul_ps(load_half(p, DType::f16, lanes), factor);
    });
  } else {
    std::memcpy(dst, src, count * sizeof *dst);
  }
}

// The halves are written where the row's values have been read already, from its front; and read from its back.
void take_apart(float* row, std::size_t count, std::uint16_t* rest) {
  auto* halves = reinterpret_cast<std::uint16_t*>(row);
  for (std::size_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512i bits = _mm512_maskz_loadu_epi32(lanes, row + i);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    _mm256_mask_storeu_epi16(halves + i, lanes, _mm512_cvtepi32_epi16(rounded));
    _mm256_mask_storeu_epi16(rest + i, lanes, _mm512_cvtepi32_epi16(bits));
  }
  std::memcpy(halves + count, rest, count * sizeof *rest);
}

void put_together(float* row, std::size_t count, std::uint16_t* rest) {
  auto* halves = reinterpret_cast<std::uint16_t*>(row);
  std::memcpy(rest, halves + count, count * sizeof *rest);
  for (std::size_t i = (count + 15) / 16 * 16; i > 0;) {
    i -= 16;
    const __mmask16 lanes = first_lanes(count - i);
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, halves + i)), 16);
    const __m512i lower = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes, rest + i));
    _mm512_mask_storeu_epi32(row + i, lanes, _mm512_add_epi32(upper, lower));
  }
}

}  // namespace
}  // namespace pissa
