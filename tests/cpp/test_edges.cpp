// Every instruction set, element type and split, on sizes around the vector width, with every option, against the naive
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
void check_call(const Problem& problem, const Expected& expected, bool repeat) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  release_pool();  // so that every buffer is fresh, and filled with the allocator's pattern
  EngineCall<T> call(problem);
  const auto packed = call.pack();
  const Outputs inference = call.forward(false, packed.get());
  check_outputs(inference, expected.inference, tolerance);
  const Outputs training = call.forward(true);
  check_outputs(training, expected.training, tolerance);
  const Gradients gradients = call.backward(repeat);
  check_gradients(gradients, expected.gradients, sizeof(T) == 4 ? 5e-5 : 1e-11);
  if (!repeat) return;
  check_same_gradients(call.backward(false), gradients);
  CHECK_THROWS(std::logic_error, call.backward());
  check_same("output of weights packed by the call", call.forward(false).output, inference.output);
  check_same("output, repeated", call.forward(true).output, training.output);
  check_same_gradients(call.backward(), gradients);
}

// A problem meets each instruction set in one of the modes, in turn.
void check_problem(const Problem& problem, const std::vector<std::string>& isas, int turn) {
  const std::string text = problem.describe();
  set_case(text + " (float64 scalar, one thread)");
  force_isa("scalar");
  force_mode(kModes[0]);
  Expected expected{naive_forward(problem, true), naive_forward(problem, false), {}};
  EngineCall<double> plain(problem);
  check_outputs(plain.forward(true), expected.training, 1e-12);
  expected.gradients = plain.backward();
  for (const std::string& name : isas) {
    const Mode& mode = kModes[turn++ % kModeCount];
    force_isa(name);
    force_mode(mode);
    const std::string where =
        text + " | " + name + " split '" + mode.split + "' threads " + std::to_string(mode.threads);
    set_case(where + " float64");
    check_call<double>(problem, expected, turn % 4 == 0);
    set_case(where + " float32");
    check_call<float>(problem, expected, turn % 4 == 2);
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
    for (const int64_t hidden : {1, 3, 15, 16, 17, 31, 33})
      for (const int64_t steps : {0, 1, 5})
        for (const int64_t batch : {int64_t{0}, int64_t{1}, 2 + hidden % 12}) check({cell, steps, batch, hidden});
    for (const int64_t hidden : {71, 131})
      for (const int64_t batch : {1, 7}) check({cell, 2, batch, hidden});
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
