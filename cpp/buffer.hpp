// Scratch memory that is used again: touching fresh pages costs as much as the arithmetic on them.
#pragma once

#include <cstddef>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

namespace pissa {

// Keeps blocks that are given back for the next taker. Holds never more than was in use at once at some time.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  struct Block {
    void* memory = nullptr;
    std::size_t bytes = 0;
  };
  Block take(std::size_t bytes);
  // What taking so many bytes takes.
  static std::size_t rounded(std::size_t bytes);
  std::size_t peak() const { return peak_; }
  void give_back(Block block);

 private:
  void release_down_to(std::size_t bytes);

  std::mutex mutex_;
  std::vector<Block> idle_;
  std::size_t used_ = 0, held_ = 0, peak_ = 0;
};

// An array in scratch memory, not initialised. An empty one takes none.
template <class T>
class Buffer {
  static_assert(std::is_trivial<T>::value, "scratch memory is never constructed");

 public:
  Buffer() = default;
  Buffer(Scratch& scratch, std::size_t count)
      : scratch_(&scratch), block_(count > 0 ? scratch.take(count * sizeof(T)) : Scratch::Block{}), size_(count) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~Buffer() {
    if (size_ > 0) scratch_->give_back(block_);
  }

  T* data() { return static_cast<T*>(block_.memory); }
  const T* data() const { return static_cast<const T*>(block_.memory); }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](std::size_t i) { return data()[i]; }
  const T& operator[](std::size_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(scratch_, other.scratch_);
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
  }

  Scratch* scratch_ = nullptr;
  Scratch::Block block_;
  std::size_t size_ = 0;
};

}  // namespace pissa
