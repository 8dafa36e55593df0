// Whether a second thread is worth having just now.
//
// Where other programs keep the cores busy, threads that work together wait for whichever of them has no core, for
// milliseconds at a time: a call of microseconds becomes a thousand times slower. A call in which a thread has waited for
// more than half of the time would have been as fast on one; after the second such call in a row calls run on one thread for
// a while, each time that a new trial fails for twice as long. The work is cut up in the same way, so results keep their bits.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnfast {

class Contention {
 public:
  bool present() const;                          // at this moment, as far as the last calls tell
  void report(int64_t waited, int64_t elapsed);  // nanoseconds, of one call by several threads

 private:
  std::atomic<int64_t> until_{0}, pause_{kShortest};
  std::atomic<int> in_vain_{0};
  static constexpr int64_t kShortest = 10'000'000, kLongest = 1'000'000'000, kNoticeable = 100'000;
};

Contention& contention();
int64_t monotonic_ns();

}  // namespace rnnfast
