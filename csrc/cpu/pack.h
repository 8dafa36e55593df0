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
  static constexpr int64_t W = Vec<T>::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;

 public:
  explicit Packer(const PackJob<T>& job) : job_(job) {}

  int64_t blocks() const { return Blocks<T>::count(job_.kind == PackJob<T>::kRows ? job_.K : job_.rows); }

  void run(Range blocks) const {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      if (job_.kind == PackJob<T>::kBias)
        bias(block);
      else if (job_.kind == PackJob<T>::kColumns)
        columns(block);
      else
        rows(block);
    }
  }

 private:
  int gates() const { return job_.gates ? G : 1; }
  // First source row of the g-th gate in kernel order.
  const T* gate_rows(int g) const {
    if (!job_.gates) return job_.source;
    const int gate = job_.recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g];
    return job_.source + gate * job_.rows * job_.row_stride;
  }

  // A transposition: done in strips of k, so that the lines being written stay in the first cache.
  void columns(int64_t block) const {
    constexpr int64_t kStrip = 32;
    const int64_t lanes = Blocks<T>::lanes(job_.rows, block), step = gates() * W;
    T* const target = job_.target + block * job_.K * step;
    for (int64_t k0 = 0; k0 < job_.K; k0 += kStrip) {
      const int64_t k1 = least(k0 + kStrip, job_.K);
      for (int g = 0; g < gates(); ++g)
        for (int64_t lane = 0; lane < W; ++lane) {
          const T* row = gate_rows(g) + (block * W + lane) * job_.row_stride;
          T* out = target + g * W + lane;
          if (lane < lanes)
            for (int64_t k = k0; k < k1; ++k) out[k * step] = row[k * job_.column_stride];
          else
            for (int64_t k = k0; k < k1; ++k) out[k * step] = T(0);
        }
    }
  }

  void rows(int64_t block) const {
    T* out = job_.target + block * job_.rows * gates() * W;
    for (int64_t unit = 0; unit < job_.rows; unit += W)
      for (int g = 0; g < gates(); ++g)
        for (int64_t lane = 0; lane < least(W, job_.rows - unit); ++lane, out += W)
          row_lanes(gate_rows(g) + (unit + lane) * job_.row_stride, block).store(out);
  }

  Vec<T> row_lanes(const T* row, int64_t block) const {
    const int64_t lanes = Blocks<T>::lanes(job_.K, block);
    if (job_.column_stride == 1) return load_lanes(row + block * W, lanes);
    T values[W] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = row[(block * W + lane) * job_.column_stride];
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
