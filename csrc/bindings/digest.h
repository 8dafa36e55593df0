// A digest of the weights' bytes: how the torch layer knows that packed weights are still those of the module. Addresses and
// version counters do not tell, because a write through `tensor.data`, NumPy or another process changes neither.
//
// It is read at every call of a loop of single steps, so it must cost little more than reading the bytes. Nobody is to be
// kept from forging one: what it must notice is any change that a program makes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define RNNFAST_AES
#include <immintrin.h>
#endif

namespace rnnfast::bindings {

// Two words to one, with all bits of both in all of it (the finaliser of MurmurHash3).
inline uint64_t mix(uint64_t sum, uint64_t word) {
  sum = (sum ^ word) * 0xFF51AFD7ED558CCD;
  sum = (sum ^ (sum >> 33)) * 0xC4CEB9FE1A85EC53;
  return sum ^ (sum >> 29);
}

// Eight lanes of words, each mixed as in XXH3 (Collet): the sum of the words and of a keyed product of their halves. Every
// word counts, and so does its place, through the key.
class WordLanes {
 public:
  static constexpr size_t kBlock = 64;

  void add(const uint8_t* data, size_t blocks) {
    for (size_t i = 0; i < blocks; ++i) {
      uint64_t words[kLanes];
      std::memcpy(words, data + i * kBlock, kBlock);
      for (int j = 0; j < kLanes; ++j) {
        const uint64_t mixed = words[j] ^ (key_ * static_cast<uint64_t>(2 * j + 1));
        sums_[j] += words[j] + (mixed & 0xFFFFFFFF) * (mixed >> 32);
      }
      key_ += 0xD6E8FEB86659FD93;
    }
  }
  uint64_t end(uint64_t sum) const {
    for (const uint64_t lane : sums_) sum = mix(sum, lane);
    return sum;
  }

 private:
  static constexpr int kLanes = 8;
  uint64_t sums_[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8}, key_ = 0x9E3779B97F4A7C15;
};

#ifdef RNNFAST_AES
// Eight chains of AES rounds, one round for 16 bytes: a round is one to one, so that a change in one block always shows, and
// blocks that change together must fit by chance.
class AesLanes {
 public:
  static constexpr size_t kBlock = 128;

  __attribute__((target("aes"))) void add(const uint8_t* data, size_t blocks) {
    __m128i state[kLanes];
    for (int j = 0; j < kLanes; ++j) state[j] = _mm_loadu_si128(state_ + j);
    for (size_t i = 0; i < blocks; ++i)
      for (int j = 0; j < kLanes; ++j) {
        const __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i * kBlock + 16 * j));
        state[j] = _mm_aesenc_si128(state[j], block);
      }
    for (int j = 0; j < kLanes; ++j) _mm_storeu_si128(state_ + j, state[j]);
  }
  uint64_t end(uint64_t sum) const {
    uint64_t words[2 * kLanes];
    std::memcpy(words, state_, sizeof words);
    for (const uint64_t word : words) sum = mix(sum, word);
    return sum;
  }

 private:
  static constexpr int kLanes = 8;
  __m128i state_[kLanes] = {};
};
#endif

template <class Lanes>
uint64_t digest_in(const void* memory, size_t bytes, uint64_t seed) {
  const auto* data = static_cast<const uint8_t*>(memory);
  const size_t blocks = bytes / Lanes::kBlock, rest = bytes - blocks * Lanes::kBlock;
  Lanes lanes;
  uint8_t tail[Lanes::kBlock] = {};
  std::memcpy(tail, data + blocks * Lanes::kBlock, rest);
  lanes.add(data, blocks);
  lanes.add(tail, 1);
  return lanes.end(mix(seed, bytes));
}

inline uint64_t digest(const void* memory, size_t bytes, uint64_t seed) {
#ifdef RNNFAST_AES
  if (__builtin_cpu_supports("aes")) return digest_in<AesLanes>(memory, bytes, seed);
#endif
  return digest_in<WordLanes>(memory, bytes, seed);
}

}  // namespace rnnfast::bindings
