// A digest of the weights' bytes: how the torch layer knows that packed weights are still those of the module. Addresses and
// version counters do not tell, because a write through `tensor.data`, NumPy or another process changes neither.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace rnnfast::bindings {

// One pass at the speed of memory; on x86 the compiler makes a version for wider vectors, too.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define RNNFAST_WIDER __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RNNFAST_WIDER
#endif

// Eight lanes, each mixed as in XXH3 (Collet): the sum of the words and of a keyed product of their halves. Every word
// counts, and so does its place, through the key.
RNNFAST_WIDER inline void digest_words(const uint8_t* data, size_t blocks, uint64_t* lanes) {
  constexpr int kLanes = 8;
  uint64_t sums[kLanes], keys[kLanes];
  for (int j = 0; j < kLanes; ++j) sums[j] = lanes[j], keys[j] = 0x9E3779B97F4A7C15 * static_cast<uint64_t>(2 * j + 1);
  for (size_t i = 0; i < blocks; ++i) {
    uint64_t words[kLanes];
    std::memcpy(words, data + i * sizeof words, sizeof words);
    for (int j = 0; j < kLanes; ++j) {
      const uint64_t mixed = words[j] ^ keys[j];
      sums[j] += words[j] + (mixed & 0xFFFFFFFF) * (mixed >> 32);
      keys[j] += 0xD6E8FEB86659FD93;
    }
  }
  for (int j = 0; j < kLanes; ++j) lanes[j] = sums[j];
}
#undef RNNFAST_WIDER

inline uint64_t digest(const void* memory, size_t bytes, uint64_t seed) {
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, tail[8] = {};
  const auto* data = static_cast<const uint8_t*>(memory);
  const size_t blocks = bytes / sizeof lanes;
  digest_words(data, blocks, lanes);
  std::memcpy(tail, data + blocks * sizeof lanes, bytes - blocks * sizeof lanes);
  digest_words(reinterpret_cast<const uint8_t*>(tail), 1, lanes);
  uint64_t sum = seed + bytes;
  for (const uint64_t lane : lanes) {  // the finaliser of MurmurHash3
    sum = (sum ^ lane) * 0xFF51AFD7ED558CCD;
    sum = (sum ^ (sum >> 33)) * 0xC4CEB9FE1A85EC53;
    sum ^= sum >> 29;
  }
  return sum;
}

}  // namespace rnnfast::bindings
