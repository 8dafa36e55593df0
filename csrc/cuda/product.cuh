// Matrix products through shared memory: a block of 16 x 16 threads makes a tile of 16 RM x 16 RN results, for G right-hand
// sides at once; each thread has RM x RN x G sums, in one order whatever the shape of the rest.
#pragma once

#include "cuda/item.h"
#include "cuda/mma.cuh"

RNNFAST_BEGIN

constexpr int kTile = 16;  // threads along each side of a block, and the depth of a shared tile
constexpr int kThreads = kTile * kTile;

// The places of an operand with k from k0 on, from value(line, k); zero from `end` on. `kAlongK`: neighbouring k lie together
// in memory, else neighbouring lines (rows or columns) do. Thread (x, y) of a block has kLines / 16 of them.
template <bool kAlongK, int kLines, class A, int kRow, class Value>
__device__ void fill_tile(A (&tile)[kTile][kRow], int64_t k0, int64_t end, const Value& value) {
  const int x = threadIdx.x, y = threadIdx.y, k = kAlongK ? x : y;
  const bool inside = k0 + k < end;
  for (int m = 0; m < kLines / kTile; ++m) {
    const int line = (kAlongK ? y : x) + kTile * m;
    tile[k][line] = inside ? value(line, k0 + k) : A(0);
  }
}

// What is multiplied: float32 as it is, or rounded to TF32 where that was asked for.
template <class A>
RNNFAST_FN A operand(A value, bool tf32) {
  if constexpr (sizeof(A) == sizeof(float)) return tf32 ? rounded_to_tf32(value) : value;
  return value;
}

// sum[g][m][n] += over k in [begin, end) of left(row, k) * right(g, k, column), for this thread's rows y + 16 m and columns
// x + 16 n of the tile. Operands give zero outside their matrix. To be called by all threads of a block. The sums of a shared
// tile are made apart and then added: over thousands of k that loses a tenth of the digits that one long sum would.
template <bool kLeftAlongK, bool kRightAlongK, class A, int G, int RM, int RN, class Left, class Right>
__device__ void multiply(A (&sum)[G][RM][RN], int64_t begin, int64_t end, bool tf32, const Left& left,
                         const Right& right) {
  __shared__ A a[kTile][kTile * RM + 1];
  __shared__ A b[G][kTile][kTile * RN + 1];
  const int x = threadIdx.x, y = threadIdx.y;
  for (int64_t k0 = begin; k0 < end; k0 += kTile) {
    fill_tile<kLeftAlongK, kTile * RM>(a, k0, end, [&](int row, int64_t k) { return operand(left(row, k), tf32); });
    for (int g = 0; g < G; ++g)
      fill_tile<kRightAlongK, kTile * RN>(b[g], k0, end,
                                          [&](int column, int64_t k) { return operand(right(g, k, column), tf32); });
    __syncthreads();
    A part[G][RM][RN] = {};
    for (int k = 0; k < kTile; ++k)
      for (int g = 0; g < G; ++g)
        for (int m = 0; m < RM; ++m)
          for (int n = 0; n < RN; ++n) part[g][m][n] = fma(a[k][y + kTile * m], b[g][k][x + kTile * n], part[g][m][n]);
    for (int g = 0; g < G; ++g)
      for (int m = 0; m < RM; ++m)
        for (int n = 0; n < RN; ++n) sum[g][m][n] = sum[g][m][n] + part[g][m][n];
    __syncthreads();
  }
}

// ---- large products: target(row, column, part, value) of left(row, k) * right(k, column), k cut into parts --------

struct ProductSize {
  int64_t rows, columns, depth, parts;

  static constexpr int kSide = 64;  // of a block's tile
  RNNFAST_FN int64_t column_tiles() const { return (columns + kSide - 1) / kSide; }
  RNNFAST_FN int64_t tiles() const { return (rows + kSide - 1) / kSide * column_tiles(); }
};

// A block's tile of one part, and the operands within it: zero outside their matrices.
template <class A, class Left, class Right>
struct ProductTile {
  const ProductSize& size;
  const Left& left;
  const Right& right;
  const int64_t tile = blockIdx.x % size.tiles(), part = blockIdx.x / size.tiles();
  const int64_t row0 = tile / size.column_tiles() * ProductSize::kSide;
  const int64_t column0 = tile % size.column_tiles() * ProductSize::kSide;

  RNNFAST_FN int64_t begin() const { return size.depth * part / size.parts; }
  RNNFAST_FN int64_t end() const { return size.depth * (part + 1) / size.parts; }
  RNNFAST_FN A left_at(int row, int64_t k) const { return row0 + row < size.rows ? left(row0 + row, k) : A(0); }
  RNNFAST_FN A right_at(int64_t k, int column) const {
    return column0 + column < size.columns ? right(k, column0 + column) : A(0);
  }
  template <class Target>
  RNNFAST_FN void store(const Target& target, int row, int column, A value) const {
    if (row0 + row < size.rows && column0 + column < size.columns) target(row0 + row, column0 + column, part, value);
  }
};

template <class A, class Left, class Right, class Target>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(ProductSize size, Left left, Right right, Target target) {
  constexpr int R = ProductSize::kSide / kTile;
  const ProductTile<A, Left, Right> tile{size, left, right};
  A sum[1][R][R] = {};
  multiply<Left::kAlongK, Right::kAlongK>(
      sum, tile.begin(), tile.end(), false, [&](int row, int64_t k) { return tile.left_at(row, k); },
      [&](int, int64_t k, int column) { return tile.right_at(k, column); });
  for (int m = 0; m < R; ++m)
    for (int n = 0; n < R; ++n) tile.store(target, threadIdx.y + kTile * m, threadIdx.x + kTile * n, sum[0][m][n]);
}

// The same on tensor cores, of operands rounded to TF32 (16-bit numbers are such already): a warp has 16 rows and 32 columns.
template <class Left, class Right, class Target>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_product_kernel(ProductSize size, Left left, Right right, Target target) {
  constexpr int kSide = ProductSize::kSide, kRow = kSide + 8;  // a fragment's elements lie in different banks
  constexpr int kColumnTiles = 4;                              // of a warp, of 8 columns each
  __shared__ float a[kTile][kRow], b[kTile][kRow];
  const ProductTile<float, Left, Right> tile{size, left, right};
  const int thread = threadIdx.y * kTile + threadIdx.x, lane = thread % int(kWarp), warp = thread / int(kWarp);
  const int row0 = warp % 4 * 16, column0 = warp / 4 * 8 * kColumnTiles;
  float sum[kColumnTiles][4] = {};
  for (int64_t k0 = tile.begin(); k0 < tile.end(); k0 += kTile) {
    fill_tile<Left::kAlongK, kSide>(a, k0, tile.end(),
                                    [&](int row, int64_t k) { return rounded_to_tf32(tile.left_at(row, k)); });
    fill_tile<Right::kAlongK, kSide>(b, k0, tile.end(),
                                     [&](int column, int64_t k) { return rounded_to_tf32(tile.right_at(k, column)); });
    __syncthreads();
    float part[kColumnTiles][4] = {};
    RNNFAST_UNROLL_ALL
    for (int k = 0; k < kTile; k += kTf32Tile.depth) {
      uint32_t fragment_a[4], fragment_b[2];
      RNNFAST_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        const FragmentPlace place = tf32_fragment_a(lane, i);
        fragment_a[i] = __builtin_bit_cast(uint32_t, a[k + place.column][row0 + place.row]);
      }
      RNNFAST_UNROLL_ALL
      for (int n = 0; n < kColumnTiles; ++n) {
        RNNFAST_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          const FragmentPlace place = tf32_fragment_b(lane, i);
          fragment_b[i] = __builtin_bit_cast(uint32_t, b[k + place.row][column0 + 8 * n + place.column]);
        }
        multiply_tf32(part[n], fragment_a, fragment_b);
      }
    }
    RNNFAST_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) sum[n][i] = sum[n][i] + part[n][i];
    __syncthreads();
  }
  RNNFAST_UNROLL_ALL
  for (int n = 0; n < kColumnTiles; ++n) RNNFAST_UNROLL_ALL
  for (int i = 0; i < 4; ++i) {
    const FragmentPlace place = fragment_c(lane, i);
    tile.store(target, row0 + place.row, column0 + 8 * n + place.column, sum[n][i]);
  }
}

// `tf32`: on tensor cores, which is for float32 sums.
template <class A, class Left, class Right, class Target>
void launch_product(ProductSize size, bool tf32, const Left& left, const Right& right, const Target& target,
                    cuda_runtime::Stream stream) {
  const int64_t blocks = size.tiles() * size.parts;
  const dim3 threads(kTile, kTile);
  if constexpr (sizeof(A) == sizeof(float))
    if (tf32)
      return cuda_runtime::launch(tensor_product_kernel<Left, Right, Target>, blocks, threads, stream, size, left,
                                  right, target);
  cuda_runtime::launch(product_kernel<A, Left, Right, Target>, blocks, threads, stream, size, left, right, target);
}

// A step's tile: which 16 sequences and 16 units, of which direction, this block has.
struct StepTile {
  int direction;
  int64_t batch0, unit0;

  RNNFAST_FN StepTile(int64_t block, int64_t batch, int64_t units) {
    const int64_t across = (units + kTile - 1) / kTile, tiles = count(batch, units);
    direction = static_cast<int>(block / tiles);
    batch0 = block % tiles / across * kTile;
    unit0 = block % tiles % across * kTile;
  }
  static RNNFAST_FN int64_t count(int64_t batch, int64_t units) {
    return (batch + kTile - 1) / kTile * ((units + kTile - 1) / kTile);
  }
};

RNNFAST_END
