// One namespace for each instruction set (and for CUDA): the same header compiled twice must never meet in the linker,
// or a baseline CPU could be handed AVX-512 code. RNNFAST_ISA is set by the build; plain host code uses `base`.
#pragma once

#ifndef RNNFAST_ISA
#define RNNFAST_ISA base
#endif

#define RNNFAST_BEGIN \
  namespace rnnfast { \
  namespace RNNFAST_ISA {
#define RNNFAST_END \
  }                 \
  }

#ifdef __CUDACC__
#define RNNFAST_FN __host__ __device__ __forceinline__
#else
#define RNNFAST_FN inline __attribute__((always_inline))
#endif

RNNFAST_BEGIN
// The scalar behind a scalar-like type: float for a vector of floats.
template <class V>
struct ScalarOf {
  using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class V>
using scalar_t = typename ScalarOf<V>::type;
RNNFAST_END
