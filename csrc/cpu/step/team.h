// Threads that work through one job together, with barriers between its phases.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace depthprune {

// Waiting threads spin: a phase of a decode step is a few microseconds, waking a thread takes as long. A thread that
// has spun for some time gives its core away, which is what lets the others go on where cores are short.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 20000;  // about 0.2 ms

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// body(index, count) on up to `threads` threads. They are those of OpenMP, which torch uses as well: a second pool on
// the same cores would fight with the first, whose idle threads spin for some milliseconds. OpenMP is invisible to
// ThreadSanitizer; DEPTHPRUNE_STD_THREADS starts plain threads for it.
template <typename Body>
void run_team(int threads, const Body& body) {
#if defined(DEPTHPRUNE_STD_THREADS)
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&body, i, threads] { body(i, threads); });
  body(0, threads);
  for (std::thread& other : others) other.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  static_cast<void>(threads);
  body(0, 1);
#endif
}

}  // namespace depthprune
