#include "core/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

namespace rnnfast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastPooled = size_t{256} << 20, kMostPooled = size_t{1} << 30, kMostBlocks = 64;
constexpr double kAskedFor = 1 << 30;  // less is allocated without a look at what the system has

struct Block {
  uint8_t* data;
  size_t capacity;
};

// What may be held for reuse: a sixteenth of the memory, within limits.
size_t pool_limit() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  const size_t memory = pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : 0;
  return std::clamp(memory / 16, kLeastPooled, kMostPooled);
}

// Never destroyed: buffers of static lifetime may outlive it.
struct Pool {
  Pool() { blocks.reserve(kMostBlocks); }  // a destructor adds to it and must not throw
  std::mutex mutex;
  std::vector<Block> blocks;  // the one that has waited longest first
  size_t bytes = 0;
  const size_t limit = pool_limit();
};
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

// The smallest pooled block that is large enough and not more than twice too large.
Block take_pooled(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.blocks.end();
  for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it)
    if (it->capacity >= bytes && it->capacity <= 2 * bytes && (best == p.blocks.end() || it->capacity < best->capacity))
      best = it;
  if (best == p.blocks.end()) return {nullptr, 0};
  const Block block = *best;
  p.blocks.erase(best);
  p.bytes -= block.capacity;
  return block;
}

// Bytes that the system could still back, infinite where it does not say.
double available_memory() {
  double memory = std::numeric_limits<double>::infinity(), swap = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    std::sscanf(line.c_str(), "MemAvailable: %lf", &memory);
    std::sscanf(line.c_str(), "SwapFree: %lf", &swap);
  }
  return (memory + swap) * 1024;
}

Block allocate(size_t bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  require_memory(static_cast<double>(bytes));
  if (bytes > SIZE_MAX - alignment) throw OutOfMemory(static_cast<double>(bytes));
  const size_t capacity = (bytes + alignment - 1) / alignment * alignment;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, capacity));
  if (!data) throw OutOfMemory(static_cast<double>(bytes));
  if (alignment == kHugePage) madvise(data, capacity, MADV_HUGEPAGE);
  return {data, capacity};
}

}  // namespace

OutOfMemory::OutOfMemory(double bytes) {
  char digits[320];  // of the largest double
  std::snprintf(digits, sizeof digits, "%.0f", bytes);
  text_ = std::string("expected memory for ") + digits + " bytes, found less";
}

void require_memory(double bytes) {
  if (bytes < kAskedFor || bytes <= available_memory()) return;
  release_pool();
  if (bytes > available_memory()) throw OutOfMemory(bytes);
}

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  Block block = take_pooled(bytes);
  if (!block.data) block = allocate(bytes);
  data_ = block.data;
  capacity_ = block.capacity;
  allow(data_, capacity_);
}

// Into the pool, from which those go that have waited longest: the sizes of late are those of the next call.
Buffer::~Buffer() {
  if (!data_) return;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (capacity_ > p.limit) {
    std::free(data_);
    return;
  }
  while (p.blocks.size() == kMostBlocks || p.bytes + capacity_ > p.limit) {
    std::free(p.blocks.front().data);
    p.bytes -= p.blocks.front().capacity;
    p.blocks.erase(p.blocks.begin());
  }
  p.blocks.push_back({data_, capacity_});
  p.bytes += capacity_;
}

size_t pooled_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.bytes;
}

void release_pool() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  for (const Block& block : p.blocks) std::free(block.data);
  p.blocks.clear();
  p.bytes = 0;
}

}  // namespace rnnfast
