// Eigenpairs of small symmetric matrices, column-major.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "lapack.hpp"
#include "thread_pool.hpp"
#include "tridiagonal.hpp"

namespace pissa {

template <class T>
struct Tridiagonal;  // LAPACK's names for T
template <>
struct Tridiagonal<float> {
  static constexpr auto solve = lapack::scipy_sstedc_;
  static constexpr auto transform = lapack::scipy_sormtr_;
};
template <>
struct Tridiagonal<double> {
  static constexpr auto solve = lapack::scipy_dstedc_;
  static constexpr auto transform = lapack::scipy_dormtr_;
};

// The `count` largest eigenpairs of the tridiagonal matrix d, e (e destroyed), ascending: values in the last places of
// d, vectors in the last columns of z (n × n). False where LAPACK reports a failure.
//
// A part of them by bisection and inverse iteration, unless they lie too close together; many, whose vectors would have
// to be made orthogonal to each other, by divide and conquer, which finds all.
template <class T>
bool solve_tridiagonal(ThreadPool& pool, std::size_t n, std::size_t count, T* d, T* e, T* z) {
  constexpr std::size_t kMany = 160;
  if (count <= kMany && 2 * count <= n) {
    const std::vector<T> values = largest_by_bisection(pool, n, d, e, count);
    if (vectors_by_inverse_iteration(pool, n, d, e, values, z + (n - count) * n)) {
      std::copy(values.begin(), values.end(), d + (n - count));
      return true;
    }
  }
  const int size = lapack::narrow(n);
  std::vector<T> work(1 + 4 * n + n * n);
  std::vector<int> iwork(3 + 5 * n);
  const int lwork = lapack::narrow(work.size()), liwork = lapack::narrow(iwork.size());
  int info = 0;
  Tridiagonal<T>::solve("I", &size, d, e, z, &size, work.data(), &lwork, iwork.data(), &liwork, &info);
  return info == 0;
}

// Symmetric a (n × n, rows and columns `stride` ≥ n apart) as Q·T·Qᵀ with T tridiagonal: its diagonal d and what is
// beside it e; Q as reflections in a and tau. False where a is not finite.
inline bool reduce(const Kernels&, std::size_t n, std::size_t stride, double* a, double* d, double* e, double* tau) {
  const int size = lapack::narrow(n), lda = lapack::narrow(stride);
  std::vector<double> work(64 * n);
  const int lwork = lapack::narrow(work.size());
  int info = 0;
  lapack::scipy_dsytrd_("L", &size, a, &lda, d, e, tau, work.data(), &lwork, &info);
  return info == 0;
}

inline bool reduce(const Kernels& kernels, std::size_t n, std::size_t stride, float* a, float* d, float* e,
                   float* tau) {
  const float largest = kernels.max_magnitude(a, DType::f32, stride * stride);
  if (!std::isfinite(largest)) return false;
  // Squares are to stay inside of float's range.
  const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -120, 120) : 0;
  const float down = std::ldexp(1.0f, -exponent), up = std::ldexp(1.0f, exponent);
  for (std::size_t i = 0; i < stride * stride; ++i) a[i] *= down;
  std::vector<float> work(4 * stride);
  kernels.tridiagonalize(a, n, stride, d, e, tau, work.data());
  for (std::size_t i = 0; i < n; ++i) d[i] *= up;
  for (std::size_t i = 0; i + 1 < n; ++i) e[i] *= up;
  return true;
}

inline std::size_t reduced_stride(std::size_t n) { return (n + 15) / 16 * 16; }

// Symmetric a (n × n, given by its upper triangle or, transposed, by its lower one) in full, padded with zeros.
template <class T>
Buffer<T> in_full(Scratch& scratch, std::size_t n, const T* a, bool lower) {
  const std::size_t stride = reduced_stride(n);
  Buffer<T> full(scratch, stride * stride);
  std::fill(full.begin(), full.end(), T{0});
  for (std::size_t j = 0; j < n; ++j) {
    const std::size_t begin = lower ? j : 0, end = lower ? n : j + 1;
    for (std::size_t i = begin; i < end; ++i) full[j * stride + i] = full[i * stride + j] = a[j * n + i];
  }
  return full;
}

// The `count` largest eigenvalues (descending) of symmetric a (n × n, upper) and their vectors (n × count). False where
// LAPACK reports a failure, or a is not finite.
template <class T>
bool largest_eigenpairs(const Kernels& kernels, ThreadPool& pool, std::size_t n, const T* a, std::size_t count,
                        double* values, T* vectors) {
  Scratch& scratch = pool.scratch();
  Buffer<T> full = in_full(scratch, n, a, false), z(scratch, n * n), work(scratch, 64 * n);
  std::vector<T> d(n), e(n), tau(n);
  if (!reduce(kernels, n, reduced_stride(n), full.data(), d.data(), e.data(), tau.data()) ||
      !solve_tridiagonal(pool, n, count, d.data(), e.data(), z.data())) {
    return false;
  }
  const int size = lapack::narrow(n), wanted = lapack::narrow(count), lda = lapack::narrow(reduced_stride(n)),
            lwork = lapack::narrow(work.size());
  int info = 0;
  Tridiagonal<T>::transform("L", "L", "N", &size, &wanted, full.data(), &lda, tau.data(), z.data() + (n - count) * n,
                            &size, work.data(), &lwork, &info);
  if (info != 0) return false;
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<double>(d[n - 1 - i]);
    std::copy_n(z.data() + (n - 1 - i) * n, n, vectors + i * n);
  }
  return true;
}

// Diagonal d and beside it e of a tridiagonal matrix with the eigenvalues of symmetric a (n × n, lower, destroyed).
// False as above.
inline bool tridiagonalize(const Kernels& kernels, Scratch&, std::size_t n, double* a, double* d, double* e) {
  std::vector<double> tau(n);
  return reduce(kernels, n, n, a, d, e, tau.data());
}

inline bool tridiagonalize(const Kernels& kernels, Scratch& scratch, std::size_t n, float* a, float* d, float* e) {
  Buffer<float> full = in_full(scratch, n, a, true);
  std::vector<float> tau(n);
  return reduce(kernels, n, reduced_stride(n), full.data(), d, e, tau.data());
}

}  // namespace pissa
