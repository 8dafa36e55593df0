// The products of tiles (cuda/tiles.h): on FMA cores in float32; on tensor cores for 16-bit numbers and TF32.
//
// A tile type has the weights of one thread, its sums, and
//   element(value)                as weights and states are multiplied: rounded
//   weight(lane, i)               where element i of the thread's weights lies within the tile
//   kFetchesAhead                 is there room for the states of the next tile?
//   fetch(states, stride, lane)   the thread's share of states that lie at the tile's first depth, rows `stride` elements apart
//   add<n>(sums, weights, states) from what was fetched; n is 0 or 1 in turn: two tiles do not wait for each other
//   finish(sums, store)           store(output, row, sum), each pair by one thread of the warp
#pragma once

#include "cuda/mma.cuh"
#include "cuda/persistent.cuh"

RNNFAST_BEGIN

template <int kSlices>
struct FmaTile {
  static constexpr TileShape kShape = fma_tile(kSlices);
  static constexpr bool kFetchesAhead = false;
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

  // Read when they are multiplied: there are too many for registers, and 32 sums that do not wait for each other.
  struct States {
    const float* first;
    int stride;
  };
  static __device__ States fetch(const float* states, int stride, int lane) {
    return {states + lane % kSlices * 4, stride};
  }
  template <int>
  static __device__ void add(Sums& sums, const Weights& weights, const States& states) {
    RNNFAST_UNROLL_ALL
    for (int r = 0; r < kFmaRows; ++r) {
      const Quad<float> state = *reinterpret_cast<const Quad<float>*>(states.first + r * states.stride);
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
  static constexpr bool kFetchesAhead = true;
  using Weights = cuda_runtime::Words;  // a fragment of A
  struct Sums {
    float value[2][4];  // of even and of odd tiles of the warp
  };
  struct States {
    uint32_t word[2];  // a fragment of B
  };

  static __device__ void clear(Sums& sums) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) sums.value[0][i] = sums.value[1][i] = 0;
  }
  template <class Store>
  static __device__ void finish(Sums& sums, int lane, const Store& store) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i)
      store(fragment_c(lane, i).row, fragment_c(lane, i).column, sums.value[0][i] + sums.value[1][i]);
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

  static __device__ States fetch(const T* states, int stride, int lane) {
    States b;
    RNNFAST_UNROLL_ALL
    for (int w = 0; w < 2; ++w) {  // two neighbouring depths, which lie together
      const FragmentPlace place = fragment_b(lane, 2 * w);
      b.word[w] = reinterpret_cast<const cuda_runtime::Word*>(states + place.column * stride + place.row)->value;
    }
    return b;
  }
  template <int kChain>
  static __device__ void add(Sums& sums, const Weights& weights, const States& states) {
    multiply_fragments<T>(sums.value[kChain], weights.word, states.word);
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

  static __device__ States fetch(const float* states, int stride, int lane) {
    States b;
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const FragmentPlace place = tf32_fragment_b(lane, i);
      b.word[i] = __builtin_bit_cast(uint32_t, states[place.column * stride + place.row]);
    }
    return b;
  }
  template <int kChain>
  static __device__ void add(Sums& sums, const Weights& weights, const States& states) {
    multiply_tf32(sums.value[kChain], weights.word, states.word);
  }
};

RNNFAST_END
