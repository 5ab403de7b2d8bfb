// The BLAS and LAPACK entry points in use, and what is built of them. Column-major; the symbols carry
// scipy-openblas32's prefix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "tridiagonal.hpp"

namespace pissa::lapack {

extern "C" {
void scipy_openblas_set_num_threads(int threads);
void scipy_sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                  const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                  const int* ldc);
void scipy_dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const double* alpha,
                  const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
                  const int* ldc);
void scipy_dsyrk_(const char* uplo, const char* trans, const int* n, const int* k, const double* alpha, const double* a,
                  const int* lda, const double* beta, double* c, const int* ldc);
void scipy_ssyrk_(const char* uplo, const char* trans, const int* n, const int* k, const float* alpha, const float* a,
                  const int* lda, const float* beta, float* c, const int* ldc);
void scipy_strsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m, const int* n,
                  const float* alpha, const float* a, const int* lda, float* b, const int* ldb);
void scipy_dtrsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m, const int* n,
                  const double* alpha, const double* a, const int* lda, double* b, const int* ldb);
void scipy_dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void scipy_spotrf_(const char* uplo, const int* n, float* a, const int* lda, int* info);
void scipy_spotri_(const char* uplo, const int* n, float* a, const int* lda, int* info);
void scipy_dpstrf_(const char* uplo, const int* n, double* a, const int* lda, int* pivots, int* rank,
                   const double* tolerance, double* work, int* info);
void scipy_sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau, float* work, const int* lwork,
                   int* info);
void scipy_sorgqr_(const int* m, const int* n, const int* k, float* a, const int* lda, const float* tau, float* work,
                   const int* lwork, int* info);
void scipy_dsytrd_(const char* uplo, const int* n, double* a, const int* lda, double* d, double* e, double* tau,
                   double* work, const int* lwork, int* info);
void scipy_sstedc_(const char* compz, const int* n, float* d, float* e, float* z, const int* ldz, float* work,
                   const int* lwork, int* iwork, const int* liwork, int* info);
void scipy_dstedc_(const char* compz, const int* n, double* d, double* e, double* z, const int* ldz, double* work,
                   const int* lwork, int* iwork, const int* liwork, int* info);
void scipy_sormtr_(const char* side, const char* uplo, const char* trans, const int* m, const int* n, const float* a,
                   const int* lda, const float* tau, float* c, const int* ldc, float* work, const int* lwork,
                   int* info);
void scipy_dormtr_(const char* side, const char* uplo, const char* trans, const int* m, const int* n, const double* a,
                   const int* lda, const double* tau, double* c, const int* ldc, double* work, const int* lwork,
                   int* info);
}

inline int narrow(std::size_t value) { return static_cast<int>(value); }

// c (m × n) = alpha·op(a)·op(b) + beta·c.
inline void gemm(char transa, char transb, std::size_t m, std::size_t n, std::size_t k, float alpha, const float* a,
                 std::size_t lda, const float* b, std::size_t ldb, float beta, float* c, std::size_t ldc) {
  const int im = narrow(m), in = narrow(n), ik = narrow(k), ia = narrow(lda), ib = narrow(ldb), ic = narrow(ldc);
  scipy_sgemm_(&transa, &transb, &im, &in, &ik, &alpha, a, &ia, b, &ib, &beta, c, &ic);
}

inline void gemm(char transa, char transb, std::size_t m, std::size_t n, std::size_t k, double alpha, const double* a,
                 std::size_t lda, const double* b, std::size_t ldb, double beta, double* c, std::size_t ldc) {
  const int im = narrow(m), in = narrow(n), ik = narrow(k), ia = narrow(lda), ib = narrow(ldb), ic = narrow(ldc);
  scipy_dgemm_(&transa, &transb, &im, &in, &ik, &alpha, a, &ia, b, &ib, &beta, c, &ic);
}

inline void trsm(char side, char trans, const int* m, const int* n, const float* r, const int* ldr, float* b,
                 const int* ldb) {
  const float one = 1;
  scipy_strsm_(&side, "U", &trans, "N", m, n, &one, r, ldr, b, ldb);
}

inline void trsm(char side, char trans, const int* m, const int* n, const double* r, const int* ldr, double* b,
                 const int* ldb) {
  const double one = 1;
  scipy_dtrsm_(&side, "U", &trans, "N", m, n, &one, r, ldr, b, ldb);
}

// b (m × n) = b·r⁻¹, r upper triangular n × n.
template <class T>
void solve_right(std::size_t m, std::size_t n, const T* r, std::size_t ldr, T* b, std::size_t ldb) {
  const int im = narrow(m), in = narrow(n), ir = narrow(ldr), ib = narrow(ldb);
  trsm('R', 'N', &im, &in, r, &ir, b, &ib);
}

// b (m × n) = r⁻¹·b, or r⁻ᵀ·b with `trans` 'T', r upper triangular m × m.
template <class T>
void solve_left(char trans, std::size_t m, std::size_t n, const T* r, std::size_t ldr, T* b, std::size_t ldb) {
  const int im = narrow(m), in = narrow(n), ir = narrow(ldr), ib = narrow(ldb);
  trsm('L', trans, &im, &in, r, &ir, b, &ib);
}

template <class T>
struct Tridiagonal;  // LAPACK's names for T
template <>
struct Tridiagonal<float> {
  static constexpr auto solve = scipy_sstedc_;
  static constexpr auto transform = scipy_sormtr_;
};
template <>
struct Tridiagonal<double> {
  static constexpr auto solve = scipy_dstedc_;
  static constexpr auto transform = scipy_dormtr_;
};

// The `count` largest eigenpairs of the tridiagonal matrix d, e (e destroyed), ascending: values in the last places of
// d, vectors in the last columns of z (n × n). False where LAPACK reports a failure.
//
// A part of them by bisection and inverse iteration, unless they lie too close together; many, whose vectors would have
// to be made orthogonal to each other, by divide and conquer, which finds all.
template <class T>
bool solve_tridiagonal(std::size_t n, std::size_t count, T* d, T* e, T* z) {
  constexpr std::size_t kMany = 160;
  if (count <= kMany && 2 * count <= n) {
    const std::vector<T> values = largest_by_bisection(n, d, e, count);
    if (vectors_by_inverse_iteration(n, d, e, values, z + (n - count) * n)) {
      std::copy(values.begin(), values.end(), d + (n - count));
      return true;
    }
  }
  const int size = narrow(n);
  std::vector<T> work(1 + 4 * n + n * n);
  std::vector<int> iwork(3 + 5 * n);
  const int lwork = narrow(work.size()), liwork = narrow(iwork.size());
  int info = 0;
  Tridiagonal<T>::solve("I", &size, d, e, z, &size, work.data(), &lwork, iwork.data(), &liwork, &info);
  return info == 0;
}

// Symmetric a (n × n, rows and columns `stride` ≥ n apart) as Q·T·Qᵀ with T tridiagonal: its diagonal d and what is
// beside it e; Q as reflections in a and tau. False where a is not finite.
inline bool reduce(const Kernels&, std::size_t n, std::size_t stride, double* a, double* d, double* e, double* tau) {
  const int size = narrow(n), lda = narrow(stride);
  std::vector<double> work(64 * n);
  const int lwork = narrow(work.size());
  int info = 0;
  scipy_dsytrd_("L", &size, a, &lda, d, e, tau, work.data(), &lwork, &info);
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
bool largest_eigenpairs(const Kernels& kernels, Scratch& scratch, std::size_t n, const T* a, std::size_t count,
                        double* values, T* vectors) {
  Buffer<T> full = in_full(scratch, n, a, false), z(scratch, n * n), work(scratch, 64 * n);
  std::vector<T> d(n), e(n), tau(n);
  if (!reduce(kernels, n, reduced_stride(n), full.data(), d.data(), e.data(), tau.data()) ||
      !solve_tridiagonal(n, count, d.data(), e.data(), z.data())) {
    return false;
  }
  const int size = narrow(n), wanted = narrow(count), lda = narrow(reduced_stride(n)), lwork = narrow(work.size());
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

// c (n × n, lower) = a·aᵀ + beta·c, a being n × k; or aᵀ·a with `trans` 'T', a being k × n.
inline void rank_update(char trans, std::size_t n, std::size_t k, const float* a, std::size_t lda, float beta,
                        float* c) {
  const int size = narrow(n), depth = narrow(k), ia = narrow(lda);
  const float one = 1;
  scipy_ssyrk_("L", &trans, &size, &depth, &one, a, &ia, &beta, c, &size);
}

inline void rank_update(char trans, std::size_t n, std::size_t k, const double* a, std::size_t lda, double beta,
                        double* c) {
  const int size = narrow(n), depth = narrow(k), ia = narrow(lda);
  const double one = 1;
  scipy_dsyrk_("L", &trans, &size, &depth, &one, a, &ia, &beta, c, &size);
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

}  // namespace pissa::lapack
