#include "sweep.hpp"

#include <algorithm>
#include <cstring>

#include "packing.hpp"

namespace pissa {
namespace {

// A block of rows stays in a core's second-level cache between its two products, beside the X and Z of so many columns.
constexpr std::size_t kBesideColumns = 16;
constexpr std::size_t kMinBlockRows = 32, kGoodBlockRows = 64, kMaxBlockRows = 128;
// A piece of packed x that stays in the second-level cache while the rows of a block pass over it.
constexpr std::size_t kXBytes = 256u << 10;
constexpr std::size_t kMaxWide = 32;  // of any tile

// Many rows are worth it where half the cache is left to what else passes through. But each block reads and writes all
// of its part of Z, so that up to a number they are worth it wherever they fit; and where not even few stay in the
// cache, as they are more than half of it.
std::size_t choose_block_rows(std::size_t cache, const Weight& weight, std::size_t element_bytes, std::size_t columns) {
  const std::size_t beside = weight.cols * kBesideColumns * (element_bytes + sizeof(float));
  const std::size_t row = weight.cols * std::min(size_of(weight.dtype), element_bytes);  // as it is multiplied
  const auto fitting = [&](std::size_t bytes) {
    return (bytes - std::min(bytes, beside)) / std::max<std::size_t>(1, row) / kMinBlockRows * kMinBlockRows;
  };
  const bool hopeless = 2 * kMinBlockRows * row > cache;
  const std::size_t rows =
      std::max({hopeless ? kGoodBlockRows : kMinBlockRows, std::min(fitting(cache), kGoodBlockRows),
                std::min(fitting(cache / 2), kMaxBlockRows)});
  return std::min(
      rows, round_up(std::max<std::size_t>(weight.rows / LaneSums::min_lanes(weight, columns), 1), kMinBlockRows));
}

// All rows from `begin` on, so many at a time.
template <class Task>
void for_each_block(std::size_t begin, std::size_t end, std::size_t rows, const Task& task) {
  for (; begin < end; begin += rows) task(begin, std::min(rows, end - begin));
}

}  // namespace

template <class Element>
struct Sweep<Element>::Lane {
  Lane(const Sweep& sweep, std::size_t k)
      : converted(sweep.pool_.scratch(), sweep.direct_ ? 0 : sweep.block_rows_ * sweep.row_stride_),
        packed_y(sweep.pool_.scratch(), sweep.block_rows_ * k),
        sums(sweep.pool_.scratch(), sweep.block_rows_ * k) {}
  Buffer<Element> converted;
  Buffer<Element> packed_y;  // [step][column][depth]
  Buffer<float> sums;
  const char* rows = nullptr;  // of the block, as they are read
};

template <class Element>
Sweep<Element>::Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block)
    : kernels_(kernels),
      pool_(pool),
      weight_(weight),
      tile_(tile_for<Element>(kernels)),
      block_rows_(choose_block_rows(kernels.cache, weight, sizeof(Element), max_block)),
      steps_((weight.cols + tile_.depth - 1) / tile_.depth),
      direct_(!kIsBf16<Element> || (weight.dtype == DType::bf16 && weight.cols % tile_.wide == 0)),
      row_stride_(direct_ ? weight.cols : round_up(weight.cols, tile_.wide) + 32),
      read_bytes_(direct_ ? size_of(weight.dtype) : sizeof(Element)),
      row_kernels_(kIsBf16<Element> ? RowKernels{tile_.assign, tile_.add_transposed} : kernels.rows(weight.dtype)),
      sums_(pool, weight, block_rows_, max_block, round_up(weight.cols, tile_.wide) + 16),
      packed_x_(pool.scratch(), steps_ * tile_.depth * max_block) {}

template <class Element>
std::size_t Sweep<Element>::workspace_bytes(const Weight& weight, std::size_t max_block, unsigned threads) {
  const std::size_t rows =
      std::max(kGoodBlockRows, choose_block_rows(kLargestCache, weight, sizeof(Element), max_block));
  const std::size_t part = Scratch::rounded(sizeof(float) * (weight.cols + 80) * max_block);
  const std::size_t lane = (kIsBf16<Element> ? Scratch::rounded(sizeof(Element) * rows * (weight.cols + 96)) : 0) +
                           Scratch::rounded(sizeof(Element) * rows * max_block) +
                           Scratch::rounded(sizeof(float) * rows * max_block) + part;
  return Scratch::rounded(sizeof(Element) * (weight.cols + 64) * max_block) + part + threads * lane;
}

template <class Element>
bool Sweep<Element>::can_read_halves() const {
  return kIsBf16<Element> && weight_.dtype == DType::f32 && weight_.cols % tile_.wide == 0;
}

template <class Element>
void Sweep<Element>::read_halves() {
  direct_ = true;
  row_stride_ = 2 * weight_.cols;
}

template <class Element>
template <class Add>
void Sweep<Element>::add_up(std::size_t k, float z_scale, float* z, std::size_t z_stride, std::size_t rows,
                            const Add& add) {
  sums_.sum(k, z_scale, z, z_stride, [&](std::size_t begin, std::size_t end, float* part) {
    Lane lane(*this, k);
    for_each_block(begin, end, rows, [&](std::size_t first, std::size_t count) { add(first, count, lane, part); });
  });
}

template <class Element>
void Sweep<Element>::power_step(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                                std::size_t y_stride, float z_scale, float* z) {
  pack_x(x, x_stride, k, x_scale);
  add_up(k, z_scale, z, k, block_rows_, [&](std::size_t begin, std::size_t count, Lane& lane, float* part) {
    load_rows(begin, count, lane);
    multiply_rows(begin, count, k, x_scale, lane, y, y_stride);
    multiply_columns(begin, count, k, lane, y, y_stride, part);
  });
}

template <class Element>
void Sweep<Element>::product(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                             std::size_t y_stride) {
  pack_x(x, x_stride, k, x_scale);
  sums_.for_each([&](std::size_t begin, std::size_t end) {
    Lane lane(*this, k);
    for_each_block(begin, end, block_rows_, [&](std::size_t first, std::size_t count) {
      load_rows(first, count, lane);
      multiply_rows(first, count, k, x_scale, lane, y, y_stride);
    });
  });
}

template <class Element>
void Sweep<Element>::transposed_product(const Element* y, std::size_t y_stride, std::size_t k, float z_scale, float* z,
                                        std::size_t z_stride) {
  add_up(k, z_scale, z, z_stride, block_rows_, [&](std::size_t begin, std::size_t count, Lane& lane, float* part) {
    load_rows(begin, count, lane);
    multiply_columns(begin, count, k, lane, y, y_stride, part);
  });
}

template <class Element>
void Sweep<Element>::sketch(const float* signs, std::size_t k, float* z) {
  // There is but one product, and rows that are read as they lie need no room: as many at once as there are, so that
  // the columns of z are read and written once.
  const std::size_t at_once = direct_ ? sums_.lane_rows() : block_rows_;
  add_up(k, 1.0f, z, k, at_once, [&](std::size_t begin, std::size_t count, Lane& lane, float* part) {
    load_rows(begin, count, lane);
    for (std::size_t c = 0; c < k; ++c) {
      const std::size_t first = (c + k - begin % k) % k;  // row of these that column c sums, as every k-th after it
      if (first >= count) continue;
      const std::size_t rows = (count - first + k - 1) / k;
      Element* factors = lane.packed_y.data();
      for (std::size_t i = 0; i < rows; ++i) factors[i] = to_element<Element>(signs[begin + first + i * k]);
      std::fill(factors + rows, factors + round_up(rows, tile_.depth), Element{0});
      add_columns(factors, 1, lane.rows + first * row_stride_ * read_bytes_, k * row_stride_, rows,
                  part + c * sums_.stride());
    }
  });
}

// The block's rows as they lie, or as elements, padded with a zero where pairs do not come out even.
template <class Element>
void Sweep<Element>::load_rows(std::size_t begin, std::size_t count, Lane& lane) const {
  const std::size_t bytes = weight_.cols * size_of(weight_.dtype);
  const char* data = static_cast<const char*>(weight_.data) + begin * bytes;
  lane.rows = data;
  if constexpr (kIsBf16<Element>) {
    if (direct_) return;
    lane.rows = reinterpret_cast<const char*>(lane.converted.data());
    for (std::size_t i = 0; i < count; ++i) {
      Element* out = lane.converted.data() + i * row_stride_;
      kernels_.bf16->round_weight(data + i * bytes, weight_.dtype, weight_scale_, out, weight_.cols);
      std::fill(out + weight_.cols, out + round_up(weight_.cols, tile_.wide), Element{0});
    }
  }
}

template <class Element>
void Sweep<Element>::pack_x(const Element* x, std::size_t stride, std::size_t k, float x_scale) {
  const Groups groups(k, tile_);
  const std::size_t depth = tile_.depth;
  constexpr std::size_t kSteps = 128;
  pool_.run((steps_ + kSteps - 1) / kSteps, [&](std::size_t task) {
    const std::size_t begin = task * kSteps * depth;
    const std::size_t end = std::min(weight_.cols, begin + kSteps * depth);
    for (std::size_t group = 0; group < groups.count; ++group) {
      const std::size_t lanes = groups.size(group);
      Element* out = packed_x_.data() + groups.begin(group) * steps_ * depth + begin * lanes;
      pack(kernels_, x + begin * stride + groups.begin(group), stride, end - begin, lanes, out);
      if (end == weight_.cols) {
        const std::size_t packed = round_up(end, depth) * lanes;
        std::fill(out + packed - begin * lanes, out + (steps_ * depth - begin) * lanes, Element{0});
      }
      if constexpr (!kIsBf16<Element>) {
        for (std::size_t i = 0; i < round_up(end - begin, depth) * lanes; ++i) out[i] *= x_scale;
      }
    }
  });
}

template <class Element>
void Sweep<Element>::multiply_rows(std::size_t begin, std::size_t count, std::size_t k, float x_scale, Lane& lane,
                                   Element* y, std::size_t y_stride) const {
  const Groups groups(k, tile_);
  const std::size_t depth = tile_.depth;
  // Kernels for rows as they are stored cut x into pieces by themselves.
  const std::size_t piece =
      kIsBf16<Element> ? std::max<std::size_t>(16, kXBytes / (k * depth * sizeof(Element))) : steps_;
  for (std::size_t at = 0; at < steps_; at += piece) {
    const std::size_t steps = std::min(piece, steps_ - at);
    for (std::size_t group = 0; group < groups.count; ++group) {
      const Element* b = packed_x_.data() + (groups.begin(group) * steps_ + at * groups.size(group)) * depth;
      const StripFunction multiply = at == 0 ? row_kernels_.assign : tile_.accumulate;
      multiply(lane.rows + at * depth * sizeof(Element), row_stride_, depth, b, steps,
               lane.sums.data() + groups.begin(group), k, count, groups.vectors_of(group));
    }
  }
  if constexpr (kIsBf16<Element>) {  // whose sums are far from float's limits; x would have to be rounded again
    for (std::size_t i = 0; i < count * k; ++i) lane.sums[i] *= x_scale;
  }
  round_to(kernels_, lane.sums.data(), count, k, y + begin * y_stride, y_stride);
}

template <class Element>
void Sweep<Element>::multiply_columns(std::size_t begin, std::size_t count, std::size_t k, Lane& lane, const Element* y,
                                      std::size_t y_stride, float* part) const {
  pack(kernels_, y + begin * y_stride, y_stride, count, k, lane.packed_y.data());
  add_columns(lane.packed_y.data(), k, lane.rows, row_stride_, count, part);
}

// part (k × columns) += factorsᵀ·rows, the rows being `stride` elements apart.
template <class Element>
void Sweep<Element>::add_columns(const Element* factors, std::size_t k, const char* rows, std::size_t stride,
                                 std::size_t count, float* part) const {
  const std::size_t whole = direct_ ? weight_.cols / tile_.wide * tile_.wide : round_up(weight_.cols, tile_.wide);
  row_kernels_.add_transposed(factors, k, rows, stride, count, whole, part, sums_.stride());
  if (whole >= weight_.cols) return;
  // What is left of each row, padded with zeros.
  alignas(64) char rest[kMaxBlockRows * kMaxWide * sizeof(float)] = {};
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(rest + i * tile_.wide * read_bytes_, rows + (i * stride + whole) * read_bytes_,
                (weight_.cols - whole) * read_bytes_);
  }
  row_kernels_.add_transposed(factors, k, rest, tile_.wide, count, tile_.wide, part + whole, sums_.stride());
}

template class Sweep<float>;
template class Sweep<std::uint16_t>;

}  // namespace pissa
