// A float weight taken apart, within its own memory, into its values as bf16 and what these leave.
#pragma once

#include "buffer.hpp"
#include "kernels/kernels.hpp"
#include "thread_pool.hpp"
#include "weight.hpp"

namespace pissa {

// While it lives, each row of the weight holds its values rounded to bf16, and after them as many 16-bit differences,
// from which the destructor restores every bit. Rounding is to nearest, halves away from zero. So a product in bf16
// reads half the bytes and converts nothing, and no copy of the weight is needed.
class Halves {
 public:
  Halves(const Kernels& kernels, ThreadPool& pool, const Weight& weight);
  ~Halves();
  Halves(const Halves&) = delete;
  Halves& operator=(const Halves&) = delete;

  static std::size_t workspace_bytes(const Weight& weight);

 private:
  template <class Change>
  void for_each_row(const Change& change);

  const Kernels& kernels_;
  ThreadPool& pool_;
  Weight weight_;
  Buffer<std::uint16_t> rest_;  // a row of each task's, taken here as a destructor must not fail
};

}  // namespace pissa
