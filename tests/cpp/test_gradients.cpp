// The engine's backward pass in float64 against central differences of the naive loop: for every array that goes in, the
// derivative along a random direction.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "core/registry.h"
#include "engine_call.h"
#include "naive.h"

namespace rnnfast::test {
namespace {

constexpr double kStep = 1e-5, kTolerance = 1e-7;

// d loss / d (parameter along direction) by differences, against the sum of gradient * direction.
void check_direction(const std::string& name, Problem& problem, Tensor& parameter, const Tensor& gradient,
                     Random& random) {
  if (parameter.empty() || gradient.empty()) return;
  CHECK(parameter.size() == gradient.size());
  const Tensor direction = random.tensor(static_cast<int64_t>(parameter.size())), saved = parameter;
  const auto loss_at = [&](double step) {
    for (size_t i = 0; i < parameter.size(); ++i) parameter[i] = saved[i] + step * direction[i];
    return naive_loss(problem);
  };
  const double slope = (loss_at(kStep) - loss_at(-kStep)) / (2 * kStep);
  parameter = saved;
  double expected = 0, scale = 1;
  for (size_t i = 0; i < gradient.size(); ++i) {
    expected += gradient[i] * direction[i];
    scale += std::abs(gradient[i] * direction[i]);
  }
  check_close("derivative along a direction of " + name, {expected / scale}, {slope / scale}, kTolerance);
}

// A reset state that the batch shares receives the sum of the rows' gradients.
Tensor shared(const Tensor& gradient, int64_t states, int64_t batch, int64_t rows) {
  if (rows != 1 || batch == 0) return gradient;
  const int64_t n = static_cast<int64_t>(gradient.size()) / (states * batch);
  Tensor sum(states * n);
  for (int64_t i = 0; i < states * batch; ++i)
    for (int64_t j = 0; j < n; ++j) sum[i / batch * n + j] += gradient[i * n + j];
  return sum;
}

void check_problem(Problem problem, Random& random) {
  set_case(problem.describe());
  EngineCall<double> call(problem);
  call.forward(true);
  const Gradients g = call.backward();
  const int64_t states = problem.config.states();
  check_direction("x", problem, problem.x, g.x, random);
  check_direction("h0", problem, problem.h0, g.h0, random);
  check_direction("c0", problem, problem.c0, g.c0, random);
  check_direction("reset_h", problem, problem.reset_h, shared(g.reset_h, states, problem.batch, problem.reset_h_rows),
                  random);
  check_direction("reset_c", problem, problem.reset_c, shared(g.reset_c, states, problem.batch, problem.reset_c_rows),
                  random);
  for (size_t i = 0; i < g.weights.size(); ++i) {
    ProblemWeights& w = problem.weights[i];
    check_direction("w_ih", problem, w.w_ih, g.weights[i].w_ih, random);
    check_direction("w_hh", problem, w.w_hh, g.weights[i].w_hh, random);
    check_direction("b_ih", problem, w.b_ih, g.weights[i].b_ih, random);
    check_direction("b_hh", problem, w.b_hh, g.weights[i].b_hh, random);
    check_direction("w_hr", problem, w.w_hr, g.weights[i].w_hr, random);
  }
}

void run() {
  setenv("RNNFAST_ISA", "scalar", 1);
  choose_isa();
  set_split("one");
  Random random(1);
  uint64_t seed = 1;
  for (int cell = 0; cell < kCellCount; ++cell)
    for (const int64_t hidden : {1, 2, 5, 17})
      for (const int64_t steps : {1, 2, 5})
        for (const int64_t batch : {1, 3})
          check_problem(draw_problem({cell, steps, batch, hidden}, 104729 * seed++), random);
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::run();
  return rnnfast::test::finish();
}
