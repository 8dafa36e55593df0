#include "core/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "core/registry.h"
#include "core/split.h"

namespace rnnfast {
namespace {

constexpr int64_t kChunkBytes = 384 << 10;  // pre-activations that stay in the second-level cache
constexpr int64_t kChunkRows = 2048, kGradientRows = 128, kLeastGradientRows = 16;
// A thread's patience with the others: longer than any wait of threads that all have a core; and a part of a long call, which
// would lose more by going on alone than it can lose until another program's threads stop spinning.
constexpr double kPatience = 2000, kPatiencePart = 0.05;  // microseconds; of the predicted time
constexpr int64_t kSegmentBytes = 2 << 20;                // gates that are rebuilt at once in lean mode

// For experiments and tests: one of kSplits instead of the model's choice; "alone": hidden, and a thread leaves the others
// behind as soon as it can; empty: the model's choice.
constexpr const char* kSplits[] = {"", "one", "batch", "hidden", "layers", "alone"};
std::string& forced_split() {
  static std::string split;
  return split;
}

// A split that is not possible for this call leaves it to one thread.
Split forced(const std::vector<Split>& splits) {
  const std::string& name = forced_split();
  const Split::Kind kind = name == "batch"    ? Split::kBatch
                           : name == "layers" ? Split::kLayers
                           : name == "one"    ? Split::kOne
                                              : Split::kHidden;
  for (const Split& split : splits)
    if (split.kind == kind) return split;
  return splits[0];
}

// Lean mode cannot run layers at once; what takes its place must not slice the batch either, or lean mode's bits would not be
// those of the full mode.
Split without_layers(std::vector<Split>& splits) {
  std::erase_if(splits, [](const Split& split) { return split.slices > 1 || split.kind == Split::kLayers; });
  return best_split(splits);
}

void choose_split(Plan& plan, const Config& config, const ForwardArgs& args, bool training, int lanes,
                  int64_t max_threads) {
  plan.splits = possible_splits(config, args, training, lanes, max_threads);
  plan.forced = forced_split();
  Split choice = plan.forced.empty() ? best_split(plan.splits) : forced(plan.splits);
  if (training && args.lean && choice.kind == Split::kLayers) choice = without_layers(plan.splits);
  plan.choice = choice;
  plan.threads = choice.threads, plan.slices = choice.slices;
  plan.wavefront = choice.kind == Split::kLayers;
  const double patience = std::max(kPatience, kPatiencePart * choice.microseconds);
  plan.patience = plan.forced == "alone" ? -1 : std::llround(1000 * patience);
}

// Sequences are dealt to the slices by falling length, so that every slice gets long and short ones.
void fill_slice(SlicePlan& slice, const std::vector<int32_t>& sorted, const std::vector<int32_t>& lengths,
                int64_t index, int64_t slices, int64_t steps) {
  for (size_t i = index; i < sorted.size(); i += slices) {
    slice.order.push_back(sorted[i]);
    slice.lengths.push_back(lengths[sorted[i]]);
  }
  slice.active.resize(steps);
  slice.offset.resize(steps + 1);
  int64_t running = slice.lengths.size();
  slice.offset[0] = 0;
  for (int64_t t = 0; t < steps; ++t) {
    while (running > 0 && slice.lengths[running - 1] <= t) --running;
    slice.active[t] = static_cast<int32_t>(running);
    slice.offset[t + 1] = slice.offset[t] + running;
  }
  slice.schedule = {steps,
                    static_cast<int64_t>(slice.order.size()),
                    0,
                    slice.offset[steps],
                    slice.order.data(),
                    slice.active.data(),
                    slice.offset.data(),
                    slice.lengths.data()};
}

void make_slices(Plan& plan, const ForwardArgs& args) {
  plan.slice.resize(plan.slices);
  const bool ragged =
      args.lengths && std::any_of(args.lengths, args.lengths + args.batch, [&](int64_t n) { return n != args.steps; });
  if (!ragged) {
    for (int64_t s = 0; s < plan.slices; ++s) {
      const int64_t begin = args.batch * s / plan.slices, end = args.batch * (s + 1) / plan.slices;
      plan.slice[s].schedule = {args.steps, end - begin, begin,   args.steps * (end - begin),
                                nullptr,    nullptr,     nullptr, nullptr};
    }
    return;
  }
  plan.lengths.assign(args.lengths, args.lengths + args.batch);
  std::vector<int32_t> sorted(args.batch);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int32_t a, int32_t b) { return plan.lengths[a] > plan.lengths[b]; });
  for (int64_t s = 0; s < plan.slices; ++s) fill_slice(plan.slice[s], sorted, plan.lengths, s, plan.slices, args.steps);
}

int64_t max_sequences(const Plan& plan) {
  int64_t most = 0;
  for (const SlicePlan& slice : plan.slice) most = std::max(most, slice.schedule.sequences);
  return most;
}

int64_t round_down(int64_t n, int64_t unit) { return std::max(unit, n / unit * unit); }

int64_t gradient_rows(const Config& config, const ForwardArgs& args) {
  if (!can_run_layers_at_once(config, args)) return kGradientRows;
  return std::clamp(args.steps * args.batch / kLayerPieces, kLeastGradientRows, kGradientRows);
}

// The lengths of what is worked on at once, for the caches; in lean mode also for the memory.
void choose_chunks(Plan& plan, const Config& config, const ForwardArgs& args, bool training) {
  const int64_t size = config.dtype == Dtype::kFloat32 ? 4 : 8;
  const int64_t sequences = std::max<int64_t>(1, max_sequences(plan)), steps = std::max<int64_t>(1, args.steps);
  const int64_t slots = config.hidden_size * kCells[config.cell].slots * size * sequences;  // bytes of a step's
  plan.row_chunk = kGradientRows;
  plan.gradient_steps = std::clamp<int64_t>(gradient_rows(config, args) / sequences, 1, steps);
  const int64_t most = std::min(steps, std::max<int64_t>(1, kChunkRows / sequences));
  // Not longer where threads share the units: a chunk's last rows may be few, and few rows are summed in another order.
  plan.chunk = round_down(std::min(kChunkBytes / slots, most), plan.gradient_steps);
  if (can_run_layers_at_once(config, args)) plan.chunk = plan.gradient_steps;  // do they or not, for the same reason
  plan.segment = 0;
  if (!training || !args.lean) return;
  const int64_t wanted = args.checkpoint_every ? args.checkpoint_every : kSegmentBytes / slots;
  plan.segment = round_down(std::min(wanted + plan.chunk - 1, steps + plan.chunk - 1), plan.chunk);
}

}  // namespace

std::string Plan::reason() const {
  std::ostringstream words;
  if (!forced.empty()) words << "RNNFAST_SPLIT=" << forced << ": ";
  words << choice.words() << " (predicted " << std::llround(choice.microseconds) << " us";
  for (const Split& split : splits)
    if (split.kind != choice.kind || split.threads != choice.threads)
      words << "; " << split.words() << ": " << std::llround(split.microseconds);
  words << ")";
  return words.str();
}

void set_split(const std::string& split) {
  if (std::find(std::begin(kSplits), std::end(kSplits), split) == std::end(kSplits))
    throw std::invalid_argument(
        "split (RNNFAST_SPLIT): expected '', 'one', 'batch', 'hidden', 'layers' or 'alone', got '" + split + "'");
  forced_split() = split;
}

void choose_split() {
  const char* text = std::getenv("RNNFAST_SPLIT");
  set_split(text ? text : "");
}

std::shared_ptr<const Plan> make_plan(const Config& config, const ForwardArgs& args, bool training, int lanes,
                                      int max_threads) {
  auto plan = std::make_shared<Plan>();
  choose_split(*plan, config, args, training, lanes, max_threads);
  make_slices(*plan, args);
  choose_chunks(*plan, config, args, training);
  return plan;
}

}  // namespace rnnfast
