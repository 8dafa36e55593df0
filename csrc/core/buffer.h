// Aligned memory that is returned to a small pool, so that a training loop does not ask the system for its reserve (and
// pay for every fresh page) at each step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace rnnfast {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // uninitialised, 64-byte aligned; std::bad_alloc
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
    T* here = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

size_t pooled_bytes();  // held for reuse at the moment
void release_pool();

}  // namespace rnnfast
