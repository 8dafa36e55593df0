// Tensor cores: a warp's product of fragments, and the rounding to TF32 that float32 operands need before it. Who holds what:
// cuda/tiles.h.
#pragma once

#include "cuda/runtime.h"
#include "cuda/storage.h"
#include "cuda/tiles.h"

RNNFAST_BEGIN

// To 10 bits behind the point, to the nearest, ties away from zero: what tensor cores multiply of a float32. The bits below
// are zero, so that FMA cores multiply the same.
RNNFAST_FN float rounded_to_tf32(float x) {
  constexpr uint32_t kKept = 0xffffe000;
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __builtin_bit_cast(float, bits& kKept);
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7f800000) == 0x7f800000) return x;
  return __builtin_bit_cast(float, (bits + 0x1000) & kKept);
#endif
}

// c += a b, of a warp: the fragments of mma.sync.aligned.m16n8k16.row.col.f32, of 16-bit numbers, and of m16n8k8 of TF32.
#ifdef RNNFAST_EMULATE
template <class T>
float unpacked(const uint32_t* words, int i) {
  // NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult): they were written as 16-bit values
  return read(T{uint16_t(words[i / 2] >> 16 * (i % 2))});
}
template <int kDepth, class PlaceA, class PlaceB, class A, class B>
void emulate_fragments(float (&c)[4], const PlaceA& place_a, const PlaceB& place_b, const A& a, const B& b) {
  static thread_local float left[32][16][kDepth], right[32][kDepth][8];  // of the warps of a block
  const int warp = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) % 32;
  for (int i = 0; i < kDepth / 2; ++i) left[warp][place_a(lane, i).row][place_a(lane, i).column] = a(i);
  for (int i = 0; i < kDepth / 4; ++i) right[warp][place_b(lane, i).row][place_b(lane, i).column] = b(i);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const FragmentPlace place = fragment_c(lane, i);
    for (int k = 0; k < kDepth; ++k) c[i] += left[warp][place.row][k] * right[warp][k][place.column];
  }
  __syncwarp();
}
template <class T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_fragments<16>(
      c, fragment_a, fragment_b, [&](int i) { return unpacked<T>(a, i); }, [&](int i) { return unpacked<T>(b, i); });
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto tf32 = [](uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffffe000); };  // the rest is not seen
  // NOLINTBEGIN(clang-analyzer-core.CallAndMessage): the words of a fragment were written, each by its place
  emulate_fragments<8>(
      c, tf32_fragment_a, tf32_fragment_b, [&](int i) { return tf32(a[i]); }, [&](int i) { return tf32(b[i]); });
  // NOLINTEND(clang-analyzer-core.CallAndMessage)
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
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

RNNFAST_END
