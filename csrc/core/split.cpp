#include "core/split.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "core/registry.h"

namespace rnnfast {
namespace {

// Round figures of a current core, fitted to the measurements of bench/splits.py. They need not be exact, only to rank the
// choices.
constexpr double kFlopsPerMicrosecond = 1.05e5;   // fused multiply-adds in float32, as the kernels reach it
constexpr double kHalf = 1 / 2., kMost = 7 / 8.;  // parts of a core's second-level cache that weights may take
constexpr double kNearBytes = 9e4, kFullBytes = 6e4, kFarBytes = 5e4;  // read in a microsecond: up to those, and beyond
constexpr double kCell = 0.012;  // microseconds for a vector of units and a gate: the activations
constexpr double kStep = 0.15, kBarrier = 0.4, kRegion = 5;  // of a step; of entering a parallel region
constexpr double kShared = 1.06;                             // two threads at once are slower than one at a time
constexpr double kWorthwhile = 0.95;                         // more threads must bring so much
constexpr double kSharedRows = 6;                            // as in cpu/forward.h
constexpr double kTrainingWork = 3, kTrainingWaits = 2;      // forward and backward, as multiples of forward

// Of a core's second-level cache.
double cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return double(bytes);
#endif
  return 1 << 20;
}

// One layer and direction.
class Work {
 public:
  Work(const Config& config, int64_t layer, int lanes) {
    const double size = config.dtype == Dtype::kFloat32 ? 4 : 8, gates = kCells[config.cell].gates;
    recurrent_ = gates * config.hidden_size * config.output_size() * size;
    input_ = gates * config.hidden_size * config.layer_input(layer) * size;
    cell_ = kCell * gates * std::ceil(double(config.hidden_size) / lanes);
  }

  // Microseconds of a step of `rows` sequences for one of `parts` threads that share the hidden units.
  double step(double rows, double parts) const {
    return kStep + product(rows, input_ / parts) + recurrent(rows, recurrent_ / parts) + cell_ * rows / parts;
  }

 private:
  // Weights that come from beyond the second level are waited for.
  static double recurrent(double rows, double bytes) {
    const double computing = product(rows, bytes), cache = cache_bytes();
    if (bytes > kMost * cache) return computing + bytes / kFarBytes;
    return std::max(computing, bytes / (bytes > kHalf * cache ? kFullBytes : kNearBytes));
  }
  // Two operations for each weight; double takes twice as long, as its bytes say.
  static double product(double rows, double bytes) { return 2 * rows * bytes / 4 / kFlopsPerMicrosecond; }

  double recurrent_, input_;  // bytes of weights
  double cell_;
};

class Model {
 public:
  Model(const Config& config, const ForwardArgs& args, bool training, int lanes, int64_t threads)
      : config_(config),
        lanes_(lanes),
        steps_(args.steps),
        batch_(args.batch),
        threads_(threads),
        work_(training ? kTrainingWork : 1),
        waits_(training ? kTrainingWaits : 1) {}

  double one() const {
    return work_ * steps_ *
           over_layers([&](const Work& layer) { return config_.num_directions * layer.step(batch_, 1); });
  }
  // Items of a layer are dealt to the threads.
  double batch(int64_t slices) const {
    const double rounds = std::ceil(double(slices) * config_.num_directions / threads_);
    const double rows = std::ceil(double(batch_) / slices);
    return entering() + at_once() * over_layers([&](const Work& layer) { return rounds * layer.step(rows, 1); });
  }
  double hidden(int64_t threads) const {
    // Blocks that are left over are shared by rows, where there are enough of them.
    const double blocks = std::ceil(double(config_.hidden_size) / lanes_),
                 uneven = blocks / std::ceil(blocks / threads);
    const double parts = batch_ < kSharedRows * threads ? uneven : double(threads);
    const double barriers = waits_ * steps_ * kBarrier * config_.num_layers;
    return entering() + barriers +
           at_once() * over_layers([&](const Work& layer) { return layer.step(batch_, parts); });
  }
  // As many layers at once as there are threads; the last of a round starts when the others have done a few pieces.
  double layers() const {
    const double threads = std::min<double>(threads_, config_.num_layers);
    const double rounds = std::ceil(config_.num_layers / threads) + (threads - 1) / kLayerPieces;
    return entering() + at_once() * rounds * Work(config_, config_.num_layers - 1, lanes_).step(batch_, 1);
  }

 private:
  double entering() const { return waits_ * kRegion; }
  double at_once() const { return kShared * work_ * steps_; }

  template <class Layer>
  double over_layers(Layer&& layer) const {
    double sum = 0;
    for (int64_t l = 0; l < config_.num_layers; ++l) sum += layer(Work(config_, l, lanes_));
    return sum;
  }

  const Config& config_;
  const int lanes_;
  const double steps_, batch_, threads_, work_, waits_;
};

}  // namespace

std::string Split::words() const {
  switch (kind) {
    case kOne:
      return "one thread";
    case kBatch:
      return slices == 1 ? "a thread for each direction"
                         : "the batch is split in " + std::to_string(slices) + ", no barriers";
    case kHidden:
      return "the hidden units are split between " + std::to_string(threads) + " threads, one barrier a step";
    case kLayers:
      return "a thread for each layer, one after the other in time";
  }
  return {};
}

std::vector<Split> possible_splits(const Config& config, const ForwardArgs& args, bool training, int lanes,
                                   int64_t max_threads) {
  const Model model(config, args, training, lanes, max_threads);
  const int64_t D = config.num_directions;
  std::vector<Split> splits{{Split::kOne, 1, 1, model.one()}};
  if (max_threads < 2 || args.batch == 0 || args.steps == 0) return splits;
  const int64_t slices = std::min(args.batch, std::max<int64_t>(1, max_threads / D));
  if (slices * D > 1) splits.push_back({Split::kBatch, std::min(max_threads, slices * D), slices, model.batch(slices)});
  for (int64_t parts = max_threads / D; parts > 1; parts /= 2)
    splits.push_back({Split::kHidden, parts * D, 1, model.hidden(parts)});
  const bool dropping = training && args.dropout > 0;
  if (can_run_layers_at_once(config, args) && !dropping)
    splits.push_back({Split::kLayers, std::min(max_threads, config.num_layers), 1, model.layers()});
  return splits;
}

Split best_split(const std::vector<Split>& splits) {
  Split best = splits[0];
  for (const Split& split : splits)
    if (split.microseconds < best.microseconds * (split.threads > best.threads ? kWorthwhile : 1)) best = split;
  return best;
}

}  // namespace rnnfast
