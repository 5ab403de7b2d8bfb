// One weight, W = W_res + s·B·A: the bytes of W become those of W_res, and A and B are written beside them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

struct SplitRequest {
  Weight weight;
  std::size_t rank;
  double scaling;       // s
  bool fan_in_fan_out;  // the weight is stored in × out
  DType adapter_dtype;
  void* a;             // rank × in, row-major
  void* b;             // out × rank, row-major
  std::size_t passes;  // 0: as many as the estimate asks for
  std::uint64_t key;   // of the random start
  // The triplets of a float weight, or an f16 one, are orthonormal to float's digits, and what is left of a float one
  // is summed in double. Else they may be so to bf16's, and that is summed in float.
  bool precise = true;
};

struct SplitResult {
  std::vector<double> sigma;  // the rank largest singular values of W
  double weight_norm = 0;     // ‖W‖, Frobenius
  double rounding_error = 0;  // ‖W − (W_res + s·B·A)‖: from storing W_res in W's dtype
  double estimated_deficit = 0;
  std::size_t passes = 0;  // 0: the exact method of small matrices
  std::size_t block = 0;
  bool householder = false;
  bool int8 = false;  // the basis was found by products of bytes
  double sweep_seconds = 0, ritz_seconds = 0, residual_seconds = 0;
};

// Throws std::domain_error, before anything is written, where W is not finite or a factor overflows its dtype, and
// std::overflow_error where the residual does; its weight is then lost.
SplitResult split(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request);

// The same for a float matrix near one whose A and B lie in `a` and `b`: they are where the search begins, and
// where the matrix is not near after all, the search is split()'s. `passes` is not looked at, rows are `out`, and what
// is left in the matrix' place is summed in float.
SplitResult refit(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request);

// Upper bound of the bytes that split() takes beside W, A and B.
std::size_t split_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads);
// The same for refit() and correct() (correction.hpp).
std::size_t refit_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads);

}  // namespace pissa
