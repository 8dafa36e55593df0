// Launch plans of the grid-persistent kernels: recurrent weights spread over the multiprocessors of a device for all steps.
//
// The hidden units of a layer are cut into `parts`, the batch into `slices`: a block has one part of one slice. The sequences
// of a slice are taken in `groups` of as many rows as a tile has; each group is a recurrence of its own, so that a block works
// on one while another's states are on their way. What the parts tell each other goes through global memory:
//
//   forward    states   [direction][slice][group][buffer][row][units of all parts]: h as it enters a step
//   backward   partials [direction][slice][group][buffer][owner][source][row][unit]: a part's share of the owner's dL/dh
//   both       flags    [direction][slice][group][part]: the last epoch that a part has written
//
// or, where the parts of a slice are a thread-block cluster, through the shared memory of each block:
//
//   forward    states   [group][buffer][row][units of all parts], which all parts write
//   backward   partials [group][buffer][source][row][unit], each source its own
//   both       barriers [group], at which every part arrives once an epoch
//
// Every sum of partials has one order, that of the parts: results are bitwise repeatable.
#pragma once

#include "cuda/tiles.h"

namespace rnnfast {

// ---- the protocol of a group, the same in both passes ---------------------------------------------------------------
//
// Epoch e is what step number e of a launch reads. A part waits until the flags of all parts are at least e, reads buffer
// e mod 2, writes its own place in buffer (e + 1) mod 2 and sets its flag to e + 1. Two buffers are enough: who writes for
// e + 1 has seen all flags at e, and a part raises its flag to e only after it has read what e - 1 left in that buffer. In a
// cluster the flags that a part reads are one barrier of its own, of which epoch e is phase e - 1: no phase ends before this
// part has arrived too, so that it never misses one, and the parity of the phase tells all. Epoch 1 is the first of a launch.
// (tests/cpp/test_cuda_protocol.cpp tries every interleaving.)
constexpr int kExchangeBuffers = 2;
RNNFAST_PLAN int exchange_buffer(int64_t epoch) { return static_cast<int>(epoch % kExchangeBuffers); }

// ---- the plan -------------------------------------------------------------------------------------------------------

constexpr int kGridThreads = 256;  // at most: 255 registers for each

enum class GridPass { kForward, kBackward };

constexpr int kFactorBits = 22, kMostParts = 1 << (32 - kFactorBits);

struct GridPlan {
  bool possible = false;
  TileShape tile{};
  int units = 0;                           // of a part
  uint32_t unit_factor = 0;                // 2^kFactorBits / units, rounded up: see `owner`
  int parts = 0, slices = 0, groups = 0;   // see above
  int directions = 0;                      // that run at once
  int threads = 0;                         // of a block
  int depth_warps = 0, output_warps = 0;   // warps that share the depth of an output; and that have other outputs
  int output_tiles = 0, depth_tiles = 0;   // of a block
  int tiles = 0;                           // of a warp, at most
  int64_t exchange_row = 0;                // forward: values of a row of states, in global memory
  int sum_bytes = 0;                       // of shared memory, for sums of several warps or sources
  int64_t cost = 0;                        // of a step, roughly, in tiles
  bool cluster = false;                    // the parts of a slice are one: they exchange through shared memory
  int kept_states = 1, kept_partials = 0;  // in shared memory, of a group and buffer each

  RNNFAST_PLAN int blocks() const { return directions * slices * parts; }
  RNNFAST_PLAN int outputs() const { return output_tiles * tile.outputs; }
  RNNFAST_PLAN int state_row() const { return depth_tiles * tile.depth + tile.skew; }  // in shared memory, elements
  // unit / units, and what is left, without a division, in 32 bits: exact for fewer than kMostParts parts of at most 64 units
  // (tests/cpp/test_cuda_grid.cpp goes over all of them).
  RNNFAST_PLAN int owner(int unit) const {
    return static_cast<int>(static_cast<uint32_t>(unit) * unit_factor >> kFactorBits);
  }
  RNNFAST_PLAN int unit_of_owner(int unit) const { return unit - owner(unit) * units; }
  RNNFAST_PLAN int pairs() const { return units * tile.rows; }  // (row, unit): a thread owns one, or none

  // Shared memory: weights beyond the registers', states of a group (in a cluster of all, twice), sums,
  // of each group its steps, sequences and their lengths; in a cluster partials and barriers.
  RNNFAST_PLAN int weight_quads() const { return tiles > tile.held ? (tiles - tile.held) * tile.quads * threads : 0; }
  RNNFAST_PLAN int weight_index(int number, int quad, int thread) const {  // number: of a tile in shared memory
    return (number * tile.quads + quad) * threads + thread;
  }
  RNNFAST_PLAN int state_bytes() const { return (tile.rows * state_row() * tile.element + 15) / 16 * 16; }
  RNNFAST_PLAN int state_offset(int number = 0) const { return 16 * weight_quads() + number * state_bytes(); }
  RNNFAST_PLAN int sum_offset() const { return state_offset(kept_states); }
  RNNFAST_PLAN int range_offset() const { return sum_offset() + sum_bytes; }
  RNNFAST_PLAN int sequence_offset() const { return range_offset() + 16 * groups; }
  RNNFAST_PLAN int length_offset() const { return sequence_offset() + 4 * groups * tile.rows; }
  RNNFAST_PLAN int partial_offset(int number = 0) const {  // a part's own, [source][row][unit]
    return length_offset() + 4 * groups * tile.rows + number * 4 * parts * pairs();
  }
  RNNFAST_PLAN int barrier_offset() const { return partial_offset(kept_partials); }
  RNNFAST_PLAN int64_t shared_bytes() const {
    const int64_t needed = barrier_offset() + (cluster ? 8 * groups : 0), staged = int64_t{16} * kStagedQuads * threads;
    return needed > staged ? needed : staged;
  }

  // Global memory. `team`: which direction and slice, of directions * slices.
  RNNFAST_PLAN int64_t group_number(int team, int group) const { return int64_t{team} * groups + group; }
  RNNFAST_PLAN int64_t flag_count() const { return int64_t{directions} * slices * groups * parts; }
  RNNFAST_PLAN int64_t flag_index(int team, int group, int part) const {
    return group_number(team, group) * parts + part;
  }
  RNNFAST_PLAN int64_t state_index(int team, int group, int buffer) const {
    return (group_number(team, group) * kExchangeBuffers + buffer) * tile.rows * exchange_row;
  }
  RNNFAST_PLAN int64_t state_count() const { return state_index(directions * slices, 0, 0); }
  RNNFAST_PLAN int64_t partial_index(int team, int group, int buffer) const {
    return (group_number(team, group) * kExchangeBuffers + buffer) * parts * parts * pairs();
  }
  RNNFAST_PLAN int64_t partial_count() const { return partial_index(directions * slices, 0, 0); }
  // Within a buffer: what `source` has for row `row` of hidden unit `unit` of the layer; and within the owner's part of it.
  RNNFAST_PLAN int partial_place(int unit, int source, int row) const {
    return owner(unit) * parts * pairs() + own_partial_place(unit, source, row);
  }
  RNNFAST_PLAN int own_partial_place(int unit, int source, int row) const {
    return (source * tile.rows + row) * units + unit_of_owner(unit);
  }
  RNNFAST_PLAN int kept_number(int group, int buffer) const { return group * kExchangeBuffers + buffer; }
};

// Which block this is.
struct GridPlace {
  int part, team, direction, slice;

  RNNFAST_PLAN GridPlace(const GridPlan& plan, int block)
      : part(block % plan.parts), team(block / plan.parts), direction(team / plan.slices), slice(team % plan.slices) {}

  // Groups are dealt to the slices in turn: where they are sorted by length, each slice has as much to do.
  RNNFAST_PLAN int64_t first_sequence(const GridPlan& plan, int group) const {
    return (int64_t{group} * plan.slices + slice) * plan.tile.rows;
  }
};

// The tiles of a warp, in the order in which it multiplies them: depth first, so that the sums of an output end.
struct TileWalk {
  const GridPlan& plan;
  const int first_depth_tile;
  int output_tile, depth_tile;

  RNNFAST_PLAN TileWalk(const GridPlan& plan_, int warp)
      : plan(plan_),
        first_depth_tile(warp % plan_.depth_warps),
        output_tile(warp / plan_.depth_warps),
        depth_tile(first_depth_tile) {}

  // Goes on; true: what has been multiplied was the last tile of its outputs.
  RNNFAST_PLAN bool next() {
    depth_tile += plan.depth_warps;
    if (depth_tile < plan.depth_tiles) return false;
    depth_tile = first_depth_tile, output_tile += plan.output_warps;
    return true;
  }
};

namespace grid_plan {

constexpr int kUnitStep = 4;                           // parts have multiples of this
constexpr int64_t kMostExchange = int64_t{256} << 20;  // bytes: of a large batch the generic path makes good use

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline uint32_t unit_factor(int units) { return static_cast<uint32_t>(((1 << kFactorBits) + units - 1) / units); }

// Warps over outputs and depth, so that the busiest has the fewest tiles.
inline void share_tiles(GridPlan& plan, GridPass pass, int64_t outputs, int64_t depth) {
  plan.output_tiles = ceil_div(outputs, plan.tile.outputs), plan.depth_tiles = ceil_div(depth, plan.tile.depth);
  const int most_depth_warps = pass == GridPass::kForward ? kGridThreads / int(kWarp) : 1;
  plan.tiles = 0;
  for (int depth_warps = 1; depth_warps <= most_depth_warps && depth_warps <= plan.depth_tiles; depth_warps *= 2) {
    const int most_output_warps = kGridThreads / int(kWarp) / depth_warps;
    const int useful_warps = plan.output_tiles < most_output_warps ? plan.output_tiles : most_output_warps;
    const int tiles = ceil_div(plan.output_tiles, useful_warps) * ceil_div(plan.depth_tiles, depth_warps);
    if (plan.tiles && tiles >= plan.tiles) continue;
    plan.tiles = tiles, plan.depth_warps = depth_warps;
    plan.threads = useful_warps * depth_warps * int(kWarp);
  }
  while (plan.threads < plan.pairs()) plan.threads += plan.depth_warps * int(kWarp);  // idle but for the cell
  plan.output_warps = plan.threads / int(kWarp) / plan.depth_warps;
}

// What follows from the sizes of a block.
inline void share_block(GridPlan& plan, GridPass pass, int gates, int64_t H) {
  const bool forward = pass == GridPass::kForward;
  plan.unit_factor = unit_factor(plan.units);
  share_tiles(plan, pass, forward ? gates * plan.units : H, forward ? H : gates * plan.units);
  const int values = 16 / plan.tile.element;
  plan.exchange_row = int64_t{ceil_div(H, values)} * values;
  plan.sum_bytes = forward ? 4 * plan.depth_warps * plan.tile.rows * plan.outputs() : 4 * plan.threads;
}

inline GridPlan with_units(const DeviceLimits& device, const TileShape& tile, GridPass pass, int gates, int64_t H,
                           int64_t batch, int directions, int units) {
  GridPlan plan;
  plan.tile = tile, plan.units = units, plan.directions = directions;
  plan.parts = ceil_div(H, units);
  const int64_t room = device.multiprocessors / (int64_t{plan.parts} * directions), all = ceil_div(batch, tile.rows);
  if (room < 1 || plan.pairs() > kGridThreads || plan.parts >= kMostParts) return plan;
  plan.groups = ceil_div(all, room);
  plan.slices = ceil_div(all, plan.groups);
  share_block(plan, pass, gates, H);
  const int64_t exchanged =
      pass == GridPass::kForward ? tile.element * plan.state_count() : int64_t{4} * plan.partial_count();
  plan.possible =
      plan.threads <= kGridThreads && plan.shared_bytes() <= device.shared_bytes && exchanged <= kMostExchange;
  return plan;
}

// A cluster of `parts` blocks for each slice, `room` of them at once. With as few groups as the room allows, or fewer where the
// shared memory is not enough: then some slices come after the others.
inline GridPlan with_cluster(const DeviceLimits& device, const TileShape& tile, GridPass pass, int gates, int64_t H,
                             int64_t batch, int directions, int parts, int64_t room) {
  GridPlan plan;
  plan.tile = tile, plan.parts = parts, plan.directions = directions, plan.cluster = true;
  plan.units = ceil_div(ceil_div(H, parts), kUnitStep) * kUnitStep;
  if (plan.pairs() > kGridThreads || room < 1) return plan;
  share_block(plan, pass, gates, H);
  const int64_t all = ceil_div(batch, tile.rows), at_once = room > directions ? room / directions : 1;
  const int64_t most = device.shared_bytes / (int64_t{2} * 4 * plan.pairs());  // buffers alone take more than that
  const int64_t wanted = ceil_div(all, at_once);
  for (int groups = static_cast<int>(wanted < most ? wanted : most); groups > 0 && !plan.possible; --groups) {
    plan.groups = groups, plan.slices = ceil_div(all, groups);
    plan.kept_states = pass == GridPass::kForward ? groups * kExchangeBuffers : 1;
    plan.kept_partials = pass == GridPass::kForward ? 0 : groups * kExchangeBuffers;
    plan.possible = plan.threads <= kGridThreads && plan.shared_bytes() <= device.shared_bytes;
  }
  return plan;
}

}  // namespace grid_plan

// The cheaper of two plans; with equal costs that of fewer parts.
inline GridPlan cheaper(const GridPlan& a, const GridPlan& b) {
  if (!a.possible || !b.possible) return a.possible ? a : b;
  return b.cost < a.cost || (b.cost == a.cost && b.parts < a.parts) ? b : a;
}

// The plan that takes the least time by a rough count of tiles.
inline GridPlan plan_grid(const DeviceLimits& device, const TileShape& tile, GridPass pass, int gates, int64_t H,
                          int64_t batch, int directions) {
  GridPlan best;
  if (batch < 1) return best;
  for (int units = grid_plan::kUnitStep; units * tile.rows <= kGridThreads; units += grid_plan::kUnitStep) {
    GridPlan plan = grid_plan::with_units(device, tile, pass, gates, H, batch, directions, units);
    plan.cost = int64_t{plan.groups} * (plan.tiles + tile.step_tiles);
    best = cheaper(best, plan);
  }
  return best;
}

// Likewise, of clusters. room(parts): how many of so many blocks there are at once. What is not the product takes about half as
// long as through global memory: nobody has measured it yet.
template <class Room>
GridPlan plan_cluster(const DeviceLimits& device, const TileShape& tile, GridPass pass, int gates, int64_t H,
                      int64_t batch, int directions, const Room& room) {
  GridPlan best;
  for (int parts = 2; parts <= device.cluster && batch > 0; parts *= 2) {
    const int64_t at_once = room(parts);
    GridPlan plan = grid_plan::with_cluster(device, tile, pass, gates, H, batch, directions, parts, at_once);
    if (!plan.possible) continue;
    const int turns = grid_plan::ceil_div(int64_t{directions} * plan.slices, at_once);
    plan.cost = int64_t{turns} * plan.groups * (plan.tiles + tile.step_tiles / 2);
    best = cheaper(best, plan);
  }
  return best;
}

}  // namespace rnnfast
