// rnnfast._cuda: the CUDA engine, by pointers. Python brings all memory (of CuPy or PyTorch) and the stream; its only caller,
// rnnfast/_device, has checked devices, dtypes, shapes and strides. An array is (address, stride, stride, ...), strides in
// elements; None is absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "core/registry.h"
#include "cuda/api.h"

namespace py = pybind11;
using namespace rnnfast;

namespace {

using View = std::optional<std::vector<int64_t>>;

void* address(int64_t value) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): a pointer comes from Python as a number
  return reinterpret_cast<void*>(static_cast<uintptr_t>(value));
}

class Views {
 public:
  explicit Views(const py::dict& views) : views_(views) {}

  Array3 array(const char* name) const {
    const std::vector<int64_t> view = find(name);
    return view.empty() ? Array3{} : Array3{address(view.at(0)), view.at(1), view.at(2)};
  }
  void* data(const char* name) const {
    const std::vector<int64_t> view = find(name);
    return view.empty() ? nullptr : address(view.at(0));
  }

 private:
  std::vector<int64_t> find(const char* name) const {
    if (!views_.contains(name)) return {};
    return views_[name].cast<View>().value_or(std::vector<int64_t>{});
  }
  const py::dict& views_;
};

Config make_config(const std::string& cell, const std::string& dtype, const std::vector<int64_t>& sizes, bool bias,
                   const std::vector<double>& parameters, bool tf32) {
  Config config{-1, Dtype::kFloat32, sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), sizes.at(4), bias, {}};
  for (int i = 0; i < kCellCount; ++i)
    if (cell == kCells[i].name) config.cell = i;
  if (config.cell < 0) throw py::value_error("cell: expected one that _core.cells() names, got '" + cell + "'");
  if (dtype == "float64")
    config.dtype = Dtype::kFloat64;
  else if (dtype == "float16")
    config.dtype = Dtype::kFloat16;
  else if (dtype == "bfloat16")
    config.dtype = Dtype::kBfloat16;
  else if (dtype != "float32")
    throw py::type_error("dtype: expected float32, float64, float16 or bfloat16, got " + dtype);
  config.tf32 = tf32 && config.dtype == Dtype::kFloat32;
  if (parameters.size() > 4) throw py::value_error("parameters: expected at most 4");
  std::copy(parameters.begin(), parameters.end(), config.parameters);
  return config;
}

ForwardArgs make_forward(const py::dict& views, int64_t steps, int64_t batch, double dropout, uint64_t seed,
                         uint64_t call, std::optional<int64_t> checkpoint_every) {
  const Views v(views);
  ForwardArgs args{};
  args.steps = steps, args.batch = batch;
  args.x = v.array("x"), args.output = v.array("output"), args.reset = v.array("reset");
  args.lengths = static_cast<const int64_t*>(v.data("lengths"));
  args.h0 = v.array("h0"), args.c0 = v.array("c0");
  args.reset_h = v.array("reset_h"), args.reset_c = v.array("reset_c");
  args.hn = v.array("hn"), args.cn = v.array("cn"), args.running_c = v.array("running_c");
  args.h_all = v.data("h_all"), args.c_all = v.data("c_all");
  args.dropout = dropout, args.seed = seed, args.call = call;
  args.lean = checkpoint_every.has_value(), args.checkpoint_every = checkpoint_every.value_or(0);
  return args;
}

// For each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr; absent ones None.
std::vector<LayerWeights> make_weights(const std::vector<View>& views) {
  std::vector<LayerWeights> all(views.size() / 5);
  for (size_t i = 0; i < views.size(); ++i) {
    const std::vector<int64_t> view = views[i].value_or(std::vector<int64_t>{});
    if (view.empty()) continue;
    LayerWeights& w = all.at(i / 5);
    Array2* const targets[5] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr};
    *targets[i % 5] = {address(view.at(0)), view.at(1), view.size() > 2 ? view[2] : 1};
  }
  return all;
}

// A configuration and the arrays of one forward call; the backward call reads the same ones.
class Call {
 public:
  Call(const std::string& cell, const std::string& dtype, const std::vector<int64_t>& sizes, bool bias,
       const std::vector<double>& parameters, int64_t steps, int64_t batch, bool training, const py::dict& views,
       const std::vector<View>& weights, double dropout, uint64_t seed, uint64_t call,
       std::optional<int64_t> checkpoint_every, bool tf32)
      : config_(make_config(cell, dtype, sizes, bias, parameters, tf32)),
        args_(make_forward(views, steps, batch, training ? dropout : 0, seed, call, checkpoint_every)),
        weights_(make_weights(weights)),
        training_(training) {}

  std::pair<size_t, size_t> forward_bytes() const {
    const cuda_engine::Sizes sizes = cuda_engine::forward_sizes(config_, args_, training_);
    return {sizes.reserve, sizes.workspace};
  }
  void forward(int64_t reserve, int64_t workspace, int64_t stream) const {
    const cuda_engine::Memory memory = make_memory(reserve, workspace);
    const py::gil_scoped_release release;
    cuda_engine::forward(config_, args_, weights_, training_, memory, address(stream));
  }

  std::string plan() const { return cuda_engine::describe(config_, args_); }

  size_t backward_bytes(const py::dict& views, const std::vector<View>& gradients, bool retain) const {
    return cuda_engine::backward_workspace(config_, args_, make_backward(views, gradients, retain));
  }
  void backward(const py::dict& views, const std::vector<View>& gradients, bool retain, int64_t reserve,
                int64_t workspace, int64_t stream) const {
    const BackwardArgs args = make_backward(views, gradients, retain);
    const cuda_engine::Memory memory = make_memory(reserve, workspace);
    const py::gil_scoped_release release;
    cuda_engine::backward(config_, args_, args, memory, address(stream));
  }

 private:
  static cuda_engine::Memory make_memory(int64_t reserve, int64_t workspace) {
    return {static_cast<uint8_t*>(address(reserve)), static_cast<uint8_t*>(address(workspace))};
  }

  BackwardArgs make_backward(const py::dict& views, const std::vector<View>& gradients, bool retain) const {
    const Views v(views);
    BackwardArgs args{};
    args.grad_output = v.array("grad_output");
    args.grad_hn = v.array("grad_hn"), args.grad_cn = v.array("grad_cn");
    args.grad_h_all = v.data("grad_h_all"), args.grad_c_all = v.data("grad_c_all");
    args.grad_x = v.array("grad_x");
    args.grad_h0 = v.array("grad_h0"), args.grad_c0 = v.array("grad_c0");
    args.grad_reset_h = v.array("grad_reset_h"), args.grad_reset_c = v.array("grad_reset_c");
    args.record_h = v.data("record_h");
    args.weights = weights_;
    args.grad_weights = make_weights(gradients);
    args.retain = retain;
    return args;
  }

  const Config config_;
  const ForwardArgs args_;
  const std::vector<LayerWeights> weights_;
  const bool training_;
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA engine: the whole time loop of recurrent layers on a device, by pointers.";
  py::class_<Call>(m, "Call", "One forward call, and its backward.")
      .def(py::init<const std::string&, const std::string&, const std::vector<int64_t>&, bool,
                    const std::vector<double>&, int64_t, int64_t, bool, const py::dict&, const std::vector<View>&,
                    double, uint64_t, uint64_t, std::optional<int64_t>, bool>(),
           py::kw_only(), py::arg("cell"), py::arg("dtype"), py::arg("sizes"), py::arg("bias"), py::arg("parameters"),
           py::arg("steps"), py::arg("batch"), py::arg("training"), py::arg("views"), py::arg("weights"),
           py::arg("dropout"), py::arg("seed"), py::arg("call"), py::arg("checkpoint_every"), py::arg("tf32"))
      .def("forward_bytes", &Call::forward_bytes, "(reserve, workspace)")
      .def("forward", &Call::forward, py::arg("reserve"), py::arg("workspace"), py::arg("stream"))
      .def("plan", &Call::plan, "Which kernels serve it, in words.")
      .def("backward_bytes", &Call::backward_bytes, py::arg("views"), py::arg("gradients"), py::arg("retain"),
           "workspace")
      .def("backward", &Call::backward, py::arg("views"), py::arg("gradients"), py::arg("retain"), py::arg("reserve"),
           py::arg("workspace"), py::arg("stream"));
  m.def("set_path", &cuda_engine::set_path, py::arg("path"),
        "'generic': a launch for each step, even where all steps fit one launch; 'grid', 'cluster': blocks that share "
        "the "
        "hidden units, even where one block would do, all of the device or those of a cluster; '': the best.");
  m.def("device_count", &cuda_engine::device_count, "0 where there is no driver.");
  m.def("device_description", &cuda_engine::device_description, "The current device, or why there is none.");
  m.def("launches", &cuda_engine::launches, "In the emulator: how many kernels this thread has launched.");
  m.def("barriers", &cuda_engine::barriers,
        "In the emulator: how many barriers blocks have come to, not in vain: a measure of the steps they did.");
  m.def("run_backwards", &cuda_engine::run_backwards, py::arg("on"),
        "In the emulator: run the threads of a block in the opposite order.");
  m.def("set_multiprocessors", &cuda_engine::set_multiprocessors, py::arg("count"), py::arg("cluster") = 16,
        "In the emulator: how many the device has that plans are made for, 132 at first, and how many blocks its "
        "clusters.");
  m.attr("emulated") = cuda_engine::emulated();
  m.attr("architectures") = RNNFAST_CUDA_ARCHITECTURES;
}
