// Dropout between layers: the mask is a function of (seed, call, layer, t, b, unit), made in the forward and again in the
// backward pass. It selects, it does not multiply: what was dropped leaves no NaN. (reference.py has the definition.)
#pragma once

#include "core/philox.h"
#include "cuda/product.cuh"

RNNFAST_BEGIN

// target[t, b, j] = keep_j ? source[t, b, j] * scale : 0; a thread has four features. They may be the same memory.
template <class T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DropoutKey key, int64_t steps, int64_t batch, int64_t width,
                                                           Sequence<T> source, Sequence<T> target) {
  using A = Arithmetic<T>;
  const int64_t groups = (width + 3) / 4, n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = n / groups, t = row / batch, b = row % batch, j = n % groups;
  if (row >= steps * batch) return;
  const Philox random(uint32_t(t), uint32_t(b), key.layer * (1u << 20) + uint32_t(j), uint32_t(key.call),
                      uint32_t(key.seed), uint32_t(key.seed >> 32));
  for (int i = 0; i < 4; ++i) {
    if (4 * j + i >= width) continue;  // a fixed number of rounds keeps the words in registers
    const bool keep = !key.all && random.word[i] >= key.threshold;
    const A value = read(at(source, t, b)[4 * j + i]) * A(key.scale);
    at(target, t, b)[4 * j + i] = keep ? rounded<T>(value) : rounded<T>(A(0));
  }
}

RNNFAST_END
