// The launch plans of the grid-persistent CUDA kernels, over all shapes that have one: what a device has is enough, every
// weight and every sum has exactly one thread, and no two things share a place in memory.
#include <algorithm>
#include <set>

#include "cuda/grid_plan.h"
#include "harness.h"

namespace rnnfast::test {
namespace {

constexpr int kLanes = kWarp;

// Which element of a tile, which sum, is a thread's: as in cuda/tiles.cuh.
enum class Unit { kFma, kHalf, kTf32 };
Unit unit_of(const TileShape& tile) {
  return tile.element == 2 ? Unit::kHalf : tile.depth == kTf32Tile.depth ? Unit::kTf32 : Unit::kFma;
}
const char* name_of(Unit unit) { return unit == Unit::kHalf ? "16 bits" : unit == Unit::kTf32 ? "TF32" : "float32"; }
int slices_of(const TileShape& tile) { return tile.depth / 4; }
OutputDepth weight_of(const TileShape& tile, int lane, int i) {
  if (unit_of(tile) == Unit::kFma) return fma_weight(slices_of(tile), lane, i);
  const FragmentPlace place = unit_of(tile) == Unit::kHalf ? fragment_a(lane, i) : tf32_fragment_a(lane, i);
  return {place.row, place.column};
}
OutputRow sum_of(const TileShape& tile, int lane, int i) {
  if (unit_of(tile) == Unit::kFma) return fma_sum(slices_of(tile), lane, i);
  return {fragment_c(lane, i).row, fragment_c(lane, i).column};
}

const TileShape kTiles[] = {fma_tile(kForwardSlices), fma_tile(kBackwardSlices), kMmaTile, kTf32Tile};

void check_tile(const TileShape& tile) {
  std::set<std::pair<int, int>> weights, sums;
  const int elements = tile.quads * 16 / tile.element, finished = tile.outputs * tile.rows / kLanes;
  CHECK(elements * kLanes == tile.outputs * tile.depth);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < elements; ++i) {
      const OutputDepth place = weight_of(tile, lane, i);
      CHECK(place.output >= 0 && place.output < tile.outputs && place.depth >= 0 && place.depth < tile.depth);
      CHECK(weights.insert({place.output, place.depth}).second);
    }
    for (int i = 0; i < finished; ++i) {
      const OutputRow place = sum_of(tile, lane, i);
      CHECK(place.output >= 0 && place.output < tile.outputs && place.row >= 0 && place.row < tile.rows);
      CHECK(sums.insert({place.output, place.row}).second);
    }
  }
}

// The fragments as the PTX manual words them (mma.m16n8k16 of 16-bit numbers, mma.m16n8k8 of TF32): an emulator cannot tell.
void check_manual() {
  const auto same = [](FragmentPlace found, int row, int column) { return found.row == row && found.column == column; };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const bool upper = i < 2 || (i >= 4 && i < 6);
      CHECK(same(fragment_a(lane, i), upper ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)));
    }
    for (int i = 0; i < 4; ++i) {
      CHECK(same(fragment_b(lane, i), in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group));
      CHECK(same(fragment_c(lane, i), i < 2 ? group : group + 8, in_group * 2 + (i & 1)));
      CHECK(same(tf32_fragment_a(lane, i), i == 0 || i == 2 ? group : group + 8, i < 2 ? in_group : in_group + 4));
    }
    CHECK(same(tf32_fragment_b(lane, 0), in_group, group) && same(tf32_fragment_b(lane, 1), in_group + 4, group));
  }
}

// The fragments of B: every (depth, row) once; and the rows of a fragment lie in different banks.
void check_fragments() {
  std::set<std::pair<int, int>> places;
  for (int i = 0; i < 4; i += 2) {
    std::set<int> banks;
    for (int lane = 0; lane < kLanes; ++lane) {
      const FragmentPlace low = fragment_b(lane, i), high = fragment_b(lane, i + 1);
      CHECK(high.row == low.row + 1 && high.column == low.column && low.row % 2 == 0);  // one 32-bit word
      places.insert({low.row, low.column}), places.insert({high.row, high.column});
      const int row = 5 * kMmaTile.depth * 2 + kMmaTile.skew;  // an even number of tiles deep
      banks.insert((low.column * row + low.row) / 2 % 32);
    }
    CHECK(banks.size() == size_t{kLanes});
  }
  CHECK(places.size() == size_t{16 * 8});
}
void check_tf32_fragments() {
  std::set<std::pair<int, int>> places;
  for (int tiles = 1; tiles < 8; ++tiles)
    for (int i = 0; i < 2; ++i) {
      std::set<int> banks;
      for (int lane = 0; lane < kLanes; ++lane) {
        const FragmentPlace place = tf32_fragment_b(lane, i);
        places.insert({place.row, place.column});
        banks.insert((place.column * (tiles * kTf32Tile.depth + kTf32Tile.skew) + place.row) % 32);
      }
      CHECK(banks.size() == size_t{kLanes});
    }
  CHECK(places.size() == size_t{8 * 8});
}

// Every tile of the block by one warp, each output's tiles one after another, and no warp has more than the plan says.
void check_walks(const GridPlan& plan) {
  std::set<std::pair<int, int>> tiles;
  std::vector<int> finished(plan.output_tiles, 0);
  for (int warp = 0; warp < plan.threads / kLanes; ++warp) {
    TileWalk walk(plan, warp);
    for (int n = 0; n < plan.tiles && walk.output_tile < plan.output_tiles; ++n) {
      CHECK(walk.depth_tile < plan.depth_tiles);
      CHECK(tiles.insert({walk.output_tile, walk.depth_tile}).second);
      const int output = walk.output_tile;
      if (walk.next()) ++finished[output];
    }
    CHECK(walk.output_tile >= plan.output_tiles);
  }
  CHECK(static_cast<int>(tiles.size()) == plan.output_tiles * plan.depth_tiles);
  for (const int count : finished) CHECK(count == plan.depth_warps);
}

// Of a block, in order, and none within another.
void check_shared_memory(const GridPlan& plan) {
  CHECK(plan.state_offset() % 16 == 0 && plan.sum_offset() % 16 == 0 && plan.range_offset() % 16 == 0);
  CHECK(plan.state_row() * plan.tile.element % 16 == 0);
  const int last = std::max(plan.tiles - plan.tile.held, 0) - 1;
  CHECK(last < 0 || plan.weight_index(last, plan.tile.quads - 1, plan.threads - 1) + 1 == plan.weight_quads());
  CHECK(plan.sum_offset() == plan.state_offset() + plan.kept_states * plan.state_bytes());
  CHECK(plan.sequence_offset() == plan.range_offset() + 16 * plan.groups);
  CHECK(plan.length_offset() == plan.sequence_offset() + 4 * plan.groups * plan.tile.rows);
  CHECK(plan.partial_offset() == plan.length_offset() + 4 * plan.groups * plan.tile.rows);
  CHECK(plan.partial_offset(1) - plan.partial_offset() == 4 * plan.parts * plan.pairs());
  CHECK(plan.barrier_offset() % 8 == 0);
  CHECK(plan.barrier_offset() + (plan.cluster ? 8 * plan.groups : 0) <= plan.shared_bytes());
}

// The buffers of the exchange within a cluster: one for each group and parity, none twice.
void check_kept(const GridPlan& plan, bool forward) {
  CHECK((forward ? plan.kept_states : plan.kept_partials) == 2 * plan.groups);
  std::set<int> numbers;
  for (int group = 0; group < plan.groups; ++group)
    for (int buffer = 0; buffer < kExchangeBuffers; ++buffer) {
      const int number = plan.kept_number(group, buffer);
      CHECK(number >= 0 && number < 2 * plan.groups && numbers.insert(number).second);
    }
  std::set<int> places;
  for (int source = 0; source < plan.parts; ++source)
    for (int row = 0; row < plan.tile.rows; ++row)
      for (int unit = 0; unit < plan.units; ++unit) {
        const int place = plan.own_partial_place(3 * plan.units + unit, source, row);
        CHECK(place == source * plan.pairs() + row * plan.units + unit && places.insert(place).second);
      }
  CHECK(static_cast<int>(places.size()) == plan.parts * plan.pairs());
}

// Places of the exchange in global memory: none twice, all inside.
void check_partials(const GridPlan& plan, int64_t H) {
  std::vector<char> taken(plan.partial_index(0, 0, 1), 0);
  for (int source = 0; source < plan.parts; ++source)
    for (int row = 0; row < plan.tile.rows; ++row)
      for (int unit = 0; unit < H; ++unit) {
        const int place = plan.partial_place(unit, source, row), owner = unit / plan.units;
        CHECK(place >= 0 && place < static_cast<int>(taken.size()) && !taken[place]);
        taken[place] = 1;
        const int first = plan.partial_place(owner * plan.units, 0, 0);  // the owner's are one array [source][pairs]
        CHECK(place == first + source * plan.pairs() + row * plan.units + unit % plan.units);
      }
}

// The quotient without a division, for every number of units that a part may have and every unit of so many parts.
void check_owners() {
  GridPlan plan;
  for (plan.units = grid_plan::kUnitStep; plan.units * kFmaRows <= kGridThreads; plan.units += grid_plan::kUnitStep) {
    plan.unit_factor = grid_plan::unit_factor(plan.units);
    set_case("units " + std::to_string(plan.units));
    bool right = true;
    for (int unit = 0; unit < (kMostParts - 1) * plan.units; ++unit)
      right = right && plan.owner(unit) == unit / plan.units && plan.unit_of_owner(unit) == unit % plan.units;
    CHECK(right);
  }
}

// Every sequence in one group of one slice; a first group has longer ones than a second, of whichever slice, once sorted.
void check_sequences(const GridPlan& plan, int64_t batch) {
  std::set<int64_t> places;
  for (int slice = 0; slice < plan.slices; ++slice)
    for (int group = 0; group < plan.groups; ++group) {
      const GridPlace place(plan, slice * plan.parts);
      const int64_t first = place.first_sequence(plan, group);
      CHECK(place.slice == slice && place.direction == 0);
      CHECK(first / (int64_t{plan.slices} * plan.tile.rows) == group);
      for (int row = 0; row < plan.tile.rows; ++row) CHECK(places.insert(first + row).second);
    }
  for (int64_t b = 0; b < batch; ++b) CHECK(places.count(b) == 1);
}

struct Shape {
  DeviceLimits device;
  TileShape tile;
  GridPass pass;
  int gates;
  int64_t H, batch;
  int directions;
};

void check_plan(const GridPlan& plan, const Shape& s) {
  const bool forward = s.pass == GridPass::kForward;
  CHECK(plan.cluster || plan.blocks() <= s.device.multiprocessors);
  CHECK(!plan.cluster || (plan.parts <= s.device.cluster && (plan.parts & (plan.parts - 1)) == 0));
  CHECK(plan.threads <= kGridThreads && plan.threads % kLanes == 0 && plan.threads >= plan.pairs());
  CHECK(plan.threads == plan.output_warps * plan.depth_warps * kLanes);
  CHECK(plan.shared_bytes() <= s.device.shared_bytes);
  CHECK(int64_t{plan.parts} * plan.units >= s.H);
  CHECK(plan.cluster || int64_t{plan.parts - 1} * plan.units < s.H);  // the last parts of a cluster may have no units
  CHECK(int64_t{plan.slices} * plan.groups * plan.tile.rows >= s.batch);
  CHECK(int64_t{plan.outputs()} >= (forward ? int64_t{s.gates} * plan.units : s.H));
  CHECK(int64_t{plan.depth_tiles} * plan.tile.depth >= (forward ? s.H : int64_t{s.gates} * plan.units));
  CHECK(forward || plan.depth_warps == 1);  // whose sums go to global memory at once
  CHECK(plan.exchange_row >= s.H && plan.exchange_row * plan.tile.element % 16 == 0);
  CHECK(!forward || plan.exchange_row <= plan.state_row());
  check_walks(plan);
  check_shared_memory(plan);
  if (s.H % 7 == 0) check_sequences(plan, s.batch);
  if (plan.cluster)
    check_kept(plan, forward);
  else if (!forward && s.H % 97 == 0 && s.batch == 1)
    check_partials(plan, s.H);
}

// The most hidden units of which this device has plans for both passes, B 64.
int64_t check_device(const DeviceLimits& device, Unit unit, int gates) {
  int64_t most = 0;
  for (int64_t H = 1; H <= 4300; H += H < 70 ? 1 : 61)
    for (const int64_t batch : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{64}, int64_t{1000}})
      for (const int directions : {1, 2}) {
        int possible = 0;
        for (const GridPass pass : {GridPass::kForward, GridPass::kBackward}) {
          const bool forward = pass == GridPass::kForward;
          const TileShape fma = fma_tile(forward ? kForwardSlices : kBackwardSlices);
          const TileShape tile = unit == Unit::kFma ? fma : unit == Unit::kHalf ? kMmaTile : kTf32Tile;
          set_case("gates " + std::to_string(gates) + ", H " + std::to_string(H) + ", B " + std::to_string(batch) +
                   ", directions " + std::to_string(directions) + (forward ? ", forward" : ", backward"));
          const Shape shape{device, tile, pass, gates, H, batch, directions};
          const GridPlan plan = plan_grid(device, tile, pass, gates, H, batch, directions);
          if (plan.possible) check_plan(plan, shape);
          possible += plan.possible;
        }
        if (possible == 2 && batch == 64 && directions == 1) most = std::max(most, H);
      }
  printf("%3d multiprocessors, %s, %d gates: H up to %d\n", static_cast<int>(device.multiprocessors), name_of(unit),
         gates, static_cast<int>(most));
  return most;
}

// The most hidden units of which clusters of at most so many blocks have plans for both passes, B 64.
int64_t check_clusters(DeviceLimits device, Unit unit, int gates, int largest) {
  device.cluster = std::min(device.cluster, largest);
  int64_t most = 0;
  for (int64_t H = 1; H <= 1100; H += H < 64 ? 1 : 8)
    for (const int64_t batch : {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{5000}})
      for (const int directions : {1, 2}) {
        int possible = 0;
        for (const GridPass pass : {GridPass::kForward, GridPass::kBackward}) {
          const TileShape fma = fma_tile(pass == GridPass::kForward ? kForwardSlices : kBackwardSlices);
          const TileShape tile = unit == Unit::kFma ? fma : unit == Unit::kHalf ? kMmaTile : kTf32Tile;
          set_case("clusters, gates " + std::to_string(gates) + ", H " + std::to_string(H) + ", B " +
                   std::to_string(batch) + ", directions " + std::to_string(directions));
          const auto room = [&](int parts) { return device.multiprocessors / parts; };
          const GridPlan plan = plan_cluster(device, tile, pass, gates, H, batch, directions, room);
          CHECK(!plan.possible || plan.cluster);
          if (plan.possible) check_plan(plan, {device, tile, pass, gates, H, batch, directions});
          const auto nowhere = [](int) { return int64_t{0}; };
          CHECK(!plan_cluster(device, tile, pass, gates, H, batch, directions, nowhere).possible);
          possible += plan.possible;
        }
        if (possible == 2 && batch == 64 && directions == 1) most = std::max(most, H);
      }
  printf("clusters of %2d, %s, %d gates: H up to %d\n", largest, name_of(unit), gates, static_cast<int>(most));
  return most;
}

void run() {
  for (const TileShape& tile : kTiles) check_tile(tile);
  check_manual();
  check_fragments();
  check_tf32_fragments();
  check_owners();
  CHECK(check_device(kH200, Unit::kFma, 4) >= 1024);  // LSTM
  CHECK(check_device(kH200, Unit::kFma, 3) >= 1024);  // GRU
  CHECK(check_device(kH200, Unit::kFma, 1) >= 2048);  // RNN
  CHECK(check_device(kH200, Unit::kHalf, 4) >= 2048);
  CHECK(check_device(kH200, Unit::kHalf, 3) >= 2048);
  CHECK(check_device(kH200, Unit::kHalf, 1) >= 2048);
  CHECK(check_device(kH200, Unit::kTf32, 4) >= 1024);
  CHECK(check_device(kH200, Unit::kTf32, 1) >= 2048);
  CHECK(check_device(kA100, Unit::kFma, 4) >= 960);
  CHECK(check_device(kA100, Unit::kHalf, 4) >= 1024);
  CHECK(check_clusters(kH200, Unit::kFma, 4, 16) >= 512);
  CHECK(check_clusters(kH200, Unit::kFma, 1, 16) >= 512);
  CHECK(check_clusters(kH200, Unit::kHalf, 4, 16) >= 512);
  CHECK(check_clusters(kH200, Unit::kTf32, 3, 16) >= 512);
  CHECK(check_clusters(kH200, Unit::kFma, 4, 8) >= 384);
  CHECK(check_clusters(kH200, Unit::kHalf, 4, 8) >= 256);
  CHECK(check_clusters(kA100, Unit::kHalf, 4, 16) == 0);  // it has none
  const DeviceLimits seventh{16, 227 << 10, 0};           // of a GPU that is shared
  CHECK(check_device(seventh, Unit::kHalf, 4) >= 256);
  CHECK(!plan_grid(seventh, kMmaTile, GridPass::kForward, 4, 2048, 1, 1).possible);
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::run();
  return rnnfast::test::finish();
}
