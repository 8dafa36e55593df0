// A forward without a graph on PyTorch's tensors, for loops of single steps: there NumPy views of each tensor, and the Python
// around them, would take longer than the kernels. PyTorch is not linked: its tensors are read through their own methods.
#include "bindings/tensors.h"

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

// Three integers of a tuple.
bool read(const py::object& tuple, int64_t (&values)[3]) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != 3) return false;
  for (int i = 0; i < 3; ++i) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  return !PyErr_Occurred();
}

// A tensor of three axes, the last one contiguous; `fits` is false for any other.
struct TensorView {
  int64_t shape[3], stride[3];
  Array3 array;
  bool fits = false;

  explicit TensorView(const py::handle& tensor) {
    if (!read(checked(PyObject_GetAttr(tensor.ptr(), names().shape)), shape)) return;
    if (!read(checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().stride)), stride)) return;
    array = {data_of(tensor), stride[0], stride[1]};
    fits = stride[2] == 1 && shape[0] > 0 && shape[1] > 0;
  }
  bool has(int64_t a, int64_t b, int64_t c) const { return fits && shape[0] == a && shape[1] == b && shape[2] == c; }
};

}  // namespace

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
                              bool batch_first, const py::object& empty, const py::object& dtype,
                              const py::object& device) const {
  const TensorView input(x);
  if (!input.fits || input.shape[2] != config.input_size) return py::none();
  ForwardArgs args{};
  args.steps = input.shape[batch_first ? 1 : 0], args.batch = input.shape[batch_first ? 0 : 1];
  if (args.steps > INT32_MAX || args.batch > INT32_MAX) return py::none();
  args.x = input.array;
  if (batch_first) std::swap(args.x.stride0, args.x.stride1);
  const int64_t states = config.states(), P = config.output_size(), H = config.hidden_size;
  const auto state = [&](const py::object& tensor, int64_t width, Array3& target) {
    if (tensor.is_none()) return true;
    const TensorView view(tensor);
    target = view.array;
    return view.has(states, args.batch, width);
  };
  if (!state(h0, P, args.h0) || !state(c0, H, args.c0)) return py::none();
  const auto fresh = [&](int64_t a, int64_t b, int64_t c, Array3& target) {
    PyObject* const shape[5] = {PyLong_FromLongLong(a), PyLong_FromLongLong(b), PyLong_FromLongLong(c), dtype.ptr(),
                                device.ptr()};
    py::object tensor = py::reinterpret_steal<py::object>(PyObject_Vectorcall(empty.ptr(), shape, 3, names().options));
    for (int i = 0; i < 3; ++i) Py_XDECREF(shape[i]);
    if (!tensor) throw py::error_already_set();
    target = {data_of(tensor), b * c, c};
    return tensor;
  };
  const int64_t width = config.num_directions * P;
  py::object output = fresh(input.shape[0], input.shape[1], width, args.output), cn = py::none();
  if (batch_first) std::swap(args.output.stride0, args.output.stride1);
  py::object hn = fresh(states, args.batch, P, args.hn);
  if (has_cell_state) cn = fresh(states, args.batch, H, args.cn);
  const PackedObject& weights = matching(packed);
  {
    const py::gil_scoped_release release;
    rnnfast::forward(config, args, nullptr, weights.packed.get(), false);
  }
  return py::make_tuple(output, hn, cn, py::none(), py::none());
}

}  // namespace rnnfast::bindings
