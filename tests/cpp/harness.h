// What the C++ tests stand on: checks that report the case at hand, repeatable random numbers, and arrays that end (or
// begin) at a page that cannot be touched, so that one element too many is a fault, in masked vector code too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

namespace rnnfast::test {

using Tensor = std::vector<double>;  // row-major

// ---- checks ----

void set_case(const std::string& text);  // printed with every failure, and when the process dies
void fail(const char* file, int line, const std::string& message);
int finish();  // the exit status

#define CHECK(condition) \
  if (!(condition)) ::rnnfast::test::fail(__FILE__, __LINE__, #condition)

#define CHECK_THROWS(Exception, statement)                                                           \
  try {                                                                                              \
    statement;                                                                                       \
    ::rnnfast::test::fail(__FILE__, __LINE__, #statement ": expected " #Exception ", got no error"); \
  } catch (const Exception&) {                                                                       \
  }

// Everywhere within tolerance * (1 + the largest of `want`); a NaN never is.
void check_close(const std::string& name, const Tensor& got, const Tensor& want, double tolerance);
void check_same(const std::string& name, const Tensor& got, const Tensor& want);  // bit for bit

// ---- random numbers (SplitMix64): the same everywhere ----

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  double uniform() { return double(bits() >> 11) / (uint64_t{1} << 53) * 2 - 1; }  // [-1, 1)
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool chance(int64_t n, int64_t of) { return below(of) < n; }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
  }
  Tensor tensor(int64_t size, double scale = 1);

 private:
  uint64_t state_;
};

// ---- guarded memory ----

enum class Edge { kBegin, kEnd };  // where the forbidden page touches the array

class GuardedBytes {
 public:
  GuardedBytes(size_t bytes, Edge edge);
  ~GuardedBytes();
  GuardedBytes(GuardedBytes&& other) noexcept;
  GuardedBytes& operator=(GuardedBytes&&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t *mapping_, *data_;
  size_t mapped_;
};

// Exactly `count` elements; alignment is the element's own and no better. Filled with NaN (all bits set).
template <class T>
class Guarded {
 public:
  Guarded(int64_t count, Edge edge) : count_(count), bytes_(count * sizeof(T), edge) {
    std::memset(bytes_.data(), 0xff, count * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  GuardedBytes bytes_;
};

// A row-major tensor [n0, n1, n2] in guarded memory with strides of its own; what lies between the rows is NaN.
struct Layout {
  bool swapped = false;  // the second axis outermost, as with batch_first
  bool flipped = false;  // the first axis backwards: a negative stride
  int64_t gap = 0;       // elements between rows
};

template <class T>
class Strided {
 public:
  Strided(int64_t n0, int64_t n1, int64_t n2, const Layout& layout, Edge edge)
      : n0_(n0),
        n1_(n1),
        n2_(n2),
        stride0_((layout.swapped ? 1 : n1) * (n2 + layout.gap)),
        stride1_((layout.swapped ? n0 : 1) * (n2 + layout.gap)),
        memory_(n0 && n1 && n2 ? (n0 - 1) * stride0_ + (n1 - 1) * stride1_ + n2 : 0, edge),
        data_(memory_.data()) {
    if (!layout.flipped || n0 == 0) return;
    data_ += (n0 - 1) * stride0_;
    stride0_ = -stride0_;
  }

  void set(const Tensor& values) {
    for_each([&](T& element, size_t i) { element = static_cast<T>(values[i]); });
  }
  Tensor get() const {
    Tensor values(n0_ * n1_ * n2_);
    for_each([&](T& element, size_t i) { values[i] = static_cast<double>(element); });
    return values;
  }
  // Nothing was written between the rows.
  bool gaps_intact() const {
    std::vector<T> copy(memory_.data(), memory_.data() + memory_.size());
    for_each([&](T& element, size_t) { copy[&element - memory_.data()] = std::numeric_limits<T>::quiet_NaN(); });
    for (const T& element : copy)
      if (!std::isnan(element)) return false;
    return true;
  }

  T* data() const { return data_; }
  T* row(int64_t i, int64_t j) const { return data_ + i * stride0_ + j * stride1_; }
  int64_t stride0() const { return stride0_; }
  int64_t stride1() const { return stride1_; }
  int64_t width() const { return n2_; }

 private:
  template <class Function>
  void for_each(Function&& function) const {
    size_t next = 0;
    for (int64_t i = 0; i < n0_; ++i)
      for (int64_t j = 0; j < n1_; ++j)
        for (int64_t k = 0; k < n2_; ++k) function(row(i, j)[k], next++);
  }

  int64_t n0_, n1_, n2_, stride0_, stride1_;
  Guarded<T> memory_;
  T* data_;
};

}  // namespace rnnfast::test
