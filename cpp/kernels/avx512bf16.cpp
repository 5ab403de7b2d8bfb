// AVX-512 with BF16: pairs of bf16 are multiplied exactly and summed in float.
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
  static Operand broadcast(const Element* p) {
    std::int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<Operand>(_mm512_set1_epi32(pair));
  }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm512_dpbf16_ps(c, a, b); }
};

void pack_pairs(const std::uint16_t* src, std::size_t stride, std::size_t rows, std::size_t columns, std::size_t width,
                std::uint16_t* dst, std::size_t strip_stride) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (std::size_t i = 0; i < rows; i += 2) {
    const std::uint16_t* even = src + i * stride;
    const std::uint16_t* odd = even + stride;
    for (std::size_t begin = 0; begin < columns; begin += width) {
      std::uint16_t* out = dst + begin / width * strip_stride + i * width;
      std::size_t j = 0;
      for (; j + 32 <= width; j += 32) {
        const std::size_t left = begin + j < columns ? columns - begin - j : 0;
        const __mmask32 lanes = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(lanes, even + begin + j);
        const __m512i b = _mm512_maskz_loadu_epi16(i + 1 < rows ? lanes : __mmask32{0}, odd + begin + j);
        _mm512_storeu_si512(out + 2 * j, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(out + 2 * j + 32, _mm512_permutex2var_epi16(a, high, b));
      }
      if (j < width) {
        const __mmask16 lanes = begin + j < columns ? first_lanes(columns - begin - j) : __mmask16{0};
        const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, even + begin + j));
        const __m512i b =
            _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(i + 1 < rows ? lanes : __mmask16{0}, odd + begin + j));
        _mm512_storeu_si512(out + 2 * j, _mm512_permutex2var_epi16(a, low, b));
      }
    }
  }
}

void narrow(const float* src, std::uint16_t* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    _mm256_mask_storeu_epi16(dst + i, lanes, round_half(_mm512_maskz_loadu_ps(lanes, src + i), DType::bf16));
  }
}

constexpr Bf16Kernels kBf16 = {make_tile<Bf16Pair16, 8, 3>(), narrow, pack_pairs};

}  // namespace

const Kernels kAvx512Bf16 = {
    "avx512bf16", make_tile<Float16, 8, 3>(), make_tile<Double8, 8, 3>(), &kBf16, widen, subtract, max_magnitude};

}  // namespace pissa
