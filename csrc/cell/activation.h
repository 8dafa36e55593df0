// Activations, written once for every scalar-like type V: a SIMD vector on the CPU, a float in a CUDA thread.
//
// V needs + - *, and, found by argument: fma(a, b, c), select(mask, a, b), clamp(x, low, high), divide(a, b, error of b),
// reciprocal(x), round_magic(y, k) and pow2(magic) (see cpu/simd.h). Both functions are within 2 ulp of the exact value
// over all normal floats; NaN stays NaN.
#pragma once

#include "cell/namespace.h"

RNNFAST_BEGIN

// Coefficients of exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2)/2 (by a function: nvcc knows no constant arrays of a class), and
// the split of ln 2 whose products with a small integer are exact.
template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMax = 87.5f;      // exp stays finite and 2^n normal
  static constexpr float kTanhMax = 20.0f;  // expm1(2x) beyond which tanh rounds to 1
  static constexpr int kTerms = 5;  // minimax for the relative error of exp, 3.2e-9, rounded to float one by one
  static RNNFAST_FN constexpr float q(int i) {
    constexpr float kQ[kTerms] = {4.999999404e-01f, 1.666652113e-01f, 4.166827351e-02f, 8.368683048e-03f,
                                  1.382005168e-03f};
    return kQ[i];
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 1.44269504088896340736, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kMax = 709.0, kTanhMax = 40.0;  // kMax: 1 / exp flushes to zero, so sigmoid(-inf) is 0
  static constexpr int kTerms = 12;                       // Taylor: the next term is below 2^-57
  static RNNFAST_FN constexpr double q(int i) {
    constexpr double kQ[kTerms] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                   1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                   1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    return kQ[i];
  }
};

// exp(y) = scale (1 + m): the two parts.
template <class V>
struct Exponential {
  V scale, m;
};

template <class V>
RNNFAST_FN Exponential<V> exponential(V y, scalar_t<V> most) {
  using C = ExpConstants<scalar_t<V>>;
  y = clamp(y, V(-most), V(most));
  const V magic = round_magic(y, V(C::kLog2E));
  const V n = unround(magic);
  V r = fma(n, V(-C::kLn2High), y);
  r = fma(n, V(-C::kLn2Low), r);
  V q = V(C::q(C::kTerms - 1));
  for (int i = C::kTerms - 2; i >= 0; --i) q = fma(q, r, V(C::q(i)));
  return {pow2(magic), fma(q, r * r, r)};
}

// 1 / (1 + exp(-x)). The denominator is rounded once: 1 + scale is exact while the sum has digits of both.
template <class V>
RNNFAST_FN V sigmoid(V x) {
  const Exponential<V> e = exponential(-x, ExpConstants<scalar_t<V>>::kMax);
  return reciprocal(fma(e.scale, e.m, e.scale + V(1)));
}

// expm1(2x) / (expm1(2x) + 2): accurate near zero too, where expm1 is m itself. The denominator's rounding error (exact,
// since 2 exceeds it) goes into the quotient's remainder; without that the error would reach 2.6 ulp.
template <class V>
RNNFAST_FN V tanh(V x) {
  const Exponential<V> e = exponential(x + x, ExpConstants<scalar_t<V>>::kTanhMax);
  const V expm1 = fma(e.scale, e.m, e.scale - V(1));
  const V denominator = expm1 + V(2);
  return divide(expm1, denominator, expm1 - (denominator - V(2)));
}

// 1 - y^2, the derivative of tanh where it is y: rounded once, since what is near 1 cancels.
template <class V>
RNNFAST_FN V one_minus_square(V y) {
  return fma(-y, y, V(1));
}

// A nonlinearity of the vanilla RNN, y = f(a), and its adjoint in terms of the result.
struct Tanh {
  template <class V>
  static RNNFAST_FN V forward(V a) {
    return tanh(a);
  }
  template <class V>
  static RNNFAST_FN V backward(V y, V dy) {
    return dy * one_minus_square(y);
  }
};

struct Relu {
  template <class V>
  static RNNFAST_FN V forward(V a) {
    return select(a < V(0), V(0), a);  // NaN stays NaN
  }
  template <class V>
  static RNNFAST_FN V backward(V y, V dy) {
    return select(y <= V(0), V(0), dy);  // a selection: an infinite dy must not become NaN where the unit was off
  }
};

// Either of them, known at run time: for engines in which one more branch costs less than kernels of its own.
struct TanhOrRelu {
  bool relu;

  template <class V>
  RNNFAST_FN V forward(V a) const {
    return relu ? Relu::forward(a) : Tanh::forward(a);
  }
  template <class V>
  RNNFAST_FN V backward(V y, V dy) const {
    return relu ? Relu::backward(y, dy) : Tanh::backward(y, dy);
  }
};
RNNFAST_FN TanhOrRelu either(Tanh) { return {false}; }
RNNFAST_FN TanhOrRelu either(Relu) { return {true}; }

RNNFAST_END
