// Vec<T>: as many values as one register of the instruction set holds. All that the kernels need, and no more.
//
// Built on the compilers' vector extension, so that arithmetic, comparison and selection need no intrinsics; those that
// remain (broadcast, fused multiply-add, partial load and store) are one small block for each instruction set.
// Contraction is off in the build: a fused multiply-add is one where fma() or multiply_add() is written.
#pragma once

#include <stdint.h>

#include <utility>

#include "cell/namespace.h"

#if defined(RNNFAST_AVX512) || defined(RNNFAST_AVX2)
#include <immintrin.h>
#elif defined(RNNFAST_NEON)
#include <arm_neon.h>
#endif

RNNFAST_BEGIN

#define RNNFAST_UNROLL _Pragma("GCC unroll 32")

#if defined(RNNFAST_AVX512)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(RNNFAST_AVX2)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(RNNFAST_NEON)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 0, kRegisters = 16;  // scalar
#endif

template <class T>
struct Lanes;

#if defined(RNNFAST_AVX512) || defined(RNNFAST_AVX2) || defined(RNNFAST_NEON)
template <>
struct Lanes<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
#else
template <>
struct Lanes<float> {
  typedef float Raw;
  typedef uint32_t Int;
  typedef float Unaligned;
};
template <>
struct Lanes<double> {
  typedef double Raw;
  typedef uint64_t Int;
  typedef double Unaligned;
};
#endif

template <class T>
struct Vec {
  using Scalar = T;
  using Raw = typename Lanes<T>::Raw;
  using Int = typename Lanes<T>::Int;
  static constexpr int kLanes = sizeof(Raw) / sizeof(T);

  Raw v;

  Vec() = default;
  RNNFAST_FN explicit Vec(T s) : v(broadcast(s)) {}
  RNNFAST_FN explicit Vec(int s) : v(broadcast(T(s))) {}
  static RNNFAST_FN Vec raw(Raw r) {
    Vec x;
    x.v = r;
    return x;
  }

  static RNNFAST_FN Vec load(const T* p) { return raw(*reinterpret_cast<const typename Lanes<T>::Unaligned*>(p)); }
  RNNFAST_FN void store(T* p) const { *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v; }
  static RNNFAST_FN Vec load(const T* p, int64_t n);  // the first n lanes, zero in the others; nothing else is touched
  RNNFAST_FN void store(T* p, int64_t n) const;

  static RNNFAST_FN Raw broadcast(T s);
};

#define RNNFAST_OPERATOR(op)                          \
  template <class T>                                  \
  RNNFAST_FN Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    return Vec<T>::raw(a.v op b.v);                   \
  }
RNNFAST_OPERATOR(+)
RNNFAST_OPERATOR(-)
RNNFAST_OPERATOR(*)
#undef RNNFAST_OPERATOR

template <class T>
RNNFAST_FN Vec<T> operator-(Vec<T> a) {
  return Vec<T>::raw(-a.v);
}
template <class T>
RNNFAST_FN auto operator<(Vec<T> a, Vec<T> b) {
  return a.v < b.v;
}
template <class T>
RNNFAST_FN auto operator>(Vec<T> a, Vec<T> b) {
  return a.v > b.v;
}
template <class T>
RNNFAST_FN auto operator<=(Vec<T> a, Vec<T> b) {
  return a.v <= b.v;
}
template <class M, class T>
RNNFAST_FN Vec<T> select(M mask, Vec<T> a, Vec<T> b) {
  return Vec<T>::raw(mask ? a.v : b.v);
}

// Rounding to an integer by adding 1.5 * 2^(mantissa bits): the sum's low bits are the integer itself, from which
// pow2() makes 2^n with a shift and an addition.
template <class T>
struct Magic;
template <>
struct Magic<float> {
  static constexpr float kValue = 12582912.0f;
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kOne = 0x3f800000;
};
template <>
struct Magic<double> {
  static constexpr double kValue = 6755399441055744.0;
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kOne = 0x3ff0000000000000;
};

template <class T>
RNNFAST_FN Vec<T> round_magic(Vec<T> y, Vec<T> k);  // y * k, rounded; defined below, where fma is known
template <class T>
RNNFAST_FN Vec<T> unround(Vec<T> magic) {
  return magic - Vec<T>(Magic<T>::kValue);
}
template <class T>
RNNFAST_FN Vec<T> pow2(Vec<T> magic) {
  using Int = typename Vec<T>::Int;
  const Int bits = __builtin_bit_cast(Int, magic.v);
  return Vec<T>::raw(__builtin_bit_cast(typename Vec<T>::Raw, (bits << Magic<T>::kMantissa) + Magic<T>::kOne));
}

// ---- what differs between instruction sets -----------------------------------------------------------------------

#if defined(RNNFAST_AVX512)

RNNFAST_FN __mmask16 first_lanes16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
RNNFAST_FN __mmask8 first_lanes8(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }

template <>
RNNFAST_FN Vec<float>::Raw Vec<float>::broadcast(float s) {
  return (Raw)_mm512_set1_ps(s);
}
template <>
RNNFAST_FN Vec<double>::Raw Vec<double>::broadcast(double s) {
  return (Raw)_mm512_set1_pd(s);
}
RNNFAST_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::raw((Vec<float>::Raw)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v));
}
RNNFAST_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::raw((Vec<double>::Raw)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v));
}
template <>
RNNFAST_FN Vec<float> Vec<float>::load(const float* p, int64_t n) {
  return raw((Raw)_mm512_maskz_loadu_ps(first_lanes16(n), p));
}
template <>
RNNFAST_FN Vec<double> Vec<double>::load(const double* p, int64_t n) {
  return raw((Raw)_mm512_maskz_loadu_pd(first_lanes8(n), p));
}
template <>
RNNFAST_FN void Vec<float>::store(float* p, int64_t n) const {
  _mm512_mask_storeu_ps(p, first_lanes16(n), (__m512)v);
}
template <>
RNNFAST_FN void Vec<double>::store(double* p, int64_t n) const {
  _mm512_mask_storeu_pd(p, first_lanes8(n), (__m512d)v);
}

#elif defined(RNNFAST_AVX2)

alignas(32) constexpr int32_t kLaneMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(32) constexpr int64_t kLaneMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
RNNFAST_FN __m256i first_lanes32(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask32 + 8 - n));
}
RNNFAST_FN __m256i first_lanes64(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask64 + 4 - n));
}

template <>
RNNFAST_FN Vec<float>::Raw Vec<float>::broadcast(float s) {
  return (Raw)_mm256_set1_ps(s);
}
template <>
RNNFAST_FN Vec<double>::Raw Vec<double>::broadcast(double s) {
  return (Raw)_mm256_set1_pd(s);
}
RNNFAST_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::raw((Vec<float>::Raw)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v));
}
RNNFAST_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::raw((Vec<double>::Raw)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v));
}
template <>
RNNFAST_FN Vec<float> Vec<float>::load(const float* p, int64_t n) {
  return raw((Raw)_mm256_maskload_ps(p, first_lanes32(n)));
}
template <>
RNNFAST_FN Vec<double> Vec<double>::load(const double* p, int64_t n) {
  return raw((Raw)_mm256_maskload_pd(p, first_lanes64(n)));
}
template <>
RNNFAST_FN void Vec<float>::store(float* p, int64_t n) const {
  _mm256_maskstore_ps(p, first_lanes32(n), (__m256)v);
}
template <>
RNNFAST_FN void Vec<double>::store(double* p, int64_t n) const {
  _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)v);
}

#elif defined(RNNFAST_NEON)

template <>
RNNFAST_FN Vec<float>::Raw Vec<float>::broadcast(float s) {
  return (Raw)vdupq_n_f32(s);
}
template <>
RNNFAST_FN Vec<double>::Raw Vec<double>::broadcast(double s) {
  return (Raw)vdupq_n_f64(s);
}
RNNFAST_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::raw((Vec<float>::Raw)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v));
}
RNNFAST_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::raw((Vec<double>::Raw)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v));
}
template <class T>
RNNFAST_FN Vec<T> Vec<T>::load(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
RNNFAST_FN void Vec<T>::store(T* p, int64_t n) const {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

#else

template <class T>
RNNFAST_FN typename Vec<T>::Raw Vec<T>::broadcast(T s) {
  return s;
}
// The baseline has no fused one, and the library's emulation is slow. Exact but for the last rounding, or nearly so.
RNNFAST_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::raw(float(double(a.v) * double(b.v) + double(c.v)));
}
RNNFAST_FN void split(double a, double& high, double& low) {
  const double t = 134217729.0 * a;  // 2^27 + 1: 26 bits each
  high = t - (t - a), low = a - high;
}
// Dekker's product (1971) and Knuth's sum; where they overflow, two roundings.
RNNFAST_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  double a1, a2, b1, b2;
  split(a.v, a1, a2), split(b.v, b1, b2);
  const double product = a.v * b.v, error = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
  const double sum = product + c.v, part = sum - product, lost = (product - (sum - part)) + (c.v - part);
  const double exact = sum + (lost + error);
  return Vec<double>::raw(exact == exact ? exact : sum);
}
template <class T>
RNNFAST_FN Vec<T> Vec<T>::load(const T* p, int64_t n) {
  return n > 0 ? load(p) : Vec(T(0));
}
template <class T>
RNNFAST_FN void Vec<T>::store(T* p, int64_t n) const {
  if (n > 0) store(p);
}

#endif

// Exchanges rows and columns of a square: for each bit of the index, the lanes that have it in the upper row of a pair for
// those that lack it in the lower.
template <int kBit, class Raw, int... kLane>
RNNFAST_FN void exchange(Raw& upper, Raw& lower, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
  constexpr int W = sizeof...(kLane);
  const Raw a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (kLane & kBit ? kLane - kBit + W : kLane)...);
  lower = __builtin_shufflevector(a, b, (kLane & kBit ? kLane + W : kLane + kBit)...);
#else
  const Raw a = upper, b = lower;
  ((upper[kLane] = kLane & kBit ? b[kLane - kBit] : a[kLane]), ...);
  ((lower[kLane] = kLane & kBit ? b[kLane] : a[kLane + kBit]), ...);
#endif
}
template <class T, int kBit = Vec<T>::kLanes / 2>
RNNFAST_FN void transpose(Vec<T> (&rows)[Vec<T>::kLanes]) {
  if constexpr (kBit > 0) {
    constexpr int W = Vec<T>::kLanes;
    RNNFAST_UNROLL
      for (int i = 0; i < W; ++i)
        if (!(i & kBit)) exchange<kBit>(rows[i].v, rows[i + kBit].v, std::make_integer_sequence<int, W>());
    transpose<T, kBit / 2>(rows);
  }
}

// The sum of all lanes, by halves.
template <int kBit, class Raw, int... kLane>
RNNFAST_FN Raw add_swapped(Raw v, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
  return v + __builtin_shufflevector(v, v, (kLane ^ kBit)...);
#else
  Raw other = v;
  ((other[kLane] = v[kLane ^ kBit]), ...);
  return v + other;
#endif
}
template <class T, int kBit = Vec<T>::kLanes / 2>
RNNFAST_FN T sum_of_lanes(Vec<T> a) {
  if constexpr (Vec<T>::kLanes == 1) {
    return a.v;
  } else if constexpr (kBit == 0) {
    return a.v[0];
  } else {
    return sum_of_lanes<T, kBit / 2>(
        Vec<T>::raw(add_swapped<kBit>(a.v, std::make_integer_sequence<int, Vec<T>::kLanes>())));
  }
}

// What the long sums are made of: fused where that is an instruction.
template <class T>
RNNFAST_FN Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return kVectorBytes ? fma(a, b, c) : a * b + c;
}

template <class T>
RNNFAST_FN Vec<T> round_magic(Vec<T> y, Vec<T> k) {
  return fma(y, k, Vec<T>(Magic<T>::kValue));
}

// Within [low, high]; a comparison with NaN is false, so NaN stays.
template <class T>
RNNFAST_FN Vec<T> clamp(Vec<T> x, Vec<T> low, Vec<T> high) {
#if defined(RNNFAST_AVX512)
  // min and max return their second operand when one is NaN.
  // (GCC 12 warns that the unmasked forms read an undefined register; these are the same instructions.)
  constexpr __mmask16 all16 = 0xffff;
  constexpr __mmask8 all8 = 0xff;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::raw((typename Vec<T>::Raw)_mm512_maskz_max_ps(
        all16, (__m512)low.v, _mm512_maskz_min_ps(all16, (__m512)high.v, (__m512)x.v)));
  else
    return Vec<T>::raw((typename Vec<T>::Raw)_mm512_maskz_max_pd(
        all8, (__m512d)low.v, _mm512_maskz_min_pd(all8, (__m512d)high.v, (__m512d)x.v)));
#elif defined(RNNFAST_AVX2)
  if constexpr (sizeof(T) == 4)
    return Vec<T>::raw((typename Vec<T>::Raw)_mm256_max_ps((__m256)low.v, _mm256_min_ps((__m256)high.v, (__m256)x.v)));
  else
    return Vec<T>::raw(
        (typename Vec<T>::Raw)_mm256_max_pd((__m256d)low.v, _mm256_min_pd((__m256d)high.v, (__m256d)x.v)));
#else
  x = select(x > high, high, x);
  x = select(x < low, low, x);
  // Or the compiler would compute what follows for a constant `high`, without flushing what the processor flushes.
  __asm__("" : "+m"(x.v));
  return x;
#endif
}

template <class T>
RNNFAST_FN Vec<T> reciprocal(Vec<T> x) {
  return Vec<T>::raw(Vec<T>(T(1)).v / x.v);
}

#if defined(RNNFAST_AVX512)
// The divider takes 16 cycles for sixteen floats; an estimate of 14 bits and one Newton step are three instructions. For
// 1 <= x < 2^126, which is all that the activations ask for.
template <>
RNNFAST_FN Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> y = Vec<float>::raw((Vec<float>::Raw)_mm512_maskz_rcp14_ps(__mmask16(0xffff), (__m512)x.v));
  return fma(y, fma(-x, y, Vec<float>(1.0f)), y);
}
#endif

// a / (b + error of b): the quotient's own remainder brings it within one ulp.
template <class T>
RNNFAST_FN Vec<T> divide(Vec<T> a, Vec<T> b, Vec<T> error) {
  const Vec<T> y = reciprocal(b), q = a * y;
  return fma(fma(-error, q, fma(-b, q, a)), y, q);
}

RNNFAST_END
