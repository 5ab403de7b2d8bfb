// A fixed set of threads that hand out numbered tasks, and the scratch memory that their work uses again.
//
// Which thread runs a task is not determined; callers make each task's result independent of it (fixed partitions,
// partial results added in the order of their tasks), so that no result depends on the number of threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#include "buffer.hpp"

namespace pissa {

void relax(int spins);  // one turn of a waiting loop: a pause, or after many the CPU to others

template <class Condition>
void wait_until(const Condition& condition) {
  for (int spins = 0; !condition(); ++spins) relax(spins);
}

class ThreadPool {
 public:
  explicit ThreadPool(unsigned threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Scratch& scratch() { return scratch_; }

  unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }

  // Calls task(0) … task(count - 1), the calling thread taking part; returns when all are done. Tasks must not throw.
  template <class Task>
  void run(std::size_t count, const Task& task) {
    run_erased(count, [](const void* t, std::size_t i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

 private:
  using Call = void (*)(const void*, std::size_t);
  void run_erased(std::size_t count, Call call, const void* task);
  void drain();
  void work();

  Scratch scratch_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::size_t> generation_{0};
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> busy_{0};
  std::size_t count_ = 0;
  Call call_ = nullptr;
  const void* task_ = nullptr;
  std::atomic<int> sleeping_{0};
  bool stopping_ = false;
};

}  // namespace pissa
