// The BLAS and LAPACK entry points in use. Column-major; the symbols carry scipy-openblas32's prefix.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace pissa::lapack {

extern "C" {
void scipy_openblas_set_num_threads(int threads);
void scipy_sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                  const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                  const int* ldc);
void scipy_dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const double* alpha,
                  const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
                  const int* ldc);
void scipy_strsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m, const int* n,
                  const float* alpha, const float* a, const int* lda, float* b, const int* ldb);
void scipy_dtrsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m, const int* n,
                  const double* alpha, const double* a, const int* lda, double* b, const int* ldb);
void scipy_dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void scipy_dpstrf_(const char* uplo, const int* n, double* a, const int* lda, int* pivots, int* rank,
                   const double* tolerance, double* work, int* info);
void scipy_sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau, float* work, const int* lwork,
                   int* info);
void scipy_sorgqr_(const int* m, const int* n, const int* k, float* a, const int* lda, const float* tau, float* work,
                   const int* lwork, int* info);
void scipy_dsyevr_(const char* jobz, const char* range, const char* uplo, const int* n, double* a, const int* lda,
                   const double* vl, const double* vu, const int* il, const int* iu, const double* abstol, int* m,
                   double* w, double* z, const int* ldz, int* isuppz, double* work, const int* lwork, int* iwork,
                   const int* liwork, int* info);
void scipy_ssyevr_(const char* jobz, const char* range, const char* uplo, const int* n, float* a, const int* lda,
                   const float* vl, const float* vu, const int* il, const int* iu, const float* abstol, int* m,
                   float* w, float* z, const int* ldz, int* isuppz, float* work, const int* lwork, int* iwork,
                   const int* liwork, int* info);
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

// b (m × n) = b·r⁻¹, r upper triangular.
inline void solve_right(std::size_t m, std::size_t n, const float* r, std::size_t ldr, float* b, std::size_t ldb) {
  const int im = narrow(m), in = narrow(n), ir = narrow(ldr), ib = narrow(ldb);
  const float one = 1;
  scipy_strsm_("R", "U", "N", "N", &im, &in, &one, r, &ir, b, &ib);
}

inline void solve_right(std::size_t m, std::size_t n, const double* r, std::size_t ldr, double* b, std::size_t ldb) {
  const int im = narrow(m), in = narrow(n), ir = narrow(ldr), ib = narrow(ldb);
  const double one = 1;
  scipy_dtrsm_("R", "U", "N", "N", &im, &in, &one, r, &ir, b, &ib);
}

// b (m × n) = r⁻¹·b, r upper triangular m × m.
inline void solve_left(std::size_t m, std::size_t n, const double* r, std::size_t ldr, double* b, std::size_t ldb) {
  const int im = narrow(m), in = narrow(n), ir = narrow(ldr), ib = narrow(ldb);
  const double one = 1;
  scipy_dtrsm_("L", "U", "N", "N", &im, &in, &one, r, &ir, b, &ib);
}

inline void syevr(const int* n, float* a, const int* first, int* found, float* w, float* z, int* support, float* work,
                  const int* lwork, int* iwork, const int* liwork, int* info) {
  const float none = 0;
  scipy_ssyevr_("V", "I", "U", n, a, n, &none, &none, first, n, &none, found, w, z, n, support, work, lwork, iwork,
                liwork, info);
}

inline void syevr(const int* n, double* a, const int* first, int* found, double* w, double* z, int* support,
                  double* work, const int* lwork, int* iwork, const int* liwork, int* info) {
  const double none = 0;
  scipy_dsyevr_("V", "I", "U", n, a, n, &none, &none, first, n, &none, found, w, z, n, support, work, lwork, iwork,
                liwork, info);
}

// The `count` largest eigenvalues (descending) of symmetric a (n × n, upper, destroyed) and their vectors (n × count).
// False where LAPACK reports a failure.
template <class T>
bool largest_eigenpairs(std::size_t n, T* a, std::size_t count, double* values, double* vectors) {
  const int size = narrow(n), first = narrow(n - count + 1), query = -1;
  std::vector<T> ascending(n), z(n * count);
  std::vector<int> support(2 * n);
  int found = 0, info = 0, integers = 0;
  T reals = 0;
  syevr(&size, a, &first, &found, ascending.data(), z.data(), support.data(), &reals, &query, &integers, &query, &info);
  std::vector<T> work(static_cast<std::size_t>(reals) + 1);
  std::vector<int> iwork(static_cast<std::size_t>(integers));
  const int lwork = narrow(work.size()), liwork = narrow(iwork.size());
  syevr(&size, a, &first, &found, ascending.data(), z.data(), support.data(), work.data(), &lwork, iwork.data(),
        &liwork, &info);
  if (info != 0 || narrow(count) != found) return false;
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<double>(ascending[count - 1 - i]);
    std::copy_n(z.data() + (count - 1 - i) * n, n, vectors + i * n);
  }
  return true;
}

}  // namespace pissa::lapack
