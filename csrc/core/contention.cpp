#include "core/contention.h"

#include <algorithm>
#include <chrono>

namespace rnnfast {

int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

bool Contention::present() const { return until_ != 0 && monotonic_ns() < until_; }

void Contention::report(int64_t waited, int64_t elapsed) {
  if (waited < kNoticeable || 2 * waited < elapsed) {
    in_vain_ = 0, pause_ = kShortest;
    return;
  }
  if (in_vain_.exchange(1) == 0) return;  // once is chance, or the start of the threads
  until_ = monotonic_ns() + pause_;
  pause_ = std::min<int64_t>(2 * pause_, kLongest);
}

Contention& contention() {
  static Contention instance;
  return instance;
}

}  // namespace rnnfast
