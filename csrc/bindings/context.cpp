#include <cstring>

#include "bindings/stack.h"
#include "core/plan.h"
#include "core/registry.h"

namespace rnnfast::bindings {
namespace {

// One backward call, as ForwardCall: each step checks some of the arguments and fills its part of `args`.
class BackwardCall {
 public:
  BackwardCall(Context& context, bool batch_first)
      : context_(context),
        config_(context.config),
        forward_(context.args),
        batch_first_(batch_first),
        has_cell_state_(kCells[config_.cell].cell_state) {}

  void grad_output(const py::object& given) {
    args_.grad_output = gradient("grad_output", given, sequence("D*P", P() * config_.num_directions), batch_first_);
  }

  void grad_states(const py::object& hn, const py::object& cn, const py::object& h_all, const py::object& c_all) {
    args_.grad_hn = gradient("grad_state", hn, state(P()), false);
    args_.grad_cn = gradient("grad_state", cn, state(H()), false);
    if (!has_cell_state_ && !(cn.is_none() && c_all.is_none()))
      throw py::value_error("grad_state: this cell has no cell state, expected one array");
    args_.grad_h_all = all_states(h_all, P());
    args_.grad_c_all = all_states(c_all, H());
  }

  void require_reserve() const {
    if (context_.consumed)
      throw std::runtime_error(
          "backward: this forward's reserve has been used up by an earlier backward; give that one retain=True");
  }

  // The caller's memory where it is given, else fresh.
  void grad_x(bool needed, const py::object& given) {
    if (!needed) return;
    const Axes axes = sequence("I", config_.input_size);
    const py::array a = given.is_none() ? empty(config_.dtype, {axes[0].size, axes[1].size, axes[2].size})
                                        : writeable("grad_x", given, config_.dtype, axes);
    args_.grad_x = view3(a, batch_first_);
    grad_x_ = a;
  }

  void initial_states(bool needed) {
    if (needed) grad_h0_ = fresh(P(), args_.grad_h0);
    if (needed && has_cell_state_) grad_c0_ = fresh(H(), args_.grad_c0);
    if (forward_.reset_h.data) grad_reset_h_ = fresh(P(), args_.grad_reset_h);
    if (forward_.reset_c.data) grad_reset_c_ = fresh(H(), args_.grad_reset_c);
  }

  void record() {
    const auto shape = py::make_tuple(forward_.steps, config_.states(), forward_.batch, P());
    grad_h_all_ = py::module_::import("numpy").attr("zeros")(shape, numpy_dtype(config_.dtype));
    args_.record_h = grad_h_all_.cast<py::array>().mutable_data();
  }

  void weights(const std::vector<py::object>& weights, bool need_gradients) {
    size_t next = 0;
    for (int64_t i = 0; i < config_.states(); ++i) {
      LayerWeights w, g;
      const auto one = [&](Array2& weight, Array2& gradient) {
        const py::array source = weights[next++].cast<py::array>();
        weight = view2(source);
        if (!need_gradients) return;
        const py::array target = empty(config_.dtype, {source.shape(), source.shape() + source.ndim()});
        gradient = view2(target);
        gradients_.append(target);
      };
      one(w.w_ih, g.w_ih), one(w.w_hh, g.w_hh);
      if (config_.bias) one(w.b_ih, g.b_ih), one(w.b_hh, g.b_hh);
      if (config_.proj_size) one(w.w_hr, g.w_hr);
      args_.weights.push_back(w);
      if (need_gradients) args_.grad_weights.push_back(g);
    }
  }

  py::tuple run(bool retain) {
    args_.retain = retain;
    {
      const py::gil_scoped_release release;
      rnnfast::backward(context_, args_);
    }
    return py::make_tuple(grad_x_, grad_h0_, grad_c0_, gradients_, grad_reset_h_, grad_reset_c_, grad_h_all_);
  }

 private:
  int64_t P() const { return config_.output_size(); }
  int64_t H() const { return config_.hidden_size; }

  Axes sequence(const char* last, int64_t size) const {
    const Axis t{"T", forward_.steps}, b{"B", forward_.batch}, n{last, size};
    return batch_first_ ? Axes{b, t, n} : Axes{t, b, n};
  }
  Axes state(int64_t size) const {
    return {{"L*D", config_.states()}, {"B", forward_.batch}, {size == P() ? "P" : "H", size}};
  }

  Array3 gradient(const char* name, const py::object& object, const Axes& axes, bool swap) {
    if (object.is_none()) return {};
    const py::array a = readable(name, object, config_.dtype, axes);
    alive_.append(a);
    return view3(a, swap);
  }

  const void* all_states(const py::object& object, int64_t size) {
    if (object.is_none()) return nullptr;
    py::array a = require_array("grad_states", object, config_.dtype);
    Axes axes = state(size);
    axes.insert(axes.begin(), {"T", forward_.steps});
    require_shape("grad_states", a, axes);
    a = contiguous("grad_states", a);
    alive_.append(a);
    return a.data();
  }

  py::object fresh(int64_t size, Array3& target) const {
    py::array a = empty(config_.dtype, {config_.states(), forward_.batch, size});
    target = view3(a);
    return a;
  }

  Context& context_;
  const Config& config_;
  const ForwardArgs& forward_;
  const bool batch_first_, has_cell_state_;
  BackwardArgs args_;
  py::list alive_, gradients_;
  py::object grad_x_ = py::none(), grad_h0_ = py::none(), grad_c0_ = py::none(), grad_reset_h_ = py::none(),
             grad_reset_c_ = py::none(), grad_h_all_ = py::none();
};

}  // namespace

ContextObject::ContextObject(std::unique_ptr<Context> context, py::list kept, std::vector<py::object> weights,
                             bool batch_first)
    : context_(std::move(context)), kept_(std::move(kept)), weights_(std::move(weights)), batch_first_(batch_first) {}

std::string ContextObject::plan() const { return context_->plan->reason(); }

void ContextObject::rebind(const StackObject& stack, const py::object& x, const py::object& h0, const py::object& c0,
                           const py::sequence& weights, const py::object& reset, const py::object& reset_h,
                           const py::object& reset_c, const py::object& output) {
  const Busy busy(busy_, "backward");
  const Config& config = context_->config;
  ForwardArgs args = context_->args;
  const int64_t a0 = batch_first_ ? args.batch : args.steps, a1 = batch_first_ ? args.steps : args.batch;
  py::list kept;
  const auto same = [&](const char* name, const py::object& object, const Array3& before) {
    if (object.is_none() != (before.data == nullptr))
      throw py::value_error(std::string(name) + ": expected what the forward was given");
    return !object.is_none();
  };
  const auto sequence = [&](const char* name, const py::object& object, int64_t width) {
    const py::array a = readable(name, object, config.dtype,
                                 {{batch_first_ ? "B" : "T", a0}, {batch_first_ ? "T" : "B", a1}, {"N", width}});
    kept.append(a);
    return view3(a, batch_first_);
  };
  const auto state = [&](const char* name, const py::object& object, bool cell, bool broadcast, Array3& target) {
    if (!same(name, object, target)) return;
    const py::array a = stack.state(name, object, cell, args.batch, broadcast);
    kept.append(a);
    target = broadcast ? view_states(a) : view3(a);
  };
  args.x = sequence("x", x, config.input_size);
  args.output = sequence("output", output, config.num_directions * config.output_size());
  state("h0", h0, false, false, args.h0), state("c0", c0, true, false, args.c0);
  state("reset_state", reset_h, false, true, args.reset_h), state("reset_state", reset_c, true, true, args.reset_c);
  if (same("reset", reset, args.reset)) {
    const auto a = py::array_t<bool>::ensure(reset);
    if (!a) throw py::type_error("reset: expected bool, got " + type_name(reset));
    require_shape("reset", a, {{batch_first_ ? "B" : "T", a0}, {batch_first_ ? "T" : "B", a1}});
    args.reset = view3(a, batch_first_);
    kept.append(a);
  }
  std::vector<py::object> kept_weights;
  stack.layer_weights(weights, &kept_weights);
  auto context = std::make_unique<Context>(config, args, context_->plan);
  context->reserve = std::move(context_->reserve);
  context->consumed = context_->consumed;
  context_ = std::move(context);
  kept_ = std::move(kept), weights_ = std::move(kept_weights);
}

py::tuple ContextObject::backward(const py::object& grad_output, const py::object& grad_hn, const py::object& grad_cn,
                                  const py::object& grad_h_all, const py::object& grad_c_all, bool need_grad_x,
                                  bool need_grad_weights, bool retain, bool record, const py::object& grad_x,
                                  bool need_grad_state) {
  const Busy busy(busy_, "backward");
  BackwardCall call(*context_, batch_first_);
  call.grad_output(grad_output);
  call.grad_states(grad_hn, grad_cn, grad_h_all, grad_c_all);
  call.require_reserve();
  return wanting_memory("backward", smaller(!context_->args.lean), [&] {
    call.grad_x(need_grad_x, grad_x);
    call.initial_states(need_grad_state);
    if (record) call.record();
    call.weights(weights_, need_grad_weights);
    return call.run(retain);
  });
}

}  // namespace rnnfast::bindings
