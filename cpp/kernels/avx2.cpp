// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels/blocks.hpp"
#include "kernels/tiles.hpp"

namespace pissa {
namespace {

struct Float8 {
  using Element = float;
  using Sum = float;
  using Register = __m256;
  using Operand = __m256;
  static constexpr std::size_t kDepth = 1;
  static constexpr std::size_t kWidth = 8;
  static Register zero() { return _mm256_setzero_ps(); }
  static Register add(Register x, Register y) { return _mm256_add_ps(x, y); }
  static Register load_sum(const float* p) { return _mm256_loadu_ps(p); }
  static void store_sum(float* p, Register r) { _mm256_storeu_ps(p, r); }
  static Operand load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Operand x) { _mm256_storeu_ps(p, x); }
  static Operand broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm256_fmadd_ps(a, b, c); }
};

struct Double4 {
  using Element = double;
  using Sum = double;
  using Register = __m256d;
  using Operand = __m256d;
  static constexpr std::size_t kDepth = 1;
  static constexpr std::size_t kWidth = 4;
  static Register zero() { return _mm256_setzero_pd(); }
  static Register add(Register x, Register y) { return _mm256_add_pd(x, y); }
  static Register load_sum(const double* p) { return _mm256_loadu_pd(p); }
  static void store_sum(double* p, Register r) { _mm256_storeu_pd(p, r); }
  static Operand load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Operand x) { _mm256_storeu_pd(p, x); }
  static Operand broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Register multiply_add(Operand a, Operand b, Register c) { return _mm256_fmadd_pd(a, b, c); }
};

// 2-byte values as operands of Float8.
struct FromF16 {
  using Element = std::uint16_t;
  static __m256 load(const Element* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};

struct FromBf16 {
  using Element = std::uint16_t;
  static __m256 load(const Element* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
};

struct ConvertF16 {
  using Bits = std::uint16_t;
  static float widen(Bits bits) { return _cvtsh_ss(bits); }
  static Bits round(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
};

void widen(const void* src, DType dtype, float* dst, std::size_t count) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, count * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const std::uint16_t*>(src);
  if (dtype == DType::bf16) {
    for (std::size_t i = 0; i < count; ++i) dst[i] = bf16_to_float(bits[i]);
    return;
  }
  const std::size_t whole = count - count % 8;
  for (std::size_t i = 0; i < whole; i += 8) _mm256_storeu_ps(dst + i, FromF16::load(bits + i));
  for (std::size_t i = whole; i < count; ++i) dst[i] = ConvertF16::widen(bits[i]);
}

// GCC does not vectorise the F16C scalar conversions: the residual goes through float in short pieces.
void subtract_f16(std::uint16_t* w, const float* product, std::size_t count, float scale, TileNorms& norms) {
  constexpr std::size_t kPiece = 64;
  for (std::size_t at = 0; at < count; at += kPiece) {
    const std::size_t size = count - at < kPiece ? count - at : kPiece;
    if (size < 8) {
      subtract_as<ConvertF16>(w + at, product + at, size, scale, norms);
      continue;
    }
    __m256 weight = _mm256_setzero_ps();
    __m256 error = _mm256_setzero_ps();
    const __m256 factor = _mm256_set1_ps(scale);
    std::size_t j = at;
    for (; j + 8 <= at + size; j += 8) {
      auto* place = reinterpret_cast<__m128i*>(w + j);
      const __m256 before = _mm256_cvtph_ps(_mm_loadu_si128(place));
      const __m256 exact = _mm256_sub_ps(before, _mm256_loadu_ps(product + j));
      const __m128i stored = _mm256_cvtps_ph(exact, _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(place, stored);
      const __m256 scaled = _mm256_mul_ps(before, factor);
      const __m256 rounding = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtph_ps(stored), exact), factor);
      weight = _mm256_fmadd_ps(scaled, scaled, weight);
      error = _mm256_fmadd_ps(rounding, rounding, error);
    }
    float lanes[2][8];
    _mm256_storeu_ps(lanes[0], weight);
    _mm256_storeu_ps(lanes[1], error);
    for (std::size_t lane = 0; lane < 8; ++lane) {
      norms.weight += static_cast<double>(lanes[0][lane]);
      norms.error += static_cast<double>(lanes[1][lane]);
    }
    if (j < at + size) subtract_as<ConvertF16>(w + j, product + j, at + size - j, scale, norms);
  }
}

void subtract(void* w, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms) {
  switch (dtype) {
    case DType::f32:
      return subtract_as<ConvertF32>(static_cast<float*>(w), static_cast<const double*>(product), count, scale, norms);
    case DType::f16:
      return subtract_f16(static_cast<std::uint16_t*>(w), static_cast<const float*>(product), count, scale, norms);
    case DType::bf16:
      return subtract_as<ConvertBf16>(static_cast<std::uint16_t*>(w), static_cast<const float*>(product), count, scale,
                                      norms);
  }
}

bool quantise(const void* src, DType dtype, std::size_t count, const FourBitCode& code, std::uint8_t* packed,
              float* absmax) {
  return quantise_with(widen, src, dtype, count, code, packed, absmax);
}

void read_codes(const std::uint8_t* packed, const float* absmax, std::size_t count, const FourBitCode& code,
                DType dtype, float* q) {
  read_codes_one_by_one(packed, absmax, count, code, dtype, q);
}

template <class From>
constexpr RowKernels kRows = {multiply_stored<Float8, From, 3, 4, 8>, add_transposed<Float8, From, 6>};

}  // namespace

const Kernels kAvx2 = {"avx2",
                       512u << 10,
                       make_tile<Float8, 4, 3, 6>(),
                       make_tile<Double4, 4, 3, 6>(),
                       kRows<Float8>,
                       kRows<FromF16>,
                       kRows<FromBf16>,
                       nullptr,
                       nullptr,
                       widen,
                       subtract,
                       max_magnitude,
                       quantise,
                       read_codes,
                       tridiagonalize};

}  // namespace pissa
