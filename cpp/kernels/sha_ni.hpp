// The compression function of SHA-256 with x86's SHA extensions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pissa {

bool sha_ni_available();

// state ← state after `blocks` blocks of 64 bytes.
void compress(std::uint32_t* state, const std::uint8_t* data, std::size_t blocks);

// The same for two streams at once.
void compress_two(std::uint32_t* first, const std::uint8_t* a, std::uint32_t* second, const std::uint8_t* b,
                  std::size_t blocks);

}  // namespace pissa
