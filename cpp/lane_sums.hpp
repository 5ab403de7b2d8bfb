// Z = Wᵀ·Y as a sum of parts, each over a fixed range of W's rows: a lane. The parts are added in their order, whatever
// thread computes them, so that the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "buffer.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

class LaneSums {
 public:
  // Lanes are whole blocks of rows. The parts' rows, so many as there are columns of Y, are `stride` apart: no power of
  // two, and at least as long as what is added to them.
  LaneSums(ThreadPool& pool, const Weight& weight, std::size_t block_rows, std::size_t columns, std::size_t stride)
      : pool_(pool), rows_(weight.rows), cols_(weight.cols), stride_(stride) {
    const std::size_t lanes = min_lanes(weight, columns);
    const std::size_t rows = std::min((weight.rows + lanes - 1) / lanes, kLaneRows);
    lane_rows_ = (std::max<std::size_t>(rows, 1) + block_rows - 1) / block_rows * block_rows;
  }

  static std::size_t min_lanes(const Weight& weight, std::size_t columns) {
    const std::size_t elements = kLaneElements * std::max<std::size_t>(1, columns / 16);
    return std::clamp<std::size_t>(weight.rows * weight.cols / elements, 1, kLanes);
  }

  std::size_t lane_rows() const { return lane_rows_; }
  std::size_t stride() const { return stride_; }

  // Calls task(first row, end) for every lane.
  template <class Task>
  void for_each(const Task& task) const {
    pool_.run(lanes(), [&](std::size_t lane) { task(lane * lane_rows_, std::min(rows_, (lane + 1) * lane_rows_)); });
  }

  // z (cols × k, its rows z_stride apart) = scale · the sum of what add(first row, end, part) adds to each lane's part,
  // which is Zᵀ: a row of W can then be read as it lies.
  template <class Add>
  void sum(std::size_t k, float scale, float* z, std::size_t z_stride, const Add& add) const {
    const std::size_t size = stride_ * k;
    Buffer<float> sum(pool_.scratch(), size);
    std::atomic<std::size_t> added{0};
    for_each([&](std::size_t begin, std::size_t end) {
      const std::size_t lane = begin / lane_rows_;
      Buffer<float> own(pool_.scratch(), lane == 0 ? 0 : size);
      float* part = lane == 0 ? sum.data() : own.data();
      std::memset(part, 0, sizeof(float) * size);
      add(begin, end, part);
      // In their order, which is also that in which tasks are handed out: the one waited for is always at work.
      wait_until([&] { return added.load(std::memory_order_acquire) == lane; });
      if (lane > 0) add_to(sum.data(), part, size);
      added.store(lane + 1, std::memory_order_release);
    });
    transpose(sum.data(), k, scale, z, z_stride);
  }

 private:
  // Many blocks to a lane, so that adding up the parts is little work.
  static constexpr std::size_t kLaneRows = 512;
  static constexpr std::size_t kLanes = 8;  // at least, where there is work enough for each
  static constexpr std::size_t kLaneElements = 64u << 10;

  std::size_t lanes() const { return (rows_ + lane_rows_ - 1) / lane_rows_; }

  // In vectors: left to itself, the compiler adds one by one.
  static void add_to(float* __restrict sum, const float* __restrict part, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) sum[i] += part[i];
  }

  void transpose(const float* sum, std::size_t k, float scale, float* z, std::size_t z_stride) const {
    constexpr std::size_t kColumns = 256;  // per task
    pool_.run((cols_ + kColumns - 1) / kColumns, [&](std::size_t task) {
      const std::size_t end = std::min(cols_, (task + 1) * kColumns);
      for (std::size_t begin = task * kColumns; begin < end; begin += 16) {
        const std::size_t stop = std::min(end, begin + 16);
        for (std::size_t c = 0; c < k; ++c) {
          for (std::size_t j = begin; j < stop; ++j) z[j * z_stride + c] = sum[c * stride_ + j] * scale;
        }
      }
    });
  }

  ThreadPool& pool_;
  std::size_t rows_, cols_, stride_, lane_rows_;
};

}  // namespace pissa
