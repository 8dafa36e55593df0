#include "harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace rnnfast::test {
namespace {

char current[1024] = "start";
int failures = 0;
constexpr int kMostFailures = 20;

void print_case() {
  const char text[] = "\ndied in: ";
  if (write(STDERR_FILENO, text, sizeof text - 1) < 0 || write(STDERR_FILENO, current, std::strlen(current)) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0)
    return;
}

// A fault at a forbidden page, or a sanitizer's abort, tells which case it was.
[[maybe_unused]] void on_fault(int signal) {
  print_case();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

const bool installed = [] {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_case);
#else
  for (const int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE}) std::signal(signal, on_fault);
#endif
  return true;
}();

}  // namespace

void set_case(const std::string& text) { std::snprintf(current, sizeof current, "%s", text.c_str()); }

void fail(const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "%s:%d: %s\n  in: %s\n", file, line, message.c_str(), current);
  if (++failures >= kMostFailures) std::exit(1);
}

int finish() {
  if (!failures) std::printf("passed\n");
  return failures ? 1 : 0;
}

void check_close(const std::string& name, const Tensor& got, const Tensor& want, double tolerance) {
  if (got.size() != want.size()) return fail(__FILE__, __LINE__, name + ": sizes differ");
  double largest = 1;
  for (const double w : want) largest = std::max(largest, 1 + std::abs(w));
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - want[i]) <= tolerance * largest)) {
      char text[160];
      std::snprintf(text, sizeof text, ": at %zu of %zu expected %.17g, got %.17g", i, got.size(), want[i], got[i]);
      return fail(__FILE__, __LINE__, name + text);
    }
}

void check_same(const std::string& name, const Tensor& got, const Tensor& want) {
  const bool same = got.size() == want.size() &&
                    (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(double)) == 0);
  if (!same) fail(__FILE__, __LINE__, name + ": expected the same bits");
}

uint64_t Random::bits() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

Tensor Random::tensor(int64_t size, double scale) {
  Tensor values(size);
  for (double& value : values) value = uniform() * scale;
  return values;
}

GuardedBytes::GuardedBytes(size_t bytes, Edge edge) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
  mapped_ = inside + 2 * page;
  void* mapping = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<uint8_t*>(mapping);
  if (inside && mprotect(mapping_ + page, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  data_ = mapping_ + page + (edge == Edge::kEnd ? inside - bytes : 0);
}

GuardedBytes::~GuardedBytes() {
  if (mapping_) munmap(mapping_, mapped_);
}

GuardedBytes::GuardedBytes(GuardedBytes&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)), data_(other.data_), mapped_(other.mapped_) {}

}  // namespace rnnfast::test
