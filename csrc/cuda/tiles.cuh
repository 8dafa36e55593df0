// The products of tiles (cuda/tiles.h): on FMA cores in float32, on tensor cores for 16-bit numbers with sums in float32.
//
// A tile type has the weights of one thread, its sums, and
//   weight(lane, i)               where element i of the thread's weights lies within the tile
//   add(sums, weights, states)    states at the tile's first depth, rows `stride` elements apart
//   finish(sums, store)           store(output, row, sum), each pair by one thread of the warp
#pragma once

#include "cuda/persistent.cuh"
#include "cuda/tiles.h"

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

// c += a b, of a warp: the fragments of mma.sync.aligned.m16n8k16.row.col.f32.
#ifdef RNNFAST_EMULATE
template <class T>
float unpacked(const uint32_t* words, int i) {
  // NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult): they were written as 16-bit values
  return read(T{uint16_t(words[i / 2] >> 16 * (i % 2))});
}
template <class T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static thread_local float left[32][16][16], right[32][16][8];  // of the warps of a block
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 8; ++i) left[warp][fragment_a(lane, i).row][fragment_a(lane, i).column] = unpacked<T>(a, i);
  for (int i = 0; i < 4; ++i) right[warp][fragment_b(lane, i).row][fragment_b(lane, i).column] = unpacked<T>(b, i);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const FragmentPlace place = fragment_c(lane, i);
    for (int k = 0; k < 16; ++k) c[i] += left[warp][place.row][k] * right[warp][k][place.column];
  }
  __syncwarp();
}
#else
template <class T>
__device__ void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_fragments<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_fragments<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

template <class T>
struct MmaTile {
  static constexpr TileShape kShape = kMmaTile;
  using Element = T;

  using Weights = cuda_runtime::Words;  // a fragment of A
  struct Sums {
    float value[4];
  };

  static RNNFAST_FN OutputDepth weight(int lane, int i) {
    const FragmentPlace place = fragment_a(lane, i);
    return {place.row, place.column};
  }

  static __device__ void clear(Sums& sums) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) sums.value[i] = 0;
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

  template <class Store>
  static __device__ void finish(Sums& sums, int lane, const Store& store) {
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) store(fragment_c(lane, i).row, fragment_c(lane, i).column, sums.value[i]);
  }
};

RNNFAST_END
