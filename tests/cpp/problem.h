// One call of the engine, drawn at random: sizes, options and values in double. The naive loop runs it as it stands;
// EngineCall<T> (engine_call.h) hands it to the engine.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/api.h"
#include "harness.h"

namespace rnnfast::test {

// The weights of one layer and direction; an absent one is empty.
struct ProblemWeights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
};

struct Problem {
  Config config;
  int64_t steps, batch;
  std::vector<int64_t> lengths;                // empty: all of them `steps`
  std::vector<uint8_t> reset;                  // [T, B]; empty: none
  int64_t reset_h_rows = 0, reset_c_rows = 0;  // 0 (zeros), 1 or B
  double dropout = 0;
  uint64_t seed = 0, call = 0;

  // An absent one is empty; where T or B is 0 a present one is empty too, which comes to the same.
  Tensor x, h0, c0, reset_h, reset_c;
  std::vector<ProblemWeights> weights;
  Tensor grad_output, grad_hn, grad_cn, grad_h_all, grad_c_all;

  // How the call is made.
  bool return_states, want_grad_x, want_grad_weights, want_grad_reset, record;
  bool transposed_weights;
  Layout x_layout, output_layout, state_layout;
  Edge edge;

  int64_t length(int64_t b) const { return lengths.empty() ? steps : lengths[b]; }
  int64_t width() const { return config.num_directions * config.output_size(); }
  bool cuts(int64_t t, int64_t b) const { return !reset.empty() && reset[t * batch + b]; }
  std::string describe() const;
};

struct Sizes {
  int cell;
  int64_t steps, batch, hidden;
};

// Every option is drawn from `random`; problems of a cell with a kink stay away from it.
Problem draw_problem(const Sizes& sizes, uint64_t seed);

// What a forward returns, and what a backward returns.
struct Outputs {
  Tensor output, hn, cn, h_all, c_all;
};
struct Gradients {
  Tensor x, h0, c0, reset_h, reset_c, record;  // those of the reset state: one row a sequence
  std::vector<ProblemWeights> weights;
};

void check_outputs(const Outputs& got, const Outputs& want, double tolerance);
void check_gradients(const Gradients& got, const Gradients& want, double tolerance);
void check_same_gradients(const Gradients& got, const Gradients& want);

}  // namespace rnnfast::test
