// Products of tall, narrow, column-major matrices, parallel over fixed blocks of rows above single-threaded BLAS.
#pragma once

#include <cstddef>

#include "thread_pool.hpp"

namespace pissa {

// c (p × q) = aᵀ·b for a (n × p) and b (n × q), both with leading dimension n. Blocks are multiplied in float, or in
// double with `exact`, and added in double in the order of the rows, whatever the threads.
void cross_product(ThreadPool& pool, std::size_t n, const float* a, std::size_t p, const float* b, std::size_t q,
                   bool exact, double* c);

// c (n × q) = alpha·a·b + beta·c for a (n × p) and b (p × q).
void multiply(ThreadPool& pool, std::size_t n, float alpha, const float* a, std::size_t p, const float* b,
              std::size_t q, float beta, float* c);

}  // namespace pissa
