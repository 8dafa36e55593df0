// rnnfast._core: the CPU engine. rnnfast/functional.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/stack.h"
#include "bindings/tensors.h"
#include "core/registry.h"

namespace py = pybind11;
using namespace rnnfast;
using namespace rnnfast::bindings;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The CPU engine: the whole time loop of recurrent layers, forward and backward.";
  choose_isa();
  choose_split();

  // First, because the signatures of the others name it.
  py::class_<StackObject> stack(m, "Stack", "The configuration of a stack of recurrent layers.");

  py::class_<Fresh>(m, "Fresh", "What makes new tensors: torch.empty, and what it is told beside the shape.")
      .def(py::init([](py::object empty, py::object dtype, py::object device) {
             return Fresh{std::move(empty), std::move(dtype), std::move(device)};
           }),
           py::arg("empty"), py::arg("dtype"), py::arg("device"));

  py::class_<PackedObject, std::shared_ptr<PackedObject>>(m, "Packed",
                                                          "Weights in the kernels' order, pinned when made.")
      .def(py::init<const StackObject&, const py::sequence&>(), py::arg("stack"), py::arg("weights"))
      .def_property_readonly("nbytes", [](const PackedObject& p) { return p.packed->buffer.size(); });

  py::class_<ContextObject>(m, "Context", "What a training-mode forward keeps for its backward.")
      .def("backward", &ContextObject::backward, py::arg("grad_output"), py::arg("grad_hn"), py::arg("grad_cn"),
           py::arg("grad_h_all"), py::arg("grad_c_all"), py::arg("need_grad_x"), py::arg("need_grad_weights"),
           py::arg("retain"), py::arg("record"), py::arg("grad_x") = py::none(), py::arg("need_grad_state") = true,
           "(grad_x, grad_h0, grad_c0, [grad_weights], grad_reset_h, grad_reset_c, grad_h)")
      .def("rebind", &ContextObject::rebind, py::arg("stack"), py::arg("x"), py::arg("h0"), py::arg("c0"),
           py::arg("weights"), py::arg("reset"), py::arg("reset_h"), py::arg("reset_c"), py::arg("output"),
           "Read these arrays from now on: of the same contents as the forward's, but in other memory.")
      .def_property_readonly("nbytes", &ContextObject::reserve_bytes)
      .def_property_readonly("consumed", &ContextObject::consumed)
      .def_property_readonly("plan", &ContextObject::plan);

  stack
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                    const std::vector<double>&>(),
           py::arg("cell"), py::arg("dtype"), py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size"),
           py::arg("num_layers"), py::arg("num_directions"), py::arg("bias"), py::arg("parameters"))
      .def("forward", &StackObject::forward, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
           py::arg("batch_first"), py::arg("training"), py::arg("lengths"), py::arg("reset"), py::arg("reset_h"),
           py::arg("reset_c"), py::arg("return_states"), py::arg("dropout"), py::arg("seed"), py::arg("call"),
           py::arg("output") = py::none(), py::arg("hn") = py::none(), py::arg("cn") = py::none(),
           py::arg("packed") = py::none(), py::arg("lean") = false, py::arg("checkpoint_every") = 0,
           "(output, hn, cn, h_all, c_all, context)")
      .def("infer", &StackObject::infer, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("packed"),
           py::arg("batch_first"), py::arg("fresh"),
           "Inference on PyTorch's tensors: (output, hn, cn), or None where they are not the plain ones.")
      .def("infer_step", &StackObject::infer_step, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("packed"),
           py::arg("fresh"), "One step of one layer, [B, .] to (h, c); None as for `infer`.");

  py::class_<StreamObject>(m, "Stream", "One step after another, with pinned weights and the state inside.")
      .def(py::init<const StackObject&, std::shared_ptr<PackedObject>, int64_t>(), py::arg("stack"), py::arg("packed"),
           py::arg("batch_size"))
      .def("step", &StreamObject::step, py::arg("x_t"), py::arg("reset") = py::none(), py::arg("out") = py::none())
      .def("get_state", &StreamObject::get_state)
      .def("set_state", &StreamObject::set_state, py::arg("h"), py::arg("c") = py::none())
      .def("reorder", &StreamObject::reorder, py::arg("rows"))
      .def("set_packed", &StreamObject::set_packed, py::arg("packed"))
      .def("fork", &StreamObject::fork)
      .def("close", &StreamObject::close)
      .def_property_readonly("closed", &StreamObject::closed);

  m.def(
      "cells",
      [] {
        py::list all;
        for (int i = 0; i < kCellCount; ++i)
          all.append(py::make_tuple(kCells[i].name, kCells[i].gates, kCells[i].cell_state, kCells[i].parameters));
        return all;
      },
      "(name, gates, has a cell state, parameters) of every cell.");

  m.def("as_array", &as_array, py::arg("tensor"), py::arg("dtype"), "The memory of a strided CPU tensor of PyTorch.");

  py::class_<TensorMemory>(m, "TensorMemory", "Where some of PyTorch's tensors lie, and what is there.")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("holds", &TensorMemory::holds, py::arg("tensors"),
           "Whether they are the same objects, contiguous, in the same memory.")
      .def("digest", &TensorMemory::digest,
           "A number that changes when a byte of the tensors does; None where one is not contiguous.");

  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &possible_isas, "Those that this machine can run, best first.");
  m.def("compiled_isas", &compiled_isas);
  m.def("get_num_threads", &get_num_threads);
  m.def(
      "set_num_threads",
      [](int n) {
        if (n < 1) throw py::value_error("n: expected an integer >= 1, got " + std::to_string(n));
        set_num_threads(n);
      },
      py::arg("n"));
  m.def("set_split", &set_split, py::arg("split"), "Force how calls are shared between threads; '' is the cost model.");
  m.def(
      "barrier_time",
      [](int threads) {
        if (threads < 1) throw py::value_error("threads: expected >= 1, got " + std::to_string(threads));
        const py::gil_scoped_release release;
        return barrier_time(threads);
      },
      py::arg("threads"), "Seconds in which threads that have nothing else to do meet.");
  m.def(
      "fma_peak",
      [](int threads, double seconds, const std::string& dtype) {
        if (threads < 1) throw py::value_error("threads: expected >= 1, got " + std::to_string(threads));
        const Dtype type = dtype == "float64" ? Dtype::kFloat64 : Dtype::kFloat32;
        const py::gil_scoped_release release;
        return fma_peak(threads, seconds, type);
      },
      py::arg("threads"), py::arg("seconds") = 0.2, py::arg("dtype") = "float32", "GFLOP/s of fused multiply-adds.");
  m.def("pooled_bytes", &pooled_bytes, "Memory held for reuse.");
  m.def("release_pool", &release_pool);
  m.attr("version") = RNNFAST_VERSION;
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // names itself
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
}
