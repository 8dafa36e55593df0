// The register tiles: every floating-point operation that counts is in this file.
//
//   accumulate     acc[m][v] += sum_k a_m[k] w[k][v]      a row's scalars against packed weight vectors
//   accumulate_gates   the same, where the row is the blocked gradient of the gates
//   outer          acc[m][v] += sum_r a_r[m] g_r[v]       weight gradients: summed over rows
//
// m runs over MR rows (or columns), v over U blocks x G vectors; the accumulators stay in registers. Small tiles are unrolled
// over k with partial sums, so that the latency of the fused multiply-add is hidden.
#pragma once

#include "cpu/simd.h"

RNNFAST_BEGIN

// Rows of the largest tile with panels of G gates: as many as the registers allow, beside the weights and one broadcast. A
// panel of one gate may be 4, 2 or 1 blocks wide: the rows are those of the widest, so that a result does not depend on how
// the blocks are shared between threads. For the same reason so are the partial sums.
constexpr int vectors_wide(int gates) { return gates == 1 ? 4 : gates; }
constexpr int max_rows(int gates) { return (kRegisters == 32 ? 24 : 12) / vectors_wide(gates); }

// Partial sums over k for a tile of MR rows. Without vectors and fused multiply-adds it is the rounding errors that ask for
// them: a vector of lanes is summed in pieces anyway by those whom the results are compared with.
constexpr int partial_sums(int rows, int gates) {
  const int n = rows * vectors_wide(gates);
  if (kVectorBytes == 0) return 8;
  return n >= 12 ? 1 : n >= 6 ? (kRegisters == 32 ? 2 : 1) : kRegisters == 32 ? 4 : 2;
}

// Accumulators: MR rows x U blocks x G vectors.
template <class T, int MR, int U, int G>
struct Tile {
  Vec<T> acc[MR][U * G];

  RNNFAST_FN void clear() {
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m)
        RNNFAST_UNROLL
          for (int v = 0; v < U * G; ++v) acc[m][v] = Vec<T>(T(0));
  }
  RNNFAST_FN void add(const Tile& other) {
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m)
        RNNFAST_UNROLL
          for (int v = 0; v < U * G; ++v) acc[m][v] = acc[m][v] + other.acc[m][v];
  }
};

template <class T, int U, int G>
RNNFAST_FN void load_vectors(Vec<T> (&vector)[U * G], const T* p, int64_t block_stride) {
  RNNFAST_UNROLL
    for (int u = 0; u < U; ++u)
      RNNFAST_UNROLL
        for (int g = 0; g < G; ++g) vector[u * G + g] = Vec<T>::load(p + u * block_stride + g * Vec<T>::kLanes);
}

// w: packed weights [U blocks, w_stride apart][K][G][W]; a: MR rows of K scalars.
template <class T, int MR, int U, int G>
RNNFAST_FN void rank_one(Tile<T, MR, U, G>& tile, const T* const (&a)[MR], int64_t k, const T* w, int64_t w_stride) {
  Vec<T> weight[U * G];
  load_vectors<T, U, G>(weight, w, w_stride);
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vec<T> scalar(a[m][k]);
      RNNFAST_UNROLL
        for (int v = 0; v < U * G; ++v) tile.acc[m][v] = multiply_add(scalar, weight[v], tile.acc[m][v]);
    }
}

// Two lines for each k of the panel that comes next: asked for while this one is worked on, they are in the second-level
// cache when it is their turn. The large tiles have load slots to spare for it; the small ones wait for the loads anyway.
template <class T>
struct Ahead {
  const T *first, *second;  // of k = 0
};
constexpr bool looks_ahead(int accumulators) { return kVectorBytes && accumulators >= 12; }

// Long sums are made of sums over so many: the error of one grows with its length.
constexpr int64_t kLongSum = 256;

template <class T, int MR, int U, int G>
RNNFAST_FN void accumulate(Tile<T, MR, U, G>& tile, const T* const (&a)[MR], int64_t K, const T* w, int64_t w_stride,
                           Ahead<T> ahead) {
  constexpr int W = Vec<T>::kLanes;
  for (int64_t k = 0; k < K; ++k) {
    __builtin_prefetch(ahead.first + k * (G * W), 0, 2);
    __builtin_prefetch(ahead.second + k * (G * W), 0, 2);
    rank_one(tile, a, k, w + k * (G * W), w_stride);
  }
}

template <class T, int MR, int U, int G>
RNNFAST_FN void accumulate(Tile<T, MR, U, G>& tile, const T* const (&a)[MR], int64_t K, const T* w, int64_t w_stride) {
  constexpr int W = Vec<T>::kLanes, S = partial_sums(MR, G);
  int64_t k = 0;
  if constexpr (S > 1) {
    Tile<T, MR, U, G> partial[S - 1];
    RNNFAST_UNROLL
      for (int s = 0; s < S - 1; ++s) partial[s].clear();
    for (; k <= K - S; k += S) {
      const T* wk = w + k * (G * W);
      rank_one(tile, a, k, wk, w_stride);
      RNNFAST_UNROLL
        for (int s = 1; s < S; ++s) rank_one(partial[s - 1], a, k + s, wk + s * G * W, w_stride);
    }
    RNNFAST_UNROLL
      for (int s = 0; s < S - 1; ++s) tile.add(partial[s]);
  }
  for (; k < K; ++k) rank_one(tile, a, k, w + k * (G * W), w_stride);
}

// The gates of a row, blocked: `full` blocks of G * W values, `block_stride` apart, then G pieces of `tail` values.
struct GateOperand {
  int64_t row_stride, block_stride, full, tail;
  int gates;
};

// Weights packed as [U blocks][G * H][W], their rows in the order in which the blocked gates are read here.
template <class T, int MR, int U>
RNNFAST_FN void accumulate_gates(Tile<T, MR, U, 1>& tile, const T* row0, const GateOperand& g, const T* w,
                                 int64_t w_stride) {
  constexpr int W = Vec<T>::kLanes;
  const T* a[MR];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) a[m] = row0 + m * g.row_stride;
  const int64_t piece = int64_t(g.gates) * W, pieces = piece < kLongSum ? kLongSum / piece : 1;
  const bool many = g.full > pieces;
  Tile<T, MR, U, 1> total;
  if (many) total.clear();
  for (int64_t block = 0; block < g.full; ++block, w += piece * W) {
    if (many && block % pieces == 0) {
      total.add(tile);
      tile.clear();
    }
    accumulate(tile, a, piece, w, w_stride);
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m) a[m] += g.block_stride;
  }
  for (int gate = 0; gate < g.gates && g.tail > 0; ++gate, w += g.tail * W) {
    accumulate(tile, a, g.tail, w, w_stride);
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m) a[m] += W;
  }
  if (many) tile.add(total);
}

template <class T, int MR, int U, int G>
RNNFAST_FN void outer_row(Tile<T, MR, U, G>& tile, const T* row, const T* g, int64_t block_stride) {
  Vec<T> gradient[U * G];
  load_vectors<T, U, G>(gradient, g, block_stride);
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vec<T> scalar(row[m]);
      RNNFAST_UNROLL
        for (int v = 0; v < U * G; ++v) tile.acc[m][v] = multiply_add(scalar, gradient[v], tile.acc[m][v]);
    }
}

// acc[m][u][v] += sum over rows of a[row][m] * g[row][u][v]; g's rows are `row_stride` apart, its blocks `block_stride`.
template <class T, int MR, int U, int G>
RNNFAST_FN void outer(Tile<T, MR, U, G>& tile, const T* const* a, int64_t column, int64_t rows, const T* g,
                      int64_t row_stride, int64_t block_stride) {
  constexpr int S = kVectorBytes == 0 ? 8 : 1;
  int64_t r = 0;
  if constexpr (S > 1) {
    Tile<T, MR, U, G> partial[S - 1];
    RNNFAST_UNROLL
      for (int s = 0; s < S - 1; ++s) partial[s].clear();
    for (; r <= rows - S; r += S) {
      outer_row(tile, a[r] + column, g + r * row_stride, block_stride);
      RNNFAST_UNROLL
        for (int s = 1; s < S; ++s)
          outer_row(partial[s - 1], a[r + s] + column, g + (r + s) * row_stride, block_stride);
    }
    RNNFAST_UNROLL
      for (int s = 0; s < S - 1; ++s) tile.add(partial[s]);
  }
  for (; r < rows; ++r) outer_row(tile, a[r] + column, g + r * row_stride, block_stride);
}

// Tiles of weight gradients in the caller's layout: gradients of units (scalars) times vectors of inputs, summed over rows.
template <class T>
struct Outer {
  const T* gates;  // of the first unit and row
  const T* ahead;  // the gates that are wanted next: asked for meanwhile
  int64_t gates_stride;
  const T* inputs;  // [rows][U * W]
  int64_t rows;
  T* sums;  // of the first unit and column
  int64_t sums_stride;
  int64_t last;  // lanes of the last vector
  bool add;
};

template <class T, int MR, int U>
RNNFAST_FN void outer_step(Vec<T> (&sum)[MR][U], const T* gates, const T* inputs) {
  Vec<T> vector[U];
  RNNFAST_UNROLL
    for (int u = 0; u < U; ++u) vector[u] = Vec<T>::load(inputs + u * Vec<T>::kLanes);
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vec<T> scalar(gates[m]);
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u) sum[m][u] = multiply_add(scalar, vector[u], sum[m][u]);
    }
}

template <class T, int MR, int U>
__attribute__((noinline)) void outer_tile(const Outer<T>& p) {
  using V = Vec<T>;
  constexpr int W = V::kLanes, S = kVectorBytes == 0 ? 8 : 1;
  V acc[S][MR][U];
  RNNFAST_UNROLL
    for (int s = 0; s < S; ++s)
      RNNFAST_UNROLL
        for (int m = 0; m < MR; ++m)
          RNNFAST_UNROLL
            for (int u = 0; u < U; ++u) acc[s][m][u] = V(T(0));
  for (int m = 0; p.add && m < MR; ++m)
    for (int u = 0; u < U; ++u) __builtin_prefetch(p.sums + m * p.sums_stride + u * W, 1);
  int64_t r = 0;
  for (; S > 1 && r <= p.rows - S; r += S)
    RNNFAST_UNROLL
      for (int s = 0; s < S; ++s) outer_step(acc[s], p.gates + (r + s) * p.gates_stride, p.inputs + (r + s) * U * W);
  for (; r < p.rows; ++r) {
    __builtin_prefetch(p.ahead + r * p.gates_stride, 0, 2);
    outer_step(acc[0], p.gates + r * p.gates_stride, p.inputs + r * U * W);
  }
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u) {
          V value = acc[0][m][u];
          for (int s = 1; s < S; ++s) value = value + acc[s][m][u];
          T* sum = p.sums + m * p.sums_stride + u * W;
          const int64_t lanes = u + 1 < U ? W : p.last;
          if (p.add) value = value + (lanes == W ? V::load(sum) : V::load(sum, lanes));
          lanes == W ? value.store(sum) : value.store(sum, lanes);
        }
}

// ---- tables over the tile sizes that only the run time knows ------------------------------------------------------

// Splits n into tiles of at most `most`, as even as possible: 7 rows in tiles of 6 are 4 + 3, not 6 + 1.
template <class Function>
RNNFAST_FN void for_tiles(int64_t n, int64_t most, Function&& run) {
  int64_t tiles = (n + most - 1) / most;
  for (int64_t start = 0; tiles > 0; --tiles) {
    const int64_t size = (n - start + tiles - 1) / tiles;
    run(start, size);
    start += size;
  }
}

// outer_tile for `units` units of one gate.
template <class T, int U>
RNNFAST_FN void outer_units(const Outer<T>& p, int64_t units) {
  constexpr int64_t kAccumulators = kRegisters == 32 ? 24 : 12, kMost = Vec<T>::kLanes == 1 ? 1 : kAccumulators / U;
  for_tiles(units, kMost < 8 ? kMost : 8, [&](int64_t unit, int64_t count) {
    Outer<T> tile = p;
    tile.gates += unit, tile.sums += unit * p.sums_stride;
    switch (count) {
#define RNNFAST_CASE(n)                                  \
  case n:                                                \
    if constexpr (n <= kMost) outer_tile<T, n, U>(tile); \
    break;
      RNNFAST_CASE(1)
      RNNFAST_CASE(2)
      RNNFAST_CASE(3)
      RNNFAST_CASE(4)
      RNNFAST_CASE(5)
      RNNFAST_CASE(6)
      RNNFAST_CASE(7)
      RNNFAST_CASE(8)
#undef RNNFAST_CASE
    }
  });
}

// Splits blocks into panels of 4, 2 and 1: the widths that are compiled.
RNNFAST_FN int panel_width(int64_t blocks_left, int most) {
  return most >= 4 && blocks_left >= 4 ? 4 : most >= 2 && blocks_left >= 2 ? 2 : 1;
}

RNNFAST_END
