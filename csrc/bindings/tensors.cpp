// A forward without a graph on PyTorch's tensors, for loops of single steps: there NumPy views of each tensor, and the Python
// around them, would take longer than the kernels. PyTorch is not linked: its tensors are read through their own methods.
#include "bindings/tensors.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/digest.h"
#include "bindings/stack.h"

namespace rnnfast::bindings {
namespace {

// Method and attribute names, made once and never freed: the interpreter may be gone when statics are.
struct Names {
  PyObject *data_ptr = intern("data_ptr"), *shape = intern("shape"), *stride = intern("stride"),
           *is_contiguous = intern("is_contiguous"), *nbytes = intern("nbytes");
  PyObject* options = py::make_tuple("dtype", "device").release().ptr();

  static PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }
};
const Names& names() {
  static const Names* instance = new Names;
  return *instance;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void* data_of(const py::handle& tensor) {
  void* data = PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr)).ptr());
  if (!data && PyErr_Occurred()) throw py::error_already_set();
  return data;
}

bool is_contiguous(const py::handle& tensor) {
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().is_contiguous)).ptr() == Py_True;
}

// The last `rank` of three integers, from a tuple of as many.
bool read(const py::object& tuple, int rank, int64_t (&values)[3]) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != rank) return false;
  for (int i = 0; i < rank; ++i) values[3 - rank + i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  return !PyErr_Occurred();
}

// A tensor of three axes, or of the last two of them; `fits` where it has so many, elements, and a contiguous last axis.
struct TensorView {
  int64_t shape[3] = {1, 1, 1}, stride[3] = {};
  Array3 array;
  bool fits = false;

  TensorView(const py::handle& tensor, int rank) {
    if (!read(checked(PyObject_GetAttr(tensor.ptr(), names().shape)), rank, shape)) return;
    if (!read(checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().stride)), rank, stride)) return;
    array = {data_of(tensor), stride[0], stride[1]};
    fits = stride[2] == 1 && shape[0] > 0 && shape[1] > 0;
  }
  bool has(int64_t a, int64_t b, int64_t c) const { return fits && shape[0] == a && shape[1] == b && shape[2] == c; }
};

// One call: arguments that are not plain are told by false, and nothing has happened then.
class InferenceCall {
 public:
  InferenceCall(const StackObject& stack, int rank, const Fresh& fresh)
      : stack_(stack), config_(stack.config), rank_(rank), fresh_(fresh) {}

  bool input(const py::object& x, bool batch_first) {
    const TensorView view(x, rank_);
    args_.steps = view.shape[batch_first ? 1 : 0], args_.batch = view.shape[batch_first ? 0 : 1];
    args_.x = view.array;
    if (batch_first) std::swap(args_.x.stride0, args_.x.stride1);
    return view.fits && view.shape[2] == config_.input_size && std::max(args_.steps, args_.batch) <= INT32_MAX;
  }
  bool states(const py::object& h0, const py::object& c0) {
    return state(h0, config_.output_size(), args_.h0) && state(c0, config_.hidden_size, args_.c0);
  }

  py::object output(bool batch_first) {
    const int64_t T = args_.steps, B = args_.batch, width = config_.num_directions * config_.output_size();
    const py::object tensor = batch_first ? make(B, T, width, args_.output) : make(T, B, width, args_.output);
    if (batch_first) std::swap(args_.output.stride0, args_.output.stride1);
    return tensor;
  }
  py::object hn() { return make(config_.states(), args_.batch, config_.output_size(), args_.hn); }
  py::object cn() {
    return stack_.has_cell_state ? make(config_.states(), args_.batch, config_.hidden_size, args_.cn) : py::none();
  }

  void run(const py::object& packed) const {
    const PackedObject& weights = stack_.matching(packed);
    wanting_memory("x", smaller(false), [&] {
      const py::gil_scoped_release release;
      return rnnfast::forward(config_, args_, nullptr, weights.packed.get(), false);
    });
  }

 private:
  bool state(const py::object& tensor, int64_t width, Array3& target) const {
    if (tensor.is_none()) return true;
    const TensorView view(tensor, rank_);
    target = view.array;
    return view.has(config_.states(), args_.batch, width);
  }

  // empty(*shape, dtype=, device=)
  py::object make(int64_t a, int64_t b, int64_t c, Array3& target) const {
    PyObject* arguments[5];
    int count = 0;
    if (rank_ == 3) arguments[count++] = PyLong_FromLongLong(a);
    arguments[count++] = PyLong_FromLongLong(b), arguments[count++] = PyLong_FromLongLong(c);
    arguments[count] = fresh_.dtype.ptr(), arguments[count + 1] = fresh_.device.ptr();
    PyObject* tensor = PyObject_Vectorcall(fresh_.empty.ptr(), arguments, static_cast<size_t>(count), names().options);
    for (int i = 0; i < count; ++i) Py_XDECREF(arguments[i]);
    py::object owned = checked(tensor);
    target = {data_of(owned), b * c, c};
    return owned;
  }

  const StackObject& stack_;
  const Config& config_;
  const int rank_;
  const Fresh& fresh_;
  ForwardArgs args_{};
};

}  // namespace

py::array as_array(const py::object& tensor, const py::dtype& dtype) {
  const auto shape = checked(PyObject_GetAttr(tensor.ptr(), names().shape)).cast<std::vector<py::ssize_t>>();
  auto strides = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().stride)).cast<std::vector<py::ssize_t>>();
  for (py::ssize_t& stride : strides) stride *= dtype.itemsize();
  void* const data = data_of(tensor);
  return data ? py::array(dtype, shape, strides, data, tensor) : py::array(dtype, shape);
}

TensorMemory::TensorMemory(const py::list& tensors) {
  for (const py::handle& tensor : tensors) {
    const py::object bytes = checked(PyObject_GetAttr(tensor.ptr(), names().nbytes));
    contiguous_ = contiguous_ && is_contiguous(tensor);
    pieces_.push_back({py::reinterpret_borrow<py::object>(tensor), data_of(tensor), bytes.cast<size_t>()});
  }
}

bool TensorMemory::holds(const py::list& tensors) const {
  if (!contiguous_ || tensors.size() != pieces_.size()) return false;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const py::handle tensor = tensors[i];
    if (!tensor.is(pieces_[i].tensor) || data_of(tensor) != pieces_[i].data || !is_contiguous(tensor)) return false;
  }
  return true;
}

py::object TensorMemory::digest() const {
  if (!contiguous_) return py::none();
  uint64_t sum = 0;
  for (const Piece& piece : pieces_) sum = bindings::digest(piece.data, piece.bytes, sum);
  return py::int_(sum);
}

py::object StackObject::infer(const py::object& x, const py::object& h0, const py::object& c0, const py::object& packed,
                              bool batch_first, const Fresh& fresh) const {
  InferenceCall call(*this, 3, fresh);
  if (!call.input(x, batch_first) || !call.states(h0, c0)) return py::none();
  const py::object output = call.output(batch_first), hn = call.hn(), cn = call.cn();
  call.run(packed);
  return py::make_tuple(output, hn, cn);
}

py::object StackObject::infer_step(const py::object& x, const py::object& h0, const py::object& c0,
                                   const py::object& packed, const Fresh& fresh) const {
  InferenceCall call(*this, 2, fresh);
  if (config.states() != 1 || !call.input(x, false) || !call.states(h0, c0)) return py::none();
  const py::object h = call.output(false), c = call.cn();
  call.run(packed);
  return py::make_tuple(h, c);
}

}  // namespace rnnfast::bindings
