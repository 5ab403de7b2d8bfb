// A weight as it lies in a checkpoint: row-major, contiguous, in its own dtype.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pissa {

enum class DType : std::uint8_t { f32, f16, bf16 };

inline std::size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Weight {
  void* data;
  DType dtype;
  std::size_t rows;
  std::size_t cols;
};

}  // namespace pissa
