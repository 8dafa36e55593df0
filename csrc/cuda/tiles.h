// Tiles of weights: what a warp multiplies at once in the grid-persistent kernels, and which thread holds which element. The
// index arithmetic is constexpr, so that kernels, emulator and tests share it.
//
//   sums[output][row] += weights[output][depth] * states[row][depth]       row: a sequence of the batch
//
// On FMA cores (float32) a warp is groups x slices: the threads of a group share 8 outputs, each has 4 consecutive depths of
// them, and in the end every thread has the sums of 32 / slices (output, row) pairs. On tensor cores a tile is the A operand
// of mma.sync.m16n8k16 (16-bit numbers) or m16n8k8 (TF32) and the states are its B operand, in the fragments of the PTX manual.
#pragma once

#include "cuda/plan.h"

namespace rnnfast {

struct TileShape {
  int rows;            // sequences
  int outputs, depth;  // of the weights
  int held;            // tiles whose weights a thread keeps in registers; those of the others lie in shared memory
  int quads;           // 16 bytes each: a thread's share of a tile's weights
  int element;         // bytes of a weight, and of a state
  int skew;            // elements between rows of states, so that the rows of a fragment lie in different banks
  int step_tiles;      // as many as a warp multiplies, roughly, in the time that the rest of a step takes
};

constexpr int kFmaOutputs = 8;  // of a thread
constexpr int kFmaRows = 4;
constexpr int kFmaSums = kFmaOutputs * kFmaRows;  // of a thread before the exchange within its group: a warp's width
static_assert(kFmaSums == kWarp);

// Deep and narrow for the forward product (few units, all of h), shallow and wide for the backward one.
constexpr int kForwardSlices = 32, kBackwardSlices = 4;
constexpr TileShape fma_tile(int slices) {
  return {kFmaRows, kFmaOutputs * int(kWarp) / slices, 4 * slices, 4, kFmaOutputs, 4, 0, 4};
}
constexpr TileShape kMmaTile{8, 16, 16, 32, 1, 2, 8, 32}, kTf32Tile{8, 16, 8, 32, 1, 4, 4, 32};

// Weights come to the registers by way of shared memory, these many quads of each thread at a time: the code that finds one
// weight in the caller's matrix is long, and would otherwise be there once for each register.
constexpr int kStagedQuads = 8;

// Element i of those that a thread has of a tile.
struct OutputDepth {
  int output, depth;
};
RNNFAST_PLAN OutputDepth fma_weight(int slices, int lane, int i) {
  return {lane / slices * kFmaOutputs + i / 4, lane % slices * 4 + i % 4};
}

struct OutputRow {
  int output, row;
};

// The (output, row) of sum i of the 32 / slices that a thread ends with.
RNNFAST_PLAN OutputRow fma_sum(int slices, int lane, int i) {
  const int sum = lane % slices * (kFmaSums / slices) + i;
  return {lane / slices * kFmaOutputs + sum / kFmaRows, sum % kFmaRows};
}

// Elements of the fragments of m16n8k16: A has eight a thread, row by depth; B four, depth by column; C four, row by column.
struct FragmentPlace {
  int row, column;
};
RNNFAST_PLAN FragmentPlace fragment_a(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
RNNFAST_PLAN FragmentPlace fragment_b(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
// Of m16n8k8: A four, B two, C the same.
RNNFAST_PLAN FragmentPlace tf32_fragment_a(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4}; }
RNNFAST_PLAN FragmentPlace tf32_fragment_b(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
RNNFAST_PLAN FragmentPlace fragment_c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

}  // namespace rnnfast
