#include "bindings/stack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/plan.h"
#include "core/registry.h"

namespace rnnfast::bindings {
namespace {

constexpr int64_t kLargest = int64_t{1} << 40;  // elements of one weight matrix: far beyond memory, far from overflow

int cell_index(const std::string& name) {
  std::string known;
  for (int i = 0; i < kCellCount; ++i) {
    if (name == kCells[i].name) return i;
    known += std::string(i ? ", " : "") + kCells[i].name;
  }
  throw py::value_error("cell: expected one of " + known + ", got '" + name + "'");
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  throw py::type_error("dtype: expected float32 or float64 on the CPU, got " + name);
}

}  // namespace

StackObject::StackObject(const std::string& cell, const std::string& dtype, int64_t input_size, int64_t hidden_size,
                         int64_t proj_size, int64_t num_layers, int64_t num_directions, bool bias,
                         const std::vector<double>& parameters)
    : config{cell_index(cell),
             parse_dtype(dtype),
             positive("input_size", input_size),
             positive("hidden_size", hidden_size),
             positive("proj_size", proj_size, 0),
             positive("num_layers", num_layers),
             positive("num_directions", num_directions),
             bias,
             {}} {
  has_cell_state = kCells[config.cell].cell_state;
  if (num_directions > 2)
    throw py::value_error("num_directions: expected 1 or 2, got " + std::to_string(num_directions));
  if (proj_size && !has_cell_state)
    throw py::value_error("proj_size: expected 0 for cell " + cell + ", got " + std::to_string(proj_size));
  if (proj_size >= hidden_size && proj_size)
    throw py::value_error("proj_size: expected less than hidden_size " + std::to_string(hidden_size) + ", got " +
                          std::to_string(proj_size));
  if (hidden_size > kLargest / 8 / hidden_size)
    throw py::value_error("hidden_size: too large: " + std::to_string(hidden_size));
  if (input_size > kLargest / 8 / hidden_size)
    throw py::value_error("input_size: too large: " + std::to_string(input_size));
  if (num_layers > 65536)
    throw py::value_error("num_layers: expected at most 65536, got " + std::to_string(num_layers));
  if (parameters.size() > 4)
    throw py::value_error("parameters: expected at most 4, got " + std::to_string(parameters.size()));
  std::copy(parameters.begin(), parameters.end(), config.parameters);
}

// PyTorch's flat order: for each layer and direction w_ih, w_hh, then b_ih, b_hh, then w_hr.
std::vector<LayerWeights> StackObject::layer_weights(const py::sequence& weights, std::vector<py::object>* kept) const {
  const int64_t each = 2 + (config.bias ? 2 : 0) + (config.proj_size ? 1 : 0),
                rows = kCells[config.cell].gates * config.hidden_size;
  if (static_cast<int64_t>(py::len(weights)) != each * config.states())
    throw py::value_error("weights: expected " + std::to_string(each * config.states()) + " arrays, got " +
                          std::to_string(py::len(weights)));
  std::vector<LayerWeights> all(config.states());
  size_t next = 0;
  const auto take = [&](const char* kind, int64_t layer, int64_t d, const Axes& axes) {
    const std::string name = std::string(kind) + "_l" + std::to_string(layer) + (d ? "_reverse" : "");
    py::object item = weights[next++];
    py::array a = require_array(name.c_str(), item, config.dtype);
    require_shape(name.c_str(), a, axes);
    if (!element_strides(a)) a = contiguous(name.c_str(), a);
    if (kept) kept->push_back(a);
    return view2(a);
  };
  for (int64_t i = 0; i < config.states(); ++i) {
    const int64_t layer = i / config.num_directions, d = i % config.num_directions;
    LayerWeights& w = all[i];
    w.w_ih = take("weight_ih", layer, d, {{"G*H", rows}, {"I", config.layer_input(layer)}});
    w.w_hh = take("weight_hh", layer, d, {{"G*H", rows}, {"P", config.output_size()}});
    if (config.bias) w.b_ih = take("bias_ih", layer, d, {{"G*H", rows}});
    if (config.bias) w.b_hh = take("bias_hh", layer, d, {{"G*H", rows}});
    if (config.proj_size) w.w_hr = take("weight_hr", layer, d, {{"P", config.proj_size}, {"H", config.hidden_size}});
  }
  return all;
}

py::array StackObject::state(const char* name, const py::handle& object, bool cell, int64_t batch,
                             bool broadcast) const {
  py::array a = require_array(name, object, config.dtype);
  const int64_t width = cell ? config.hidden_size : config.output_size();
  const bool one = broadcast && a.ndim() == 3 && a.shape(1) == 1;
  require_shape(name, a, {{"L*D", config.states()}, {"B", one ? 1 : batch}, {cell ? "H" : "P", width}});
  return rows_contiguous(a) ? a : contiguous(name, a);
}

namespace {

// One forward call, from Python's arguments to the engine's: each step checks some of them and fills its part of `args`.
// Nothing has been written when a check fails.
class ForwardCall {
 public:
  ForwardCall(const StackObject& stack, const py::object& x, bool batch_first)
      : stack_(stack), config_(stack.config), batch_first_(batch_first) {
    x_ = readable("x", x, config_.dtype, sequence("I", -1, -1, config_.input_size));
    args_.steps = x_.shape(batch_first ? 1 : 0), args_.batch = x_.shape(batch_first ? 0 : 1);
    if (args_.steps > INT32_MAX || args_.batch > INT32_MAX)
      throw py::value_error("x: expected at most 2147483647 steps and sequences, got shape " + describe_shape(x_));
    const int64_t widest = std::max(config_.input_size, 4 * config_.num_directions * config_.hidden_size);
    if (args_.batch && args_.steps > kLargest / args_.batch / widest)
      throw py::value_error("x: expected as many steps and sequences as fit the memory, got shape " +
                            describe_shape(x_));
    args_.x = view3(x_, batch_first);
    kept_.append(x_);
  }

  void initial_states(const py::object& h0, const py::object& c0) {
    args_.h0 = state("hx (h0)", h0, false, false);
    args_.c0 = state("hx (c0)", c0, true, false);
  }

  void segments(const py::object& reset, const py::object& reset_h, const py::object& reset_c) {
    args_.reset_h = state("reset_state", reset_h, false, true);
    args_.reset_c = state("reset_state", reset_c, true, true);
    if (reset.is_none()) return;
    Axes axes = sequence("", args_.steps, args_.batch, 0);
    axes.pop_back();
    const py::array a = flags("reset", reset, axes);
    args_.reset = view3(a, batch_first_);
    kept_.append(a);
  }

  void lengths(const py::object& lengths) {
    if (lengths.is_none()) return;
    lengths_ = integers("lengths", lengths, {{"B", args_.batch}});
    for (int64_t b = 0; b < args_.batch; ++b)
      if (lengths_.data()[b] < 0 || lengths_.data()[b] > args_.steps)
        throw py::value_error("lengths: expected values within [0, " + std::to_string(args_.steps) + "], got " +
                              std::to_string(lengths_.data()[b]) + " at " + std::to_string(b));
    args_.lengths = lengths_.data();
  }

  void dropout(double p, uint64_t seed, uint64_t call) {
    if (!(p >= 0 && p <= 1)) throw py::value_error("dropout: expected within [0, 1], got " + std::to_string(p));
    args_.dropout = config_.num_layers > 1 ? p : 0, args_.seed = seed, args_.call = call;
  }

  void memory(bool lean, int64_t checkpoint_every) {
    args_.checkpoint_every = positive("checkpoint_every", checkpoint_every, 0);
    args_.lean = lean || checkpoint_every > 0;
  }

  // The caller's memory where it is given, else fresh.
  void outputs(const py::object& output, const py::object& hn, const py::object& cn, bool return_states) {
    const int64_t P = config_.output_size(), H = config_.hidden_size, states = config_.states(), B = args_.batch;
    output_ = target("output", output, sequence("D*P", args_.steps, B, config_.num_directions * P));
    hn_ = target("hn", hn, {{"L*D", states}, {"B", B}, {"P", P}});
    args_.output = view3(output_, batch_first_);
    args_.hn = view3(hn_);
    if (stack_.has_cell_state) {
      const py::array a = target("cn", cn, {{"L*D", states}, {"B", B}, {"H", H}});
      args_.cn = view3(a);
      cn_ = a;
    } else if (!cn.is_none()) {
      throw py::value_error("cn: this cell has no cell state, expected None");
    }
    if (!return_states) return;
    h_all_ = all_states(P, args_.h_all);
    if (stack_.has_cell_state) c_all_ = all_states(H, args_.c_all);
  }

  void weights(const py::object& weights, const py::object& packed, bool training) {
    if (!packed.is_none()) packed_ = &stack_.matching(packed);
    if (py::isinstance<PackedObject>(weights)) {
      if (training) throw py::value_error("weights: expected arrays in training, got packed weights");
      packed_ = &stack_.matching(weights);
    } else if (py::isinstance<py::sequence>(weights)) {
      matrices_ = stack_.layer_weights(weights.cast<py::sequence>(), &kept_weights_);
    } else {
      throw py::type_error("weights: expected a sequence of arrays or packed weights, got " + type_name(weights));
    }
  }

  py::tuple run(bool training) {
    std::unique_ptr<Context> context;
    if (!training) args_.dropout = 0;
    {
      const py::gil_scoped_release release;
      context = rnnfast::forward(config_, args_, packed_ ? nullptr : &matrices_,
                                 packed_ ? packed_->packed.get() : nullptr, training);
    }
    py::object ctx = py::none();
    if (training) {
      kept_.append(output_);
      ctx =
          py::cast(std::make_unique<ContextObject>(std::move(context), kept_, std::move(kept_weights_), batch_first_));
    }
    return py::make_tuple(output_, hn_, cn_, h_all_, c_all_, ctx);
  }

 private:
  Axes sequence(const char* last, int64_t steps, int64_t batch, int64_t size) const {
    const Axis t{"T", steps}, b{"B", batch}, n{last, size};
    return batch_first_ ? Axes{b, t, n} : Axes{t, b, n};
  }

  Array3 state(const char* name, const py::object& object, bool cell, bool broadcast) {
    if (object.is_none()) return {};
    if (cell && !stack_.has_cell_state)
      throw py::value_error(std::string(name) + ": this cell has no cell state, expected None");
    const py::array a = stack_.state(name, object, cell, args_.batch, broadcast);
    kept_.append(a);
    return broadcast ? view_states(a) : view3(a);
  }

  py::array target(const char* name, const py::object& given, const Axes& axes) const {
    if (given.is_none()) return empty(config_.dtype, {axes[0].size, axes[1].size, axes[2].size});
    const py::array a = writeable(name, given, config_.dtype, axes);
    if (overlap(a, x_)) throw py::value_error(std::string(name) + ": expected memory apart from x");
    return a;
  }

  py::array all_states(int64_t n, void*& data) const {
    py::array a = empty(config_.dtype, {args_.steps, config_.states(), args_.batch, n});
    data = a.mutable_data();
    return a;
  }

  const StackObject& stack_;
  const Config& config_;
  const bool batch_first_;
  ForwardArgs args_;
  py::array x_, output_, hn_;
  py::array_t<int64_t> lengths_;
  py::object cn_ = py::none(), h_all_ = py::none(), c_all_ = py::none();
  py::list kept_;  // what the context must keep alive
  std::vector<py::object> kept_weights_;
  std::vector<LayerWeights> matrices_;
  const PackedObject* packed_ = nullptr;
};

}  // namespace

py::tuple StackObject::forward(const py::object& x, const py::object& h0, const py::object& c0,
                               const py::object& weights, bool batch_first, bool training, const py::object& lengths,
                               const py::object& reset, const py::object& reset_h, const py::object& reset_c,
                               bool return_states, double dropout, uint64_t seed, uint64_t call,
                               const py::object& output, const py::object& hn, const py::object& cn,
                               const py::object& packed, bool lean, int64_t checkpoint_every) const {
  ForwardCall forward(*this, x, batch_first);
  forward.initial_states(h0, c0);
  forward.segments(reset, reset_h, reset_c);
  forward.lengths(lengths);
  forward.dropout(dropout, seed, call);
  forward.memory(lean, checkpoint_every);
  forward.weights(weights, packed, training);
  return wanting_memory("x", smaller(training && !lean && !checkpoint_every), [&] {
    forward.outputs(output, hn, cn, return_states);
    return forward.run(training);
  });
}

const PackedObject& StackObject::matching(const py::object& packed) const {
  if (!py::isinstance<PackedObject>(packed))
    throw py::type_error("packed: expected packed weights, got " + type_name(packed));
  const PackedObject& object = packed.cast<const PackedObject&>();
  const Config& other = object.packed->config;
  if (other.cell != config.cell || other.dtype != config.dtype || other.input_size != config.input_size ||
      other.hidden_size != config.hidden_size || other.proj_size != config.proj_size ||
      other.num_layers != config.num_layers || other.num_directions != config.num_directions)
    throw py::value_error("weights: expected weights packed for this configuration");
  return object;
}

PackedObject::PackedObject(const StackObject& stack, const py::sequence& weights) {
  std::vector<py::object> kept;
  const auto matrices = stack.layer_weights(weights, &kept);
  packed = wanting_memory("weights", "", [&] { return std::make_unique<Packed>(stack.config, matrices); });
}

}  // namespace rnnfast::bindings
