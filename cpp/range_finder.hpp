// Block Krylov range finder: a basis in which the leading singular directions of W can be found.
//
// Method: block Lanczos on WᵀW with full reorthogonalisation, started from Wᵀ·G for a random sign matrix G
// (Musco & Musco 2015, arXiv 1504.05477; Golub & Underwood 1977). Deviations: blocks are narrower than the rank, which
// reaches the same accuracy with fewer products; and W·X may be computed from bf16 roundings of X, because the
// Rayleigh–Ritz step (rayleigh_ritz.hpp) only uses Y as it came out and Z = Wᵀ·Y, which are exact for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "buffer.hpp"
#include "sweep.hpp"

namespace pissa {

// After p passes, with k = p·block columns: Wᵀ·Y = 2^(2·exponent)·… is kept factored as Z = X·H.
//   y (rows × k):           Y = W·X_k·2^-exponent, rounded
//   x (cols × (k + block)): orthonormal
//   h ((k + block) × k):    2^-exponent·Wᵀ·Y = X·H; block upper Hessenberg, column-major, leading dimension `h_rows`
struct KrylovBasis {
  std::size_t block = 0;
  std::size_t passes = 0;
  std::size_t h_rows = 0;
  int exponent = 0;  // ‖W‖ is near 2^exponent: everything here is of order one
  bool exhausted = false;
  bool householder = false;
  Buffer<float> x;
  Buffer<float> y;
  Buffer<double> h;

  std::size_t columns() const { return passes * block; }
  // Columns of x that h refers to: an exhausted basis got no further block.
  std::size_t x_columns() const { return columns() + (exhausted ? 0 : block); }
};

class RangeFinder {
 public:
  // Sketches W. Requires (max_passes + 1)·block ≤ min(rows, cols).
  // Throws std::domain_error where W holds a value that is not finite.
  RangeFinder(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t block, std::size_t max_passes,
              std::uint64_t key);

  // One more pass. False where there is none: the limit is reached, or the basis holds W's whole range.
  bool advance();

  bool zero() const { return zero_; }  // W is zero everywhere
  const KrylovBasis& basis() const { return basis_; }

  static std::size_t workspace_bytes(const Weight& weight, std::size_t block, std::size_t max_passes);

 private:
  double sketch(float magnitude, std::uint64_t key);

  ThreadPool& pool_;
  Weight weight_;
  std::size_t max_passes_;
  bool zero_ = false;
  std::optional<Sweep> sweep_;
  KrylovBasis basis_;
};

}  // namespace pissa
