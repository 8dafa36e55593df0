#include "core/dispatch.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/api.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Declared here, defined by cpu/engine.cpp for each instruction set and element type.
#define RNNFAST_DECLARE(isa)                 \
  namespace rnnfast::isa {                   \
  extern const Engine<float> engine_float;   \
  extern const Engine<double> engine_double; \
  }
RNNFAST_DECLARE(scalar)
#ifdef RNNFAST_HAS_avx2
RNNFAST_DECLARE(avx2)
#endif
#ifdef RNNFAST_HAS_avx512
RNNFAST_DECLARE(avx512)
#endif
#ifdef RNNFAST_HAS_neon
RNNFAST_DECLARE(neon)
#endif

namespace rnnfast {
namespace {

struct Isa {
  const char* name;
  const Engine<float>* engine_float;
  const Engine<double>* engine_double;
  bool (*runs)();
};

#if defined(__x86_64__)
// The CPU's word alone is not enough: the operating system must save the wide registers too (XCR0).
bool saves_registers(unsigned mask) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && saves_registers(0x06);
}
[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && saves_registers(0xe6);
}
#endif
bool always() { return true; }

const Isa kIsas[] = {
#ifdef RNNFAST_HAS_avx512
    {"avx512", &avx512::engine_float, &avx512::engine_double, runs_avx512},
#endif
#ifdef RNNFAST_HAS_avx2
    {"avx2", &avx2::engine_float, &avx2::engine_double, runs_avx2},
#endif
#ifdef RNNFAST_HAS_neon
    {"neon", &neon::engine_float, &neon::engine_double, always},
#endif
    {"scalar", &scalar::engine_float, &scalar::engine_double, always},
};

const Isa* best_isa() {
  for (const Isa& isa : kIsas)
    if (isa.runs()) return &isa;
  return nullptr;
}

const Isa*& chosen() {
  static const Isa* isa = best_isa();
  return isa;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// ---- threads ----

std::atomic<int> requested{0};
std::atomic<bool> forked{false};
// When the library is loaded, not at the first call: the parent's threads may be those that PyTorch woke.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Physical cores that this process may use: a second thread on a core shares the units that the kernels fill.
int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return n;
  }
  return usable_cores();
}

}  // namespace

template <>
const Engine<float>& engine<float>() {
  return *chosen()->engine_float;
}
template <>
const Engine<double>& engine<double>() {
  return *chosen()->engine_double;
}

std::string isa() { return chosen()->name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> possible_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.runs()) names.push_back(isa.name);
  return names;
}

void choose_isa() {
  const char* wanted = std::getenv("RNNFAST_ISA");
  if (!wanted || !*wanted) {
    chosen() = best_isa();
    return;
  }
  for (const Isa& isa : kIsas)
    if (isa.runs() && isa.name == std::string(wanted)) {
      chosen() = &isa;
      return;
    }
  throw std::runtime_error("RNNFAST_ISA: expected one of " + joined(possible_isas()) + " on this machine, got '" +
                           wanted + "'");
}

// libgomp's worker threads do not survive a fork, and waiting for them would never end: a child runs on one thread.
int get_num_threads() {
  static std::once_flag once;
  std::call_once(once, [] {
    int unset = 0;
    requested.compare_exchange_strong(unset, default_threads());
  });
  return forked ? 1 : requested.load();
}

void set_num_threads(int n) {
  get_num_threads();
  requested = n;
}

double barrier_time(int threads) {
  constexpr int kTries = 9;
  constexpr int64_t kBarriers = 4000;
  double best = engine<float>().barrier_seconds(kBarriers, threads);
  for (int n = 1; n < kTries; ++n) best = std::min(best, engine<float>().barrier_seconds(kBarriers, threads));
  return best / kBarriers;
}

double fma_peak(int threads, double seconds, Dtype dtype) {
  const auto run = [&](int64_t n) {
    return dtype == Dtype::kFloat32 ? engine<float>().fma_seconds(n, threads)
                                    : engine<double>().fma_seconds(n, threads);
  };
  const int lanes = dtype == Dtype::kFloat32 ? engine<float>().lanes : engine<double>().lanes;
  int64_t iterations = 100000;
  double best = 0, spent = 0;
  while (spent < seconds) {
    const double took = std::max(run(iterations), 1e-9);
    best = std::max(best, 24.0 * lanes * iterations * threads / took / 1e9);
    spent += took;
    if (took < seconds / 10) iterations *= 2;
  }
  return best;
}

}  // namespace rnnfast
