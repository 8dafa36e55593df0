// Dropout between layers. The mask is a function of (seed, call, layer, t, b, unit) and is made where it is needed, in the
// forward and again in the backward pass: Philox4x32-10 (Salmon et al. 2011), four units a call. It selects, it does not
// multiply: what was dropped leaves no NaN.
#pragma once

#include "cpu/rows.h"

RNNFAST_BEGIN

struct Philox {
  uint32_t word[4];

  Philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) : word{c0, c1, c2, c3} {
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t low = uint64_t(0xD2511F53u) * word[0], high = uint64_t(0xCD9E8D57u) * word[2];
      const uint32_t next[4] = {uint32_t(high >> 32) ^ word[1] ^ k0, uint32_t(high), uint32_t(low >> 32) ^ word[3] ^ k1,
                                uint32_t(low)};
      for (int i = 0; i < 4; ++i) word[i] = next[i];
    }
  }
};

// target[j] = keep_j ? source[j] * scale : 0 for the `width` features of (t, b); source and target may be the same row.
template <class T>
void mask_row(const DropoutKey& key, int64_t t, int64_t b, int64_t width, const T* source, T* target) {
  for (int64_t j = 0; j < width; j += 4) {
    const Philox random(uint32_t(t), uint32_t(b), key.layer * (1u << 20) + uint32_t(j / 4), uint32_t(key.call),
                        uint32_t(key.seed), uint32_t(key.seed >> 32));
    for (int64_t i = 0; i < least(4, width - j); ++i)
      target[j + i] = !key.all && random.word[i] >= key.threshold ? source[j + i] * T(key.scale) : T(0);
  }
}

// This member's share of all (t, b).
template <class T>
void mask_sequence(const DropoutKey& key, int64_t steps, int64_t batch, int64_t width, const Sequence<T>& source,
                   const Sequence<T>& target, Member team) {
  const Range mine = share(steps * batch, team.rank, team.size);
  for (int64_t i = mine.begin; i < mine.end; ++i)
    mask_row(key, i / batch, i % batch, width, at(source, i / batch, i % batch), at(target, i / batch, i % batch));
}

RNNFAST_END
