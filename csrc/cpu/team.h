// Threads: which part of the work is mine, and waiting for the others.
#pragma once

#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

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

RNNFAST_FN int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

// How long a thread has waited for others in this call, but for the shortest waits.
struct Waiting {
  int64_t start, waited = 0;
  int64_t patience;  // nanoseconds after which waiting may be in vain; negative: it always is (tests)

  RNNFAST_FN bool in_vain() const { return patience < 0 || (waited >= patience && 2 * waited >= now_ns() - start); }
};

RNNFAST_FN void pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins a while, then yields: with more threads than cores a spinning thread would otherwise keep the core from the one
// that it waits for.
template <class Ready>
RNNFAST_FN void wait_until(Waiting& waiting, Ready&& ready) {
  constexpr int kShort = 50, kSpins = 4000;
  const auto spin = [&](int times) {
    for (int n = 0; n < times; ++n) {
      if (ready()) return true;
      pause();
    }
    return false;
  };
  if (spin(kShort)) return;
  const int64_t begin = now_ns();
  if (!spin(kSpins))
    while (!ready()) sched_yield();
  waiting.waited += now_ns() - begin;
}

// Counts arrivals; the last one opens the next generation.
//
// A thread that has waited for more than half of its time (another program has the others' cores, and each barrier lasts
// until they get a turn) may leave them behind: from the barrier that it then arrives at, it does the work of all.
struct Barrier {
  alignas(64) int32_t arrived = 0;
  alignas(64) uint32_t generation = 0;
  alignas(64) int64_t alone = kNobody;  // generation from which it holds << 16 | rank

  // The same for who comes new: whoever went on alone at a barrier that all have passed.
  RNNFAST_FN int64_t left() const { return left_by(int64_t{__atomic_load_n(&generation, __ATOMIC_ACQUIRE)} - 1); }

  // Returns the rank of the member that goes on alone, or -1.
  RNNFAST_FN int64_t wait(int32_t members, int64_t rank, Waiting& waiting, bool may_leave) {
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (may_leave && waiting.in_vain()) leave_behind(now, rank);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
    } else {
      wait_until(waiting, [&] { return __atomic_load_n(&generation, __ATOMIC_ACQUIRE) != now; });
    }
    return may_leave ? left_by(now) : -1;
  }

 private:
  static constexpr int64_t kNobody = -1;

  // Another may already be past the barrier before: it must not believe that this holds there.
  void leave_behind(uint32_t now, int64_t rank) {
    int64_t nobody = kNobody;
    __atomic_compare_exchange_n(&alone, &nobody, int64_t{now} << 16 | rank, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
  RNNFAST_FN int64_t left_by(int64_t passed) const {
    const int64_t who = __atomic_load_n(&alone, __ATOMIC_ACQUIRE);
    return who == kNobody || (who >> 16) > passed ? -1 : who & 0xffff;
  }
};

// A thread's place: in the team of the call, and in the group that runs one item together.
struct Member {
  int64_t rank, size;
  Barrier* barrier;
  Waiting* waiting;
  bool may_leave;

  // Returns the rank of the member that goes on alone, or -1.
  RNNFAST_FN int64_t wait() const {
    return size == 1 ? -1 : barrier->wait(static_cast<int32_t>(size), rank, *waiting, may_leave);
  }
};

// Layers that run at once, each on one thread: steps that the layer has done, and that the one which it reads from has.
// Null: every layer waits for the whole of the one before.
struct Wavefront {
  int64_t* mine = nullptr;
  const int64_t* before = nullptr;
};

// A thread of the group that works on one item, and its part of it.
class Worker {
 public:
  Worker(Member group, int64_t blocks, int64_t out_blocks, Wavefront front = {})
      : group_(group), front_(front), all_{blocks, out_blocks} {
    if (group.size > 1 && group.may_leave) follow(group.barrier->left());
    assign();
  }

  void wait() {
    if (group_.size == 1 || !follow(group_.wait())) return;
    assign();
  }

  // Steps, counted in the order in which they are run.
  void wait_for_input(int64_t steps) const {
    if (front_.before)
      wait_until(*group_.waiting, [&] { return __atomic_load_n(front_.before, __ATOMIC_ACQUIRE) >= steps; });
  }
  void have_done(int64_t steps) const {
    if (front_.mine) __atomic_store_n(front_.mine, steps, __ATOMIC_RELEASE);
  }

  // My part of n; all or nothing once a member has gone on alone.
  RNNFAST_FN Range part(int64_t n) const { return idle_ ? Range{0, 0} : share(n, group_.rank, group_.size); }
  RNNFAST_FN int64_t rank() const { return group_.rank; }
  RNNFAST_FN int64_t size() const { return group_.size; }

  Range blocks, out_blocks;  // mine, of H and of P

 private:
  bool follow(int64_t alone) {
    if (alone < 0) return false;
    idle_ = alone != group_.rank;
    group_ = {0, 1, group_.barrier, group_.waiting, false};
    return true;
  }
  void assign() { blocks = part(all_[0]), out_blocks = part(all_[1]); }

  Member group_;
  const Wavefront front_;
  const int64_t all_[2];
  bool idle_ = false;
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
