#include "core/split.h"

#include <algorithm>
#include <cmath>

#include "core/registry.h"

namespace rnnfast {
namespace {

// Round figures of a current core. They need not be exact, only to rank the choices: bench/splits.py holds them against
// measurements.
constexpr double kFlopsPerMicrosecond = 9e4;             // fused multiply-adds in float32, as the kernels reach it
constexpr double kNearBytes = 1.1e5, kFarBytes = 3.5e4;  // weights read a microsecond, from the second level or beyond
constexpr double kNear = 768 << 10;                      // bytes of weights that stay in a core's second level
constexpr double kStep = 0.1, kBarrier = 0.35, kRegion = 12;  // of a step; of entering a parallel region
constexpr double kShared = 1.15;                              // two threads at once are slower than one at a time
constexpr double kWorthwhile = 0.93;                          // more threads must bring so much

// One layer and direction.
struct Work {
  double weights, input_weights;  // bytes read in a step, and once in many steps
  double flops;                   // of one sequence's step

  Work(const Config& config, int64_t layer) {
    const double size = config.dtype == Dtype::kFloat32 ? 4 : 8, gates = kCells[config.cell].gates;
    weights = gates * config.hidden_size * config.output_size() * size;
    input_weights = gates * config.hidden_size * config.layer_input(layer) * size;
    flops = 2 * (weights + input_weights) / 4;  // double takes twice as long
  }

  // Microseconds of a step of `rows` sequences for one of `parts` threads that share the hidden units.
  double step(double rows, double parts) const {
    const double own = weights / parts;
    const double reading = own / (own > kNear ? kFarBytes : kNearBytes);
    const double input = flops * rows / parts * input_weights / (weights + input_weights) / kFlopsPerMicrosecond;
    return kStep + input + std::max(flops * rows / parts / kFlopsPerMicrosecond - input, reading);
  }
};

class Model {
 public:
  Model(const Config& config, const ForwardArgs& args, int64_t threads)
      : config_(config), steps_(args.steps), batch_(args.batch), threads_(threads) {}

  double one() const {
    return steps_ * over_layers([&](const Work& work) { return config_.num_directions * work.step(batch_, 1); });
  }
  // Items of a layer are dealt to the threads.
  double batch(int64_t slices) const {
    const double rounds = std::ceil(double(slices) * config_.num_directions / threads_);
    const double rows = std::ceil(double(batch_) / slices);
    return kRegion + kShared * steps_ * over_layers([&](const Work& work) { return rounds * work.step(rows, 1); });
  }
  double hidden(int64_t blocks, int64_t threads) const {
    const double parts = double(blocks) / std::ceil(double(blocks) / threads);
    return kRegion +
           steps_ * over_layers([&](const Work& work) { return kShared * work.step(batch_, parts) + kBarrier; });
  }
  // As many layers at once as there are threads; the last of a round starts when the others have done a few pieces.
  double layers(int64_t pieces) const {
    const Work work(config_, config_.num_layers - 1);
    const double threads = std::min<double>(threads_, config_.num_layers);
    const double rounds = std::ceil(config_.num_layers / threads);
    return kRegion + kShared * steps_ * work.step(batch_, 1) * (rounds + (threads - 1) / pieces);
  }

 private:
  template <class Layer>
  double over_layers(Layer&& layer) const {
    double sum = 0;
    for (int64_t l = 0; l < config_.num_layers; ++l) sum += layer(Work(config_, l));
    return sum;
  }

  const Config& config_;
  const double steps_, batch_, threads_;
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
  const Model model(config, args, max_threads);
  const int64_t D = config.num_directions, blocks = (config.hidden_size + lanes - 1) / lanes;
  std::vector<Split> splits{{Split::kOne, 1, 1, model.one()}};
  if (max_threads < 2 || args.batch == 0 || args.steps == 0) return splits;
  const int64_t slices = std::min(args.batch, std::max<int64_t>(1, max_threads / D));
  if (slices * D > 1) splits.push_back({Split::kBatch, std::min(max_threads, slices * D), slices, model.batch(slices)});
  for (int64_t parts = max_threads / D; parts > 1; parts /= 2)
    splits.push_back({Split::kHidden, parts * D, 1, model.hidden(blocks, parts)});
  const bool dropping = training && args.dropout > 0;
  if (can_run_layers_at_once(config, args) && !dropping && !(training && args.lean))
    splits.push_back({Split::kLayers, std::min(max_threads, config.num_layers), 1, model.layers(kLayerPieces)});
  return splits;
}

Split best_split(const std::vector<Split>& splits) {
  Split best = splits[0];
  for (const Split& split : splits)
    if (split.microseconds < best.microseconds * (split.threads > best.threads ? kWorthwhile : 1)) best = split;
  return best;
}

}  // namespace rnnfast
