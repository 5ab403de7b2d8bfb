#include "thread_pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pissa {
namespace {

// Phases of a sweep follow each other within microseconds: waiting in the kernel would cost more than the phases.
constexpr int kSpins = 8000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

void relax(int spins) {
  if (spins < kSpins) {
    pause();
  } else {
    std::this_thread::yield();
  }
}

ThreadPool::ThreadPool(unsigned threads) {
  for (unsigned i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_erased(std::size_t count, Call call, const void* task) {
  if (workers_.empty() || count <= 1) {
    for (std::size_t i = 0; i < count; ++i) call(task, i);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    count_ = count;
    call_ = call;
    task_ = task;
    next_.store(0);
    busy_.store(workers_.size());
    generation_.fetch_add(1);
  }
  if (sleeping_.load() > 0) wake_.notify_all();
  drain();
  wait_until([&] { return busy_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::drain() {
  for (std::size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) call_(task_, i);
}

void ThreadPool::work() {
  std::size_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      sleeping_.fetch_sub(1);
      seen = generation_.load();
      if (stopping_) return;
    }
    drain();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace pissa
