// Threads that run one function together and meet at barriers.
//
// A thread that waits spins for some ten microseconds, which is longer than the parts of a step
// are apart, and then sleeps: the processes of a machine share its cores, and one that is idle
// takes none of them. A team of one thread does not wait at all.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace baton {

static inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {
    for (int thread = 1; thread < threads; ++thread) {
      helpers_.emplace_back([this, thread] { help(thread); });
    }
  }

  ~Team() {
    ending_ = true;
    advance(started_);
    for (std::thread& helper : helpers_) helper.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls work(thread) once on each thread, on the caller's too, and returns when all are done.
  void run(const std::function<void(int)>& work) {
    if (threads_ > 1) {
      work_ = &work;
      advance(started_);
    }
    work(0);
    barrier();
  }

  // Returns when all threads of the team have called it.
  void barrier() {
    if (threads_ == 1) return;
    const uint32_t round = met_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0);
      advance(met_);
    } else {
      wait_beyond(met_, round);
    }
  }

 private:
  static constexpr int kSpins = 2000;  // About 50 microseconds of pauses.

  void help(int thread) {
    for (uint32_t round = 0;; ++round) {
      wait_beyond(started_, round);
      if (ending_) return;
      (*work_)(thread);
      barrier();
    }
  }

  void advance(std::atomic<uint32_t>& counter) {
    counter.fetch_add(1);
    if (sleepers_.load() == 0) return;
    // A sleeper that was counted holds the lock until it sleeps, or sees the new count.
    { const std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }

  void wait_beyond(const std::atomic<uint32_t>& counter, uint32_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (counter.load() != seen) return;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return counter.load() != seen; });
    sleepers_.fetch_sub(1);
  }

  const int threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> ending_{false};
  std::atomic<uint32_t> started_{0}, met_{0};
  std::atomic<int> arrived_{0}, sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> helpers_;
};

}  // namespace baton
