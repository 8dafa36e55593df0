// CUDA's words for a plain C++ compiler: the kernels and the code that launches them run on the CPU, slowly but exactly, so
// that they are tested where there is no GPU. "Device" memory is the host's.
//
// The threads of a block are fibres: each runs until __syncthreads() or its end, then the next one takes over; a warp that
// only exchanges values goes on by itself. A barrier that some threads of a block miss is an error; one that is missing in
// the source shows when the threads run in the opposite order (`emulation().backwards`), since then the results differ.
// Blocks run one after another, but those of a cooperative launch, or of a cluster, together: one that has come to a barrier
// lets another go on, in an order that is drawn. That none of them can go on any more is an error.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace rnnfast::emulator {

struct Emulation {
  bool backwards = false;  // threads and blocks run from the last to the first
  int64_t launches = 0,
          barriers = 0;           // barriers that blocks came to, but for those at which they waited for others in vain
  int64_t multiprocessors = 132;  // of the device that is emulated
  int cluster = 16;               // blocks of its largest cluster
  bool waits_in_vain = false;     // the block that runs now, for other blocks
};
inline Emulation& emulation() {
  static thread_local Emulation state;
  return state;
}

enum class Wait { kNone, kWarp, kBlock };  // at the end of the kernel, at a barrier

// One thread of a block, at `index` in it. Fibres are made once and serve all launches; _setjmp, unlike swapcontext, makes no
// system call.
class Fibre {
 public:
  Fibre() : stack_(new char[kStack]) {
    getcontext(&start_);
    start_.uc_stack.ss_sp = stack_.get(), start_.uc_stack.ss_size = kStack, start_.uc_link = nullptr;
    makecontext(&start_, &Fibre::serve, 0);
  }

  dim3 index;

  // Runs until the next barrier or the end of the kernel.
  Wait resume(const std::function<void()>& kernel) {
    current() = this, threadIdx = index;
    if (wait_ == Wait::kNone) kernel_ = &kernel;
    enter();
    return wait_;
  }

  static void barrier(Wait kind) {
    current()->wait_ = kind;
    current()->leave();
    current()->wait_ = Wait::kNone;
  }

 private:
  static constexpr size_t kStack = 128 << 10;

  static Fibre*& current() {
    static thread_local Fibre* fibre = nullptr;
    return fibre;
  }
  static void serve() {
    for (;;) {
      (*current()->kernel_)();
      current()->leave();
    }
  }

#if defined(__SANITIZE_ADDRESS__)  // which must be told of each change of stack, and knows this one
  void enter() { swapcontext(&outside_, &start_); }
  void leave() { swapcontext(&start_, &outside_); }
  ucontext_t outside_;
#else
  void enter() {
    if (_setjmp(outside_)) return;
    if (started_) _longjmp(inside_, 1);
    started_ = true;
    setcontext(&start_);
  }
  void leave() {
    if (!_setjmp(inside_)) _longjmp(outside_, 1);
  }
  jmp_buf outside_, inside_;
  bool started_ = false;
#endif

  ucontext_t start_;
  std::unique_ptr<char[]> stack_;
  const std::function<void()>* kernel_ = nullptr;
  Wait wait_ = Wait::kNone;
};

// Runs the threads [begin, end), a warp, until they wait for the block (how many, is the result) or have ended. `first`: the
// fibre of the block's thread 0.
inline unsigned run_warp(std::vector<std::unique_ptr<Fibre>>& fibres, unsigned first, unsigned begin, unsigned end,
                         const std::function<void()>& kernel) {
  const bool backwards = emulation().backwards;
  for (;;) {
    unsigned count[3] = {};
    for (unsigned n = begin; n < end; ++n) {
      const unsigned i = backwards ? begin + end - 1 - n : n;
      ++count[static_cast<int>(fibres[first + i]->resume(kernel))];
    }
    if (count[static_cast<int>(Wait::kWarp)] == 0) return count[static_cast<int>(Wait::kBlock)];
    if (count[static_cast<int>(Wait::kWarp)] != end - begin)
      throw std::logic_error("emulator: an exchange that not all threads of a warp reach");
  }
}

using Fibres = std::vector<std::unique_ptr<Fibre>>;

// Runs each thread of a block to the next barrier; false: to the end of the kernel.
inline bool run_to_barrier(Fibres& fibres, unsigned first, const std::function<void()>& kernel) {
  constexpr unsigned kWarpSize = 32;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z, warps = (count + kWarpSize - 1) / kWarpSize;
  unsigned waiting = 0;
  for (unsigned n = 0; n < warps; ++n) {
    const unsigned begin = (emulation().backwards ? warps - 1 - n : n) * kWarpSize;
    waiting += run_warp(fibres, first, begin, begin + kWarpSize < count ? begin + kWarpSize : count, kernel);
  }
  if (waiting != 0 && waiting != count) throw std::logic_error("emulator: a barrier that not all threads reach");
  return waiting != 0;
}

// Of a block: memory whose size the launch gives, and what its threads hand to each other.
inline thread_local double* dynamic_shared;
inline thread_local std::vector<double> exchanged;

struct Block {
  dim3 index;
  unsigned first_fibre;
  std::vector<double> shared;

  bool run(Fibres& fibres, const std::function<void()>& kernel) {
    blockIdx = index, dynamic_shared = shared.data();
    return run_to_barrier(fibres, first_fibre, kernel);
  }
};

// The blocks that run now, and how often one of them has come to sync_together().
inline thread_local std::vector<Block>* together;
inline thread_local uint64_t meetings;

// Of the cluster that runs: the shared memory of the block of that number.
inline double* shared_of_peer(int number) {
  for (Block& block : *together)
    if (block.index.x % together->size() == static_cast<unsigned>(number)) return block.shared.data();
  throw std::logic_error("emulator: no such block in the cluster");
}

// A barrier of all threads of the blocks that run together.
inline void sync_together() {
  const auto wait = [] { Fibre::barrier(Wait::kBlock); };
  wait();
  const uint64_t all = together->size(), enough = (meetings / all + 1) * all;  // the same for all threads of the block
  wait();
  if (threadIdx.x == 0) ++meetings;
  for (bool ready = false; !ready;) {
    wait();
    ready = meetings >= enough;
    emulation().waits_in_vain = !ready;
  }
}

// For as long as they run.
struct Together {
  explicit Together(std::vector<Block>& blocks) { together = &blocks, meetings = 0; }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;
  ~Together() { together = nullptr; }
};

// All blocks at once, in turns.
inline void run_blocks(std::vector<Block>& blocks, Fibres& fibres, const std::function<void()>& kernel) {
  constexpr size_t kPatience = 1000;  // turns of each block
  std::vector<Block*> running;
  running.reserve(blocks.size());
  for (Block& block : blocks) running.push_back(&block);
  const Together running_together(blocks);
  uint32_t random = emulation().backwards ? 12345 : 67890;
  for (size_t in_vain = 0; !running.empty();) {
    random = random * 1664525 + 1013904223;
    const size_t n = (random >> 8) % running.size();
    emulation().waits_in_vain = false;
    if (!running[n]->run(fibres, kernel)) running.erase(running.begin() + static_cast<ptrdiff_t>(n));
    emulation().barriers += !emulation().waits_in_vain;
    in_vain = emulation().waits_in_vain ? in_vain + 1 : 0;
    if (in_vain > kPatience * (running.size() + 1))
      throw std::logic_error("emulator: blocks that wait for each other for ever");
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
                     int64_t at_once = 1) {
  static thread_local Fibres fibres;
  gridDim = grid, blockDim = block;
  const unsigned threads = block.x * block.y * block.z;
  exchanged.resize(threads);
  ++emulation().launches;
  const int64_t count = int64_t{grid.x} * grid.y * grid.z;
  while (fibres.size() < size_t{threads} * at_once) fibres.push_back(std::make_unique<Fibre>());
  for (unsigned i = 0; i < threads * at_once; ++i)
    fibres[i]->index = dim3(i % threads % block.x, i % threads / block.x % block.y, i % threads / block.x / block.y);
  try {
    for (int64_t n = 0; n < count; n += at_once) {
      std::vector<Block> blocks;
      for (int64_t j = 0; j < at_once; ++j) {
        const int64_t i = emulation().backwards ? count - 1 - n - j : n + j;
        const dim3 index(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        const std::vector<double> shared(shared_bytes / sizeof(double) + 1, NAN);  // not what the block before has left
        blocks.push_back({index, static_cast<unsigned>(j) * threads, shared});
      }
      run_blocks(blocks, fibres, kernel);
    }
  } catch (...) {
    fibres.clear();
    throw;
  }
}

}  // namespace rnnfast::emulator

inline void __syncthreads() { rnnfast::emulator::Fibre::barrier(rnnfast::emulator::Wait::kBlock); }
inline void __syncwarp() { rnnfast::emulator::Fibre::barrier(rnnfast::emulator::Wait::kWarp); }
