// How the blocks of a grid-persistent kernel hand each other states (forward) and partials (backward): through global memory,
// or within a thread-block cluster through the shared memory of each. cuda/grid_plan.h has the protocol, which is the same.
//
//   start(block)                       before all else, by all threads; what the block has prepared is there afterwards
//   put_state(block, group, epoch, v)  of this thread's row and unit, for all parts
//   put_partial(block, ..., o, r, v)   of row r, for the owner of unit o
//   publish(block, group, epoch)       after all that the block's threads have put for that epoch
//   await_states(...)                  the number of the block's states that have them, of all units
//   await_partials(...)                [source][row][unit], of this block's own units, to be read by load()
//   finish()                           after all else, by all threads
//   kThere                             can the architecture that is compiled for do it?
#pragma once

#include "cuda/grid_plan.h"
#include "cuda/runtime.h"

RNNFAST_BEGIN

// The flags are zero at first, and so are the states.
template <class V>
struct GlobalExchange {
  static constexpr bool kThere = true;

  V* values;  // states or partials
  uint32_t* flags;

  template <class Block>
  __device__ void start(const Block&) const {
    __syncthreads();
  }
  template <class Block>
  __device__ void put_state(const Block& block, int group, uint32_t epoch, V value) const {
    const int64_t first = block.plan.state_index(block.place.team, group, exchange_buffer(epoch));
    values[first + block.row * block.plan.exchange_row + block.unit] = value;
  }
  template <class Block>
  __device__ void put_partial(const Block& block, int group, uint32_t epoch, int unit, int row, V value) const {
    const int64_t first = block.plan.partial_index(block.place.team, group, exchange_buffer(epoch));
    values[first + block.plan.partial_place(unit, block.place.part, row)] = value;
  }
  template <class Block>
  __device__ void publish(const Block& block, int group, uint32_t epoch) const {
    cuda_runtime::publish(flags + block.plan.flag_index(block.place.team, group, block.place.part), epoch);
  }
  template <class Block>
  __device__ int await_states(const Block& block, int group, uint32_t epoch) const {
    await(block, group, epoch);
    fetch_states(block, values + block.plan.state_index(block.place.team, group, exchange_buffer(epoch)));
    __syncthreads();
    return 0;
  }
  template <class Block>
  __device__ const V* await_partials(const Block& block, int group, uint32_t epoch) const {
    await(block, group, epoch);
    return values + block.plan.partial_index(block.place.team, group, exchange_buffer(epoch)) +
           block.plan.partial_place(block.place.part * block.plan.units, 0, 0);
  }
  static __device__ V load(const V* p) { return cuda_runtime::load_shared_by_blocks(p); }
  __device__ void finish() const {}

 private:
  template <class Block>
  __device__ void await(const Block& block, int group, uint32_t epoch) const {
    cuda_runtime::await(flags + block.plan.flag_index(block.place.team, group, 0), block.plan.parts, epoch);
  }

  // The states of a group, from global to shared memory.
  template <class Block>
  static __device__ void fetch_states(const Block& block, const V* states) {
    using cuda_runtime::Words;
    constexpr int kValues = int(sizeof(Words) / sizeof(V)), kAtOnce = 4;  // loads that are on their way together
    const int across = static_cast<int>(block.plan.exchange_row) / kValues, count = across * block.plan.tile.rows;
    const Words* const source = reinterpret_cast<const Words*>(states);
    RNNFAST_UNROLL_NONE
    for (int first = block.thread; first < count; first += kAtOnce * block.plan.threads) {
      Words words[kAtOnce];
      RNNFAST_UNROLL_ALL
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * block.plan.threads;
        if (i < count) words[j] = cuda_runtime::load_shared_by_blocks(source + i);
      }
      RNNFAST_UNROLL_ALL
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * block.plan.threads;
        V* const target = block.states() + i / across * block.plan.state_row() + i % across * kValues;
        if (i < count) *reinterpret_cast<Words*>(target) = words[j];
      }
    }
  }
};

// States are zero at first (GridBlock::prepare). What a part reads lies in its own shared memory, where all parts write it.
template <class V>
struct ClusterExchange {
  static constexpr bool kThere = cuda_runtime::kHasClusters;

  template <class Block>
  __device__ void start(const Block& block) const {
    for (int group = block.thread; group < block.plan.groups; group += block.plan.threads)
      cuda_runtime::init_barrier(barrier(block, group), block.plan.parts);
    cuda_runtime::sync_cluster();
  }
  template <class Block>
  __device__ void put_state(const Block& block, int group, uint32_t epoch, V value) const {
    V* const own = block.states(block.plan.kept_number(group, exchange_buffer(epoch))) +
                   block.row * block.plan.state_row() + block.unit;
    int peer = block.place.part;  // each part begins with another, so that none gets all at once
    RNNFAST_UNROLL_NONE
    for (int i = 0; i < block.plan.parts; ++i) {
      *cuda_runtime::in_peer(own, peer) = value;
      peer = peer + 1 < block.plan.parts ? peer + 1 : 0;
    }
  }
  template <class Block>
  __device__ void put_partial(const Block& block, int group, uint32_t epoch, int unit, int row, V value) const {
    V* const own = partials(block, group, epoch) + block.plan.own_partial_place(unit, block.place.part, row);
    *cuda_runtime::in_peer(own, block.plan.owner(unit)) = value;
  }
  template <class Block>
  __device__ void publish(const Block& block, int group, uint32_t) const {
    __syncthreads();
    if (block.thread < block.plan.parts) cuda_runtime::arrive_in_peer(barrier(block, group), block.thread);
  }
  template <class Block>
  __device__ int await_states(const Block& block, int group, uint32_t epoch) const {
    cuda_runtime::await_phase(barrier(block, group), (epoch - 1) % 2);
    return block.plan.kept_number(group, exchange_buffer(epoch));
  }
  template <class Block>
  __device__ const V* await_partials(const Block& block, int group, uint32_t epoch) const {
    cuda_runtime::await_phase(barrier(block, group), (epoch - 1) % 2);
    return partials(block, group, epoch);
  }
  static __device__ V load(const V* p) { return *p; }
  // None ends while another may still write into its memory.
  __device__ void finish() const { cuda_runtime::sync_cluster(); }

 private:
  template <class Block>
  static __device__ cuda_runtime::ClusterBarrier* barrier(const Block& block, int group) {
    return Block::template shared<cuda_runtime::ClusterBarrier>(block.plan.barrier_offset()) + group;
  }
  template <class Block>
  static __device__ V* partials(const Block& block, int group, uint32_t epoch) {
    return Block::template shared<V>(block.plan.partial_offset(block.plan.kept_number(group, exchange_buffer(epoch))));
  }
};

RNNFAST_END
