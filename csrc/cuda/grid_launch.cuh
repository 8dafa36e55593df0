// The host's part of the grid-persistent kernels: which tile serves an element type, whether the device holds all blocks of a
// plan at once, memory and launches.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "core/api.h"
#include "core/buffer.h"
#include "cuda/grid.cuh"

RNNFAST_BEGIN

// run(tile) with the tile that serves an element type.
template <class T, GridPass kPass, class Run>
auto with_tile([[maybe_unused]] bool tf32, Run&& run) {
  if constexpr (!std::is_same_v<T, float>) {
    return run(MmaTile<T>{});
  } else {
    if (tf32) return run(Tf32Tile{});
    return run(FmaTile<kPass == GridPass::kForward ? kForwardSlices : kBackwardSlices>{});
  }
}

// Which ways of exchange a plan may have.
struct GridChoice {
  bool global, cluster;
};

// One pass of a cell. V: what its blocks exchange.
template <class T, class Cell, GridPass kPass>
struct GridLoop {
  static constexpr bool kForward = kPass == GridPass::kForward;
  using V = std::conditional_t<kForward, T, float>;

  template <class Tile, class Exchange>
  static constexpr auto kernel() {
    if constexpr (kForward)
      return grid_forward_kernel<T, Cell, Tile, Exchange>;
    else
      return grid_backward_kernel<T, Cell, Tile, Exchange>;
  }

  // The cheaper one.
  static GridPlan plan(const Config& config, const ForwardArgs& args, const GridChoice& choice) {
    if (std::max(args.steps, args.batch) > INT32_MAX) return {};  // the kernels count them in 32 bits
    return with_tile<T, kPass>(config.tf32, [&]<class Tile>(const Tile&) {
      const GridPlan cluster = choice.cluster ? plan_of_clusters<Tile>(config, args) : GridPlan{};
      const GridPlan global = choice.global ? plan_of_grid<Tile>(config, args) : GridPlan{};
      if (!global.possible) return cluster;
      return cluster.possible && cluster.cost <= global.cost * (config.num_directions / global.directions) ? cluster
                                                                                                           : global;
    });
  }

  static GlobalExchange<V> take(const GridPlan& plan, Carver& memory) {
    if (!plan.possible || plan.cluster) return {};
    uint8_t* const all = memory.take<uint8_t>(flag_bytes(plan) + value_bytes(plan));
    return {reinterpret_cast<V*>(all ? all + flag_bytes(plan) : nullptr), reinterpret_cast<uint32_t*>(all)};
  }

  // `range`: begin and end of the steps, forward.
  template <class... Range>
  static void launch(const GridPlan& plan, const Items<T>& items, const Cell& cell, const GlobalExchange<V>& exchange,
                     cuda_runtime::Stream stream, const Range&... range) {
    const dim3 threads(static_cast<unsigned>(plan.threads));
    with_tile<T, kPass>(items.item[0].tf32, [&]<class Tile>(const Tile&) {
      if (plan.cluster)
        return cuda_runtime::launch_clusters(kernel<Tile, ClusterExchange<V>>(), plan.blocks(), plan.parts, threads,
                                             plan.shared_bytes(), stream, items, cell, plan, ClusterExchange<V>{},
                                             range...);
      for (int64_t first = 0; first < items.count; first += plan.directions) {
        const Items<T> some{{items.item[first], items.item[first + plan.directions - 1]}, plan.directions};
        cuda_runtime::clear(exchange.flags, flag_bytes(plan) + (kForward ? value_bytes(plan) : 0), stream);
        cuda_runtime::launch_together(kernel<Tile, GlobalExchange<V>>(), plan.blocks(), threads, plan.shared_bytes(),
                                      stream, some, cell, plan, exchange, range...);
      }
    });
  }

 private:
  // Both directions at once where there is room, else one after the other. A plan is possible only where the device says
  // that all its blocks are there at once: with a part of a GPU it may not be.
  template <class Tile>
  static GridPlan plan_of_grid(const Config& config, const ForwardArgs& args) {
    const DeviceLimits device = cuda_runtime::device_limits();
    for (int directions = static_cast<int>(config.num_directions); directions > 0; --directions) {
      const GridPlan plan =
          plan_grid(device, Tile::kShape, kPass, Cell::kGates, config.hidden_size, args.batch, directions);
      if (plan.possible && cuda_runtime::resident_blocks(kernel<Tile, GlobalExchange<V>>(), plan.threads,
                                                         plan.shared_bytes()) >= plan.blocks())
        return plan;
    }
    return {};
  }

  // Clusters do not wait for each other: one that finds no room comes later.
  template <class Tile>
  static GridPlan plan_of_clusters(const Config& config, const ForwardArgs& args) {
    const DeviceLimits device = cuda_runtime::device_limits();
    return plan_cluster(device, Tile::kShape, kPass, Cell::kGates, config.hidden_size, args.batch,
                        static_cast<int>(config.num_directions), [&](int parts) {
                          return cuda_runtime::resident_clusters(kernel<Tile, ClusterExchange<V>>(), parts,
                                                                 kGridThreads, device.shared_bytes);
                        });
  }

  static int64_t flag_bytes(const GridPlan& plan) { return (plan.flag_count() * 4 + 63) / 64 * 64; }
  static int64_t value_bytes(const GridPlan& plan) {
    return int64_t{sizeof(V)} * (kForward ? plan.state_count() : plan.partial_count());
  }
};

inline std::string in_words(const GridPlan& plan) {
  const auto count = [](int n, const std::string& what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  return (plan.cluster ? "clusters of " : "") + count(plan.parts, "block") + " of " + std::to_string(plan.threads) +
         " threads with " + std::to_string(plan.units) + " units each, " + count(plan.slices, "batch slice") + " of " +
         count(plan.groups, "group") + " of " + count(plan.tile.rows, "sequence") +
         (plan.directions > 1 ? ", both directions at once" : "");
}

RNNFAST_END
