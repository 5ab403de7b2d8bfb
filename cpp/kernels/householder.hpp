// Householder's reduction of a symmetric matrix to tridiagonal form. Internal linkage: see tiles.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

namespace pissa {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kFloats = 16;
#elif defined(__AVX__)
constexpr std::size_t kFloats = 8;
#else
constexpr std::size_t kFloats = 4;
#endif
using Floats __attribute__((vector_size(kFloats * sizeof(float)))) = float;

inline Floats load_floats(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

inline void store_floats(float* to, Floats floats) { std::memcpy(to, &floats, sizeof floats); }

inline float sum_of(Floats floats) {
  float values[kFloats];
  store_floats(values, floats);
  for (std::size_t half = kFloats / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// Rows [i, i + Rows) and columns [begin, end) of a: a −= v·wᵀ + w·vᵀ, and what they add to product = a·next. `Mirrored`
// columns stand for rows, too, which are not stored.
template <std::size_t Rows, bool Mirrored>
void update_and_multiply(float* __restrict a, std::size_t stride, std::size_t i, std::size_t begin, std::size_t end,
                         const float* __restrict v, const float* __restrict w, const float* __restrict next,
                         float* __restrict product) {
  Floats sums[Rows] = {};
  for (std::size_t j = begin; j < end; j += kFloats) {
    const Floats column_v = load_floats(v + j), column_w = load_floats(w + j), column_next = load_floats(next + j);
    Floats sum = load_floats(product + j);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < Rows; ++r) {
      float* place = a + (i + r) * stride + j;
      const Floats value = load_floats(place) - v[i + r] * column_w - w[i + r] * column_v;
      store_floats(place, value);
      sum += value * next[i + r];
      if constexpr (Mirrored) sums[r] += value * column_next;
    }
    store_floats(product + j, sum);
  }
  if constexpr (Mirrored) {
    for (std::size_t r = 0; r < Rows; ++r) product[i + r] += sum_of(sums[r]);
  }
}

inline float dot_product(const float* a, const float* b, std::size_t begin, std::size_t end) {
  Floats sums = {};
  for (std::size_t j = begin; j < end; j += kFloats) sums += load_floats(a + j) * load_floats(b + j);
  return sum_of(sums);
}

// Up to here, both halves of the matrix are updated: they lie in cache, and rows need not be summed up.
constexpr std::size_t kWhole = 256;

// A square beside a largest element of order one. Smaller ones would be sums of denormals, and reflections by them not
// orthogonal.
constexpr float kNoSquare = 0x1p-100f;

// See Kernels::tridiagonalize. LAPACK's sytrd reads the matrix for half of its work and multiplies panels for the other
// half; here an element is read once for a reflection: it is updated by the last one and multiplied by the next one
// while it is in a register.
void tridiagonalize(float* a, std::size_t n, std::size_t stride, float* diagonal, float* beside, float* tau,
                    float* work) {
  float *v = work, *w = work + stride, *next = work + 2 * stride, *product = work + 3 * stride;
  std::fill(work, work + 4 * stride, 0.0f);
  for (std::size_t k = 0; k + 1 < n; ++k) {
    float* row = a + k * stride;  // from the diagonal on, as the column is
    const std::size_t begin = (k + 1) / kFloats * kFloats;
    for (std::size_t j = k; j < n; ++j) row[j] -= v[k] * w[j] + w[k] * v[j];
    diagonal[k] = row[k];
    v[k] = w[k] = 0;
    std::fill(next + begin, next + k + 2, 0.0f);
    std::copy(row + k + 2, row + n, next + k + 2);
    const float first = row[k + 1], square = dot_product(next, next, begin, stride);
    tau[k] = 0;
    beside[k] = first;
    if (square > kNoSquare) {
      const float length = std::copysign(std::sqrt(first * first + square), first), inverse = 1 / (first + length);
      tau[k] = (first + length) / length;
      beside[k] = -length;
      for (std::size_t j = k + 2; j < n; ++j) row[j] = next[j] *= inverse;
    }
    next[k + 1] = 1;
    std::fill(product + begin, product + stride, 0.0f);
    for (std::size_t i = begin; i < stride; i += kFloats) {
      constexpr std::size_t kRows = std::min<std::size_t>(kFloats, 8);
      for (std::size_t half = i; half < i + kFloats; half += kRows) {
        if (stride <= kWhole) {
          update_and_multiply<kRows, false>(a, stride, half, begin, stride, v, w, next, product);
        } else {
          update_and_multiply<kRows, false>(a, stride, half, i, i + kFloats, v, w, next, product);
          update_and_multiply<kRows, true>(a, stride, half, i + kFloats, stride, v, w, next, product);
        }
      }
    }
    const float along = tau[k] / 2 * dot_product(product, next, begin, stride);
    for (std::size_t j = k + 1; j < n; ++j) w[j] = tau[k] * (product[j] - along * next[j]);
    std::swap(v, next);
  }
  diagonal[n - 1] = a[(n - 1) * stride + n - 1] - 2 * v[n - 1] * w[n - 1];
}

}  // namespace
}  // namespace pissa
