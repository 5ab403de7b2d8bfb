// Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): random bits as a function of
// a key and a counter, so that any element can be drawn alone, in any order, on any machine, with the same result.
#pragma once

#include <array>
#include <cstdint>

namespace pissa {

using Philox4 = std::array<std::uint32_t, 4>;

inline Philox4 philox(std::uint64_t key, std::uint64_t counter) {
  Philox4 x{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0};
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * x[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * x[2];
    x = {static_cast<std::uint32_t>(p1 >> 32) ^ x[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ x[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

// Element `index` of a random ±1 (Rademacher) sequence is bit `index % 128` of block `index / 128`. Signs sketch as
// well as Gaussians do, are exact in every dtype, and need no library function that differs between platforms.
inline void random_signs(std::uint64_t key, std::uint64_t begin, std::uint64_t count, float* out) {
  Philox4 block{};
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t index = begin + i;
    if (i == 0 || index % 128 == 0) block = philox(key, index / 128);
    out[i] = (block[index % 128 / 32] >> (index % 32)) & 1u ? 1.0f : -1.0f;
  }
}

}  // namespace pissa
