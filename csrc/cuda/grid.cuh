// Whole time loops in one launch, with the recurrent weights spread over the multiprocessors: see cuda/grid_plan.h for who has
// what and how the blocks wait for each other, cuda/exchange.cuh for the ways there are, cuda/tiles.cuh for the products. What
// happens to a unit once its sums are known is the generic path's (forward.cuh, backward.cuh), as are the steps past the end of
// a sequence (persistent.cuh).
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/grid_plan.h"
#include "cuda/tiles.cuh"

RNNFAST_BEGIN

// A thread's view of its block. What is found quickly is found anew each time: the registers are the weights'.
template <class T, class Tile>
struct GridBlock {
  using Element = typename Tile::Element;
  const GridPlan& plan;
  const GridPlace place;
  const Item<T>& item;
  const int thread = threadIdx.x, warp = thread / int(kWarp), lane = thread % int(kWarp);
  const int row, local_unit;  // which this thread owns, if `pairs` is more than its number
  const int unit;

  __device__ GridBlock(const GridPlan& plan_, const Items<T>& items)
      : plan(plan_),
        place(plan_, blockIdx.x),
        item(items.item[place.direction]),
        row(thread / plan_.units),
        local_unit(thread % plan_.units),
        unit(place.part * plan_.units + local_unit) {}

  template <class V>
  static __device__ V* shared(int offset) {
    return reinterpret_cast<V*>(cuda_runtime::shared_memory<char>() + offset);
  }
  __device__ cuda_runtime::Words* weights() const { return shared<cuda_runtime::Words>(0); }
  __device__ Element* states(int number = 0) const { return shared<Element>(plan.state_offset(number)); }
  __device__ float* sums() const { return shared<float>(plan.sum_offset()); }
  // Of each group: the first and the end of the step numbers that any of its sequences runs.
  __device__ StepRange* ranges() const { return shared<StepRange>(plan.range_offset()); }

  __device__ int32_t* sequences() const { return shared<int32_t>(plan.sequence_offset()); }  // [group][row]; -1: none

  __device__ int32_t* lengths() const { return shared<int32_t>(plan.length_offset()); }  // likewise; of none: 0

  // Of this thread's row; -1: there is none, or it is not this thread's.
  __device__ int sequence(int group) const {
    return thread < plan.pairs() && unit < item.H ? sequences()[group * plan.tile.rows + row] : -1;
  }

  __device__ int length(int group) const { return lengths()[group * plan.tile.rows + row]; }  // of a row that is there

  // Zeros in the states, and the ranges. The exchange's start() comes before their first use.
  __device__ void prepare() {
    const int words = plan.kept_states * plan.state_bytes() / int(sizeof(cuda_runtime::Word));
    for (int i = thread; i < words; i += plan.threads) reinterpret_cast<cuda_runtime::Word*>(states())[i].value = 0;
    for (int g = thread; g < plan.groups; g += plan.threads)
      ranges()[g] = steps_of_block(item, place.first_sequence(plan, g), plan.tile.rows);
    for (int i = thread; i < plan.groups * plan.tile.rows; i += plan.threads) {
      const int64_t number = place.first_sequence(plan, i / plan.tile.rows) + i % plan.tile.rows;
      const int64_t sequence = number < item.batch ? sequence_at(item, number) : -1;
      sequences()[i] = static_cast<int32_t>(sequence);
      lengths()[i] = sequence < 0 ? 0 : static_cast<int32_t>(rnnfast::RNNFAST_ISA::length(item, sequence));
    }
  }
};

// Where a weight lies: a place that can be read even if it is not `inside`, and then zero.
template <class T>
struct WeightPlace {
  const T* data;
  bool inside;
};

// Of unit number `place` of the block's, slot by slot, which starts at hidden unit first_unit: its row of weight_hh, `column`.
template <class T, class Tile>
__device__ WeightPlace<T> recurrent_weight(const GridBlock<T, Tile>& block, int first_unit, int place, int column) {
  const Item<T>& item = block.item;
  const int g = block.plan.owner(place), unit = first_unit + block.plan.unit_of_owner(place);
  const bool inside = unit < item.H;
  const int64_t row = chosen_gate(item.recurrent_gate, g) * item.H + (inside ? unit : 0);
  return {item.w_hh.data + row * item.w_hh.row_stride + column * item.w_hh.column_stride, inside};
}

// A thread's weights of the tile at which a walk is, to target[quad * threads], from weight(output, depth), which is asked for
// places inside the matrix only.
template <class Tile, class T, class Load>
__device__ void copy_tile(cuda_runtime::Words* target, const GridBlock<T, Tile>& block, const TileWalk& walk,
                          int outputs, int depth, const Load& weight) {
  using Element = typename Tile::Element;
  constexpr int kValues = int(sizeof(cuda_runtime::Words) / sizeof(Element));
  const int first_output = walk.output_tile * Tile::kShape.outputs, first_depth = walk.depth_tile * Tile::kShape.depth;
  RNNFAST_UNROLL_NONE
  for (int q = 0; q < Tile::kShape.quads; ++q) {
    T values[kValues];  // that are on their way together: no load has a branch of its own
    bool inside[kValues];
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kValues; ++i) {
      const OutputDepth place = Tile::weight(block.lane, q * kValues + i);
      const int o = first_output + place.output, k = first_depth + place.depth;
      const WeightPlace<T> found = weight(o < outputs ? o : outputs - 1, k < depth ? k : depth - 1);
      values[i] = *found.data, inside[i] = found.inside && o < outputs && k < depth;
    }
    Element* const quad = reinterpret_cast<Element*>(target + q * block.plan.threads);
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kValues; ++i) quad[i] = Tile::element(inside[i] ? read(values[i]) : 0.0f);
  }
}

// A thread's weights of a tile, from source[quad * threads].
template <class Tile>
__device__ typename Tile::Weights read_tile(const cuda_runtime::Words* source, int threads) {
  typename Tile::Weights weights;
  RNNFAST_UNROLL_ALL
  for (int q = 0; q < Tile::kShape.quads; ++q)
    reinterpret_cast<cuda_runtime::Words*>(&weights)[q] = source[q * threads];
  return weights;
}

// All weights of this thread. They may go through shared memory that is something else's: the other threads wait.
template <class Tile, class T, class Load>
__device__ void load_tiles(typename Tile::Weights (&held)[Tile::kShape.held], const GridBlock<T, Tile>& block,
                           int outputs, int depth, const Load& weight) {
  constexpr int kStaged = kStagedQuads / Tile::kShape.quads;
  static_assert(Tile::kShape.held % kStaged == 0);
  TileWalk walk(block.plan, block.warp);
  const auto copy = [&](int number) {
    copy_tile<Tile>(block.weights() + block.plan.weight_index(number, 0, block.thread), block, walk, outputs, depth,
                    weight);
    walk.next();
  };
  RNNFAST_UNROLL_ALL
  for (int j = 0; j < Tile::kShape.held; j += kStaged) {
    RNNFAST_UNROLL_NONE
    for (int i = 0; i < kStaged; ++i) copy(i);
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kStaged; ++i)
      held[j + i] = read_tile<Tile>(block.weights() + block.plan.weight_index(i, 0, block.thread), block.plan.threads);
  }
  __syncthreads();
  for (int j = Tile::kShape.held; j < block.plan.tiles; ++j) copy(j - Tile::kShape.held);
}

// store(output, row, sum) for the outputs of this warp, summed over its share of the depth. `states`: the number of those.
template <class Tile, class T, class Store>
__device__ void grid_product(const typename Tile::Weights (&held)[Tile::kShape.held], const GridBlock<T, Tile>& block,
                             int states, const Store& store) {
  const GridPlan& plan = block.plan;
  TileWalk walk(plan, block.warp);
  typename Tile::Sums sums;
  Tile::clear(sums);
  const auto fetch = [&] {
    return Tile::fetch(block.states(states) + walk.depth_tile * Tile::kShape.depth, plan.state_row(), block.lane);
  };
  typename Tile::States ahead;
  if constexpr (Tile::kFetchesAhead) ahead = fetch();
  const auto multiply = [&]<int kChain>(const typename Tile::Weights& weights) {
    if (walk.output_tile >= plan.output_tiles) return;  // the same for all threads of the warp
    const int first_output = walk.output_tile * Tile::kShape.outputs;
    bool ends;
    if constexpr (Tile::kFetchesAhead) {
      const typename Tile::States now = ahead;
      ends = walk.next();
      ahead = fetch();  // of the next tile, before this one is multiplied; behind the last one too there are states
      Tile::template add<kChain>(sums, weights, now);
    } else {
      Tile::template add<kChain>(sums, weights, fetch());
      ends = walk.next();
    }
    if (!ends) return;
    Tile::finish(sums, block.lane, [&](int o, int r, float sum) { store(first_output + o, r, sum); });
    Tile::clear(sums);
  };
  static_assert(Tile::kShape.held % 2 == 0);
  RNNFAST_UNROLL_ALL
  for (int j = 0; j < Tile::kShape.held; j += 2) {
    if (j < plan.tiles) multiply.template operator()<0>(held[j]);
    if (j + 1 < plan.tiles) multiply.template operator()<1>(held[j + 1]);
  }
  const auto read = [&](int j) {
    return read_tile<Tile>(block.weights() + plan.weight_index(j - Tile::kShape.held, 0, block.thread), plan.threads);
  };
  for (int j = Tile::kShape.held; j < plan.tiles; j += 2) {
    multiply.template operator()<0>(read(j));
    if (j + 1 < plan.tiles) multiply.template operator()<1>(read(j + 1));
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// recurrent[g]: the sums of this thread's unit and row, over the warps that shared the depth.
template <int G, class Tile, class T>
__device__ void own_sums(const GridBlock<T, Tile>& block, float (&recurrent)[G]) {
  const int outputs = block.plan.outputs(), stride = Tile::kShape.rows * outputs;
  const float* sums = block.sums() + block.row * outputs + block.local_unit;
  RNNFAST_UNROLL_ALL
  for (int g = 0; g < G; ++g) recurrent[g] = sums[g * block.plan.units];
  RNNFAST_UNROLL_NONE
  for (int w = 1; w < block.plan.depth_warps; ++w) {
    sums += stride;
    RNNFAST_UNROLL_ALL
    for (int g = 0; g < G; ++g) recurrent[g] = recurrent[g] + sums[g * block.plan.units];
  }
}

// The steps with numbers [begin, end). Epoch 1 of a group is its first one.
template <class T, class Cell, class Tile, class Exchange>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_forward_kernel(Items<T> items, Cell cell, GridPlan plan, Exchange exchange, int64_t begin, int64_t end) {
  if constexpr (!Exchange::kThere) return;
  constexpr int G = Cell::kGates;
  GridBlock<T, Tile> block(plan, items);
  const Item<T>& item = block.item;
  const int u = block.unit, first_unit = u - block.local_unit;
  typename Tile::Weights held[Tile::kShape.held];
  load_tiles<Tile>(held, block, G * plan.units, static_cast<int>(item.H),
                   [&](int output, int k) { return recurrent_weight(block, first_unit, output, k); });
  block.prepare();
  exchange.start(block);

  // 32 bits of all that counts steps: each is a register less.
  const auto first_step = [&](int group) {
    const int first = static_cast<int>(begin), own = static_cast<int>(block.ranges()[group].begin);
    return first > own ? first : own;
  };
  const auto end_step = [&](int group) {
    const int last = static_cast<int>(end), own = static_cast<int>(block.ranges()[group].end);
    return last < own ? last : own;
  };
  const auto epoch_of = [&](int group, int n) { return static_cast<uint32_t>(n - first_step(group) + 1); };
  const auto enter = [&](int group, int n, float h, bool from_memory) {  // tells all parts what step n starts from
    const int b = block.sequence(group);
    if (b >= 0)
      exchange.put_state(block, group, epoch_of(group, n), Tile::element(entering_h(item, n, b, u, h, from_memory)));
    exchange.publish(block, group, epoch_of(group, n));
  };

  for (int group = 0; group < plan.groups; ++group)
    if (first_step(group) < end_step(group)) enter(group, first_step(group), 0, true);
  for (int n = static_cast<int>(begin); n < static_cast<int>(end); ++n)
    for (int group = 0; group < plan.groups; ++group) {
      if (n < first_step(group) || n >= end_step(group)) continue;  // the same for all parts
      const int t = static_cast<int>(step_number(item, n));
      const int b = block.sequence(group);
      const bool active = b >= 0 && t < block.length(group);
      const Ahead<Cell, float> ahead = active ? look_ahead<Cell>(item, t, b, u) : Ahead<Cell, float>{};
      const int states = exchange.await_states(block, group, epoch_of(group, n));
      float* const sums = block.sums() + block.warp % plan.depth_warps * Tile::kShape.rows * plan.outputs();
      grid_product<Tile>(held, block, states, [&](int o, int r, float sum) { sums[r * plan.outputs() + o] = sum; });
      __syncthreads();
      Made<Cell, float> made;
      if (active) {
        float recurrent[G];
        own_sums<G>(block, recurrent);
        made = make_step(cell, ahead, recurrent);
      }
      if (n + 1 < end_step(group)) enter(group, n + 1, made.h, false);
      if (!active) continue;  // what others wait for is on its way: now the rest
      store_step(item, t, b, u, made);
      write_h(item, t, b, u, true, made.h);
    }
  exchange.finish();
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The product for this thread's unit and row: the partials of all parts, [source][row][unit], in a fixed order.
template <class Exchange, class T, class Tile>
__device__ float add_partials(const GridBlock<T, Tile>& block, const float* partials) {
  const GridPlan& plan = block.plan;
  const int pairs = plan.pairs(), adders = plan.threads / pairs, adder = block.thread / pairs;
  const float* const mine = partials + block.thread % pairs;
  constexpr int kAtOnce = 8;  // loads that are on their way together
  float sum = 0;
  RNNFAST_UNROLL_NONE
  for (int first = adder; first < plan.parts && adder < adders; first += kAtOnce * adders) {
    float part[kAtOnce];
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kAtOnce; ++i) {
      const int source = first + i * adders;
      part[i] = source < plan.parts ? Exchange::load(mine + source * pairs) : 0.0f;
    }
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < kAtOnce; ++i) sum = sum + part[i];  // a zero more changes no bit: no sum from zero on is -0
  }
  block.sums()[block.thread] = sum;
  __syncthreads();
  if (block.thread >= pairs) return 0;
  for (int i = 1; i < adders; ++i) sum = sum + block.sums()[i * pairs + block.thread];
  return sum;
}

// All steps, from the last to the first, and what the first sends to the initial states. The states are gate gradients of the
// block's own units, the outputs dL/dh of all units before the step. Epoch 1 is what a group's last step sends.
template <class T, class Cell, class Tile, class Exchange>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_backward_kernel(Items<T> items, Cell cell, GridPlan plan, Exchange exchange) {
  if constexpr (!Exchange::kThere) return;
  constexpr int G = Cell::kGates;
  GridBlock<T, Tile> block(plan, items);
  const Item<T>& item = block.item;
  const int u = block.unit, first_unit = u - block.local_unit;
  typename Tile::Weights held[Tile::kShape.held];
  load_tiles<Tile>(held, block, static_cast<int>(item.H), G * plan.units,
                   [&](int output, int k) { return recurrent_weight(block, first_unit, k, output); });
  block.prepare();
  exchange.start(block);

  for (int n = static_cast<int>(item.steps) - 1; n >= -1; --n)
    for (int group = 0; group < plan.groups; ++group) {
      const StepRange range = block.ranges()[group];
      if (n < range.begin - 1 || n >= range.end) continue;
      const uint32_t epoch = static_cast<uint32_t>(range.end - 1 - n);
      const bool owner = block.sequence(group) >= 0;
      const Moment m = moment(item, n, owner ? block.sequence(group) : 0, owner ? block.length(group) : 0);
      const Kept<Cell, float> kept = read_kept<Cell>(item, m, u);
      const float above = grad_out(item, m, u);
      float product = 0;
      if (epoch > 0) product = add_partials<Exchange>(block, exchange.await_partials(block, group, epoch));
      if (owner) {
        float slot[Cell::kSlots];
        run_adjoint(item, cell, m, u, kept, grad_h(item, m, u, product, above), slot);
        RNNFAST_UNROLL_ALL
        for (int g = 0; g < G; ++g)
          block.states()[block.row * plan.state_row() + g * plan.units + block.local_unit] =
              Tile::element(slot[Cell::kRecurrent + g]);
      }
      __syncthreads();
      if (n < range.begin) continue;
      grid_product<Tile>(held, block, 0, [&](int o, int r, float sum) {
        if (o < static_cast<int>(item.H)) exchange.put_partial(block, group, epoch + 1, o, r, sum);
      });
      exchange.publish(block, group, epoch + 1);
    }
  exchange.finish();
}

RNNFAST_END
