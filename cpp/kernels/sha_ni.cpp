#include "kernels/sha_ni.hpp"

#include <cpuid.h>
#include <immintrin.h>

namespace pissa {
namespace {

// FIPS 180-4, 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// Bytes ahead of the rounds that are fetched: the data was written by another core or the disk, and the hardware's
// own prefetching does not keep up with two streams.
constexpr std::size_t kAhead = 1024;

// The instructions want the eight words of a state as (A B E F) and (C D G H), the first of them in the highest lane.
struct State {
  __m128i abef, cdgh;
};

State load(const std::uint32_t* words) {
  const __m128i dcba = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  const __m128i hgfe = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 4));
  const __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1), efgh = _mm_shuffle_epi32(hgfe, 0x1B);
  return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xF0)};
}

void store(const State& state, std::uint32_t* words) {
  const __m128i feba = _mm_shuffle_epi32(state.abef, 0x1B), dchg = _mm_shuffle_epi32(state.cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 4), _mm_alignr_epi8(dchg, feba, 8));
}

// One block of each of `N` streams, four rounds at a time of all of them.
template <int N>
inline __attribute__((always_inline)) void block(State (&states)[N], const std::uint8_t* const (&data)[N]) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  State now[N];
  __m128i w[N][4];  // the last sixteen words of the message schedule
  for (int n = 0; n < N; ++n) now[n] = states[n];
#pragma GCC unroll 16
  for (int group = 0; group < 16; ++group) {
    const __m128i k = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound + 4 * group));
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      __m128i& words = w[n][group % 4];
      if (group < 4) {
        const auto* place = reinterpret_cast<const __m128i*>(data[n] + 16 * group);
        words = _mm_shuffle_epi8(_mm_loadu_si128(place), big_endian);
      } else {
        const __m128i last = w[n][(group + 3) % 4];
        const __m128i seventh = _mm_alignr_epi8(last, w[n][(group + 2) % 4], 4);
        words = _mm_sha256msg1_epu32(words, w[n][(group + 1) % 4]);
        words = _mm_sha256msg2_epu32(_mm_add_epi32(words, seventh), last);
      }
      const __m128i sum = _mm_add_epi32(words, k);
      now[n].cdgh = _mm_sha256rnds2_epu32(now[n].cdgh, now[n].abef, sum);
      now[n].abef = _mm_sha256rnds2_epu32(now[n].abef, now[n].cdgh, _mm_shuffle_epi32(sum, 0x0E));
    }
  }
  for (int n = 0; n < N; ++n) {
    states[n].abef = _mm_add_epi32(states[n].abef, now[n].abef);
    states[n].cdgh = _mm_add_epi32(states[n].cdgh, now[n].cdgh);
  }
}

template <int N>
void compress_streams(std::uint32_t* const (&words)[N], const std::uint8_t* (&&data)[N], std::size_t blocks) {
  State states[N];
  for (int n = 0; n < N; ++n) states[n] = load(words[n]);
  for (std::size_t i = 0; i < blocks; ++i) {
    for (int n = 0; n < N; ++n) _mm_prefetch(reinterpret_cast<const char*>(data[n] + kAhead), _MM_HINT_T0);
    block<N>(states, data);
    for (int n = 0; n < N; ++n) data[n] += 64;
  }
  for (int n = 0; n < N; ++n) store(states[n], words[n]);
}

}  // namespace

bool sha_ni_available() {
  // Neither GCC 12 nor its __builtin_cpu_supports knows the name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & bit_SHA) != 0 && __builtin_cpu_supports("sse4.1") &&
         __builtin_cpu_supports("ssse3");
}

void compress(std::uint32_t* state, const std::uint8_t* data, std::size_t blocks) {
  compress_streams<1>({state}, {data}, blocks);
}

void compress_two(std::uint32_t* first, const std::uint8_t* a, std::uint32_t* second, const std::uint8_t* b,
                  std::size_t blocks) {
  compress_streams<2>({first, second}, {a, b}, blocks);
}

}  // namespace pissa
