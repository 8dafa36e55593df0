// The products of tiles (cuda/tiles.h): on FMA cores in float32; on tensor cores for 16-bit numbers and TF32.
//
// A tile type has the weights of one thread, its sums, and
//   element(value)                as weights and states are multiplied: rounded
//   weight(lane, i)               where element i of the thread's weights lies within the tile
//   add(sums, weights, states)    states at the tile's first depth, rows `stride` elements apart
//   finish(sums, store)           store(output, row, sum), each pair by one thread of the warp
#pragma once

#include "cuda/mma.cuh"
#include "cuda/persistent.cuh"

RNNFAST_BEGIN

template <int kSlices>
struct FmaTile {
  static constexpr TileShape kShape = fma_tile(kSlices);
  using Element = float;

  struct Weights {
    Quad<float> quad[kFmaOutputs];
  };
  struct Sums {
    float value[kFmaSums];
  };

  static RNNFAST_FN float element(float value) { return value; }
  static RNNFAST_FN OutputDepth weight(int lane, int i) { return fma_weight(kSlices, lane, i); }

  static __device__ void clear(Sums& sums) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kFmaSums; ++i) sums.value[i] = 0;
  }

  static __device__ void add(Sums& sums, const Weights& weights, const float* states, int stride, int lane) {
    RNNFAST_UNROLL_ALL
    for (int r = 0; r < kFmaRows; ++r) {
      const Quad<float> state = *reinterpret_cast<const Quad<float>*>(states + r * stride + lane % kSlices * 4);
      RNNFAST_UNROLL_ALL
      for (int o = 0; o < kFmaOutputs; ++o)
        sums.value[o * kFmaRows + r] = dot(weights.quad[o], state, sums.value[o * kFmaRows + r]);
    }
  }

  // Adds within a group: at each exchange a thread keeps one half of its sums and gives the other away.
  template <class Store>
  static __device__ void finish(Sums& sums, int lane, const Store& store) {
    fold<kFmaSums / 2, kSlices / 2>(sums, lane);
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kFmaSums / kSlices; ++i) {
      const OutputRow place = fma_sum(kSlices, lane, i);
      store(place.output, place.row, sums.value[i]);
    }
  }

 private:
  template <int kHalf, int kMask>
  static __device__ void fold(Sums& sums, int lane) {
    if constexpr (kMask > 0) {
      const bool upper = lane & kMask;
      RNNFAST_UNROLL_ALL
      for (int i = 0; i < kHalf; ++i) {
        const float low = sums.value[i], high = sums.value[i + kHalf];
        sums.value[i] = (upper ? high : low) + cuda_runtime::exchange(upper ? low : high, kMask);
      }
      fold<kHalf / 2, kMask / 2>(sums, lane);
    }
  }
};

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// What 16-bit numbers and TF32 have in common.
struct TensorTile {
  using Weights = cuda_runtime::Words;  // a fragment of A
  struct Sums {
    float value[4];
  };

  static __device__ void clear(Sums& sums) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) sums.value[i] = 0;
  }
  template <class Store>
  static __device__ void finish(Sums& sums, int lane, const Store& store) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) store(fragment_c(lane, i).row, fragment_c(lane, i).column, sums.value[i]);
  }
};

template <class T>
struct MmaTile : TensorTile {
  static constexpr TileShape kShape = kMmaTile;
  using Element = T;

  static RNNFAST_FN T element(float value) { return rounded<T>(value); }
  static RNNFAST_FN OutputDepth weight(int lane, int i) {
    const FragmentPlace place = fragment_a(lane, i);
    return {place.row, place.column};
  }

  static __device__ void add(Sums& sums, const Weights& weights, const T* states, int stride, int lane) {
    uint32_t b[2];
    RNNFAST_UNROLL_ALL
    for (int w = 0; w < 2; ++w) {  // two neighbouring depths, which lie together
      const FragmentPlace place = fragment_b(lane, 2 * w);
      b[w] = reinterpret_cast<const cuda_runtime::Word*>(states + place.column * stride + place.row)->value;
    }
    multiply_fragments<T>(sums.value, weights.word, b);
  }
};

struct Tf32Tile : TensorTile {
  static constexpr TileShape kShape = kTf32Tile;
  using Element = float;

  static RNNFAST_FN float element(float value) { return rounded_to_tf32(value); }
  static RNNFAST_FN OutputDepth weight(int lane, int i) {
    const FragmentPlace place = tf32_fragment_a(lane, i);
    return {place.row, place.column};
  }

  static __device__ void add(Sums& sums, const Weights& weights, const float* states, int stride, int lane) {
    uint32_t b[2];
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const FragmentPlace place = tf32_fragment_b(lane, i);
      b[i] = __builtin_bit_cast(uint32_t, states[place.column * stride + place.row]);
    }
    multiply_tf32(sums.value, weights.word, b);
  }
};

RNNFAST_END
