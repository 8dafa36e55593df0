#include "naive.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/registry.h"
#include "cpu/dropout.h"

namespace rnnfast::test {
namespace {

using V = base::Vec<double>;
static_assert(V::kLanes == 1);

template <class Cell>
class Naive {
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;

 public:
  Naive(const Problem& problem, bool training)
      : p_(problem),
        training_(training),
        cell_(problem.config.parameters),
        T_(p_.steps),
        B_(p_.batch),
        H_(p_.config.hidden_size),
        P_(p_.config.output_size()) {
    const int64_t count = p_.config.states();
    out_.hn.resize(count * B_ * P_), out_.h_all.resize(T_ * count * B_ * P_);
    if (Cell::kCellState) out_.cn.resize(count * B_ * H_), out_.c_all.resize(T_ * count * B_ * H_);
  }

  Outputs run() {
    input_ = p_.x;
    for (int64_t layer = 0; layer < p_.config.num_layers; ++layer) {
      out_.output.assign(T_ * B_ * p_.width(), 0);
      for (int64_t d = 0; d < p_.config.num_directions; ++d)
        for (int64_t b = 0; b < B_; ++b) sequence(layer, d, b);
      input_ = out_.output;
      if (layer + 1 < p_.config.num_layers && training_ && p_.dropout > 0) drop(layer);
    }
    return out_;
  }

  double nearest() const { return nearest_; }

 private:
  static Tensor row(const Tensor& states, int64_t index, int64_t rows, int64_t b, int64_t n) {
    if (states.empty()) return Tensor(n);
    const auto begin = states.begin() + (index * rows + std::min(b, rows - 1)) * n;
    return Tensor(begin, begin + n);
  }

  void sequence(int64_t layer, int64_t d, int64_t b) {
    const int64_t index = layer * p_.config.num_directions + d, length = p_.length(b);
    Tensor h = row(p_.h0, index, B_, b, P_), c = row(p_.c0, index, B_, b, H_);
    for (int64_t s = 0; s < length; ++s) {
      const int64_t t = d ? length - 1 - s : s, entering = d ? t + 1 : t;
      if (entering < length && p_.cuts(entering, b)) {
        h = row(p_.reset_h, index, p_.reset_h_rows, b, P_);
        c = row(p_.reset_c, index, p_.reset_c_rows, b, H_);
      }
      step(p_.weights[index], p_.config.layer_input(layer), t, b, h, c);
      const int64_t at = (t * p_.config.states() + index) * B_ + b;
      std::copy(h.begin(), h.end(), out_.output.begin() + (t * B_ + b) * p_.width() + d * P_);
      std::copy(h.begin(), h.end(), out_.h_all.begin() + at * P_);
      if (Cell::kCellState) std::copy(c.begin(), c.end(), out_.c_all.begin() + at * H_);
    }
    std::copy(h.begin(), h.end(), out_.hn.begin() + (index * B_ + b) * P_);
    if (Cell::kCellState) std::copy(c.begin(), c.end(), out_.cn.begin() + (index * B_ + b) * H_);
  }

  void step(const ProblemWeights& w, int64_t I, int64_t t, int64_t b, Tensor& h, Tensor& c) {
    const double* x = input_.data() + (t * B_ + b) * I;
    Tensor next(H_);
    for (int64_t unit = 0; unit < H_; ++unit) {
      double sums[S] = {};
      for (int g = 0; g < G; ++g) {
        sums[g] += product(w.w_ih, w.b_ih, Cell::kInputGate[g] * H_ + unit, x, I);
        sums[R + g] += product(w.w_hh, w.b_hh, Cell::kRecurrentGate[g] * H_ + unit, h.data(), P_);
      }
      V slot[S], c_new(0);
      for (int s = 0; s < S; ++s) {
        slot[s] = V(sums[s]);
        if (sums[s] != 0) nearest_ = std::min(nearest_, std::abs(sums[s]));
      }
      cell_.gates(slot, V(c[unit]), c_new);
      next[unit] = cell_.output(slot, V(Cell::kReadsPreviousH ? h[unit] : 0.0), c_new).v;
      if (Cell::kCellState) c[unit] = c_new.v;
    }
    h = next;
    if (!p_.config.proj_size) return;
    h.assign(P_, 0);
    for (int64_t j = 0; j < P_; ++j) h[j] = product(w.w_hr, {}, j, next.data(), H_);
  }

  static double product(const Tensor& matrix, const Tensor& bias, int64_t row, const double* v, int64_t n) {
    double sum = bias.empty() ? 0 : bias[row];
    for (int64_t k = 0; k < n; ++k) sum += matrix[row * n + k] * v[k];
    return sum;
  }

  void drop(int64_t layer) {
    const double p = p_.dropout;
    const DropoutKey key{p_.seed,
                         p_.call,
                         static_cast<uint32_t>(layer),
                         p < 1 ? static_cast<uint32_t>(p * 4294967296.0) : 0,
                         p < 1 ? 1 / (1 - p) : 0,
                         p >= 1};
    for (int64_t i = 0; i < T_ * B_; ++i) {
      double* row = input_.data() + i * p_.width();
      base::mask_row(key, i / B_, i % B_, p_.width(), row, row);
    }
  }

  const Problem& p_;
  const bool training_;
  const Cell cell_;
  const int64_t T_, B_, H_, P_;
  Tensor input_;
  Outputs out_;
  double nearest_ = std::numeric_limits<double>::infinity();
};

// function(Naive<Cell>) for the problem's cell.
template <class Function>
void with_cell(const Problem& problem, bool training, Function&& function) {
  int cell = 0;
#define RNNFAST_ROW(name, Type, parameters)        \
  if (problem.config.cell == cell++) {             \
    Naive<base::Type<V>> naive(problem, training); \
    function(naive);                               \
  }
  RNNFAST_CELLS(RNNFAST_ROW)
#undef RNNFAST_ROW
}

double dot(const Tensor& value, const Tensor& gradient) {
  double sum = 0;
  for (size_t i = 0; i < gradient.size(); ++i) sum += value[i] * gradient[i];
  return sum;
}

}  // namespace

Outputs naive_forward(const Problem& problem, bool training) {
  Outputs out;
  with_cell(problem, training, [&](auto& naive) { out = naive.run(); });
  return out;
}

double distance_from_zero(const Problem& problem) {
  double nearest = 0;
  with_cell(problem, true, [&](auto& naive) {
    naive.run();
    nearest = naive.nearest();
  });
  return nearest;
}

double naive_loss(const Problem& problem) {
  const Outputs out = naive_forward(problem, true);
  return dot(out.output, problem.grad_output) + dot(out.hn, problem.grad_hn) + dot(out.cn, problem.grad_cn) +
         dot(out.h_all, problem.grad_h_all) + dot(out.c_all, problem.grad_c_all);
}

}  // namespace rnnfast::test
