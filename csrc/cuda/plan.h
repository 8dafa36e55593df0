// Launch plans of the persistent kernels, computed on the host from what a device has, and the index arithmetic that kernels
// and tests share.
//
// A block owns a few sequences for all steps, and all hidden units of a layer. Its threads form a grid of units x slices:
// thread (u, s) holds, of unit u, the weights of every S-th group of four inputs (a *quad*), of all G gates: the first ones
// in registers, the rest in shared memory. The slices' sums are added by exchange within a warp.
#pragma once

#include <stdint.h>

#include <initializer_list>

namespace rnnfast {

#ifdef __CUDACC__
#define RNNFAST_PLAN __host__ __device__ constexpr
#else
#define RNNFAST_PLAN constexpr
#endif

struct DeviceLimits {
  int64_t multiprocessors, shared_bytes;  // of a block, when asked for
  int cluster;                            // blocks of the largest thread-block cluster; 0: it has none
};
constexpr DeviceLimits kH200{132, 227 << 10, 16}, kA100{108, 163 << 10, 0};
constexpr int64_t kWarp = 32;
constexpr int kMostRows = 4;  // of a block; each slice finishes one

// Which kernel. Of a multiprocessor's four parts each has 16,384 registers: 128 a thread for 512 threads, 168 for 384.
struct PersistentShape {
  int max_threads;
};
constexpr PersistentShape kManyThreads{512}, kManyRegisters{384};

// Quads of each gate that a thread holds in registers: as many as leave none to be spilled on sm_80 and sm_90a, and hardly
// any elsewhere (.ci/check_spills.py). Many registers are for one sequence in a block: layers so small that four find enough
// slices fit many threads on every device.
RNNFAST_PLAN int register_quads(PersistentShape shape, int gates, int rows) {
  const bool many = shape.max_threads == kManyRegisters.max_threads;
  if (gates == 1) return rows > 1 ? 6 : many ? 22 : 12;
  if (gates <= 3) return rows > 1 ? 2 : many ? 7 : 3;
  return rows > 1 ? 1 : many ? 4 : 3;
}

struct PersistentPlan {
  bool possible = false;
  bool many_registers = false;  // which of the two shapes
  int rows = 1;                 // sequences of a block: 1 or 4
  int slices = 1;               // S, a power of two within a warp
  int threads = 0;
  int quads = 0;             // of a thread: ceil(depth / (4 S))
  int quads_held = 0;        // of these, in registers
  int64_t batch_slices = 0;  // blocks of a direction

  // Shared memory, in quads: weights [quads - quads_held][gates][threads], then two states [rows][state_quads]. What a block
  // can have is far below 2^31: 32-bit numbers take half of the registers.
  RNNFAST_PLAN int weight_quads(int gates) const {
    return quads > quads_held ? (quads - quads_held) * gates * threads : 0;
  }
  RNNFAST_PLAN int weight_index(int gates, int quad, int gate, int thread) const {
    return ((quad - quads_held) * gates + gate) * threads + thread;
  }
  RNNFAST_PLAN int state_quads() const { return slices * (quads > quads_held ? quads : quads_held); }
  RNNFAST_PLAN int state_index(int buffer, int row) const { return (buffer * rows + row) * state_quads(); }
  RNNFAST_PLAN int first_quad(int quad, int slice) const { return quad * slices + slice; }  // of the depth
  RNNFAST_PLAN int shared_quads(int gates) const { return weight_quads(gates) + 2 * rows * state_quads(); }
};

// units results of a recurrent product with `gates` sums each over `depth` values of `element` bytes.
inline PersistentPlan plan_persistent(const DeviceLimits& device, int gates, int64_t depth, int64_t units,
                                      int64_t batch, int64_t element) {
  for (const bool many_registers : {false, true}) {
    const PersistentShape shape = many_registers ? kManyRegisters : kManyThreads;
    if (units > shape.max_threads) continue;
    PersistentPlan plan;
    plan.many_registers = many_registers;
    const auto worth_halving = [&] { return plan.slices < kMostRows || 8 * plan.slices <= depth; };
    while (2 * plan.slices <= kWarp && 2 * plan.slices * units <= shape.max_threads && worth_halving())
      plan.slices *= 2;
    plan.threads = static_cast<int>((units * plan.slices + kWarp - 1) / kWarp * kWarp);
    plan.quads = static_cast<int>((depth + 4 * plan.slices - 1) / (4 * plan.slices));
    for (const int rows : {kMostRows, 1}) {  // more sequences in a block only where there are more than multiprocessors
      plan.rows = rows;
      plan.quads_held = register_quads(shape, gates, rows);
      plan.batch_slices = (batch + rows - 1) / rows;
      plan.possible = (rows == 1 || (batch > device.multiprocessors && rows <= plan.slices && !many_registers)) &&
                      int64_t{4} * element * plan.shared_quads(gates) <= device.shared_bytes;
      if (plan.possible) return plan;
    }
  }
  return {};
}

}  // namespace rnnfast
