// Philox4x32-10 (Salmon et al. 2011): four random words for each value of a 128-bit counter and a 64-bit key.
#pragma once

#include <stdint.h>

#include "cell/namespace.h"

RNNFAST_BEGIN

struct Philox {
  uint32_t word[4];

  RNNFAST_FN Philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1)
      : word{c0, c1, c2, c3} {
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t low = uint64_t(0xD2511F53u) * word[0], high = uint64_t(0xCD9E8D57u) * word[2];
      const uint32_t next[4] = {uint32_t(high >> 32) ^ word[1] ^ k0, uint32_t(high), uint32_t(low >> 32) ^ word[3] ^ k1,
                                uint32_t(low)};
      for (int i = 0; i < 4; ++i) word[i] = next[i];
    }
  }
};

RNNFAST_END
