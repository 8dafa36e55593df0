// Launch plans of the persistent kernels, computed on the host from what a device has, and the index arithmetic that kernels
// and tests share.
//
// A block owns a few sequences for all steps, and all hidden units of a layer. Its threads form a grid of units x slices:
// thread (u, s) holds, of unit u, the weights of every S-th group of four inputs (a *quad*), of all G gates: the first ones
// in registers, the rest in shared memory. The slices' sums are added by exchange within a warp.
#pragma once

#include <stdint.h>

namespace rnnfast {

#ifdef __CUDACC__
#define RNNFAST_PLAN __host__ __device__ constexpr
#else
#define RNNFAST_PLAN constexpr
#endif

struct DeviceLimits {
  int64_t multiprocessors, shared_bytes;  // of a block, when asked for
};
constexpr DeviceLimits kH200{132, 227 << 10}, kA100{108, 163 << 10};
constexpr int64_t kRegistersPerBlock = 65536, kWarp = 32;

// Which kernel: threads of a block at most, and the weights that each then keeps in registers, beside some 50 others.
struct PersistentShape {
  int max_threads, register_weights;
};
constexpr PersistentShape kManyThreads{512, 64}, kManyRegisters{320, 144};

RNNFAST_PLAN int register_quads(PersistentShape shape, int gates) { return shape.register_weights / (4 * gates); }

struct PersistentPlan {
  bool possible = false;
  bool many_registers = false;  // which of the two shapes
  int rows = 1;                 // sequences of a block: 1 or 4
  int slices = 1;               // S, a power of two within a warp
  int threads = 0;
  int64_t quads = 0;         // of a thread: ceil(depth / (4 S))
  int64_t quads_held = 0;    // of these, in registers
  int64_t batch_slices = 0;  // blocks of a direction

  // Shared memory, in quads: weights [quads - quads_held][gates][threads], then two states [rows][state_quads].
  RNNFAST_PLAN int64_t weight_quads(int gates) const {
    return quads > quads_held ? (quads - quads_held) * gates * threads : 0;
  }
  RNNFAST_PLAN int64_t weight_index(int gates, int64_t quad, int gate, int thread) const {
    return ((quad - quads_held) * gates + gate) * threads + thread;
  }
  RNNFAST_PLAN int64_t state_quads() const { return slices * (quads > quads_held ? quads : quads_held); }
  RNNFAST_PLAN int64_t state_index(int buffer, int row, int64_t quad, int slice) const {
    return (int64_t{buffer} * rows + row) * state_quads() + first_quad(quad, slice);
  }
  RNNFAST_PLAN int64_t first_quad(int64_t quad, int slice) const { return quad * slices + slice; }  // of the depth
  RNNFAST_PLAN int64_t shared_quads(int gates) const { return weight_quads(gates) + 2 * rows * state_quads(); }
};

// units results of a recurrent product with `gates` sums each over `depth` values of `element` bytes.
inline PersistentPlan plan_persistent(const DeviceLimits& device, int gates, int64_t depth, int64_t units,
                                      int64_t batch, int64_t element) {
  for (const bool many_registers : {false, true}) {
    const PersistentShape shape = many_registers ? kManyRegisters : kManyThreads;
    if (units > shape.max_threads) continue;
    PersistentPlan plan;
    plan.many_registers = many_registers;
    while (2 * plan.slices <= kWarp && 2 * plan.slices * units <= shape.max_threads && 8 * plan.slices <= depth)
      plan.slices *= 2;
    plan.threads = static_cast<int>((units * plan.slices + kWarp - 1) / kWarp * kWarp);
    plan.quads = (depth + 4 * plan.slices - 1) / (4 * plan.slices);
    plan.quads_held = register_quads(shape, gates);
    for (const int rows : {4, 1}) {  // more sequences in a block only where there are more than multiprocessors
      plan.rows = rows;
      plan.batch_slices = (batch + rows - 1) / rows;
      plan.possible = (rows == 1 || (batch > device.multiprocessors && rows <= plan.slices)) &&
                      plan.shared_quads(gates) * 4 * element <= device.shared_bytes;
      if (plan.possible) return plan;
    }
  }
  return {};
}

}  // namespace rnnfast
