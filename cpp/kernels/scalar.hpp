// Conversions of one value; round to nearest even. Internal linkage: see tiles.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "weight.hpp"

namespace pissa {
namespace {

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(std::uint16_t bits) { return bits_to_float(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t float_to_bf16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float f16_to_float(std::uint16_t bits) {
  // Shift exponent and mantissa into place and let one multiplication by 2^112 rebias them, denormals included.
  const std::uint32_t magnitude = bits & 0x7fffu;
  const float rebiased = bits_to_float(magnitude << 13) * 0x1p112f;
  const float value = magnitude >= 0x7c00u ? bits_to_float((magnitude << 13) | 0x7f800000u) : rebiased;
  return bits_to_float(float_to_bits(value) | (static_cast<std::uint32_t>(bits & 0x8000u) << 16));
}

inline std::uint16_t float_to_f16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below the normal range: adding 0.5 puts the last half-precision bit at float's last, and rounds there.
    const std::uint32_t denormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<std::uint16_t>(sign | denormal);
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float rounded_to(DType dtype, float value) {
  if (dtype == DType::f32) return value;
  return dtype == DType::bf16 ? bf16_to_float(float_to_bf16(value)) : f16_to_float(float_to_f16(value));
}

// Values as the dtype holds them.
inline void store_as(DType dtype, const float* values, std::size_t count, void* place) {
  if (dtype == DType::f32) {
    std::memcpy(place, values, count * sizeof *values);
    return;
  }
  auto* halves = static_cast<std::uint16_t*>(place);
  for (std::size_t i = 0; i < count; ++i) {
    halves[i] = dtype == DType::f16 ? float_to_f16(values[i]) : float_to_bf16(values[i]);
  }
}

}  // namespace
}  // namespace pissa
