// A problem handed to the engine in one element type: every array the caller's own, exactly as large as it must be, in
// guarded memory.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>
#include <memory>

#include "core/registry.h"
#include "problem.h"

namespace rnnfast::test {

template <class T>
class EngineCall {
 public:
  explicit EngineCall(const Problem& problem)
      : p_(problem), config_(problem.config), lengths_(problem.lengths.size(), problem.edge), reset_(reset_layout()) {
    config_.dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    std::copy(p_.lengths.begin(), p_.lengths.end(), lengths_.data());
    set_arguments();
    set_weights();
  }

  Outputs forward(bool training, const Packed* packed = nullptr) {
    context_ = rnnfast::forward(config_, args_, packed ? nullptr : &weights_, packed, training);
    CHECK(training == (context_ != nullptr));
    CHECK(output_->gaps_intact() && hn_->gaps_intact() && (!cn_ || cn_->gaps_intact()));
    Outputs out{output_->get(), hn_->get(), {}, {}, {}};
    if (cn_) out.cn = cn_->get();
    if (h_all_) out.h_all = h_all_->get();
    if (c_all_) out.c_all = c_all_->get();
    return out;
  }

  std::unique_ptr<Packed> pack() const { return std::make_unique<Packed>(config_, weights_); }

  Gradients backward(bool retain = false) {
    const int64_t T_ = p_.steps, B = p_.batch, P = config_.output_size(), H = config_.hidden_size;
    const int64_t count = config_.states();
    const bool cells = kCells[config_.cell].cell_state;
    BackwardArgs args;
    args.retain = retain, args.weights = weights_;
    // What lies past the end of a sequence must not be looked at.
    args.grad_output = padded(p_.grad_output, T_, B, p_.width(), p_.output_layout);
    args.grad_hn = given(p_.grad_hn, count, B, P, p_.state_layout);
    args.grad_cn = given(p_.grad_cn, count, B, H, p_.state_layout);
    args.grad_h_all = padded(p_.grad_h_all, T_, count * B, P, {}).data;
    args.grad_c_all = padded(p_.grad_c_all, T_, count * B, H, {}).data;

    Strided<T>*x = nullptr, *c0 = nullptr, *reset_h = nullptr, *reset_c = nullptr, *record = nullptr;
    if (p_.want_grad_x) x = fresh(T_, B, config_.input_size, {p_.x_layout.swapped, false, p_.x_layout.gap});
    Strided<T>* h0 = fresh(count, B, P, p_.state_layout);
    if (cells) c0 = fresh(count, B, H, p_.state_layout);
    if (p_.want_grad_reset && p_.reset_h_rows) reset_h = fresh(count, B, P, {});
    if (p_.want_grad_reset && p_.reset_c_rows) reset_c = fresh(count, B, H, {});
    if (p_.record) {
      record = fresh(T_, count * B, P, {});
      record->set(Tensor(T_ * count * B * P));  // past the end nothing is written
    }
    args.grad_x = view(x), args.grad_h0 = view(h0), args.grad_c0 = view(c0);
    args.grad_reset_h = view(reset_h), args.grad_reset_c = view(reset_c);
    args.record_h = record ? record->data() : nullptr;
    std::vector<std::vector<Strided<T>*>> gradients;
    if (p_.want_grad_weights)
      for (const ProblemWeights& w : p_.weights) gradients.push_back(weight_gradients(w, args));

    rnnfast::backward(*context_, args);

    Gradients result{values(x), values(h0), values(c0), values(reset_h), values(reset_c), values(record), {}};
    for (const auto& g : gradients)
      result.weights.push_back({values(g[0]), values(g[1]), values(g[2]), values(g[3]), values(g[4])});
    return result;
  }

  Context& context() { return *context_; }

 private:
  Layout reset_layout() const { return {p_.x_layout.swapped, false, 0}; }

  static Array3 view(const Strided<T>* array) {
    return array ? Array3{array->data(), array->stride0(), array->stride1()} : Array3{};
  }
  static Tensor values(const Strided<T>* array) {
    if (!array) return {};
    CHECK(array->gaps_intact());
    return array->get();
  }

  // Memory that lives as long as the call; all NaN.
  Strided<T>* fresh(int64_t n0, int64_t n1, int64_t n2, const Layout& layout) {
    return &arrays_.emplace_back(n0, n1, n2, layout, p_.edge);
  }
  Array3 given(const Tensor& tensor, int64_t n0, int64_t n1, int64_t n2, const Layout& layout) {
    if (tensor.empty()) return {};
    Strided<T>* array = fresh(n0, n1, n2, layout);
    array->set(tensor);
    return view(array);
  }
  // [T, B or states * B, n] with NaN past the end of each sequence.
  Array3 padded(const Tensor& tensor, int64_t n0, int64_t n1, int64_t n2, const Layout& layout) {
    if (tensor.empty()) return {};
    Strided<T>* array = fresh(n0, n1, n2, layout);
    array->set(tensor);
    for (int64_t t = 0; t < n0; ++t)
      for (int64_t j = 0; j < n1; ++j)
        if (t >= p_.length(j % p_.batch)) std::fill_n(array->row(t, j), n2, std::numeric_limits<T>::quiet_NaN());
    return view(array);
  }
  Array3 reset_state(const Tensor& tensor, int64_t rows, int64_t n) {
    Array3 array = given(tensor, config_.states(), rows, n, p_.state_layout);
    if (rows == 1) array.stride1 = 0;
    return array;
  }

  void set_arguments() {
    const int64_t T_ = p_.steps, B = p_.batch, P = config_.output_size(), H = config_.hidden_size;
    const int64_t count = config_.states();
    const bool cells = kCells[config_.cell].cell_state;
    args_.steps = T_, args_.batch = B;
    args_.x = padded(p_.x, T_, B, config_.input_size, p_.x_layout);
    if (!args_.x.data) args_.x = view(fresh(T_, B, config_.input_size, p_.x_layout));
    if (!p_.lengths.empty()) args_.lengths = lengths_.data();
    if (!p_.reset.empty()) {
      resets_ = std::make_unique<Strided<uint8_t>>(T_, B, 1, reset_, p_.edge);
      resets_->set(Tensor(p_.reset.begin(), p_.reset.end()));
      args_.reset = {resets_->data(), resets_->stride0(), resets_->stride1()};
    }
    args_.h0 = given(p_.h0, count, B, P, p_.state_layout), args_.c0 = given(p_.c0, count, B, H, p_.state_layout);
    args_.reset_h = reset_state(p_.reset_h, p_.reset_h_rows, P);
    args_.reset_c = reset_state(p_.reset_c, p_.reset_c_rows, H);
    output_ = fresh(T_, B, p_.width(), p_.output_layout);
    hn_ = fresh(count, B, P, p_.state_layout);
    if (cells) cn_ = fresh(count, B, H, p_.state_layout);
    if (p_.return_states) h_all_ = fresh(T_, count * B, P, {});
    if (p_.return_states && cells) c_all_ = fresh(T_, count * B, H, {});
    args_.output = view(output_), args_.hn = view(hn_), args_.cn = view(cn_);
    args_.h_all = h_all_ ? h_all_->data() : nullptr, args_.c_all = c_all_ ? c_all_->data() : nullptr;
    args_.dropout = p_.config.num_layers > 1 ? p_.dropout : 0, args_.seed = p_.seed, args_.call = p_.call;
  }

  Array2 matrix(const Tensor& tensor, int64_t columns) {
    if (tensor.empty()) return {};
    const int64_t rows = static_cast<int64_t>(tensor.size()) / columns;
    const Strided<T>* array = fresh(rows, columns, 1, {p_.transposed_weights, false, 0});
    const_cast<Strided<T>*>(array)->set(tensor);
    return {array->data(), array->stride0(), array->stride1()};
  }

  void set_weights() {
    const int64_t P = config_.output_size();
    for (int64_t i = 0; i < config_.states(); ++i) {
      const ProblemWeights& w = p_.weights[i];
      weights_.push_back({matrix(w.w_ih, config_.layer_input(i / config_.num_directions)), matrix(w.w_hh, P),
                          matrix(w.b_ih, 1), matrix(w.b_hh, 1), matrix(w.w_hr, config_.hidden_size)});
    }
  }

  // Contiguous, in the order of ProblemWeights.
  std::vector<Strided<T>*> weight_gradients(const ProblemWeights& w, BackwardArgs& args) {
    std::vector<Strided<T>*> gradients;
    LayerWeights targets;
    const auto one = [&](const Tensor& weight, Array2& target) {
      gradients.push_back(weight.empty() ? nullptr : fresh(1, 1, static_cast<int64_t>(weight.size()), {}));
      if (gradients.back()) target = {gradients.back()->data(), 0, 1};
    };
    one(w.w_ih, targets.w_ih), one(w.w_hh, targets.w_hh), one(w.b_ih, targets.b_ih), one(w.b_hh, targets.b_hh);
    one(w.w_hr, targets.w_hr);
    args.grad_weights.push_back(targets);
    return gradients;
  }

  const Problem& p_;
  Config config_;
  Guarded<int64_t> lengths_;
  const Layout reset_;
  std::deque<Strided<T>> arrays_;
  std::unique_ptr<Strided<uint8_t>> resets_;
  std::vector<LayerWeights> weights_;
  ForwardArgs args_;
  Strided<T>*output_ = nullptr, *hn_ = nullptr, *cn_ = nullptr, *h_all_ = nullptr, *c_all_ = nullptr;
  std::unique_ptr<Context> context_;
};

}  // namespace rnnfast::test
