// How a call is cut up: threads, slices of the batch, steps of a chunk; and the packed rows of a ragged batch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/api.h"
#include "core/item.h"
#include "core/split.h"

namespace rnnfast {

struct SlicePlan {
  std::vector<int32_t> order, active, lengths;
  std::vector<int64_t> offset;
  Schedule schedule;  // points into the vectors above
};

struct Plan {
  int64_t threads, slices;
  bool wavefront;  // the layers run at once, each on one thread
  // Steps: of one block of the gradient products, whose input product is made at once, whose gates are rebuilt at once
  // (lean mode; else 0). Each is a multiple of the one before.
  int64_t gradient_steps, chunk, segment;
  int64_t row_chunk;          // the most rows that the weight gradients take in at once
  int64_t patience;           // nanoseconds of waiting after which a thread goes on alone; negative: at once (tests)
  std::vector<Split> splits;  // the possible ones
  Split choice;
  std::string forced;  // RNNFAST_SPLIT: then the machine's load changes nothing
  std::vector<SlicePlan> slice;
  std::vector<int32_t> lengths;  // [B] in the caller's order; empty: all T

  Plan() = default;
  Plan(const Plan&) = delete;

  std::string reason() const;  // the choice in words, beside the others (explain)
};

std::shared_ptr<const Plan> make_plan(const Config& config, const ForwardArgs& args, bool training, int lanes,
                                      int max_threads);

}  // namespace rnnfast
