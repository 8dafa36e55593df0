// Dropout between layers. The mask is a function of (seed, call, layer, t, b, unit) and is made where it is needed, in the
// forward and again in the backward pass: Philox, four units a call. It selects, it does not
// multiply: what was dropped leaves no NaN.
#pragma once

#include "core/philox.h"
#include "cpu/rows.h"

RNNFAST_BEGIN

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
