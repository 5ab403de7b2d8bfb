#include "buffer.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pissa {
namespace {

constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kGrain = 4096;
// From here on in huge pages, however much of the last is wasted: scattered small ones may share a few lines of the
// cache, and what should stay there does not.
constexpr std::size_t kLarge = kHugePage / 8 * 3;

void* allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(bytes % kHugePage == 0 ? kHugePage : kGrain, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes % kHugePage == 0) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

Scratch::~Scratch() { release_down_to(0); }

std::size_t Scratch::rounded(std::size_t bytes) {
  const std::size_t grain = bytes >= kLarge ? kHugePage : kGrain;
  return std::max(grain, (bytes + grain - 1) / grain * grain);
}

Scratch::Block Scratch::take(std::size_t bytes) {
  bytes = rounded(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  // The smallest that fits, but none so large that a later taker would miss it.
  auto best = idle_.end();
  for (auto block = idle_.begin(); block != idle_.end(); ++block) {
    const bool fits = block->bytes >= bytes && block->bytes <= 2 * bytes;
    if (fits && (best == idle_.end() || block->bytes < best->bytes)) best = block;
  }
  if (best != idle_.end()) {
    const Block block = *best;
    idle_.erase(best);
    used_ += block.bytes;
    peak_ = std::max(peak_, used_);
    return block;
  }
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  release_down_to(peak_ - bytes);
  const Block block{allocate(bytes), bytes};
  held_ += bytes;
  return block;
}

void Scratch::give_back(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  used_ -= block.bytes;
  idle_.push_back(block);
}

void Scratch::release_down_to(std::size_t bytes) {
  while (held_ > bytes && !idle_.empty()) {
    held_ -= idle_.back().bytes;
    std::free(idle_.back().memory);
    idle_.pop_back();
  }
}

}  // namespace pissa
