// Python's view of a stack of layers: configuration, packed weights, the context of a forward call, a stream.
#pragma once

#include <memory>
#include <optional>

#include "bindings/array.h"
#include "bindings/tensors.h"

namespace rnnfast::bindings {

// What takes less memory than a call that found too little.
inline const char* smaller(bool keeps_gates) {
  return keeps_gates ? "; lean=True, checkpoint_every=k (in the forward call) or shorter sequences take less"
                     : "; fewer or shorter sequences take less";
}

class StackObject;

class PackedObject {
 public:
  PackedObject(const StackObject& stack, const py::sequence& weights);
  std::unique_ptr<Packed> packed;
};

// The context of one training-mode forward, with the arrays that it must keep alive.
class ContextObject {
 public:
  ContextObject(std::unique_ptr<Context> context, py::list kept, std::vector<py::object> weights, bool batch_first);
  py::tuple backward(const py::object& grad_output, const py::object& grad_hn, const py::object& grad_cn,
                     const py::object& grad_h_all, const py::object& grad_c_all, bool need_grad_x,
                     bool need_grad_weights, bool retain, bool record, const py::object& grad_x, bool need_grad_state);
  size_t reserve_bytes() const { return context_->reserve_bytes(); }
  bool consumed() const { return context_->consumed; }
  std::string plan() const;

  // Read these arrays, of the same contents, in place of those that the forward was given: for a caller that cannot
  // promise to leave their memory alone (a compiler that plans memory sees the arguments of calls, not this object).
  void rebind(const StackObject& stack, const py::object& x, const py::object& h0, const py::object& c0,
              const py::sequence& weights, const py::object& reset, const py::object& reset_h,
              const py::object& reset_c, const py::object& output);

 private:
  std::unique_ptr<Context> context_;
  py::list kept_;
  std::vector<py::object> weights_;
  bool batch_first_, busy_ = false;
};

class StackObject {
 public:
  StackObject(const std::string& cell, const std::string& dtype, int64_t input_size, int64_t hidden_size,
              int64_t proj_size, int64_t num_layers, int64_t num_directions, bool bias,
              const std::vector<double>& parameters);

  // (output, hn, cn, h_all, c_all, context); what was not asked for, or does not exist, is None.
  py::tuple forward(const py::object& x, const py::object& h0, const py::object& c0, const py::object& weights,
                    bool batch_first, bool training, const py::object& lengths, const py::object& reset,
                    const py::object& reset_h, const py::object& reset_c, bool return_states, double dropout,
                    uint64_t seed, uint64_t call, const py::object& output, const py::object& hn, const py::object& cn,
                    const py::object& packed, bool lean, int64_t checkpoint_every) const;

  // Inference on PyTorch's CPU tensors of the right dtype, into fresh ones: (output, hn, cn), or None where a shape or a layout
  // is not the plain one. One step of one layer, [B, .] to (h, c).
  py::object infer(const py::object& x, const py::object& h0, const py::object& c0, const py::object& packed,
                   bool batch_first, const Fresh& fresh) const;
  py::object infer_step(const py::object& x, const py::object& h0, const py::object& c0, const py::object& packed,
                        const Fresh& fresh) const;

  const PackedObject& matching(const py::object& packed) const;  // it, if it belongs to this configuration
  std::vector<LayerWeights> layer_weights(const py::sequence& weights, std::vector<py::object>* kept) const;
  py::array state(const char* name, const py::handle& object, bool cell, int64_t batch, bool broadcast) const;

  Config config;
  bool has_cell_state;
};

// One step after another with pinned weights and the state inside.
class StreamObject {
 public:
  StreamObject(const StackObject& stack, std::shared_ptr<PackedObject> packed, int64_t batch_size);
  py::array step(const py::object& x, const py::object& reset, const py::object& out);
  py::object get_state() const;
  void set_state(const py::object& h, const py::object& c);
  void reorder(const py::object& rows);
  void set_packed(std::shared_ptr<PackedObject> packed);
  std::unique_ptr<StreamObject> fork() const;
  void close();
  bool closed() const { return !packed_; }

 private:
  void require_open() const;
  py::array zeros(int64_t width) const;  // [L, B, width]
  const StackObject stack_;
  std::shared_ptr<PackedObject> packed_;
  int64_t batch_;
  py::array h_[2], c_[2];  // the state now, and the memory of the next
  bool busy_ = false;
};

}  // namespace rnnfast::bindings
