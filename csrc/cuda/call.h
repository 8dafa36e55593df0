// From the arguments of a call to the items of its layers: every pointer and stride that the kernels read is set here, and
// all memory is laid out, in the same order when it is only counted.
#pragma once

#include <algorithm>
#include <vector>

#include "core/registry.h"
#include "cuda/api.h"
#include "cuda/item.h"

RNNFAST_BEGIN

// Of the cell, what items hold.
struct Gates {
  int gates, slots, recurrent;
  int input[kMaxGates], recurrent_order[kMaxGates];
  bool cell_state;

  template <class Cell>
  static Gates of() {
    static_assert(Cell::kGates <= kMaxGates);
    Gates g{Cell::kGates, Cell::kSlots, Cell::kRecurrent, {}, {}, Cell::kCellState};
    std::copy(Cell::kInputGate, Cell::kInputGate + Cell::kGates, g.input);
    std::copy(Cell::kRecurrentGate, Cell::kRecurrentGate + Cell::kGates, g.recurrent_order);
    return g;
  }
};

template <class T, class U = T>
Sequence<U> sequence(const Array3& a, int64_t shift = 0) {
  return {a.data ? static_cast<T*>(a.data) + shift : nullptr, a.stride0, a.stride1};
}
// Row `index` of [L * D, B, .] as rows by batch.
template <class T, class U = T>
Rows<U> rows(const Array3& a, int64_t index) {
  return {a.data ? static_cast<T*>(a.data) + index * a.stride0 : nullptr, a.stride1};
}
// [T, L * D, B, n] at one L * D.
template <class T, class U = T>
Sequence<U> states(const void* data, int64_t index, int64_t count, int64_t batch, int64_t n) {
  if (!data) return {nullptr, 0, 0};
  return {const_cast<T*>(static_cast<const T*>(data)) + index * batch * n, count * batch * n, n};
}
template <class T>
Matrix<T> matrix(const Array2& a) {
  return {static_cast<const T*>(a.data), a.stride0, a.stride1};
}
template <class T>
Matrix<T> vector(const Array2& a) {  // as one row
  return {static_cast<const T*>(a.data), 0, a.stride0};
}

template <class T>
class Call {
  using A = Arithmetic<T>;
  // Of pre-activations, where they are not kept, and of gates in a window of lean mode: many, since each launch of a
  // persistent kernel loads the weights anew. In the emulator so few that its tests see more than one chunk.
  static constexpr int64_t kChunkBytes = cuda_runtime::kEmulated ? 1 << 10 : 128 << 20;

 public:
  Call(const Config& config, const ForwardArgs& args, const Gates& gates, bool training)
      : config_(config), args_(args), gates_(gates), training_(training), lean_(training && args.lean) {
    const int64_t step = std::max<int64_t>(1, args.batch * gates.slots * config.hidden_size * int64_t{sizeof(A)});
    const int64_t most = std::max<int64_t>(1, args.steps);
    const int64_t steps = std::clamp<int64_t>(kChunkBytes / step, 1, most);
    window_ = !lean_ ? most : args.checkpoint_every > 0 ? std::min(args.checkpoint_every, most) : steps;
    chunk_ = keeps() ? most : std::min(steps, window_);
  }

  // In lean mode the backward pass has memory for the gates of a window, the forward pass for those of a chunk.
  void lay_out(Carver& reserve, Carver& workspace, bool backward = false) {
    sequences(reserve, workspace);
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      layers_.push_back({{}, config_.num_directions});
      for (int64_t d = 0; d < config_.num_directions; ++d) {
        Item<T>& item = layers_.back().item[d];
        item = arguments(layer, d);
        if (lean_ && gates_.cell_state) item.checkpoints = reserve.take<A>((windows() - 1) * item.batch * item.H);
        if (keeps())
          take_memory(item, args_.steps, args_.steps, reserve);
        else if (layer == 0)
          take_memory(item, backward ? window_ : chunk_, backward ? window_ : 1, workspace);
        else
          share_memory(item, layers_[0].item[d]);
      }
    }
  }

  void set_weights(const std::vector<LayerWeights>& weights) {
    for (size_t i = 0; i < weights.size(); ++i) {
      Item<T>& item = layers_[i / config_.num_directions].item[i % config_.num_directions];
      const LayerWeights& w = weights[i];
      item.w_ih = matrix<T>(w.w_ih), item.w_hh = matrix<T>(w.w_hh), item.w_hr = matrix<T>(w.w_hr);
      item.b_ih = vector<T>(w.b_ih), item.b_hh = vector<T>(w.b_hh);
    }
  }

  const Config& config() const { return config_; }
  const ForwardArgs& args() const { return args_; }
  const Gates& gates() const { return gates_; }
  int64_t chunk() const { return chunk_; }  // steps whose input product is made at once
  bool lean() const { return lean_; }
  bool keeps() const { return training_ && !lean_; }  // gates and c of every step
  int64_t window() const { return window_; }          // steps that the backward pass has gates for at once
  int64_t windows() const { return std::max<int64_t>(1, (args_.steps + window_ - 1) / window_); }
  int64_t width() const { return config_.num_directions * config_.output_size(); }
  Items<T>& layer(int64_t layer) { return layers_[layer]; }
  const Sequence<T>& output(int64_t layer) const { return output_[layer]; }
  bool drops() const { return training_ && args_.dropout > 0; }
  const Sequence<T>& dropped(int64_t layer) const { return dropped_[layer]; }

  DropoutKey dropout_key(int64_t layer) const {
    const double p = args_.dropout;
    return {args_.seed,
            args_.call,
            static_cast<uint32_t>(layer),
            static_cast<uint32_t>(p * 4294967296.0 * (p < 1)),
            p < 1 ? 1 / (1 - p) : 0.0,
            p >= 1};
  }

  Sequence<T> fresh_sequence(Carver& memory) const {
    return {memory.take<T>(args_.steps * args_.batch * width()), args_.batch * width(), width()};
  }

 private:
  // The outputs of all layers; the last is the caller's. In inference two buffers serve in turn; in lean mode dropout is
  // applied anew, in one buffer.
  void sequences(Carver& reserve, Carver& workspace) {
    for (int64_t layer = 0; layer + 1 < config_.num_layers; ++layer) {
      output_.push_back(training_ || layer < 2 ? fresh_sequence(training_ ? reserve : workspace) : output_[layer - 2]);
      if (!drops())
        dropped_.push_back(output_.back());
      else
        dropped_.push_back(lean_ && layer > 0 ? dropped_[0] : fresh_sequence(lean_ ? workspace : reserve));
    }
    output_.push_back(sequence<T>(args_.output));
  }

  Item<T> arguments(int64_t layer, int64_t d) const {
    const int64_t index = layer * config_.num_directions + d, P = config_.output_size(), H = config_.hidden_size;
    Item<T> item{};
    item.steps = args_.steps, item.batch = args_.batch;
    item.I = config_.layer_input(layer), item.H = H, item.P = P;
    item.reverse = d == 1, item.projected = config_.proj_size > 0, item.keep = keeps();
    item.tf32 = config_.tf32;
    item.gates = gates_.gates, item.slot_count = gates_.slots, item.recurrent = gates_.recurrent;
    std::copy(gates_.input, gates_.input + kMaxGates, item.input_gate);
    std::copy(gates_.recurrent_order, gates_.recurrent_order + kMaxGates, item.recurrent_gate);
    item.x = sequence<const T>(args_.x);
    if (layer > 0) item.x = {dropped_[layer - 1].data, dropped_[layer - 1].t_stride, dropped_[layer - 1].b_stride};
    item.out = output_[layer];
    if (item.out.data) item.out.data += d * P;
    item.reset = sequence<const uint8_t>(args_.reset);
    item.lengths = args_.lengths;
    item.h0 = rows<const T>(args_.h0, index), item.c0 = rows<const T>(args_.c0, index);
    item.reset_h = rows<const T>(args_.reset_h, index), item.reset_c = rows<const T>(args_.reset_c, index);
    item.hn = rows<T>(args_.hn, index), item.cn = rows<T>(args_.cn, index);
    item.running_c = rows<A>(args_.running_c, index);
    item.h_all = states<T>(args_.h_all, index, config_.states(), args_.batch, P);
    item.c_all = states<T>(args_.c_all, index, config_.states(), args_.batch, H);
    return item;
  }

  void take_memory(Item<T>& item, int64_t slot_steps, int64_t steps, Carver& memory) const {
    item.slots = memory.take<A>(slot_steps * item.batch * item.slot_count * item.H);
    if (gates_.cell_state) item.cells = memory.take<A>(steps * item.batch * item.H);
    if (item.projected) item.raw = memory.take<A>(steps * item.batch * item.H);
  }
  static void share_memory(Item<T>& item, const Item<T>& first) {
    item.slots = first.slots, item.cells = first.cells, item.raw = first.raw;
  }

  const Config& config_;
  const ForwardArgs& args_;
  const Gates gates_;
  const bool training_, lean_;
  int64_t window_, chunk_;
  std::vector<Items<T>> layers_;
  std::vector<Sequence<T>> output_, dropped_;
};

RNNFAST_END
