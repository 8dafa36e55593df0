// Matrix products, the only place with shared memory: a block of 16 x 16 threads makes a tile of 16 RM x 16 RN results,
// for G right-hand sides at once; each thread has RM x RN x G sums, in one order whatever the shape of the rest.
#pragma once

#include "cuda/item.h"

RNNFAST_BEGIN

constexpr int kTile = 16;  // threads along each side of a block, and the depth of a shared tile
constexpr int kThreads = kTile * kTile;

// sum[g][m][n] += over k in [begin, end) of left(row, k) * right(g, k, column), for this thread's rows y + 16 m and columns
// x + 16 n of the tile. Operands give zero outside their matrix. `kLeftAlongK`, `kRightAlongK`: neighbouring k lie together
// in memory, else neighbouring rows or columns do. To be called by all threads of a block. The sums of a shared tile are made
// apart and then added: over thousands of k that loses a tenth of the digits that one long sum would.
template <bool kLeftAlongK, bool kRightAlongK, class A, int G, int RM, int RN, class Left, class Right>
__device__ void multiply(A (&sum)[G][RM][RN], int64_t begin, int64_t end, const Left& left, const Right& right) {
  __shared__ A a[kTile][kTile * RM + 1];
  __shared__ A b[G][kTile][kTile * RN + 1];
  const int x = threadIdx.x, y = threadIdx.y;
  for (int64_t k0 = begin; k0 < end; k0 += kTile) {
    const bool x_inside = k0 + x < end, y_inside = k0 + y < end;
    for (int m = 0; m < RM; ++m) {
      if (kLeftAlongK)
        a[x][y + kTile * m] = x_inside ? left(y + kTile * m, k0 + x) : A(0);
      else
        a[y][x + kTile * m] = y_inside ? left(x + kTile * m, k0 + y) : A(0);
    }
    for (int g = 0; g < G; ++g)
      for (int n = 0; n < RN; ++n) {
        if (kRightAlongK)
          b[g][x][y + kTile * n] = x_inside ? right(g, k0 + x, y + kTile * n) : A(0);
        else
          b[g][y][x + kTile * n] = y_inside ? right(g, k0 + y, x + kTile * n) : A(0);
      }
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

template <class A, class Left, class Right, class Target>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(ProductSize size, Left left, Right right, Target target) {
  constexpr int R = ProductSize::kSide / kTile;
  const int64_t tile = blockIdx.x % size.tiles(), part = blockIdx.x / size.tiles();
  const int64_t row0 = tile / size.column_tiles() * ProductSize::kSide;
  const int64_t column0 = tile % size.column_tiles() * ProductSize::kSide;
  A sum[1][R][R] = {};
  multiply<Left::kAlongK, Right::kAlongK>(
      sum, size.depth * part / size.parts, size.depth * (part + 1) / size.parts,
      [&](int row, int64_t k) { return row0 + row < size.rows ? left(row0 + row, k) : A(0); },
      [&](int, int64_t k, int column) { return column0 + column < size.columns ? right(k, column0 + column) : A(0); });
  for (int m = 0; m < R; ++m)
    for (int n = 0; n < R; ++n) {
      const int64_t row = row0 + threadIdx.y + kTile * m, column = column0 + threadIdx.x + kTile * n;
      if (row < size.rows && column < size.columns) target(row, column, part, sum[0][m][n]);
    }
}

template <class A, class Left, class Right, class Target>
void launch_product(ProductSize size, const Left& left, const Right& right, const Target& target,
                    cuda_runtime::Stream stream) {
  cuda_runtime::launch(product_kernel<A, Left, Right, Target>, size.tiles() * size.parts, dim3(kTile, kTile), stream,
                       size, left, right, target);
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
