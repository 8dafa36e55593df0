// How a call is shared between threads: the ways that there are, what each would cost, and the choice.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/api.h"

namespace rnnfast {

struct Split {
  enum Kind { kOne, kBatch, kHidden, kLayers } kind;
  int64_t threads, slices;
  double microseconds;  // predicted; in training of forward and backward

  std::string words() const;
};

// Stacks of few sequences and one direction may run their layers at once, each some steps behind the one before. Whether
// they do depends on the threads; the size of the pieces does not, so that the number of threads changes no bit.
constexpr int64_t kLayerPieces = 8, kLayersMostBatch = 8;
inline bool can_run_layers_at_once(const Config& config, const ForwardArgs& args) {
  return config.num_layers > 1 && config.num_directions == 1 && args.batch > 0 && args.batch <= kLayersMostBatch;
}

// Every split that is possible for the call, by the cost model's prediction.
std::vector<Split> possible_splits(const Config& config, const ForwardArgs& args, bool training, int lanes,
                                   int64_t max_threads);

// The fastest; of nearly equal ones that with fewer threads.
Split best_split(const std::vector<Split>& splits);

}  // namespace rnnfast
