#include "thread_pool.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pissa {
namespace {

// Phases of a split follow each other within microseconds: sleeping between them would cost more than they do. About
// half a millisecond.
constexpr int kSpins = 30000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Lets a thread run on every CPU that this process may use but the caller's. The kernel likes to wake a thread where its
// waker runs, and there it would wait for the waker's time slice to end.
void keep_off_this_cpu(std::thread& thread) {
#if defined(__linux__)
  cpu_set_t allowed;
  const int here = sched_getcpu();
  if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  CPU_CLR(static_cast<std::size_t>(here), &allowed);
  pthread_setaffinity_np(thread.native_handle(), sizeof allowed, &allowed);
#else
  (void)thread;
#endif
}

}  // namespace

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
  if (sleeping_.load() > 0) {
    for (auto& worker : workers_) keep_off_this_cpu(worker);
    wake_.notify_all();
  }
  drain();
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0 && spins < kSpins; ++spins) pause();
  if (busy_.load(std::memory_order_acquire) == 0) return;
  // Sleeping, not yielding: a worker that was woken on this CPU only runs when this thread is off it.
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return busy_.load() == 0; });
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
    if (busy_.fetch_sub(1) == 1) {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

}  // namespace pissa
