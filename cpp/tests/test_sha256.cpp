// SHA-256 against the examples of FIPS 180-2 and, for pairs and pieces, against itself in one piece.
#include "sha256.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "check.hpp"
#include "philox.hpp"

using pissa::Sha256;

namespace {

std::string hex(const Sha256& digest) {
  std::string text;
  char pair[3];
  for (const std::uint8_t byte : digest.digest()) {
    std::snprintf(pair, sizeof pair, "%02x", byte);
    text += pair;
  }
  return text;
}

std::string of(const void* data, std::size_t bytes) {
  Sha256 digest;
  digest.update(data, bytes);
  return hex(digest);
}

void check_examples() {
  const std::string two_blocks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", million(1000000, 'a');
  const std::pair<std::string, const char*> examples[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {two_blocks, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto& [text, expected] : examples) {
    CHECK(of(text.data(), text.size()) == expected, "%zu bytes", text.size());
  }
}

// Every length around the block's, in exact allocations, so that a byte read past the end shows.
void check_lengths() {
  for (std::size_t length = 0; length < 300; ++length) {
    std::vector<std::uint8_t> a(length), b(300 - length);
    for (std::size_t i = 0; i < 300; ++i) (i < length ? a[i] : b[i - length]) = pissa::philox(1, i)[0] & 0xff;
    Sha256 first, second;
    Sha256::update_both(first, a.data(), a.size(), second, b.data(), b.size());
    CHECK(hex(first) == of(a.data(), a.size()) && hex(second) == of(b.data(), b.size()), "length %zu", length);
    for (const std::size_t cut : {length / 3, length / 2, length - length / 7}) {
      Sha256 whole, other;
      Sha256::update_both(whole, a.data(), cut, other, b.data(), 0);
      Sha256::update_both(other, b.data(), b.size(), whole, a.data() + cut, length - cut);
      CHECK(hex(whole) == hex(first) && hex(other) == hex(second), "length %zu cut at %zu", length, cut);
    }
  }
}

// Over 2^32 bits, where the length needs its upper half.
void check_long() {
  const std::vector<std::uint8_t> zeros(1u << 20);
  Sha256 first, second;
  for (int i = 0; i < 513; ++i) Sha256::update_both(first, zeros.data(), zeros.size(), second, zeros.data(), 1);
  CHECK(hex(first) == "a3e2acbb469e4e59dde406f912e754c933c1ac0fb0092a3634d61d5073309c0c", "513 MiB of zeros: %s",
        hex(first).c_str());
  CHECK(hex(second) == of(zeros.data(), 513), "513 zeros, one by one");
}

}  // namespace

int main() {
  if (!Sha256::available()) {
    std::printf("this CPU has no instructions for SHA-256\n");
    return 0;
  }
  check_examples();
  check_lengths();
  check_long();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
