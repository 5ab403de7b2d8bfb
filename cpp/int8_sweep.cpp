#include "int8_sweep.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/int8.hpp"
#include "packing.hpp"

namespace pissa {
namespace {

constexpr std::size_t kBlockRows = kBlockPanels * kPanelRows;
static_assert(kInt8BlockRows % kBlockRows == 0, "whole blocks of bytes");

// Of what is rounded off: uniform over a step.
constexpr double kVariance = 1.0 / 12;

std::size_t groups_of(const Weight& weight) { return (weight.cols + kGroupColumns - 1) / kGroupColumns; }
std::size_t pieces_of(const Weight& weight) { return (weight.cols + kPieceRows - 1) / kPieceRows; }
std::size_t blocks_of(const Weight& weight) { return (weight.rows + kBlockRows - 1) / kBlockRows; }
std::size_t code_bytes(const Weight& weight) { return blocks_of(weight) * groups_of(weight) * kGroupStride; }
std::size_t part_stride(const Weight& weight) { return groups_of(weight) * kGroupColumns + 16; }

}  // namespace

template <class Element>
struct Int8Sweep<Element>::Lane {
  Lane(const Int8Sweep& sweep, std::size_t k)
      : values(sweep.pool_.scratch(), kInt8BlockRows * k), codes(sweep.pool_.scratch(), kInt8BlockRows * k) {}
  Buffer<float> values;       // of Y, row-major
  Buffer<std::int8_t> codes;  // the same as an operand
};

template <class Element>
Int8Sweep<Element>::Int8Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block)
    : kernels_(kernels),
      pool_(pool),
      weight_(weight),
      groups_(groups_of(weight)),
      pieces_(pieces_of(weight)),
      sums_(pool, weight, kInt8BlockRows, max_block, part_stride(weight)),
      codes_(pool.scratch(), code_bytes(weight)),
      scales_(pool.scratch(), blocks_of(weight) * kBlockRows),
      offsets_(pool.scratch(), pieces_ * blocks_of(weight) * kBlockRows),
      x_(pool.scratch(), pieces_ * kPieceRows * max_block),
      x_scales_(pool.scratch(), pieces_ * max_block) {
  std::vector<float> squares(scales_.size());
  pool_.run(blocks_of(weight), [&](std::size_t block) {
    const std::size_t begin = block * kBlockRows, end = std::min(weight_.rows, begin + kBlockRows);
    for (std::size_t i = begin; i < end; i += kPanelRows) {
      kernels_.int8->code_panel(static_cast<const char*>(weight_.data) + i * weight_.cols * size_of(weight_.dtype),
                                weight_.dtype, weight_.cols, std::min(kPanelRows, end - i),
                                codes_.data() + block * groups_ * kGroupStride + (i - begin) / kPanelRows * kGroupBytes,
                                scales_.data() + i, squares.data() + i, offsets_.data() + i, scales_.size());
    }
  });
  double variance = 0;
  for (std::size_t i = 0; i < weight.rows; ++i) {
    variance += kVariance * squared_scale(i);
    energy_ += squared_scale(i) * static_cast<double>(squares[i]);
  }
  noise_ = std::sqrt(variance);
}

template <class Element>
double Int8Sweep<Element>::cost(const Buffer<float>& left, std::size_t stride, std::size_t rank) const {
  double sum = 0;
  for (std::size_t i = 0; i < weight_.rows; ++i) {
    double squares = 0;
    for (std::size_t t = 0; t < rank; ++t) {
      squares += static_cast<double>(left[i * stride + t]) * static_cast<double>(left[i * stride + t]);
    }
    sum += kVariance * squared_scale(i) * squares;
  }
  return sum * static_cast<double>(weight_.cols) + noise_ * noise_ * static_cast<double>(rank);
}

template <class Element>
std::size_t Int8Sweep<Element>::workspace_bytes(const Weight& weight, std::size_t max_block, unsigned threads) {
  const std::size_t part = Scratch::rounded(sizeof(float) * part_stride(weight) * max_block);
  const std::size_t lane = Scratch::rounded(sizeof(float) * kInt8BlockRows * max_block) +
                           Scratch::rounded(kInt8BlockRows * max_block) + part;
  return Scratch::rounded(code_bytes(weight)) + Scratch::rounded(sizeof(float) * blocks_of(weight) * kBlockRows) +
         Scratch::rounded(pieces_of(weight) * kPieceRows * max_block) +
         Scratch::rounded(sizeof(std::int32_t) * pieces_of(weight) * blocks_of(weight) * kBlockRows) +
         Scratch::rounded(sizeof(float) * pieces_of(weight) * max_block) + part + threads * lane;
}

template <class Element>
void Int8Sweep<Element>::code_x(const Element* x, std::size_t stride, std::size_t k) {
  pool_.run(pieces_, [&](std::size_t piece) {
    const std::size_t begin = piece * kPieceRows, count = std::min(kPieceRows, weight_.cols - begin);
    float values[kPieceRows * kOperandColumns];
    for (std::size_t c = 0; c < k; c += kOperandColumns) {
      for (std::size_t i = 0; i < count; ++i) {
        const Element* row = x + (begin + i) * stride + c;
        for (std::size_t j = 0; j < kOperandColumns; ++j) values[i * kOperandColumns + j] = to_float(row[j]);
      }
      std::uint8_t* codes = x_.data() + (piece * k + c) * kPieceRows;
      kernels_.int8->code_x(values, kOperandColumns, count, codes, x_scales_.data() + piece * k + c);
      std::fill(codes + round_up(count, 4) * kOperandColumns, codes + kPieceRows * kOperandColumns, std::uint8_t{0});
    }
  });
}

template <class Element>
void Int8Sweep<Element>::multiply_rows(std::size_t begin, std::size_t count, std::size_t k, float x_scale, Lane& lane,
                                       Element* y, std::size_t y_stride) const {
  for (std::size_t first = 0; first < count; first += kBlockRows) {
    const std::size_t panels = (std::min(kBlockRows, count - first) + kPanelRows - 1) / kPanelRows;
    for (std::size_t piece = 0; piece < pieces_; ++piece) {
      const std::size_t group = piece * kPieceGroups, groups = std::min(kPieceGroups, groups_ - group);
      for (std::size_t c = 0; c < k; c += kOperandColumns) {
        kernels_.int8->multiply(codes_from(begin + first) + group * kGroupStride, panels, groups,
                                offsets_.data() + piece * scales_.size() + begin + first,
                                x_.data() + (piece * k + c) * kPieceRows, x_scales_.data() + piece * k + c, piece > 0,
                                lane.values.data() + first * k + c, k);
      }
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    const float scale = scales_[begin + i] * x_scale;
    for (std::size_t c = 0; c < k; ++c) lane.values[i * k + c] *= scale;
  }
  round_to(kernels_, lane.values.data(), count, k, y + begin * y_stride, y_stride);
}

template <class Element>
void Int8Sweep<Element>::multiply_columns(std::size_t begin, std::size_t count, std::size_t k, Lane& lane,
                                          const Element* y, std::size_t y_stride, float* part) const {
  for (std::size_t i = 0; i < count; ++i) {
    const Element* row = y + (begin + i) * y_stride;
    for (std::size_t c = 0; c < k; ++c) lane.values[i * k + c] = to_float(row[c]) * scales_[begin + i];
  }
  const std::size_t panels = (count + kPanelRows - 1) / kPanelRows;
  for (std::size_t c = 0; c < k; c += kOperandColumns) {
    float scale[kOperandColumns];
    std::int32_t offset[kOperandColumns];
    kernels_.int8->code_y(lane.values.data() + c, k, count, lane.codes.data(), scale, offset);
    kernels_.int8->add_transposed(codes_from(begin), panels, groups_ * kGroupStride, groups_, lane.codes.data(), scale,
                                  offset, part + c * sums_.stride(), sums_.stride());
  }
}

template <class Element>
void Int8Sweep<Element>::power_step(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                                    std::size_t y_stride, float z_scale, float* z) {
  code_x(x, x_stride, k);
  sums_.sum(k, z_scale, z, k, [&](std::size_t begin, std::size_t end, float* part) {
    Lane lane(*this, k);
    for (; begin < end; begin += kInt8BlockRows) {
      const std::size_t count = std::min(kInt8BlockRows, end - begin);
      multiply_rows(begin, count, k, x_scale, lane, y, y_stride);
      multiply_columns(begin, count, k, lane, y, y_stride, part);
    }
  });
}

template <class Element>
void Int8Sweep<Element>::product(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                                 std::size_t y_stride) {
  code_x(x, x_stride, k);
  sums_.for_each([&](std::size_t begin, std::size_t end) {
    Lane lane(*this, k);
    for (; begin < end; begin += kInt8BlockRows) {
      multiply_rows(begin, std::min(kInt8BlockRows, end - begin), k, x_scale, lane, y, y_stride);
    }
  });
}

template <class Element>
void Int8Sweep<Element>::transposed_product(const Element* y, std::size_t y_stride, std::size_t k, float z_scale,
                                            float* z, std::size_t z_stride) {
  sums_.sum(k, z_scale, z, z_stride, [&](std::size_t begin, std::size_t end, float* part) {
    Lane lane(*this, k);
    for (; begin < end; begin += kInt8BlockRows) {
      const std::size_t count = std::min(kInt8BlockRows, end - begin);
      multiply_columns(begin, count, k, lane, y, y_stride, part);
    }
  });
}

template class Int8Sweep<float>;
template class Int8Sweep<std::uint16_t>;

}  // namespace pissa
