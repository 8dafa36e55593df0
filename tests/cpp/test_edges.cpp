// Every instruction set, element type and split on sizes around the vector width, with every option, against the naive
// loop; gradients against those of the scalar float64 engine, which test_gradients checks by finite differences.
#include <cstdio>
#include <cstdlib>

#include "core/registry.h"
#include "engine_call.h"
#include "naive.h"

namespace rnnfast::test {
namespace {

struct Mode {
  const char* split;
  int threads;
};
constexpr Mode kModes[] = {{"one", 1}, {"batch", 2}, {"hidden", 2}, {"batch", 3}, {"hidden", 3}, {"", 3}};
constexpr int kModeCount = sizeof kModes / sizeof kModes[0];

void force_isa(const std::string& name) {
  setenv("RNNFAST_ISA", name.c_str(), 1);
  choose_isa();
  CHECK(isa() == name);
}

void force_mode(const Mode& mode) {
  set_split(mode.split);
  set_num_threads(mode.threads);
}

struct Expected {
  Outputs training, inference;
  Gradients gradients;
};

template <class T>
void check_call(const Problem& problem, const Expected& expected) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  release_pool();  // so that every buffer is fresh, and filled with the allocator's pattern
  EngineCall<T> call(problem);
  const auto packed = call.pack();
  const Outputs inference = call.forward(false);
  check_outputs(inference, expected.inference, tolerance);
  check_same("output of packed weights", call.forward(false, packed.get()).output, inference.output);
  const Outputs training = call.forward(true);
  check_outputs(training, expected.training, tolerance);
  const Gradients first = call.backward(true);
  check_gradients(first, expected.gradients, sizeof(T) == 4 ? 5e-5 : 1e-11);
  check_same_gradients(call.backward(false), first);
  CHECK_THROWS(std::logic_error, call.backward());
  check_same("output, repeated", call.forward(true).output, training.output);
  check_same_gradients(call.backward(), first);
}

// Each problem meets half of the modes with each instruction set and element type, in turn.
void check_problem(const Problem& problem, const std::vector<std::string>& isas, int turn) {
  const std::string text = problem.describe();
  set_case(text + " (float64 scalar, one thread)");
  force_isa("scalar");
  force_mode(kModes[0]);
  const Expected expected{naive_forward(problem, true), naive_forward(problem, false), [&] {
                            EngineCall<double> call(problem);
                            call.forward(true);
                            return call.backward();
                          }()};
  for (const std::string& name : isas) {
    force_isa(name);
    for (int m = turn % 2; m < kModeCount; m += 2) {
      force_mode(kModes[m]);
      const std::string where = " | " + name + " split '" + kModes[m].split + "' threads " + std::to_string(kModes[m].threads);
      set_case(text + where + " float64");
      check_call<double>(problem, expected);
      set_case(text + where + " float32");
      check_call<float>(problem, expected);
    }
    ++turn;
  }
}

void run() {
  const std::vector<std::string> isas = possible_isas();
  int turn = 0;
  const auto check = [&](const Sizes& sizes) {
    check_problem(draw_problem(sizes, 7919u * turn), isas, turn);
    ++turn;
  };
  for (int cell = 0; cell < kCellCount; ++cell) {
    // Around one and two vectors of every width; 71 and 131 fill the widest panels too.
    for (const int64_t hidden : {1, 3, 15, 16, 17, 31, 33, 71, 131})
      for (const int64_t steps : {0, 1, 2, 9})
        for (const int64_t batch : {0, 1, 3, 13})
          if (hidden < 71 || (steps == 2 && batch != 3)) check({cell, steps, batch, hidden});
    // More rows than one block of the gradient products, more steps than one chunk of input products.
    for (const Sizes& sizes : {Sizes{cell, 300, 1, 5}, Sizes{cell, 60, 13, 17}, Sizes{cell, 150, 3, 33}}) check(sizes);
  }
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::run();
  return rnnfast::test::finish();
}
