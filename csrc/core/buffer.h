// Aligned memory that is returned to a small pool, so that a training loop does not ask the system for its reserve (and
// pay for every fresh page) at each step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace rnnfast {

// For the address sanitizer alone: a gap after each array of a buffer that must not be touched.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;
inline void forbid(const uint8_t* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void allow(const uint8_t* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
constexpr size_t kGap = 0;
inline void forbid(const uint8_t*, size_t) {}
inline void allow(const uint8_t*, size_t) {}
#endif

// Says how much was wanted.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(double bytes);
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// OutOfMemory where the system could not back so many bytes: it may grant them all the same, and end the process that
// touches them. For what is allocated in several pieces before any of them is touched.
void require_memory(double bytes);

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // uninitialised, 64-byte aligned; OutOfMemory
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }
  uint8_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// Lays several arrays out in one buffer: run once without memory to learn the size, then again with it.
class Carver {
 public:
  explicit Carver(uint8_t* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), padded = (bytes + 63) / 64 * 64 + kGap;
    uint8_t* here = base_ ? base_ + used_ : nullptr;
    if (here) forbid(here + bytes, padded - bytes);
    used_ += padded;
    return reinterpret_cast<T*>(here);
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

size_t pooled_bytes();  // held for reuse at the moment
void release_pool();

}  // namespace rnnfast
