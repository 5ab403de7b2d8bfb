// A and B after a small change of the matrix that they were fitted to.
#pragma once

#include <cstddef>
#include <optional>

#include "factors.hpp"
#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// What the product of two factors changes by: left (rows × depth) times right (depth × cols), both row-major.
struct Change {
  std::size_t depth = 0;
  Buffer<float> left, right;
  double scaling = 1;  // of their product
};

struct Correction {
  Factors factors;
  Change change;
};

// One step of alternating least squares on W = E + s·B·A, where `request.weight` is the float matrix E, out × in, and a
// and b hold A and B: first the B that leaves least of W with this A, then the A that leaves least of it with that B.
// What W is to be multiplied with is known but for E: B ← B + E·A⁺/s, and A ← A + B⁺·(E − s·ΔB·A)/s. So where E is
// small beside W, what is lost by rounding is small beside E even in products of bf16.
//
// None where E is zero or not finite, or where the rows of A or the columns of B are far from independent.
std::optional<Correction> find_correction(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request);

std::size_t correction_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads);

}  // namespace pissa
