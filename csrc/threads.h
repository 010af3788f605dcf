// Tasks from a counter, shared by a few threads. The caller's own thread is one of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace karma {

// Rounding to nearest and subnormal numbers, for as long as it lives, whatever the thread was set to: scores are
// defined so, and torch.set_flush_denormal, for one, sets the thread that calls it but no other.
class StandardFloats {
 public:
#ifdef __SSE2__
  StandardFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~StandardFloats() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#elif defined(__aarch64__)
  StandardFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(before_) : : "memory");
    set(before_ & ~kNotStandard);
  }
  ~StandardFloats() { set(before_); }

 private:
  static constexpr uint64_t kNotStandard = 1 << 24 | 1 << 19 | 3 << 22;  // FZ, FZ16, RMode
  static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }
  uint64_t before_;
#endif
};

// work(task, thread) for every task below `tasks`; the first exception is thrown here once all threads have stopped.
template <class Work>
void parallel(int64_t tasks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto run = [&](int thread) {
    const StandardFloats standard;
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) work(task, thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      next = tasks;
    }
  };
  const int others = int(std::min<int64_t>(std::max(threads, 1), tasks)) - 1;
  std::vector<std::thread> team;
  try {
    for (int i = 0; i < others; ++i) team.emplace_back(run, i + 1);
  } catch (const std::exception&) {
    // no more threads, or no memory for one, to be had: those that are there do it
  }
  run(0);
  for (std::thread& t : team) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace karma
