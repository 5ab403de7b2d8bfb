#include "sha256.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/sha_ni.hpp"

namespace pissa {

#if defined(PISSA_X86)
bool Sha256::available() { return sha_ni_available(); }
#else
bool Sha256::available() { return false; }
void compress(std::uint32_t*, const std::uint8_t*, std::size_t) {}
void compress_two(std::uint32_t*, const std::uint8_t*, std::uint32_t*, const std::uint8_t*, std::size_t) {}
#endif

// Fills the block that is begun, if there is one; returns where `data` goes on.
const std::uint8_t* Sha256::complete_block(const std::uint8_t* data, std::size_t& bytes) {
  length_ += bytes;
  if (kept_ == 0) return data;
  const std::size_t count = std::min(kBlock - kept_, bytes);
  keep(data, count);
  if (kept_ == kBlock) {
    compress(state_.data(), rest_.data(), 1);
    kept_ = 0;
  }
  bytes -= count;
  return data + count;
}

void Sha256::keep(const std::uint8_t* data, std::size_t bytes) {
  if (bytes > 0) std::memcpy(rest_.data() + kept_, data, bytes);
  kept_ += bytes;
}

void Sha256::update(const void* data, std::size_t bytes) {
  const std::uint8_t* next = complete_block(static_cast<const std::uint8_t*>(data), bytes);
  const std::size_t blocks = bytes / kBlock;
  compress(state_.data(), next, blocks);
  keep(next + blocks * kBlock, bytes % kBlock);
}

void Sha256::update_both(Sha256& first, const void* a, std::size_t a_bytes, Sha256& second, const void* b,
                         std::size_t b_bytes) {
  const std::uint8_t* next_a = first.complete_block(static_cast<const std::uint8_t*>(a), a_bytes);
  const std::uint8_t* next_b = second.complete_block(static_cast<const std::uint8_t*>(b), b_bytes);
  const std::size_t blocks_a = a_bytes / kBlock, blocks_b = b_bytes / kBlock, both = std::min(blocks_a, blocks_b);
  compress_two(first.state_.data(), next_a, second.state_.data(), next_b, both);
  compress(first.state_.data(), next_a + both * kBlock, blocks_a - both);
  compress(second.state_.data(), next_b + both * kBlock, blocks_b - both);
  first.keep(next_a + blocks_a * kBlock, a_bytes % kBlock);
  second.keep(next_b + blocks_b * kBlock, b_bytes % kBlock);
}

std::array<std::uint8_t, 32> Sha256::digest() const {
  // A one, zeros up to the end of a block, and in its last eight bytes the length in bits.
  std::array<std::uint8_t, 2 * kBlock> end{};
  std::copy_n(rest_.begin(), kept_, end.begin());
  end[kept_] = 0x80;
  const std::size_t blocks = kept_ + 1 + 8 <= kBlock ? 1 : 2;
  for (std::size_t i = 0; i < 8; ++i) {
    end[blocks * kBlock - 1 - i] = static_cast<std::uint8_t>(length_ * 8 >> 8 * i);
  }
  State state = state_;
  compress(state.data(), end.data(), blocks);
  std::array<std::uint8_t, 32> result;
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i] = static_cast<std::uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
  }
  return result;
}

}  // namespace pissa
