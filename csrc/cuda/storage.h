// The element types of arrays, and what is computed with: float16 and bfloat16 are stored, arithmetic is float's.
#pragma once

#include <stdint.h>

#include "cell/namespace.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

RNNFAST_BEGIN

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

RNNFAST_FN float read(float x) { return x; }
RNNFAST_FN double read(double x) { return x; }
RNNFAST_FN float read(Bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

template <class T>
RNNFAST_FN T rounded(Arithmetic<T> x) {  // to the nearest, ties to even
  return x;
}
template <>
RNNFAST_FN Bfloat16 rounded<Bfloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};  // a NaN stays one
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// float16 by the device's instructions; on the host by arithmetic whose rounding is the one wanted.
#ifdef __CUDA_ARCH__
RNNFAST_FN float read(Half x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
RNNFAST_FN Half rounded<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#else
RNNFAST_FN float read(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000 | magnitude);
  const float exact = __builtin_bit_cast(float, magnitude) * 0x1p112f;  // exponents, and denormals, put right
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, exact));
}
template <>
RNNFAST_FN Half rounded<Half>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and beyond: infinity
  if (magnitude < 0x38800000) {  // denormal: the sum with 0.5 leaves its bits in the last places
    const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    return {uint16_t(sign | (__builtin_bit_cast(uint32_t, sum) - 0x3f000000))};
  }
  const uint32_t nearest = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | nearest >> 13)};
}
#endif

RNNFAST_END
