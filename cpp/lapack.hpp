// The BLAS and LAPACK entry points in use, and what is built of them. Column-major; the symbols carry
// scipy-openblas32's prefix.
#pragma once

#include <cstddef>

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

}  // namespace pissa::lapack
