#include "problem.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/registry.h"
#include "naive.h"

namespace rnnfast::test {
namespace {

constexpr double kKink = 2e-4;  // finite differences move a pre-activation by less

Layout draw_layout(Random& random, bool may_flip) {
  return {random.chance(1, 3), may_flip && random.chance(1, 4), random.pick<int64_t>({0, 0, 1, 5})};
}

void draw_options(Problem& p, Random& random) {
  Config& c = p.config;
  c.input_size = random.pick<int64_t>({1, 2, 3, 8, 16, 17, 35});
  if (kCells[c.cell].cell_state && c.hidden_size > 1 && random.chance(1, 3))
    c.proj_size = 1 + random.below(c.hidden_size - 1);
  c.num_layers = random.pick<int64_t>({1, 1, 2, 3, 4});
  c.num_directions = random.chance(1, 3) ? 2 : 1;
  c.bias = random.chance(3, 4);
  for (double& parameter : c.parameters) parameter = 0.25 + 0.5 * random.below(2);
  // Without a bias, dropping everything would put the next layer onto its kink.
  if (random.chance(1, 3)) p.dropout = c.bias && random.chance(1, 4) ? 1 : 0.4;
  p.seed = random.bits(), p.call = random.bits();
  p.return_states = random.chance(1, 2);
  p.want_grad_x = random.chance(3, 4), p.want_grad_weights = random.chance(5, 6);
  p.want_grad_reset = random.chance(3, 4), p.record = random.chance(1, 4);
  p.transposed_weights = random.chance(1, 4);
  p.x_layout = draw_layout(random, true), p.output_layout = draw_layout(random, false);
  p.state_layout = {random.chance(1, 4), false, random.pick<int64_t>({0, 0, 3})};
  p.edge = random.chance(1, 2) ? Edge::kEnd : Edge::kBegin;
}

void draw_rows(Problem& p, Random& random) {
  if (random.chance(1, 2))
    for (int64_t b = 0; b < p.batch; ++b) p.lengths.push_back(random.chance(1, 5) ? 0 : random.below(p.steps + 1));
  if (random.chance(1, 2)) return;
  for (int64_t i = 0; i < p.steps * p.batch; ++i) p.reset.push_back(random.chance(1, 3));
  if (p.reset.empty()) return;
  p.reset_h_rows = random.pick<int64_t>({0, 1, p.batch});
  if (kCells[p.config.cell].cell_state) p.reset_c_rows = random.pick<int64_t>({0, 1, p.batch});
}

void draw_values(Problem& p, Random& random) {
  const Config& c = p.config;
  const int64_t count = c.states(), T = p.steps, B = p.batch, P = c.output_size(), H = c.hidden_size;
  const int64_t rows = kCells[c.cell].gates * H;
  const bool cells = kCells[c.cell].cell_state;
  const auto some = [&](bool wanted, int64_t size) { return wanted ? random.tensor(size) : Tensor(); };
  const auto maybe = [&](int64_t size) { return some(random.chance(2, 3), size); };
  p.x = random.tensor(T * B * c.input_size);
  p.h0 = maybe(count * B * P), p.c0 = some(cells && random.chance(2, 3), count * B * H);
  p.reset_h = some(p.reset_h_rows, count * p.reset_h_rows * P);
  p.reset_c = some(p.reset_c_rows, count * p.reset_c_rows * H);
  const double scale = 1.5 / std::sqrt(double(H));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t I = c.layer_input(i / c.num_directions);
    ProblemWeights w;
    w.w_ih = random.tensor(rows * I, scale), w.w_hh = random.tensor(rows * P, scale);
    if (c.bias) w.b_ih = random.tensor(rows, scale), w.b_hh = random.tensor(rows, scale);
    if (c.proj_size) w.w_hr = random.tensor(P * H, scale);
    p.weights.push_back(w);
  }
  p.grad_output = maybe(T * B * p.width());
  p.grad_hn = maybe(count * B * P), p.grad_cn = some(cells && random.chance(2, 3), count * B * H);
  p.grad_h_all = some(p.return_states && random.chance(2, 3), T * count * B * P);
  p.grad_c_all = some(p.return_states && cells && random.chance(2, 3), T * count * B * H);
}

template <class Check>
void check_each(const Gradients& got, const Gradients& want, Check&& check) {
  check("grad_x", got.x, want.x);
  check("grad_h0", got.h0, want.h0);
  check("grad_c0", got.c0, want.c0);
  check("grad_reset_h", got.reset_h, want.reset_h);
  check("grad_reset_c", got.reset_c, want.reset_c);
  check("record", got.record, want.record);
  for (size_t i = 0; i < want.weights.size(); ++i) {
    const ProblemWeights &g = got.weights[i], &w = want.weights[i];
    const std::string at = std::to_string(i);
    check("grad_w_ih " + at, g.w_ih, w.w_ih);
    check("grad_w_hh " + at, g.w_hh, w.w_hh);
    check("grad_b_ih " + at, g.b_ih, w.b_ih);
    check("grad_b_hh " + at, g.b_hh, w.b_hh);
    check("grad_w_hr " + at, g.w_hr, w.w_hr);
  }
}

}  // namespace

Problem draw_problem(const Sizes& sizes, uint64_t seed) {
  const bool kinked = std::strstr(kCells[sizes.cell].name, "relu");
  Problem problem;
  for (int attempt = 0; attempt < 200; ++attempt) {
    Random random(seed + 0x1000003u * attempt);
    problem = Problem{};
    problem.config.cell = sizes.cell, problem.config.dtype = Dtype::kFloat64;
    problem.config.hidden_size = sizes.hidden;
    problem.steps = sizes.steps, problem.batch = sizes.batch;
    draw_options(problem, random);
    draw_rows(problem, random);
    draw_values(problem, random);
    if (!kinked || distance_from_zero(problem) > kKink) break;
  }
  return problem;
}

std::string Problem::describe() const {
  char text[512];
  std::snprintf(text, sizeof text, "%s T %d B %d I %d H %d P %d L %d D %d%s%s%s%s%s%s dropout %g%s%s edge %d",
                kCells[config.cell].name, int(steps), int(batch), int(config.input_size), int(config.hidden_size),
                int(config.proj_size), int(config.num_layers), int(config.num_directions), config.bias ? " bias" : "",
                h0.empty() ? "" : " h0", c0.empty() ? "" : " c0", lengths.empty() ? "" : " ragged",
                reset.empty() ? "" : " reset", return_states ? " states" : "", dropout,
                x_layout.swapped ? " batch_first" : "", x_layout.flipped ? " flipped" : "", int(edge));
  return std::string(text) + " reset rows " + std::to_string(reset_h_rows) + "," + std::to_string(reset_c_rows);
}

void check_outputs(const Outputs& got, const Outputs& want, double tolerance) {
  check_close("output", got.output, want.output, tolerance);
  check_close("hn", got.hn, want.hn, tolerance);
  check_close("cn", got.cn, want.cn, tolerance);
  if (!got.h_all.empty()) check_close("h_all", got.h_all, want.h_all, tolerance);
  if (!got.c_all.empty()) check_close("c_all", got.c_all, want.c_all, tolerance);
}

void check_gradients(const Gradients& got, const Gradients& want, double tolerance) {
  check_each(got, want,
             [&](const std::string& name, const Tensor& g, const Tensor& w) { check_close(name, g, w, tolerance); });
}

void check_same_gradients(const Gradients& got, const Gradients& want) {
  check_each(got, want, [&](const std::string& name, const Tensor& g, const Tensor& w) { check_same(name, g, w); });
}

}  // namespace rnnfast::test
