// Weights to order, with a double copy to check against.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/scalar.hpp"
#include "philox.hpp"
#include "weight.hpp"

// Uniform in (-1, 1).
inline float random_value(std::uint64_t key, std::uint64_t index) {
  return static_cast<float>(static_cast<std::int32_t>(pissa::philox(key, index)[0])) * 0x1p-31f;
}

struct TestWeight {
  TestWeight(pissa::DType dtype, std::size_t rows, std::size_t cols, std::uint64_t key)
      : bytes(rows * cols * pissa::size_of(dtype)), values(rows * cols), weight{bytes.data(), dtype, rows, cols} {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float value =
          random_value(key, i) * std::exp(-3.0f * static_cast<float>(i % cols) / static_cast<float>(cols));
      if (dtype == pissa::DType::f32) {
        reinterpret_cast<float*>(bytes.data())[i] = value;
      } else {
        halves()[i] = dtype == pissa::DType::bf16 ? pissa::float_to_bf16(value) : pissa::float_to_f16(value);
      }
      values[i] = at(i);
    }
  }

  std::uint16_t* halves() { return reinterpret_cast<std::uint16_t*>(bytes.data()); }

  double at(std::size_t i) {
    if (weight.dtype == pissa::DType::f32) return reinterpret_cast<const float*>(bytes.data())[i];
    return weight.dtype == pissa::DType::bf16 ? pissa::bf16_to_float(halves()[i]) : pissa::f16_to_float(halves()[i]);
  }

  std::vector<unsigned char> bytes;
  std::vector<double> values;
  pissa::Weight weight;
};

inline const char* name_of(pissa::DType dtype) {
  return dtype == pissa::DType::f32 ? "f32" : dtype == pissa::DType::f16 ? "f16" : "bf16";
}
