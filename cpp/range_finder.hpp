// Block Krylov range finder: a basis in which the leading singular directions of W can be found.
//
// Method: block Lanczos on WᵀW with full reorthogonalisation, started from Wᵀ·S for a random sparse S (Musco & Musco
// 2015, arXiv 1504.05477; Golub & Underwood 1977; for S, Clarkson & Woodruff 2013, arXiv 1207.6365). Starting from
// random columns themselves would save half a pass, but their part in W's null space makes the singular vectors
// inaccurate. Deviations: blocks are narrower than the rank, which reaches the same accuracy with fewer products; and X
// and Y may be rounded to bf16, because what the Rayleigh–Ritz step (rayleigh_ritz.hpp) uses holds for them as they
// are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "buffer.hpp"
#include "halves.hpp"
#include "int8_sweep.hpp"
#include "sweep.hpp"

namespace pissa {

// After p passes, with k = p·block columns: X (cols × k) is orthonormal, Y = W·X·2^-exponent, both rounded to Element.
struct KrylovBasis {
  std::size_t block = 0;
  std::size_t passes = 0;
  int weight_exponent = 0;  // W stands for W·2^-weight_exponent, in what follows too
  int exponent = 0;         // ‖W‖ is near 2^exponent: Y is of order one
  bool exhausted = false;   // X spans all that W does not map to zero
  bool householder = false;

  std::size_t columns() const { return passes * block; }
};

// X and Y are kept as `Element`: float, or bf16 for the weights and kernels that multiply it (see packing.hpp).
template <class Element>
class RangeFinder {
 public:
  // Sketches W. Requires max_passes·block ≤ min(rows, cols), and a block that is a multiple of 16. With `int8`, what
  // follows is done with a copy in bytes.
  // Throws std::domain_error where W holds a value that is not finite.
  RangeFinder(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t block, std::size_t max_passes,
              std::uint64_t key, bool int8);

  // Passes until there are `passes`, or the basis is exhausted. Wᵀ·Y, which a further pass needs, is computed while W·X
  // is, unless this is expected to be the `last` pass.
  void advance_to(std::size_t passes, bool last);

  bool zero() const { return zero_; }  // W is zero everywhere
  // W's scale is beyond what bf16 products can take without losing denormals: the finder over float can.
  bool out_of_range() const { return out_of_range_; }
  const KrylovBasis& basis() const { return basis_; }
  // What W was rounded to, if it was: in W's own units.
  const Int8Sweep<Element>* int8() const { return int8_ ? &*int8_ : nullptr; }

  // YᵀY (k × k, upper triangle valid by blocks), summed in double throughout with `exact`.
  Buffer<double> gram(bool exact);
  // Y·c and X·c, row-major with stride rank rounded up to 16; c is k × rank, column-major, and rounded to Element
  // unless the product is to be `precise`.
  Buffer<float> combine_y(const std::vector<double>& c, std::size_t rank, bool precise) const;
  Buffer<float> combine_x(const std::vector<double>& c, std::size_t rank, bool precise) const;

  static std::size_t workspace_bytes(const Weight& weight, std::size_t block, std::size_t max_passes, bool int8,
                                     unsigned threads);

 private:
  double sketch(float magnitude, std::uint64_t key);
  template <class Products>  // Sweep or Int8Sweep
  void advance_by(Products& products, std::size_t passes, bool last);
  bool extend();
  Buffer<float> combine(const Buffer<Element>& basis, std::size_t n, const std::vector<double>& c, std::size_t rank,
                        bool precise) const;
  std::size_t max_columns() const { return max_passes_ * basis_.block; }

  const Kernels& kernels_;
  ThreadPool& pool_;
  Weight weight_;
  std::size_t max_passes_;
  std::uint64_t key_;
  bool zero_ = false;
  bool out_of_range_ = false;
  Sweep<Element> sweep_;
  std::optional<Halves> halves_;
  std::optional<Int8Sweep<Element>> int8_;
  std::size_t stride_;  // of x and y
  Buffer<Element> x_;
  Buffer<Element> y_;
  Buffer<float> z_;          // the block at work, cols × block
  bool multiplied_ = false;  // z is Wᵀ·Y for the last block of Y
  KrylovBasis basis_;
  Buffer<double> gram_;  // of Y's first gram_columns_ columns, max_columns() apart
  std::size_t gram_columns_ = 0;
};

}  // namespace pissa
