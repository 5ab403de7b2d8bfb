// Compiled without contraction: products and sums are rounded one by one, as bitsandbytes rounds them.
#include "four_bit.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/kernels.hpp"
#include "kernels/scalar.hpp"
#include "thread_pool.hpp"

namespace pissa {
namespace {

constexpr std::size_t kBlocksPerTask = 1024;

// `order` lists the codes by ascending value.
FourBitCode make_code(const std::array<float, kFourBitCodes>& values,
                      const std::array<std::uint8_t, kFourBitCodes>& order) {
  FourBitCode code{};
  std::copy(values.begin(), values.end(), code.values);
  code.sorted = std::is_sorted(order.begin(), order.end());
  for (std::size_t i = 0; i + 1 < kFourBitCodes; ++i) code.bounds[i] = (values[order[i]] + values[order[i + 1]]) / 2;
  std::fill(code.cell_bounds, code.cell_bounds + kFourBitCells, std::numeric_limits<float>::infinity());
  std::fill(code.cell_places, code.cell_places + kFourBitCells, 0);
  code.by_cells = code.sorted;
  for (const float bound : code.bounds) {
    constexpr float kHalf = kFourBitCells / 2;
    const auto cell = static_cast<std::size_t>(std::fma(bound, kHalf, kHalf));  // as the kernels round it
    code.by_cells = code.by_cells && std::isinf(code.cell_bounds[cell]);
    code.cell_bounds[cell] = bound;
    for (std::size_t after = cell + 1; after < kFourBitCells; ++after) ++code.cell_places[after];
  }
  for (std::size_t i = 0; i < 256; ++i) {
    code.pairs[i] = static_cast<std::uint8_t>(order[i >> 4] << 4 | order[i & 15]);
  }
  return code;
}

// torch.linspace(0.1, 1, count), whose values come from both ends.
float linspace(std::size_t i, std::size_t count) {
  const float step = (1.0f - 0.1f) / static_cast<float>(count - 1);
  if (i < count / 2) return std::fma(step, static_cast<float>(i), 0.1f);
  return std::fma(-step, static_cast<float>(count - 1 - i), 1.0f);
}

// A sign, up to six zero bits that stand for powers of ten, a one, and what is left of seven bits for a fraction.
std::array<float, 256> make_dynamic_map() {
  std::array<float, 256> map{};
  std::size_t at = 0;
  for (int exponent = 0; exponent < 7; ++exponent) {
    const std::size_t items = std::size_t{1} << exponent;
    const auto power = static_cast<float>(std::pow(10.0, exponent - 6));
    for (std::size_t i = 0; i < items; ++i) {
      const float mean = (linspace(i, items + 1) + linspace(i + 1, items + 1)) / 2;
      map[at++] = power * mean;
      map[at++] = -power * mean;
    }
  }
  map[at++] = 0;
  map[at++] = 1;
  std::sort(map.begin(), map.end());
  return map;
}

constexpr std::size_t kGrid = 65535;

// The code nearest to each of 65536 points from -1 to 1: bitsandbytes rounds to these points first.
std::vector<std::uint8_t> make_nearest() {
  const float* map = dynamic_map();
  std::vector<std::uint8_t> nearest(kGrid + 1);
  std::size_t code = 0;
  for (std::size_t i = 0; i <= kGrid; ++i) {
    const float value = static_cast<float>(2 * i) / static_cast<float>(kGrid) - 1;
    while (code < 255 && value > (map[code] + map[code + 1]) / 2) ++code;
    nearest[i] = static_cast<std::uint8_t>(code);
  }
  return nearest;
}

// Sums of rows of 8 lanes, 4 rows at a time, in a cascade: every 2^power additions a level is passed on to the next.
class Cascade {
 public:
  static constexpr std::size_t kWidth = 8, kRows = 4, kLevels = 4;
  using Row = std::array<float, kWidth * kRows>;

  static Row sum(const float* values, std::size_t groups) {
    std::size_t log2 = 0;
    while ((std::size_t{1} << log2) < groups) ++log2;
    const std::size_t power = std::max<std::size_t>(4, log2 / kLevels), step = std::size_t{1} << power;
    std::array<Row, kLevels> level{};
    std::size_t i = 0;
    while (i + step <= groups) {
      for (std::size_t end = i + step; i < end; ++i) add(level[0], values + i * kWidth * kRows);
      for (std::size_t j = 1; j < kLevels; ++j) {
        add(level[j], level[j - 1].data());
        level[j - 1].fill(0);
        if ((i & ((step - 1) << (j * power))) != 0) break;
      }
    }
    for (; i < groups; ++i) add(level[0], values + i * kWidth * kRows);
    for (std::size_t j = 1; j < kLevels; ++j) add(level[0], level[j].data());
    return level[0];
  }

 private:
  static void add(Row& row, const float* values) {
    for (std::size_t i = 0; i < row.size(); ++i) row[i] += values[i];
  }
};

// torch.mean of float32 values, in one thread.
float mean(const float* values, std::size_t count) {
  constexpr std::size_t width = Cascade::kWidth, rows = Cascade::kRows;
  float total = 0;
  if (count < width) {  // torch adds up so few in four rows of one lane
    std::array<float, rows> row{};
    const std::size_t whole = count / rows * rows;
    for (std::size_t i = 0; i < whole; ++i) row[i % rows] += values[i];
    for (std::size_t i = whole; i < count; ++i) row[0] += values[i];
    for (std::size_t k = 1; k < rows; ++k) row[0] += row[k];
    total = row[0];
  } else {
    const std::size_t vectors = count / width, groups = vectors / rows;
    Cascade::Row sums = Cascade::sum(values, groups);
    for (std::size_t v = groups * rows; v < vectors; ++v) {
      for (std::size_t lane = 0; lane < width; ++lane) sums[lane] += values[v * width + lane];
    }
    for (std::size_t k = 1; k < rows; ++k) {
      for (std::size_t lane = 0; lane < width; ++lane) sums[lane] += sums[k * width + lane];
    }
    for (std::size_t i = vectors * width; i < count; ++i) total += values[i];
    for (std::size_t lane = 0; lane < width; ++lane) total += sums[lane];
  }
  return total / static_cast<float>(count);
}

constexpr std::size_t kPiece = 16 * kFourBitBlock;

// Calls work(begin, size, q) for pieces of the values, q being what is stored of them, as the dtype holds it.
template <class Work>
void for_each_piece(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                    const Work& work) {
  constexpr std::size_t kTask = kBlocksPerTask * kFourBitBlock;
  pool.run((count + kTask - 1) / kTask, [&](std::size_t task) {
    const std::size_t end = std::min(count, (task + 1) * kTask);
    for (std::size_t begin = task * kTask; begin < end; begin += kPiece) {
      const std::size_t size = std::min(kPiece, end - begin);
      alignas(64) float q[kPiece];
      kernels.read_codes(stored.packed + begin / 2, stored.absmax + begin / kFourBitBlock, size, *stored.code, dtype,
                         q);
      work(begin, size, q);
    }
  });
}

}  // namespace

const FourBitCode& nf4_code() {
  static const FourBitCode code =
      make_code({-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                 -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                 0.7229568362236023f, 1.0f},
                {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  return code;
}

const FourBitCode& fp4_code() {
  constexpr float tiny = 0.0625f / 12, third = 4.0f / 12, sixth = 2.0f / 12, two_thirds = 8.0f / 12;
  static const FourBitCode code = make_code({0.0f, tiny, two_thirds, 1.0f, third, 0.5f, sixth, 0.25f, 0.0f, -tiny,
                                             -two_thirds, -1.0f, -third, -0.5f, -sixth, -0.25f},
                                            {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3});
  return code;
}

const float* dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map();
  return map.data();
}

bool quantise(const Kernels& kernels, ThreadPool& pool, const void* values, DType dtype, std::size_t count,
              const FourBit& to) {
  constexpr std::size_t piece = kBlocksPerTask * kFourBitBlock;
  std::vector<unsigned char> finite((count + piece - 1) / piece);
  pool.run(finite.size(), [&](std::size_t task) {
    const std::size_t begin = task * piece;
    finite[task] = kernels.quantise(static_cast<const char*>(values) + begin * size_of(dtype), dtype,
                                    std::min(piece, count - begin), *to.code, to.packed + begin / 2,
                                    to.absmax + task * kBlocksPerTask);
  });
  return std::all_of(finite.begin(), finite.end(), [](unsigned char good) { return good != 0; });
}

float nest_absmax(float* absmax, std::size_t blocks, std::uint8_t* codes, float* nested_absmax) {
  static const std::vector<std::uint8_t> nearest = make_nearest();
  const float offset = mean(absmax, blocks);
  for (std::size_t begin = 0; begin < blocks; begin += kNestedBlock) {
    const std::size_t end = std::min(blocks, begin + kNestedBlock);
    float largest = 0;
    for (std::size_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(absmax[i] - offset));
    nested_absmax[begin / kNestedBlock] = largest;
    for (std::size_t i = begin; i < end; ++i) {
      if (largest == 0) {
        codes[i] = 0;
        continue;
      }
      const float value = std::clamp((absmax[i] - offset) * (1 / largest), -1.0f, 1.0f);
      codes[i] = nearest[static_cast<std::size_t>(std::fma((value + 1) * 0.5f, static_cast<float>(kGrid), 0.5f))];
    }
  }
  unnest_absmax(codes, nested_absmax, offset, blocks, absmax);
  return offset;
}

void unnest_absmax(const std::uint8_t* codes, const float* nested_absmax, float mean, std::size_t blocks,
                   float* absmax) {
  const float* map = dynamic_map();
  for (std::size_t i = 0; i < blocks; ++i) absmax[i] = map[codes[i]] * nested_absmax[i / kNestedBlock] + mean;
}

void dequantise(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                void* out) {
  for_each_piece(kernels, pool, stored, dtype, count, [&](std::size_t begin, std::size_t size, const float* q) {
    store_as(dtype, q, size, static_cast<char*>(out) + begin * size_of(dtype));
  });
}

void subtract_stored(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                     const void* values, DType values_dtype, float* out) {
  for_each_piece(kernels, pool, stored, dtype, count, [&](std::size_t begin, std::size_t size, const float* q) {
    alignas(64) float value[kPiece];
    kernels.widen(static_cast<const char*>(values) + begin * size_of(values_dtype), values_dtype, value, size);
    for (std::size_t i = 0; i < size; ++i) out[begin + i] = value[i] - q[i];
  });
}

void relax_towards(const Kernels& kernels, ThreadPool& pool, const FourBit& stored, DType dtype, std::size_t count,
                   float* difference, float relaxation, void* target) {
  for_each_piece(kernels, pool, stored, dtype, count, [&](std::size_t begin, std::size_t size, const float* q) {
    char* to = static_cast<char*>(target) + begin * size_of(dtype);
    float* goal = difference + begin;
    alignas(64) float step[kPiece];  // back from the goal
    kernels.widen(to, dtype, step, size);
    for (std::size_t i = 0; i < size; ++i) {
      goal[i] += q[i];
      step[i] = relaxation * (step[i] - goal[i]);
    }
    if (dtype == DType::f32) {
      auto* values = reinterpret_cast<float*>(to);
      for (std::size_t i = 0; i < size; ++i) values[i] -= step[i];
    } else {
      TileNorms norms;
      kernels.subtract(to, dtype, step, size, 1.0f, norms);
    }
  });
}

}  // namespace pissa
