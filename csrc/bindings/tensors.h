// PyTorch's tensors, read through their own methods.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace rnnfast::bindings {

namespace py = pybind11;

// What makes a new tensor: torch.empty, and what it is told beside the shape.
struct Fresh {
  py::object empty, dtype, device;
};

// The memory of a strided CPU tensor as an array. Tensor.numpy() would do, but for marking the storage as one that can never
// be resized again, which FSDP and reused buffers need.
py::array as_array(const py::object& tensor, const py::dtype& dtype);

// Where some tensors lie, and what is there: how the torch layer knows that packed weights are still those of the module.
class TensorMemory {
 public:
  explicit TensorMemory(const py::list& tensors);
  bool holds(const py::list& tensors) const;  // whether they are the same objects, contiguous, in the same memory
  py::object digest() const;  // a number that changes when a byte does; None where one is not contiguous

 private:
  struct Piece {
    py::object tensor;
    const void* data;
    size_t bytes;
  };
  std::vector<Piece> pieces_;
  bool contiguous_ = true;
};

}  // namespace rnnfast::bindings
