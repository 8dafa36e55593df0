// Threads: which part of the work is mine, and waiting for the others.
#pragma once

#include <omp.h>
#include <sched.h>
#include <stdint.h>

#include "cpu/simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

RNNFAST_BEGIN

RNNFAST_FN constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RNNFAST_FN constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, n), as even as possible.
RNNFAST_FN Range share(int64_t n, int64_t index, int64_t parts) { return {n * index / parts, n * (index + 1) / parts}; }

// Counts arrivals; the last one opens the next generation. Waiting spins a while, then yields: with more threads than
// cores a spinning thread would otherwise keep the core from the one that it waits for.
struct Barrier {
  alignas(64) int32_t arrived = 0;
  alignas(64) uint32_t generation = 0;

  RNNFAST_FN void wait(int32_t members) {
    if (members == 1) return;
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == now; ++spins) {
      if (spins < kSpins)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;
  static RNNFAST_FN void pause() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
};

// A thread's place: in the team of the call, and in the group that runs one item together.
struct Member {
  int64_t rank, size;
  Barrier* barrier;
  void wait() const { barrier->wait(static_cast<int32_t>(size)); }
};

// Denormals would slow a decaying state by a factor of a hundred. The mode is a thread's own and is put back.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

RNNFAST_END
