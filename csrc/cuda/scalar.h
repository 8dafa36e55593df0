// float and double as the scalar-like type V of the cells (cell/activation.h says what that needs). To be included before
// any header of cell/: functions of fundamental types are found only where the templates are defined.
//
// Contraction is off in the build (-fmad=false): a fused multiply-add is one where fma() is written, on the device as in
// the emulator, and both round alike. Division is IEEE's.
#pragma once

#include <stdint.h>

#include "cell/namespace.h"

RNNFAST_BEGIN

RNNFAST_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
RNNFAST_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <class S>
RNNFAST_FN S select(bool mask, S a, S b) {
  return mask ? a : b;
}

// Within [low, high]; a comparison with NaN is false, so NaN stays.
template <class S>
RNNFAST_FN S clamp(S x, S low, S high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}

template <class S>
RNNFAST_FN S reciprocal(S x) {
  return S(1) / x;
}

// a / (b + error of b): the quotient's own remainder brings it within one ulp.
template <class S>
RNNFAST_FN S divide(S a, S b, S error) {
  const S y = reciprocal(b), q = a * y;
  return fma(fma(-error, q, fma(-b, q, a)), y, q);
}

// Rounding to an integer by adding 1.5 * 2^(mantissa bits): the sum's low bits are the integer itself, from which pow2()
// makes 2^n with a shift and an addition.
template <class S>
struct Magic;
template <>
struct Magic<float> {
  using Bits = uint32_t;
  static constexpr float kValue = 12582912.0f;
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3f800000;
};
template <>
struct Magic<double> {
  using Bits = uint64_t;
  static constexpr double kValue = 6755399441055744.0;
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3ff0000000000000;
};

template <class S>
RNNFAST_FN S round_magic(S y, S k) {
  return fma(y, k, S(Magic<S>::kValue));
}
template <class S>
RNNFAST_FN S unround(S magic) {
  return magic - S(Magic<S>::kValue);
}
template <class S>
RNNFAST_FN S pow2(S magic) {
  using M = Magic<S>;
  const auto bits = __builtin_bit_cast(typename M::Bits, magic);
  return __builtin_bit_cast(S, typename M::Bits((bits << M::kMantissa) + M::kOne));
}

RNNFAST_END
