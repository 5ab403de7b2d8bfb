#include "halves.hpp"

#include <algorithm>

namespace pissa {
namespace {

constexpr std::size_t kTasks = 16;

}  // namespace

Halves::Halves(const Kernels& kernels, ThreadPool& pool, const Weight& weight)
    : kernels_(kernels), pool_(pool), weight_(weight), rest_(pool.scratch(), kTasks * weight.cols) {
  for_each_row(kernels_.bf16->take_apart);
}

Halves::~Halves() { for_each_row(kernels_.bf16->put_together); }

template <class Change>
void Halves::for_each_row(const Change& change) {
  pool_.run(kTasks, [&](std::size_t task) {
    const std::size_t end = weight_.rows * (task + 1) / kTasks;
    for (std::size_t i = weight_.rows * task / kTasks; i < end; ++i) {
      change(static_cast<float*>(weight_.data) + i * weight_.cols, weight_.cols, rest_.data() + task * weight_.cols);
    }
  });
}

std::size_t Halves::workspace_bytes(const Weight& weight) {
  return Scratch::rounded(kTasks * weight.cols * sizeof(std::uint16_t));
}

}  // namespace pissa
