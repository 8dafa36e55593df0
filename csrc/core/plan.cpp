#include "core/plan.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "core/registry.h"

namespace rnnfast {
namespace {

// The cost model: microseconds, from round figures of a current core. They need not be exact, only to rank the choices.
constexpr double kFlopsPerMicrosecond = 8e4;    // fused multiply-adds in float32, one core, as the kernels reach it
constexpr double kBytesPerMicrosecond = 5e4;    // weights streamed from the second-level cache
constexpr double kBarrier = 0.6, kRegion = 12;  // of a step; of entering a parallel region
constexpr int64_t kLeastRows = 4;               // a slice with fewer sequences reads the weights too often
constexpr double kMostShared = 512 << 10;       // weights that each of several threads may stream for itself
constexpr int64_t kChunkBytes = 384 << 10;      // pre-activations that stay in the second-level cache
constexpr int64_t kChunkRows = 2048, kGradientRows = 128;
constexpr int64_t kPatience = 2'000'000;    // nanoseconds; longer than a wait of threads that all have a core
constexpr int64_t kSegmentBytes = 2 << 20;  // gates that are rebuilt at once in lean mode

struct Work {
  double flops, bytes;  // of one step, layer and direction
};

Work step_work(const Config& config, int64_t batch) {
  const double size = config.dtype == Dtype::kFloat32 ? 4 : 8;
  const double weights = double(kCells[config.cell].gates) * config.hidden_size * config.output_size();
  return {2 * weights * batch * size / 4, weights * size};
}

double step_time(Work work, int64_t threads) {
  return std::max(work.flops / kFlopsPerMicrosecond, work.bytes / kBytesPerMicrosecond) / threads;
}

// For experiments and tests: "one", "batch" or "hidden" instead of the model's choice; "alone": hidden, and a thread leaves
// the others behind as soon as it can; empty: the model's choice.
std::string& forced_split() {
  static std::string split;
  return split;
}

bool force_split(Plan& plan, const Config& config, const ForwardArgs& args, int64_t max_threads) {
  const std::string& split = forced_split();
  if (split.empty()) return false;
  plan.threads = split == "one" ? 1 : max_threads;
  plan.slices = split == "batch" ? std::max<int64_t>(1, std::min(args.batch, max_threads / config.num_directions)) : 1;
  plan.reason = "RNNFAST_SPLIT=" + split;
  plan.forced = true;
  if (split == "alone") plan.patience = -1;
  return true;
}

void choose_split(Plan& plan, const Config& config, const ForwardArgs& args, int lanes, int64_t max_threads) {
  if (force_split(plan, config, args, max_threads)) return;
  const Work work = step_work(config, args.batch);
  const double layer_inputs = double(config.input_size) / config.output_size() + 1;
  const double total = step_time(work, 1) * args.steps * config.states() * layer_inputs;
  const int64_t blocks = (config.hidden_size + lanes - 1) / lanes;
  plan.threads = plan.slices = 1;
  if (max_threads < 2 || args.batch == 0 || total < 3 * kRegion) {
    plan.reason = "one thread: the work is smaller than the cost of waking others";
    return;
  }
  const int64_t directions = config.num_directions;
  const int64_t share = std::max<int64_t>(1, max_threads / directions);  // threads for each direction
  if (share == 1 || (args.batch / share >= kLeastRows && work.bytes <= kMostShared)) {
    plan.slices = std::min(share, std::max<int64_t>(1, args.batch / kLeastRows));
    plan.threads = std::min<int64_t>(max_threads, directions * plan.slices);
    plan.reason = share == 1 ? "a thread for each direction" : "the batch is split, no barriers";
    return;
  }
  int64_t split = std::min(share, blocks);
  while (split > 1 && step_time(work, 1) - step_time(work, split) < kBarrier) --split;
  plan.threads = directions * split;
  plan.reason = split > 1 ? "the hidden units are split, one barrier a step" : "steps are too short to share";
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

// The lengths of what is worked on at once, for the caches; in lean mode also for the memory.
void choose_chunks(Plan& plan, const Config& config, const ForwardArgs& args, bool training) {
  const int64_t size = config.dtype == Dtype::kFloat32 ? 4 : 8;
  const int64_t groups = std::max<int64_t>(1, plan.threads / (plan.slices * config.num_directions));
  const int64_t sequences = std::max<int64_t>(1, max_sequences(plan)), steps = std::max<int64_t>(1, args.steps);
  const int64_t slots = config.hidden_size * kCells[config.cell].slots * size * sequences;  // bytes of a step's
  plan.row_chunk = kGradientRows;
  plan.gradient_steps = std::clamp<int64_t>(kGradientRows / sequences, 1, steps);
  const int64_t most = std::min(steps, std::max<int64_t>(1, kChunkRows / sequences));
  plan.chunk = round_down(std::min(kChunkBytes * groups / slots, most), plan.gradient_steps);
  plan.segment = 0;
  if (!training || !args.lean) return;
  const int64_t wanted = args.checkpoint_every ? args.checkpoint_every : kSegmentBytes / slots;
  plan.segment = round_down(std::min(wanted + plan.chunk - 1, steps + plan.chunk - 1), plan.chunk);
}

}  // namespace

void set_split(const std::string& split) {
  if (split != "" && split != "one" && split != "batch" && split != "hidden" && split != "alone")
    throw std::invalid_argument("split (RNNFAST_SPLIT): expected '', 'one', 'batch', 'hidden' or 'alone', got '" +
                                split + "'");
  forced_split() = split;
}

void choose_split() {
  const char* text = std::getenv("RNNFAST_SPLIT");
  set_split(text ? text : "");
}

std::shared_ptr<const Plan> make_plan(const Config& config, const ForwardArgs& args, bool training, int lanes,
                                      int max_threads) {
  auto plan = std::make_shared<Plan>();
  plan->patience = kPatience, plan->forced = false;
  choose_split(*plan, config, args, lanes, max_threads);
  make_slices(*plan, args);
  choose_chunks(*plan, config, args, training);
  return plan;
}

}  // namespace rnnfast
