// SHA-256 (FIPS 180-4) with the CPU's own instructions, over one stream or over two at the same time.
//
// Every round waits for the one before it, so one stream leaves half of the unit idle: two that are interleaved in one
// thread take little longer than one. Where the CPU lacks the instructions there is nothing here (the Python side then
// uses hashlib).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pissa {

class Sha256 {
 public:
  // Whether this CPU has the instructions; without them nothing else here may be called.
  static bool available();

  void update(const void* data, std::size_t bytes);

  // first.update(a, a_bytes) and second.update(b, b_bytes), interleaved; the two must be different objects.
  static void update_both(Sha256& first, const void* a, std::size_t a_bytes, Sha256& second, const void* b,
                          std::size_t b_bytes);

  // Of all bytes so far; more may follow.
  std::array<std::uint8_t, 32> digest() const;

 private:
  static constexpr std::size_t kBlock = 64;
  using State = std::array<std::uint32_t, 8>;

  const std::uint8_t* complete_block(const std::uint8_t* data, std::size_t& bytes);
  void keep(const std::uint8_t* data, std::size_t bytes);

  State state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, kBlock> rest_{};  // the bytes after the last whole block
  std::size_t kept_ = 0;
  std::uint64_t length_ = 0;
};

}  // namespace pissa
