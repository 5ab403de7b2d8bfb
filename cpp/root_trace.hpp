// The trace of a matrix' square root, without its eigenvalues.
#pragma once

#include <cstddef>
#include <vector>

namespace pissa {

// A symmetric tridiagonal matrix.
struct TridiagonalMatrix {
  std::vector<double> diagonal;
  std::vector<double> beside;  // one less, or more that are not looked at
};

struct RootTrace {
  double value;
  double uncertainty;
};

// Σ λ/√(λ + δ) over the eigenvalues of a matrix that is positive semidefinite up to errors below δ = `relative_shift`
// times a bound of its norm. That is Σ √λ, less at most half of Σ δ/√(λ + δ), which is the uncertainty; errors of λ up
// to δ/2 change it by about as much again. Eigenvalues that are zero but for rounding errors add nothing on the
// average; up to `zeros` of them, known to be zero, are next to left out of the uncertainty. Infinite uncertainty where
// it is no such matrix.
//
// √λ is (2/π) ∫ λ/(λ + t²) dt, summed by the trapezoidal rule in ln t, which converges exponentially (Hale, Higham,
// Trefethen 2008, without their elliptic change of variable); a node needs the trace of an inverse of a tridiagonal
// matrix, which is the derivative of the logarithms of its pivots.
RootTrace root_trace(const TridiagonalMatrix& matrix, double relative_shift, std::size_t zeros);

}  // namespace pissa
