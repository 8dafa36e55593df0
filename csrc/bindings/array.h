// NumPy arrays at the edge: every argument is checked here, once, and an error names the argument, what was expected
// and what came. What passes is a pointer with strides; nothing is converted silently.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "core/api.h"

namespace rnnfast::bindings {

namespace py = pybind11;

inline const char* dtype_name(Dtype dtype) { return dtype == Dtype::kFloat32 ? "float32" : "float64"; }
inline py::dtype numpy_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? py::dtype::of<float>() : py::dtype::of<double>();
}
inline int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 8; }

inline std::string type_name(const py::handle& object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// "[T, B, 3]" for {-1, -1, 3} with the names T, B, I of the open axes.
struct Axis {
  const char* name;
  int64_t size;  // -1: any
};
using Axes = std::vector<Axis>;

inline std::string describe(const Axes& axes) {
  std::string text = "[";
  for (const Axis& axis : axes)
    text += (text.size() > 1 ? ", " : "") +
            (axis.size < 0 ? std::string(axis.name) : std::string(axis.name) + "=" + std::to_string(axis.size));
  return text + "]";
}
inline std::string describe_shape(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

inline py::array require_array(const char* name, const py::handle& object, Dtype dtype) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error(std::string(name) + ": expected a numpy.ndarray of " + dtype_name(dtype) + ", got " +
                         type_name(object));
  py::array a = py::reinterpret_borrow<py::array>(object);
  const py::dtype expected = numpy_dtype(dtype);
  if (a.dtype().num() != expected.num() || !(a.dtype().byteorder() == '=' || a.dtype().byteorder() == '|'))
    throw py::type_error(std::string(name) + ": expected dtype " + dtype_name(dtype) + ", got " +
                         std::string(py::str(a.dtype())) + " (nothing is converted silently)");
  return a;
}

inline void require_shape(const char* name, const py::array& a, const Axes& axes) {
  bool fits = a.ndim() == static_cast<py::ssize_t>(axes.size());
  for (size_t i = 0; fits && i < axes.size(); ++i) fits = axes[i].size < 0 || a.shape(i) == axes[i].size;
  if (!fits)
    throw py::value_error(std::string(name) + ": expected shape " + describe(axes) + ", got " + describe_shape(a));
}

inline void require_writeable(const char* name, const py::array& a) {
  if (!a.writeable()) throw py::value_error(std::string(name) + ": expected a writeable array, got a read-only one");
}

// Elements of stride; the kernels cannot read strides that are no multiple of the element, or unaligned data.
inline bool element_strides(const py::array& a) {
  const auto size = a.itemsize();
  if (reinterpret_cast<uintptr_t>(a.data()) % size != 0) return false;
  for (py::ssize_t i = 0; i < a.ndim(); ++i)
    if (a.strides(i) % size != 0) return false;
  return true;
}
inline bool rows_contiguous(const py::array& a) {
  const py::ssize_t last = a.ndim() - 1;
  if (a.size() == 0) return true;  // nothing is read, and strides may be anything
  return element_strides(a) && (a.shape(last) <= 1 || a.strides(last) == a.itemsize());
}
[[noreturn]] inline void throw_memory_error(const std::string& text) {
  PyErr_SetString(PyExc_MemoryError, text.c_str());
  throw py::error_already_set();
}
// What `call` returns; where there is no memory for it, the error says what wants it, and what would take less.
template <class Call>
auto wanting_memory(const char* name, const char* less, const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc& error) {
    throw_memory_error(std::string(name) + ": " + error.what() + less);
  }
}

// What NumPy has made of `from`; it makes nothing where there is no memory for it.
template <class Array>
Array made(const char* name, const py::array& from, Array array) {
  if (array) return array;
  double count = 1;
  for (py::ssize_t i = 0; i < from.ndim(); ++i) count *= static_cast<double>(from.shape(i));
  throw_memory_error(std::string(name) + ": expected memory for a contiguous copy of " +
                     std::to_string(static_cast<uint64_t>(count)) + " values, found none");
}
inline py::array contiguous(const char* name, const py::array& a) {
  return made(name, a, py::array::ensure(a, int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_}));
}

// An input whose last axis must be contiguous: as it is, or a copy where it is not.
inline py::array readable(const char* name, const py::handle& object, Dtype dtype, const Axes& axes) {
  py::array a = require_array(name, object, dtype);
  require_shape(name, a, axes);
  return rows_contiguous(a) ? a : contiguous(name, a);
}

// An array to be written: the caller's memory itself.
inline py::array writeable(const char* name, const py::handle& object, Dtype dtype, const Axes& axes) {
  py::array a = require_array(name, object, dtype);
  require_shape(name, a, axes);
  require_writeable(name, a);
  if (!rows_contiguous(a))
    throw py::value_error(std::string(name) + ": expected a contiguous last axis, got other strides");
  for (py::ssize_t i = 0; i < a.ndim(); ++i)
    if (a.shape(i) > 1 && a.strides(i) == 0)
      throw py::value_error(std::string(name) + ": expected memory of its own for each element, got a broadcast view");
  return a;
}

// Integers of any type as int64; `flags`: bool, or integers 0 and 1. The shape is looked at before anything is copied,
// and numbers beyond int64 become negative ones, which no argument allows.
inline py::array_t<int64_t> integers(const char* name, const py::handle& object, const Axes& axes, bool flags = false) {
  const char* const wanted = flags ? ": expected bool or integers 0 and 1, got " : ": expected integers, got ";
  const py::array a = py::array::ensure(object);
  if (!a) throw py::type_error(std::string(name) + wanted + type_name(object));
  const char kind = a.dtype().kind();
  if (kind != 'i' && kind != 'u' && !(flags && kind == 'b') && a.size())
    throw py::type_error(std::string(name) + wanted + "dtype " + std::string(py::str(a.dtype())));
  require_shape(name, a, axes);
  auto values = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(a);
  if (!values) throw py::type_error(std::string(name) + wanted + type_name(object));
  return values;
}

// Bool as it is, with its strides; else a copy of 0 and 1.
inline py::array flags(const char* name, const py::handle& object, const Axes& axes) {
  if (py::isinstance<py::array_t<bool>>(object)) {
    require_shape(name, py::reinterpret_borrow<py::array>(object), axes);
    return py::reinterpret_borrow<py::array>(object);
  }
  const py::array_t<int64_t> values = integers(name, object, axes, true);
  for (py::ssize_t i = 0; i < values.size(); ++i)
    if (values.data()[i] < 0 || values.data()[i] > 1)
      throw py::value_error(std::string(name) + ": expected bool or integers 0 and 1, got " +
                            std::to_string(values.data()[i]));
  return made(name, values, py::array_t<bool>::ensure(values));
}

// A new array. A large one lies in pooled memory, to which it returns: a training loop gets the pages of the results
// that it has dropped, and not fresh ones, whose first touch costs as much as a tenth of a call.
inline py::array empty(Dtype dtype, const std::vector<py::ssize_t>& shape) {
  constexpr double kLarge = 256 << 10;
  double bytes = dtype == Dtype::kFloat32 ? 4 : 8;  // floating point: a product that overflows is NumPy's to refuse
  for (const py::ssize_t n : shape) bytes *= static_cast<double>(n);
  if (!(bytes >= kLarge && bytes < 9e18)) return py::array(numpy_dtype(dtype), shape);
  auto buffer = std::make_unique<Buffer>(static_cast<size_t>(bytes));
  uint8_t* data = buffer->data();
  const py::capsule owner(buffer.release(), [](void* p) { delete static_cast<Buffer*>(p); });
  return py::array(numpy_dtype(dtype), shape, data, owner);
}

inline Array3 view3(const py::array& a, bool swap = false) {
  const int64_t s0 = a.strides(0) / a.itemsize(), s1 = a.strides(1) / a.itemsize();
  Array3 v{const_cast<void*>(a.data()), swap ? s1 : s0, swap ? s0 : s1};
  return v;
}
// Strides of axes with at most one element may be anything in NumPy; [L * D, B or 1, .] broadcasts over the batch.
inline Array3 view_states(const py::array& a) {
  Array3 v = view3(a);
  if (a.shape(1) == 1) v.stride1 = 0;
  return v;
}

inline bool overlap(const py::array& a, const py::array& b) {
  const auto range = [](const py::array& x) {
    const char *low = static_cast<const char*>(x.data()), *high = low;
    for (py::ssize_t i = 0; i < x.ndim(); ++i) {
      if (x.shape(i) == 0) return std::pair<const char*, const char*>(low, low);
      (x.strides(i) < 0 ? low : high) += x.strides(i) * (x.shape(i) - 1);
    }
    return std::pair<const char*, const char*>(low, high + x.itemsize());
  };
  const auto [a0, a1] = range(a);
  const auto [b0, b1] = range(b);
  return a0 < b1 && b0 < a1;
}

inline Array2 view2(const py::array& a) {
  return {const_cast<void*>(a.data()), a.strides(0) / a.itemsize(), a.ndim() > 1 ? a.strides(1) / a.itemsize() : 1};
}

inline int64_t positive(const char* name, int64_t value, int64_t least = 1) {
  if (value < least)
    throw py::value_error(std::string(name) + ": expected an integer >= " + std::to_string(least) + ", got " +
                          std::to_string(value));
  return value;
}

// While a call runs without the GIL, another Python thread must not enter the same object.
class Busy {
 public:
  Busy(bool& flag, const char* what) : flag_(flag) {
    if (flag) throw std::runtime_error(std::string(what) + ": another thread is inside this object");
    flag = true;
  }
  ~Busy() { flag_ = false; }

 private:
  bool& flag_;
};

}  // namespace rnnfast::bindings
