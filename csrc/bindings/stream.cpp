#include <cstring>

#include "bindings/stack.h"

namespace rnnfast::bindings {

StreamObject::StreamObject(const StackObject& stack, std::shared_ptr<PackedObject> packed, int64_t batch_size)
    : stack_(stack), packed_(std::move(packed)), batch_(positive("batch_size", batch_size)) {
  if (stack.config.num_directions != 1)
    throw py::value_error("stream: expected one direction, got a bidirectional layer");
  const Config& config = stack.config;
  const double rows = 2.0 * static_cast<double>(config.states()) * static_cast<double>(batch_);
  const int64_t width = config.output_size() + (stack.has_cell_state ? config.hidden_size : 0);
  wanting_memory("batch_size", "", [&] {
    require_memory(rows * static_cast<double>(width * item_size(config.dtype)));
    for (int i = 0; i < 2; ++i) {
      h_[i] = zeros(config.output_size());
      if (stack.has_cell_state) c_[i] = zeros(config.hidden_size);
    }
  });
}

py::array StreamObject::zeros(int64_t width) const {
  py::array a = empty(stack_.config.dtype, {stack_.config.states(), batch_, width});
  std::memset(a.mutable_data(), 0, a.nbytes());
  return a;
}

void StreamObject::require_open() const {
  if (!packed_) throw std::runtime_error("stream: this stream is closed");
}

py::array StreamObject::step(const py::object& x, const py::object& reset, const py::object& out) {
  require_open();
  const Busy busy(busy_, "stream");
  const Config& config = stack_.config;
  const py::array xa = readable("x_t", x, config.dtype, {{"B", batch_}, {"I", config.input_size}});
  const Axes axes{{"B", batch_}, {"P", config.output_size()}};
  const py::array y =
      out.is_none() ? empty(config.dtype, {batch_, config.output_size()}) : writeable("out", out, config.dtype, axes);
  if (!out.is_none() && overlap(y, xa)) throw py::value_error("out: expected memory apart from x_t");
  ForwardArgs args;
  args.steps = 1, args.batch = batch_;
  args.x = {const_cast<void*>(xa.data()), 0, xa.strides(0) / xa.itemsize()};
  args.output = {const_cast<void*>(y.data()), 0, y.strides(0) / y.itemsize()};
  py::array cut;
  if (!reset.is_none()) {
    cut = flags("reset", reset, {{"B", batch_}});
    args.reset = {const_cast<void*>(cut.data()), 0, cut.strides(0)};
  }
  args.h0 = view3(h_[0]), args.hn = view3(h_[1]);
  if (stack_.has_cell_state) args.c0 = view3(c_[0]), args.cn = view3(c_[1]);
  const std::shared_ptr<PackedObject> pinned = packed_;
  {
    const py::gil_scoped_release release;
    rnnfast::forward(config, args, nullptr, pinned->packed.get(), false);
  }
  std::swap(h_[0], h_[1]);
  std::swap(c_[0], c_[1]);
  return y;
}

py::object StreamObject::get_state() const {
  require_open();
  const auto copy = [](const py::array& a) { return a.attr("copy")(); };
  if (!stack_.has_cell_state) return copy(h_[0]);
  return py::make_tuple(copy(h_[0]), copy(c_[0]));
}

void StreamObject::set_state(const py::object& h, const py::object& c) {
  require_open();
  const Busy busy(busy_, "stream");
  const auto check = [&](const char* name, const py::object& object, bool cell) -> py::object {
    return object.is_none() ? object : py::object(contiguous(name, stack_.state(name, object, cell, batch_, false)));
  };
  if (!stack_.has_cell_state && !c.is_none())
    throw py::value_error("state: this cell has no cell state, expected one array");
  const py::object ha = check("state", h, false), ca = check("state", c, true);
  const auto put = [](const py::object& source, py::array& target) {
    if (source.is_none())
      std::memset(target.mutable_data(), 0, target.nbytes());
    else
      std::memmove(target.mutable_data(), source.cast<py::array>().data(), target.nbytes());
  };
  put(ha, h_[0]);
  if (stack_.has_cell_state) put(ca, c_[0]);
}

void StreamObject::reorder(const py::object& rows) {
  require_open();
  const Busy busy(busy_, "stream");
  const py::array_t<int64_t> index = integers("rows", rows, {{"B", batch_}});
  for (int64_t b = 0; b < batch_; ++b)
    if (index.data()[b] < 0 || index.data()[b] >= batch_)
      throw py::value_error("rows: expected values within [0, " + std::to_string(batch_) + "), got " +
                            std::to_string(index.data()[b]));
  const auto gather = [&](py::array(&state)[2]) {
    const size_t row = state[0].shape(2) * state[0].itemsize();
    for (int64_t layer = 0; layer < state[0].shape(0); ++layer)
      for (int64_t b = 0; b < batch_; ++b)
        std::memcpy(static_cast<char*>(state[1].mutable_data()) + (layer * batch_ + b) * row,
                    static_cast<const char*>(state[0].data()) + (layer * batch_ + index.data()[b]) * row, row);
    std::swap(state[0], state[1]);
  };
  gather(h_);
  if (stack_.has_cell_state) gather(c_);
}

void StreamObject::set_packed(std::shared_ptr<PackedObject> packed) {
  require_open();
  stack_.matching(py::cast(packed));
  packed_ = std::move(packed);
}

std::unique_ptr<StreamObject> StreamObject::fork() const {
  require_open();
  auto other = std::make_unique<StreamObject>(stack_, packed_, batch_);
  std::memcpy(other->h_[0].mutable_data(), h_[0].data(), h_[0].nbytes());
  if (stack_.has_cell_state) std::memcpy(other->c_[0].mutable_data(), c_[0].data(), c_[0].nbytes());
  return other;
}

void StreamObject::close() {
  packed_.reset();
  h_[0] = h_[1] = c_[0] = c_[1] = py::array();
}

}  // namespace rnnfast::bindings
