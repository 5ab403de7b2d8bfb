// AMX with BF16: one instruction adds 32 products to each of a tile's 16 × 16 sums. What does not fill tiles goes to
// the AVX-512 BF16 kernels.
#include <algorithm>

#include "kernels/avx512bf16.hpp"

namespace pissa {
namespace {

constexpr std::size_t kSide = 16;                // rows of a tile, and 32-bit columns
constexpr std::size_t kTileBytes = 64;           // of a row
constexpr std::size_t kPairs = 2;                // bf16 in 32 bits
constexpr std::size_t kVector = kSide * kPairs;  // bf16 in a tile's row
constexpr std::size_t kRegisters = 4;            // of sums at most; two more are for A and two for B

constexpr Tile kVectorTile = make_tile<Bf16Pair16, 8, 2, 12>();  // for what does not fill tiles

// The register's number must be known to the assembler.
template <int Register>
void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int Register>
void load(const void* rows, std::size_t bytes_apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(bytes_apart), "i"(Register) : "memory");
}
template <int Register>
void store(void* rows, std::size_t bytes_apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(bytes_apart), "i"(Register) : "memory");
}
template <int Sum, int A, int B>
void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// While it lives, all of the thread's registers are whole tiles. Nobody else's setting is relied on, and none is left.
class WholeTiles {
 public:
  WholeTiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~WholeTiles() { asm volatile("tilerelease"); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
};

// Rows × Vectors tiles of C. The sums of tile (i, v) are in register i·Vectors + v, A's rows in 4 and 5, B's in 6
// and 7.
template <std::size_t Rows, std::size_t Vectors, bool Adds>
struct Block {
  static_assert(Rows * Vectors <= kRegisters && Vectors <= 2);
  const std::uint16_t* a;
  std::size_t a_row;
  const std::uint16_t* b;
  std::size_t b_step;
  float* c;
  std::size_t c_row;

  void multiply(std::size_t steps) const { multiply(steps, std::make_index_sequence<Rows * Vectors>()); }

 private:
  template <std::size_t... Index>
  void multiply(std::size_t steps, std::index_sequence<Index...>) const {
    (begin<Index>(), ...);
    for (std::size_t s = 0; s < steps; s += kSide) (add<Index>(s / kSide, b + s * b_step), ...);
    (store<Index>(tile(Index), c_row * sizeof *c), ...);
  }
  float* tile(std::size_t index) const { return c + index / Vectors * kSide * c_row + index % Vectors * kSide; }
  template <std::size_t Index>
  void begin() const {
    if constexpr (Adds) {
      load<Index>(tile(Index), c_row * sizeof *c);
    } else {
      clear<Index>();
    }
  }
  template <std::size_t Index>
  void add(std::size_t step, const std::uint16_t* right) const {
    constexpr std::size_t kRow = Index / Vectors, kColumn = Index % Vectors;
    constexpr int kA = 4 + kRow % 2, kB = 6 + kColumn % 2;
    if constexpr (kColumn == 0) load<kA>(a + kRow * kSide * a_row + step * kVector, a_row * sizeof *right);
    if constexpr (kRow == 0) load<kB>(right + kColumn * kSide * kPairs, b_step * sizeof *right);
    multiply_add<Index, kA, kB>();
  }
};

// Columns [0, 16·Vectors) of all panels of 16 rows.
template <std::size_t Vectors, bool Adds>
void multiply_columns(const std::uint16_t* a, std::size_t a_row, const std::uint16_t* b, std::size_t b_step,
                      std::size_t steps, float* c, std::size_t c_row, std::size_t panels) {
  constexpr std::size_t kRows = kRegisters / Vectors;
  std::size_t i = 0;
  const auto multiply = [&](auto rows) {
    constexpr std::size_t kCount = decltype(rows)::value;
    for (; i + kCount <= panels; i += kCount) {
      Block<kCount, Vectors, Adds>{a + i * kSide * a_row, a_row, b, b_step, c + i * kSide * c_row, c_row}.multiply(
          steps);
    }
  };
  multiply(std::integral_constant<std::size_t, kRows>());
  if constexpr (kRows > 2) multiply(std::integral_constant<std::size_t, 2>());
  multiply(std::integral_constant<std::size_t, 1>());
}

template <bool Adds>
void multiply_strip(const void* a_begin, std::size_t a_row, std::size_t a_step, const void* b_begin, std::size_t steps,
                    void* c_begin, std::size_t c_row, std::size_t rows, std::size_t vectors) {
  const auto* a = static_cast<const std::uint16_t*>(a_begin);
  const auto* b = static_cast<const std::uint16_t*>(b_begin);
  auto* c = static_cast<float*>(c_begin);
  const std::size_t b_step = vectors * kSide * kPairs;
  const std::size_t tiled_rows = a_step == kPairs && steps >= kSide ? rows / kSide * kSide : 0;
  const std::size_t tiled_steps = tiled_rows > 0 ? steps / kSide * kSide : 0;
  if (tiled_rows > 0) {
    const WholeTiles tiles;
    (vectors == 1 ? multiply_columns<1, Adds> : multiply_columns<2, Adds>)(a, a_row, b, b_step, tiled_steps, c, c_row,
                                                                           tiled_rows / kSide);
  }
  if (tiled_rows > 0 && tiled_steps < steps) {
    kVectorTile.accumulate(a + tiled_steps * a_step, a_row, a_step, b + tiled_steps * b_step, steps - tiled_steps, c,
                           c_row, tiled_rows, vectors);
  }
  if (tiled_rows < rows) {
    (Adds ? kVectorTile.accumulate : kVectorTile.assign)(a + tiled_rows * a_row, a_row, a_step, b, steps,
                                                         c + tiled_rows * c_row, c_row, rows - tiled_rows, vectors);
  }
}

constexpr std::size_t kMaxTransposedTiles = 8;  // of 16 rows of B at a time

// One row of A's transpose, 16 rows of B: each value alone in the lower halves, and in the upper ones.
struct alignas(kTileBytes) Spread {
  std::uint32_t low[kSide][kSide], high[kSide][kSide];
};

// A is packed as [pair of rows][column][2].
void spread(const std::uint16_t* a, std::size_t k, Spread& out) {
  const __m256i pairs =
      _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(k)));
  for (std::size_t column = 0; column < kSide; ++column) {
    const __m256i rows = _mm256_i32gather_epi32(reinterpret_cast<const int*>(a) + column, pairs, 4);
    const __m512i low = _mm512_cvtepu16_epi32(rows);
    _mm512_store_si512(out.low[column], low);
    _mm512_store_si512(out.high[column], _mm512_slli_epi32(low, 16));
  }
}

// Adds two tiles, of the even columns and of the odd ones, to 16 × 32 elements of c.
void add_interleaved(const float (*sums)[kSide][kSide], float* c, std::size_t c_row) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (std::size_t i = 0; i < kSide; ++i, c += c_row) {
    const __m512 even = _mm512_load_ps(sums[0][i]), odd = _mm512_load_ps(sums[1][i]);
    _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), _mm512_permutex2var_ps(even, first, odd)));
    _mm512_storeu_ps(c + kSide, _mm512_add_ps(_mm512_loadu_ps(c + kSide), _mm512_permutex2var_ps(even, second, odd)));
  }
}

// 16 rows of C and 32 columns, or twice that. B's rows are read as they are: what the instruction takes for a pair are
// neighbours in a row, and as A's values come with a zero beside them, only one of the two is multiplied.
template <std::size_t Pairs>
void add_tiles(const Spread* a, std::size_t panels, const std::uint16_t* b, std::size_t b_row, float* c,
               std::size_t c_row) {
  clear<0>();
  clear<1>();
  if constexpr (Pairs == 2) {
    clear<2>();
    clear<3>();
  }
  for (std::size_t i = 0; i < panels; ++i) {
    load<4>(a[i].low, kTileBytes);
    load<5>(a[i].high, kTileBytes);
    load<6>(b + i * kSide * b_row, b_row * sizeof *b);
    multiply_add<0, 4, 6>();
    multiply_add<1, 5, 6>();
    if constexpr (Pairs == 2) {
      load<7>(b + i * kSide * b_row + kVector, b_row * sizeof *b);
      multiply_add<2, 4, 7>();
      multiply_add<3, 5, 7>();
    }
  }
  alignas(kTileBytes) float sums[2 * Pairs][kSide][kSide];
  store<0>(sums[0], kTileBytes);
  store<1>(sums[1], kTileBytes);
  if constexpr (Pairs == 2) {
    store<2>(sums[2], kTileBytes);
    store<3>(sums[3], kTileBytes);
  }
  for (std::size_t pair = 0; pair < Pairs; ++pair) add_interleaved(&sums[2 * pair], c + pair * kVector, c_row);
}

void add_transposed(const void* a_begin, std::size_t k, const void* b_begin, std::size_t b_row, std::size_t rows,
                    std::size_t columns, void* c_begin, std::size_t c_row) {
  const auto* a = static_cast<const std::uint16_t*>(a_begin);
  const auto* b = static_cast<const std::uint16_t*>(b_begin);
  auto* c = static_cast<float*>(c_begin);
  const std::size_t tiled_rows = k % kSide == 0 ? rows / kSide * kSide : 0;
  if (tiled_rows > 0) {
    Spread spreads[kMaxTransposedTiles];
    const WholeTiles whole;
    for (std::size_t at = 0; at < tiled_rows; at += kMaxTransposedTiles * kSide) {
      const std::size_t tiles = std::min(kMaxTransposedTiles, (tiled_rows - at) / kSide);
      for (std::size_t i = 0; i < k; i += kSide) {
        for (std::size_t t = 0; t < tiles; ++t) spread(a + (at + t * kSide) * k + i * kPairs, k, spreads[t]);
        std::size_t j = 0;
        for (; j + 2 * kVector <= columns; j += 2 * kVector) {
          add_tiles<2>(spreads, tiles, b + at * b_row + j, b_row, c + i * c_row + j, c_row);
        }
        if (j < columns) add_tiles<1>(spreads, tiles, b + at * b_row + j, b_row, c + i * c_row + j, c_row);
      }
    }
  }
  if (tiled_rows < rows) {
    kVectorTile.add_transposed(a + tiled_rows * k, k, b + tiled_rows * b_row, b_row, rows - tiled_rows, columns, c,
                               c_row);
  }
}

// W's lines arrive while strips before them are worked on.
constexpr std::size_t kStripsAhead = 8;

void subtract_product(std::uint16_t* w, std::size_t stride, std::size_t rows, std::size_t strips,
                      const std::uint16_t* a, const std::uint16_t* b, std::size_t steps, float scaling,
                      float norm_scale, TileNorms& norms) {
  constexpr std::size_t kSquare = 2 * kSide;
  const __m512 factor = _mm512_set1_ps(scaling), scale = _mm512_set1_ps(norm_scale);
  const std::size_t a_row = steps * kPairs;
  Squares squares;
  const WholeTiles whole;
  for (std::size_t s = 0; s < strips; ++s, w += kSquare, b += steps * kSquare * kPairs) {
    for (std::size_t i = 0; i < rows; i += kSquare) {
      alignas(kTileBytes) float product[kSquare][kSquare];
      Block<2, 2, false>{a + i * a_row, a_row, b, kSquare * kPairs, product[0], kSquare}.multiply(steps);
      for (std::size_t row = 0; row < kSquare; ++row) {
        std::uint16_t* place = w + (i + row) * stride;
        _mm_prefetch(reinterpret_cast<const char*>(place + kStripsAhead * kSquare), _MM_HINT_T0);
        subtract_32(place, product[row], factor, scale, squares);
      }
    }
  }
  squares.add_to(norms);
}

constexpr Bf16Kernels kBf16 = {
    {kPairs, kSide, 2 * kSide, 2, kSide, multiply_strip<false>, multiply_strip<true>, kVector, add_transposed},
    narrow,
    round_weight,
    take_apart,
    put_together,
    pack_pairs,
    subtract_product};

}  // namespace

const Kernels kAmxBf16 = {"amxbf16",
                          kLargestCache,
                          kFloatTile,
                          kDoubleTile,
                          kRows<Float16>,
                          kRows<From16<DType::f16>>,
                          kRows<From16<DType::bf16>>,
                          &kBf16,
                          nullptr,
                          widen,
                          subtract_bf16,
                          max_magnitude,
                          quantise,
                          read_codes,
                          tridiagonalize};

}  // namespace pissa
