// Power steps over a weight's copy in bytes: half of bf16's bytes, and twice its products at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "lane_sums.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// Y's columns over so many rows of W are rounded together, and multiplied at once: half of a core's second-level cache
// holds their bytes of all but the widest weights, and there are enough of them to be worth reading and writing a part
// of Z.
constexpr std::size_t kInt8BlockRows = 128;

// What Sweep's products are, but that W's rows, X's columns by pieces, and those of Y, times W's rows' scales, by
// blocks are multiplied as multiples, up to 127, of a fraction of their largest value (absmax quantisation, as of
// LLM.int8(), arXiv 2208.07339): next to independent errors of about a hundredth. A Krylov basis grows by such products
// as well as by exact ones as long as what it looks for stands out of their noise.
//
// Sums of bytes are exact, and what is done in float has its fixed order: results are the same for any number of
// threads.
template <class Element>
class Int8Sweep {
 public:
  // Copies the weight, whose values must be finite. `kernels` have products of bytes.
  Int8Sweep(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t max_block);

  static std::size_t workspace_bytes(const Weight& weight, std::size_t max_block, unsigned threads);

  // ‖W‖², Frobenius.
  double energy() const { return energy_; }
  // How long W·x is expected to be for an x of length one that W maps to zero, from W's rounding alone.
  double noise() const { return noise_; }
  // What W's rounding, E, is expected to cost triplets in energy: ‖Eᵀ·u‖² + ‖E·v‖² for each. u are the columns of
  // `left` (W's rows × rank, row-major, `stride` apart), of length one.
  double cost(const Buffer<float>& left, std::size_t stride, std::size_t rank) const;

  void power_step(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y,
                  std::size_t y_stride, float z_scale, float* z);
  void product(const Element* x, std::size_t x_stride, std::size_t k, float x_scale, Element* y, std::size_t y_stride);
  void transposed_product(const Element* y, std::size_t y_stride, std::size_t k, float z_scale, float* z,
                          std::size_t z_stride);

 private:
  struct Lane;
  void code_x(const Element* x, std::size_t stride, std::size_t k);
  void multiply_rows(std::size_t begin, std::size_t count, std::size_t k, float x_scale, Lane& lane, Element* y,
                     std::size_t y_stride) const;
  void multiply_columns(std::size_t begin, std::size_t count, std::size_t k, Lane& lane, const Element* y,
                        std::size_t y_stride, float* part) const;
  double squared_scale(std::size_t row) const {
    return static_cast<double>(scales_[row]) * static_cast<double>(scales_[row]);
  }
  const std::int8_t* codes_from(std::size_t row) const { return codes_.data() + row * groups_ * kGroupColumns; }

  const Kernels& kernels_;
  ThreadPool& pool_;
  Weight weight_;
  std::size_t groups_;  // of W's columns
  std::size_t pieces_;
  LaneSums sums_;
  Buffer<std::int8_t> codes_;     // block after block
  Buffer<float> scales_;          // of W's rows
  Buffer<std::int32_t> offsets_;  // [piece][row of W]
  Buffer<std::uint8_t> x_;        // [piece][16 columns], each an operand
  Buffer<float> x_scales_;        // [piece][column]
  double energy_ = 0, noise_ = 0;
};

}  // namespace pissa
