"""CuPy and PyTorch with the same verbs, a `Library` each: whose an array is, where it lies, its stream, and more memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from . import extension

DLPACK_CUDA = (2, 13)  # the kinds of device, of DLPack's DLDeviceType: CUDA, and its managed memory


class Library:
    """What is asked of an array library; as it stands, of NumPy beside the emulated engine."""

    name = "numpy.ndarray"

    def owns(self, array: Any) -> bool:
        return extension.emulate and isinstance(array, np.ndarray)

    def adopt(self, array: Any) -> Any:
        """An array of another library on a device as one of this one's, without a copy; else as it is, to be refused."""
        return array

    def dtype(self, array: Any) -> str:
        return str(array.dtype)

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def strides(self, array: Any) -> tuple[int, ...]:
        """In elements."""
        return tuple(stride // array.itemsize for stride in array.strides)

    def aligned(self, array: Any) -> bool:
        """Whether every element lies at a multiple of its size, as a device wants it."""
        return not any(place % array.itemsize for place in (self.address(array), *array.strides))

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        return np.empty(shape, dtype)

    def from_host(self, array: Any, like: Any) -> Any:
        return array

    def astype(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype)

    def contiguous(self, array: Any) -> Any:
        return np.ascontiguousarray(array)

    def copy(self, array: Any) -> Any:
        return array.copy()

    def place(self, array: Any) -> Any:
        """Which device the array is on; comparable."""
        return None

    def current(self, array: Any) -> AbstractContextManager[Any]:
        """Makes the array's device the current one."""
        return nullcontext()

    def stream(self, array: Any) -> int:
        """The current stream of the array's device."""
        return 0

    def lend(self, arrays: Iterable[Any], origin: Any) -> None:
        """The current stream has been given work on arrays that were made while `origin` was the current one, as
        `current_stream` has it: their memory must not be used for something else before that is done.
        """

    def current_stream(self, array: Any) -> Any:
        """What `lend` wants to know."""
        return None


class Cupy(Library):
    name = "cupy.ndarray"

    def owns(self, array: Any) -> bool:
        return type(array).__module__.partition(".")[0] == "cupy" and hasattr(array, "__cuda_array_interface__")

    def adopt(self, array: Any) -> Any:
        """By DLPack, which orders the two streams on the device; by `__cuda_array_interface__` where an array has no DLPack or
        refuses it (read-only ones of some libraries): CuPy then waits for the stream that it names.
        """
        if array is None or isinstance(array, np.ndarray) or self.owns(array):
            return array
        described = hasattr(type(array), "__cuda_array_interface__") or hasattr(array, "__cuda_array_interface__")
        if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_CUDA:
            try:
                return self.cupy.from_dlpack(array)
            except BufferError:
                if not described:
                    raise
        return self.cupy.asarray(array) if described else array

    @property
    def cupy(self) -> Any:
        return sys.modules["cupy"]

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        with like.device:
            return self.cupy.empty(shape, dtype)

    def from_host(self, array: Any, like: Any) -> Any:
        with like.device:
            return self.cupy.asarray(array)

    def contiguous(self, array: Any) -> Any:
        return self.cupy.ascontiguousarray(array)

    def place(self, array: Any) -> Any:
        return array.device.id

    def current(self, array: Any) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = array.device
        return device

    def stream(self, array: Any) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def current_stream(self, array: Any) -> Any:
        return self.cupy.cuda.get_current_stream()

    def lend(self, arrays: Iterable[Any], origin: Any) -> None:
        """CuPy gives memory to the stream that it was made on: that stream waits. A graph keeps what was captured."""
        here = self.cupy.cuda.get_current_stream()
        if here.ptr != origin.ptr and not here.is_capturing():
            origin.wait_event(here.record())


class Torch(Library):
    name = "torch.Tensor on a CUDA device"

    def owns(self, array: Any) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor) and (array.is_cuda or extension.emulate)

    @property
    def torch(self) -> Any:
        return sys.modules["torch"]

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.stride())

    def aligned(self, array: Any) -> bool:
        return bool(array.data_ptr() % array.element_size() == 0)

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        return self.torch.empty(tuple(shape), dtype=getattr(self.torch, dtype), device=like.device)

    def from_host(self, array: Any, like: Any) -> Any:
        """The host goes on at once; not within a capture, where that is refused: a graph would read the memory again."""
        waits = not like.is_cuda or self.torch.cuda.is_current_stream_capturing()
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=not waits)

    def astype(self, array: Any, dtype: str) -> Any:
        return array.to(getattr(self.torch, dtype))

    def contiguous(self, array: Any) -> Any:
        return array.contiguous()

    def copy(self, array: Any) -> Any:
        return array.detach().clone()

    def place(self, array: Any) -> Any:
        return array.device

    def current(self, array: Any) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = self.torch.cuda.device(array.device) if array.is_cuda else nullcontext()
        return device

    def stream(self, array: Any) -> int:
        return int(self.torch.cuda.current_stream(array.device).cuda_stream) if array.is_cuda else 0

    def current_stream(self, array: Any) -> Any:
        return self.torch.cuda.current_stream(array.device) if array.is_cuda else None

    def lend(self, arrays: Iterable[Any], origin: Any) -> None:
        if origin is None:
            return
        here = self.torch.cuda.current_stream(origin.device)
        for array in arrays if here != origin else ():
            array.record_stream(here)


LIBRARIES: tuple[Library, ...] = (Cupy(), Torch(), Library())


def library_of(array: Any) -> Library | None:
    """The library of an array on a CUDA device; None for anything else."""
    if type(array) is np.ndarray and not extension.emulate:  # nothing more to ask of the usual case
        return None
    return next((library for library in LIBRARIES if library.owns(array)), None)


def owns(array: Any) -> bool:
    return library_of(array) is not None
