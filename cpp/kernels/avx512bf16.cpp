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

constexpr Tile kTile = make_tile<Bf16Pair16, 8, 3>();

}  // namespace

const Kernels kAvx512Bf16 = {
    "avx512bf16", make_tile<Float16, 8, 3>(), make_tile<Double8, 8, 3>(), &kTile, widen, pack_pairs, subtract,
    max_magnitude};

}  // namespace pissa
