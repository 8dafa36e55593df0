// The emulator's own part (csrc/cuda/emulate.h): blocks that exchange values in a cooperative launch, blocks that wait for each
// other for ever, and the products of tiles, a warp's work, beside plain loops.
#include <cmath>

#include "cuda/tiles.cuh"
#include "harness.h"

namespace rnnfast::test {
namespace {

using namespace rnnfast::cuda;
using cuda_runtime::launch_clusters;
using cuda_runtime::launch_together;

// Each block adds the numbers of all, round after round, by the protocol of cuda/grid_plan.h.
void sum_kernel(int64_t* values, uint32_t* flags, int blocks, int rounds) {
  const int64_t own = blockIdx.x;
  for (uint32_t epoch = 0; epoch <= static_cast<uint32_t>(rounds); ++epoch) {
    int64_t sum = own;
    if (epoch > 0) {
      cuda_runtime::await(flags, blocks, epoch);
      sum = 0;
      for (int i = 0; i < blocks; ++i) sum += values[epoch % 2 * blocks + i];
    }
    if (threadIdx.x == 0) values[(epoch + 1) % 2 * blocks + own] = sum;
    cuda_runtime::publish(flags + own, epoch + 1);
  }
}

void check_exchange() {
  constexpr int kBlocks = 5, kRounds = 4;
  for (const bool backwards : {false, true}) {
    emulator::emulation().backwards = backwards;
    std::vector<int64_t> values(size_t{2} * kBlocks, -1);
    std::vector<uint32_t> flags(kBlocks, 0);
    launch_together(sum_kernel, kBlocks, dim3(40), 0, nullptr, values.data(), flags.data(), kBlocks, kRounds);
    for (int i = 0; i < kBlocks; ++i) CHECK(values[(kRounds + 1) % 2 * kBlocks + i] == 10 * 5 * 5 * 5);
  }
  emulator::emulation().backwards = false;
}

void wait_kernel(const uint32_t* flags) { cuda_runtime::await(flags, 1, 1); }

void check_deadlock() {
  const uint32_t never = 0;
  CHECK_THROWS(std::logic_error, launch_together(wait_kernel, 3, dim3(32), 0, nullptr, &never));
  check_exchange();  // and the next launch is as if nothing had been
}

// The same within clusters, through the shared memory of each block; sums[cluster][block].
void cluster_kernel(int64_t* sums, int blocks, int rounds, bool all_arrive) {
  auto* const values = cuda_runtime::shared_memory<int64_t>();  // [buffer][source]
  auto* const barrier = reinterpret_cast<cuda_runtime::ClusterBarrier*>(values + size_t{2} * blocks);
  const int own = static_cast<int>(blockIdx.x) % blocks, thread = static_cast<int>(threadIdx.x);
  if (thread == 0) cuda_runtime::init_barrier(barrier, blocks);
  cuda_runtime::sync_cluster();
  int64_t sum = blockIdx.x;
  for (int epoch = 1; epoch <= rounds; ++epoch) {
    if (thread < blocks) *cuda_runtime::in_peer(values + epoch % 2 * blocks + own, thread) = sum;
    __syncthreads();
    if (thread < blocks && (all_arrive || own > 0)) cuda_runtime::arrive_in_peer(barrier, thread);
    cuda_runtime::await_phase(barrier, (epoch - 1) % 2);
    sum = 0;
    for (int i = 0; i < blocks; ++i) sum += values[epoch % 2 * blocks + i];
  }
  cuda_runtime::sync_cluster();
  if (thread == 0) sums[blockIdx.x] = sum;
}

void check_clusters() {
  constexpr int kBlocks = 4, kClusters = 3, kRounds = 5, kBytes = 8 * (2 * kBlocks + 1);
  set_case("clusters");
  for (const bool backwards : {false, true}) {
    emulator::emulation().backwards = backwards;
    std::vector<int64_t> sums(size_t{kClusters} * kBlocks, -1);
    const auto launch = [&](bool all_arrive) {
      launch_clusters(cluster_kernel, kClusters * kBlocks, kBlocks, dim3(40), kBytes, nullptr, sums.data(), kBlocks,
                      kRounds, all_arrive);
    };
    launch(true);
    for (int cluster = 0; cluster < kClusters; ++cluster)
      for (int i = 0; i < kBlocks; ++i) CHECK(sums[cluster * kBlocks + i] == (4 * (4 * cluster) + 6) * 4 * 4 * 4 * 4);
    CHECK_THROWS(std::logic_error, launch(false));
  }
  emulator::emulation().backwards = false;
}

// One warp, the same tile once for each chain of sums: sums[output][row] of small whole numbers, which every element type holds
// exactly.
template <class Tile>
struct TileTest {
  using Element = typename Tile::Element;
  static constexpr TileShape kShape = Tile::kShape;
  float weights[kShape.outputs][kShape.depth], sums[kShape.outputs][kShape.rows];
  Element states[kShape.rows][kShape.depth + kShape.skew];
};

template <class Tile>
void tile_kernel(TileTest<Tile>* test) {
  using Element = typename Tile::Element;
  const int lane = threadIdx.x;
  typename Tile::Weights weights;
  for (int i = 0; i < Tile::kShape.quads * 16 / Tile::kShape.element; ++i) {
    const OutputDepth place = Tile::weight(lane, i);
    const Element element = Tile::element(test->weights[place.output][place.depth]);
    memcpy(reinterpret_cast<char*>(&weights) + sizeof(Element) * i, &element, sizeof(Element));
  }
  typename Tile::Sums sums;
  Tile::clear(sums);
  const auto states = Tile::fetch(test->states[0], Tile::kShape.depth + Tile::kShape.skew, lane);
  Tile::template add<0>(sums, weights, states);
  Tile::template add<1>(sums, weights, states);
  Tile::finish(sums, lane, [&](int o, int r, float sum) { test->sums[o][r] = sum; });
}

template <class Tile>
void check_tile(const char* name) {
  set_case(name);
  using Element = typename Tile::Element;
  auto test = std::make_unique<TileTest<Tile>>();
  Random random(1);
  for (auto& row : test->weights)
    for (float& weight : row) weight = static_cast<float>(random.below(17) - 8);
  for (auto& row : test->states)
    for (Element& state : row) state = Tile::element(static_cast<float>(random.below(9) - 4));
  launch_together(tile_kernel<Tile>, 1, dim3(32), 0, nullptr, test.get());
  for (int o = 0; o < Tile::kShape.outputs; ++o)
    for (int r = 0; r < Tile::kShape.rows; ++r) {
      float expected = 0;
      for (int k = 0; k < Tile::kShape.depth; ++k) expected += test->weights[o][k] * read(test->states[r][k]);
      CHECK(test->sums[o][r] == 2 * expected);
    }
}

// To the nearest of 11 bits, ties away from zero, over the bits around each power of two.
void check_rounding() {
  set_case("rounding to TF32");
  for (const float sign : {1.0f, -1.0f})
    for (int exponent = -120; exponent <= 120; exponent += 15)
      for (int low = -40; low <= 40; ++low) {
        const double unit = std::ldexp(1.0, exponent - 10), value = std::ldexp(1.0, exponent) * 1.5 + low * unit / 16;
        const double nearest = std::floor(value / unit + 0.5) * unit;
        CHECK(rounded_to_tf32(sign * static_cast<float>(value)) == sign * static_cast<float>(nearest));
      }
  CHECK(rounded_to_tf32(0x1.fffp127f) == INFINITY && rounded_to_tf32(-INFINITY) == -INFINITY);
  CHECK(std::isnan(rounded_to_tf32(NAN)) && std::isnan(rounded_to_tf32(__builtin_bit_cast(float, 0x7f800001u))));
}

void run() {
  check_exchange();
  check_deadlock();
  check_clusters();
  check_tile<FmaTile<kForwardSlices>>("FMA cores, forward");
  check_tile<FmaTile<kBackwardSlices>>("FMA cores, backward");
  check_tile<MmaTile<Half>>("tensor cores, float16");
  check_tile<MmaTile<Bfloat16>>("tensor cores, bfloat16");
  check_tile<Tf32Tile>("tensor cores, TF32");
  check_rounding();
}

}  // namespace
}  // namespace rnnfast::test

int main() {  // NOLINT(bugprone-exception-escape): what the emulator throws ends the test
  rnnfast::test::run();
  return rnnfast::test::finish();
}
