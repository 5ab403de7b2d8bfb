// 4-bit codes of blocks of values, in vectors that each instruction set's compiler cuts to its own width. Internal
// linkage: see tiles.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "four_bit.hpp"
#include "kernels/scalar.hpp"

namespace pissa {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kLanes = 16;
#elif defined(__AVX__)
constexpr std::size_t kLanes = 8;
#else
constexpr std::size_t kLanes = 4;
#endif
using Floats [[gnu::vector_size(4 * kLanes)]] = float;
using Ints [[gnu::vector_size(4 * kLanes)]] = std::int32_t;
static_assert(kFourBitBlock % kLanes == 0, "a block is whole vectors");

// The largest magnitude; NaN where a value is not finite.
inline float block_absmax(const float* x) {
  Floats largest = {}, bad = {};
  for (std::size_t at = 0; at < kFourBitBlock; at += kLanes) {
    Floats value;
    std::memcpy(&value, x + at, sizeof value);
    const Floats magnitude = value < 0 ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    bad += value * 0.0f;
  }
  float result = 0, sum = 0;
  for (std::size_t i = 0; i < kLanes; ++i) {
    result = std::max(result, largest[i]);
    sum += bad[i];
  }
  return result + sum;
}

// How many of the bounds each value exceeds: its place among the sorted code values.
inline void find_places(const float* x, const float* bounds, std::int32_t* places) {
  for (std::size_t at = 0; at < kFourBitBlock; at += kLanes) {
    Floats value;
    std::memcpy(&value, x + at, sizeof value);
    Ints place = {};
    for (std::size_t b = 0; b < kFourBitCodes - 1; ++b) place -= value > bounds[b];
    std::memcpy(places + at, &place, sizeof place);
  }
}

// See Kernels::quantise.
template <class Widen>
bool quantise_with(const Widen& widen, const void* src, DType dtype, std::size_t count, const FourBitCode& code,
                   std::uint8_t* packed, float* absmax) {
  alignas(64) float x[kFourBitBlock];
  alignas(64) std::int32_t place[kFourBitBlock];
  float sum = 0;  // of zeros, or NaN
  for (std::size_t at = 0; at < count; at += kFourBitBlock) {
    const std::size_t size = std::min(kFourBitBlock, count - at);
    const bool whole = size == kFourBitBlock;
    if (!whole) std::fill(x, x + kFourBitBlock, 0.0f);
    widen(static_cast<const char*>(src) + at * size_of(dtype), dtype, x, size);
    const float largest = block_absmax(x);
    sum += largest * 0.0f;
    // bitsandbytes multiplies whole blocks by the reciprocal, but divides what is left over at the end.
    const float divisor = std::max(largest, kSmallestAbsmax);
    *absmax++ = whole ? largest : divisor;
    if (whole) {
      const float factor = 1.0f / divisor;
      for (float& value : x) value *= factor;
    } else {
      for (float& value : x) value /= divisor;
    }
    find_places(x, code.bounds, place);
    std::uint8_t bytes[kFourBitBlock / 2];
    for (std::size_t i = 0; i < sizeof bytes; ++i) {
      bytes[i] = static_cast<std::uint8_t>(place[2 * i] << 4 | place[2 * i + 1]);
    }
    std::memcpy(packed, bytes, (size + 1) / 2);
    if (!code.sorted) {
      for (std::size_t i = 0; i < (size + 1) / 2; ++i) packed[i] = code.pairs[packed[i]];
    }
    packed += (size + 1) / 2;
  }
  return sum == 0.0f;
}

// See Kernels::read_codes.
inline void read_codes_one_by_one(const std::uint8_t* packed, const float* absmax, std::size_t count,
                                  const FourBitCode& code, DType dtype, float* q) {
  for (std::size_t at = 0; at < count; at += kFourBitBlock, ++absmax) {
    float scaled[kFourBitCodes];
    for (std::size_t i = 0; i < kFourBitCodes; ++i) scaled[i] = rounded_to(dtype, code.values[i] * *absmax);
    const std::size_t end = std::min(count, at + kFourBitBlock);
    for (std::size_t i = at; i < end; ++i) q[i] = scaled[i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15];
  }
}

}  // namespace
}  // namespace pissa
