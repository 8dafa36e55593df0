// Weights, rearranged once so that the kernels read them as a stream of whole vectors.
//
//   columns  W_ih, W_hh [G*H, K] -> [blocks][K][G][W]; W_hr [P, H] -> [blocks of P][H][W]: for products with W^T
//   rows     the same matrices  -> [blocks of K][G*H][W]: for the backward products; rows in the order of the blocked gates
//   bias     b_ih, b_hh -> [blocks][slots][W], summed where both products feed a slot
//
// The padded lanes of the last block are zero.
#pragma once

#include "cpu/rows.h"

RNNFAST_BEGIN

template <class T, class Cell>
class Packer {
  static constexpr int64_t W = Vec<T>::kLanes, kGroup = 8;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;

 public:
  explicit Packer(const PackJob<T>& job) : job_(job) {}

  int64_t blocks() const { return Blocks<T>::count(job_.kind == PackJob<T>::kRows ? job_.K : job_.rows); }

  void run(Range blocks) const {
    if (job_.kind == PackJob<T>::kRows)
      for (int64_t block = blocks.begin; block < blocks.end; block += kGroup)
        rows({block, least(block + kGroup, blocks.end)});
    else
      for (int64_t block = blocks.begin; block < blocks.end; ++block)
        job_.kind == PackJob<T>::kBias ? bias(block) : columns(block);
  }

 private:
  int gates() const { return job_.gates ? G : 1; }
  // First source row of the g-th gate in kernel order.
  const T* gate_rows(int g) const {
    if (!job_.gates) return job_.source;
    const int gate = job_.recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g];
    return job_.source + gate * job_.rows * job_.row_stride;
  }

  // A transposition, square by square; in strips of k, so that the lines being written stay in the first cache.
  void columns(int64_t block) const {
    constexpr int64_t kStrip = most(64, W);
    const int64_t lanes = Blocks<T>::lanes(job_.rows, block), step = gates() * W;
    T* const target = job_.target + block * job_.K * step;
    for (int64_t strip = 0; strip < job_.K; strip += kStrip)
      for (int g = 0; g < gates(); ++g) {
        const T* rows = gate_rows(g) + block * W * job_.row_stride;
        for (int64_t k = strip; k < least(strip + kStrip, job_.K); k += W) square(rows, lanes, k, target + g * W, step);
      }
  }

  void square(const T* rows, int64_t lanes, int64_t k, T* target, int64_t step) const {
    const int64_t count = least(W, job_.K - k);
    Vec<T> values[W];
    RNNFAST_UNROLL
      for (int64_t lane = 0; lane < W; ++lane)
        values[lane] = lane < lanes ? read(rows + lane * job_.row_stride, k, count) : Vec<T>(T(0));
    transpose(values);
    for (int64_t i = 0; i < count; ++i) values[i].store(target + (k + i) * step);
  }

  // A row's lines for a group of blocks at once: line after line is read, not one of each page.
  void rows(Range blocks) const {
    const int64_t block_stride = job_.rows * gates() * W;
    T* out = job_.target + blocks.begin * block_stride;
    for (int64_t unit = 0; unit < job_.rows; unit += W)
      for (int g = 0; g < gates(); ++g)
        for (int64_t lane = 0; lane < least(W, job_.rows - unit); ++lane, out += W) {
          const T* row = gate_rows(g) + (unit + lane) * job_.row_stride;
          for (int64_t block = blocks.begin; block < blocks.end; ++block)
            read(row, block * W, Blocks<T>::lanes(job_.K, block)).store(out + (block - blocks.begin) * block_stride);
        }
  }

  // Columns [k, k + count) of a row.
  RNNFAST_FN Vec<T> read(const T* row, int64_t k, int64_t count) const {
    if (job_.column_stride == 1) return load_lanes(row + k, count);
    T values[W] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = row[(k + i) * job_.column_stride];
    return Vec<T>::load(values);
  }

  void bias(int64_t block) const {
    const int64_t lanes = Blocks<T>::lanes(job_.rows, block);
    for (int s = 0; s < S; ++s)
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t unit = block * W + lane;
        T sum = T(0);
        if (lane < lanes && job_.source) {
          if (s < G) sum += job_.source[(Cell::kInputGate[s] * job_.rows + unit) * job_.row_stride];
          if (s >= R) sum += job_.source2[(Cell::kRecurrentGate[s - R] * job_.rows + unit) * job_.stride2];
        }
        job_.target[(block * S + s) * W + lane] = sum;
      }
  }

  const PackJob<T>& job_;
};

RNNFAST_END
