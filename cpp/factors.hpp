// The leading singular triplets of one matrix.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// W ≈ Σ σᵢ·uᵢ·vᵢᵀ, with uᵢ the column order[i] of `left`, and vᵢ that of `right` divided by its length. Row-major with
// `stride`.
struct Factors {
  std::size_t stride = 0;
  Buffer<float> left;          // rows × rank, orthonormal
  Buffer<float> right;         // cols × rank
  std::vector<double> length;  // of right's columns
  std::vector<double> sigma;   // descending
  std::vector<std::size_t> order;
};

// Of each of the first columns of `a` (n rows, row-major with `stride`): its length, and its entry of largest magnitude
// (the first of equals).
std::vector<double> column_lengths(ThreadPool& pool, const Buffer<float>& a, std::size_t n, std::size_t stride,
                                   std::size_t columns);
std::vector<float> largest_of_columns(ThreadPool& pool, const Buffer<float>& a, std::size_t n, std::size_t stride,
                                      std::size_t columns);

// The request's A as columns (cols × rank), and its B (rows × rank); row-major with a stride of `width`, a multiple of
// 16, and zeros beside them.
Buffer<float> columns_of_a(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, std::size_t width);
Buffer<float> columns_of_b(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, std::size_t width);

// Each of the first columns of `a` (n rows, row-major with `stride`) times its factor.
void scale_columns(ThreadPool& pool, Buffer<float>& a, std::size_t n, std::size_t stride,
                   const std::vector<double>& factors);

// The same product, Σ σᵢ·uᵢ·vᵢᵀ, where the u and v are orthonormal but for rounding, with ones that are so to float.
Factors in_singular_form(const Kernels& kernels, ThreadPool& pool, Factors factors);

// Factors whose triplets have these `sigma` and lengths to the right, in the order of the columns.
Factors in_descending_order(std::size_t stride, Buffer<float> left, Buffer<float> right,
                            const std::vector<double>& length, const std::vector<double>& sigma);

}  // namespace pissa
