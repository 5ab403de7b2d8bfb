// A and B after a small change of the matrix that they were fitted to.
#pragma once

#include <cstddef>

#include "kernels/kernels.hpp"
#include "split.hpp"
#include "thread_pool.hpp"

namespace pissa {

// One step of alternating least squares on W = E + s·B·A, where `request.weight` is the float matrix E, out × in, and a
// and b hold A and B: first the B that leaves least of W with this A, then the A that leaves least of it with that B.
// E becomes what they leave, to about one part in a thousand.
//
// What W is to be multiplied with is known but for E: B ← B + E·A⁺/s, and A ← A + B⁺·(E − s·ΔB·A)/s. So where E is
// small beside W, what is lost by rounding is small beside E even in products of bf16.
//
// False, with E as it was, where it is not finite, the rows of A or the columns of B are far from independent, or their
// dtype does not hold them: then a refit is due.
bool correct(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request);

std::size_t correction_workspace_bytes(const Weight& weight, std::size_t rank, unsigned threads);

}  // namespace pissa
