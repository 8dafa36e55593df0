"""Arrays on a CUDA device: the engine `rnnfast._cuda` behind the interface that `_core` has for NumPy arrays.

The extension takes addresses, strides and a stream, and allocates nothing. What it is given comes from the arrays' own
library, CuPy or PyTorch, and so does the memory: one `Library` each, the same verbs. A call goes to the library's current
stream of the arrays' device, and does not wait for it.

Sizes: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from . import reference
from ._tf32 import get_tf32

__all__ = [
    "Context",
    "Packed",
    "Stack",
    "Stream",
    "array_module",
    "library_of",
    "no_array_module",
    "owns",
    "unavailable",
]

DTYPES = ("float32", "float64", "float16", "bfloat16")

DLPACK_CUDA = 2  # the kind of device, of DLPack's DLDeviceType

# Tests of the emulated engine set this: NumPy arrays and PyTorch's CPU tensors then count as the device's.
emulate = False


@lru_cache(maxsize=1)
def _extension() -> Any:
    return import_module("rnnfast._cuda")


def unavailable() -> str | None:
    """Why nothing can run on a CUDA device, or None."""
    return None if emulate else _missing()


@lru_cache(maxsize=1)
def _missing() -> str | None:
    try:
        engine = _extension()
    except ModuleNotFoundError:
        return "this build has no rnnfast._cuda (RNNFAST_CUDA=ON pip install . makes it)"
    except ImportError as error:
        return f"rnnfast._cuda cannot be imported: {error}"
    if engine.emulated:
        return "rnnfast._cuda was built with RNNFAST_CUDA=emulate, for tests"
    return None if engine.device_count() else f"no CUDA device: {engine.device_description()}"


def array_module() -> Any:
    """The module of the arrays that rnnfast's own layers have on a device: CuPy."""
    return np if emulate else import_module("cupy")


def no_array_module() -> str | None:
    """Why there is none, or None."""
    try:
        array_module()
    except ImportError as error:
        return f"CuPy cannot be imported, pip install cupy-cuda13x ({error})"
    return None


# ---- libraries -------------------------------------------------------------------------------------------------------


class Library:
    """What is asked of an array library; as it stands, of NumPy beside the emulated engine."""

    name = "numpy.ndarray"

    def owns(self, array: Any) -> bool:
        return emulate and isinstance(array, np.ndarray)

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


class Cupy(Library):
    name = "cupy.ndarray"

    def owns(self, array: Any) -> bool:
        return type(array).__module__.partition(".")[0] == "cupy" and hasattr(array, "__cuda_array_interface__")

    def adopt(self, array: Any) -> Any:
        """CuPy waits for the stream that such an array names, or tells it of its own (DLPack)."""
        if array is None or isinstance(array, np.ndarray) or self.owns(array):
            return array
        if hasattr(array, "__cuda_array_interface__"):
            return self.cupy.asarray(array)
        on_device = hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CUDA
        return self.cupy.from_dlpack(array) if on_device else array

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


class Torch(Library):
    name = "torch.Tensor on a CUDA device"

    def owns(self, array: Any) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor) and (array.is_cuda or emulate)

    @property
    def torch(self) -> Any:
        return sys.modules["torch"]

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.stride())

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        return self.torch.empty(tuple(shape), dtype=getattr(self.torch, dtype), device=like.device)

    def from_host(self, array: Any, like: Any) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(like.device)

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


LIBRARIES: tuple[Library, ...] = (Cupy(), Torch(), Library())


def library_of(array: Any) -> Library | None:
    """The library of an array on a CUDA device; None for anything else."""
    if type(array) is np.ndarray and not emulate:  # nothing more to ask of the usual case
        return None
    return next((library for library in LIBRARIES if library.owns(array)), None)


def owns(array: Any) -> bool:
    return library_of(array) is not None


# ---- arguments -------------------------------------------------------------------------------------------------------


class Arguments:
    """Checks arrays against the dtype, the library and the device of a call, and makes new ones beside them."""

    def __init__(self, dtype: str, like: Any) -> None:
        library = library_of(like)
        if library is None:
            kind = type(like)
            raise TypeError(f"weights: expected arrays on a CUDA device, got {kind.__module__}.{kind.__qualname__}")
        self.library, self.dtype, self.like = library, dtype, like
        self.kept: list[Any] = []  # what must live as long as the call

    def array(self, name: str, array: Any, shape: Sequence[int | None], dtype: str | None = None) -> Any:
        """`array` itself, or a copy where its last axis is not contiguous."""
        array = self.library.adopt(array)
        self._check(name, array, shape, dtype)
        rows = array.shape[-1] <= 1 or self.library.strides(array)[-1] == 1
        aligned = self.library.address(array) % 2 == 0
        return self.keep(array if rows and aligned else self.library.contiguous(array))

    def weight(self, name: str, array: Any, shape: Sequence[int]) -> Any:
        """Any strides will do."""
        self._check(name, array, shape, None)
        return self.keep(array)

    def target(self, name: str, array: Any, shape: Sequence[int]) -> Any:
        """The caller's memory where it is given, else fresh."""
        if array is None:
            return self.empty(shape)
        self._check(name, array, shape, None)
        if array.shape[-1] > 1 and self.library.strides(array)[-1] != 1:
            raise ValueError(f"{name}: expected a contiguous last axis, got other strides")
        return self.keep(array)

    def integers(self, name: str, values: Any, shape: Sequence[int], dtype: str, most: int | None) -> Any:
        """On the device, whatever they are; values on the host are checked, those on the device are clamped there."""
        values = self.library.adopt(values)
        if self.library.owns(values) and not isinstance(values, np.ndarray):
            if self.library.dtype(values)[:3] not in ("int", "uin", "boo"):
                raise TypeError(f"{name}: expected integers, got dtype {self.library.dtype(values)}")
            self._check(name, values, shape, self.library.dtype(values))
        else:
            values = np.asarray(values)
            if values.dtype.kind not in "iub" and values.size:
                raise TypeError(f"{name}: expected integers, got dtype {values.dtype}")
            if tuple(values.shape) != tuple(shape):
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}")
            if most is not None and values.size and not 0 <= int(values.min()) <= int(values.max()) <= most:
                raise ValueError(f"{name}: expected values within [0, {most}], got {values.tolist()}")
            values = self.library.from_host(np.ascontiguousarray(values.astype(dtype)), self.like)
        if self.library.dtype(values) != dtype:
            values = self.library.astype(values, dtype)
        return self.keep(values)

    def _check(self, name: str, array: Any, shape: Sequence[int | None], dtype: str | None) -> None:
        library, wanted = self.library, dtype or self.dtype
        if not library.owns(array):
            kind = type(array)
            got = f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"{name}: expected a {library.name}, as the weights are, got {got}")
        if library.place(array) != library.place(self.like):
            raise ValueError(f"{name}: expected device {library.place(self.like)}, got {library.place(array)}")
        if library.dtype(array) != wanted:
            raise TypeError(
                f"{name}: expected dtype {wanted}, got {library.dtype(array)} (nothing is converted silently)"
            )
        sizes = tuple(array.shape)
        if len(sizes) != len(shape) or any(w is not None and w != s for w, s in zip(shape, sizes, strict=True)):
            words = ["*" if size is None else str(size) for size in shape]
            raise ValueError(f"{name}: expected shape [{', '.join(words)}], got {list(sizes)}")

    def empty(self, shape: Sequence[int]) -> Any:
        return self.keep(self.library.empty(shape, self.dtype, self.like))

    def zeros(self, shape: Sequence[int]) -> Any:
        array = self.empty(shape)
        array[...] = 0
        return array

    def memory(self, size: int) -> Any:
        return self.keep(self.library.empty((size + 63,), "uint8", self.like))

    def aligned(self, memory: Any) -> int:
        return (self.library.address(memory) + 63) // 64 * 64

    def keep(self, array: Any) -> Any:
        self.kept.append(array)
        return array

    # What the extension takes: (address, strides in elements), or None.

    def view(self, array: Any) -> tuple[int, ...] | None:
        return None if array is None else (self.library.address(array), *self.library.strides(array))

    def sequence(self, array: Any, batch_first: bool) -> tuple[int, ...] | None:
        view = self.view(array)
        return view if view is None or not batch_first else (view[0], view[2], view[1])

    def state(self, array: Any) -> tuple[int, ...] | None:
        """[L*D, B or 1, .]: one row serves the whole batch."""
        view = self.view(array)
        return view if view is None or array.shape[1] > 1 else (view[0], view[1], 0)


# ---- calls -----------------------------------------------------------------------------------------------------------


class Packed:
    """Weights pinned when made, for `Stack.forward` when not training."""

    def __init__(self, layers: Stack, weights: Sequence[Any]) -> None:
        library = library_of(weights[0])
        if library is None:
            raise TypeError("weights: expected arrays on a CUDA device")
        self.layers = layers
        self.weights = [library.copy(weight) for weight in weights]


class Stack:
    """The configuration of a stack of recurrent layers, with the interface of ``_core.Stack``."""

    def __init__(
        self,
        cell: str,
        dtype: str,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int,
        num_directions: int,
        bias: bool,
        parameters: Sequence[float],
    ) -> None:
        missing = unavailable()
        if missing:
            raise RuntimeError(f"device: {missing}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")
        self.cell, self.dtype, self.parameters = cell, dtype, list(parameters)
        self.sizes = [input_size, hidden_size, proj_size, num_layers, num_directions]
        self.input_size, self.H, self.P = input_size, hidden_size, proj_size or hidden_size
        self.states, self.directions, self.bias = num_layers * num_directions, num_directions, bias
        self.dropping = num_layers > 1
        self.has_cell_state = reference.CELLS[cell].has_c
        self.weight_shapes = reference.weight_shapes(
            cell,
            input_size,
            hidden_size,
            proj_size=proj_size,
            num_layers=num_layers,
            bidirectional=num_directions == 2,
            bias=bias,
        )

    def each(self, weights: Sequence[Any]) -> list[Any]:
        """Five for each layer and direction, as the extension takes them: None for what there is not."""
        flat, result = iter(weights), []
        for _ in range(self.states):
            result += [next(flat), next(flat)]
            result += [next(flat), next(flat)] if self.bias else [None, None]
            result += [next(flat)] if self.sizes[2] else [None]
        return result

    def forward(
        self,
        x: Any,
        h0: Any,
        c0: Any,
        weights: Any,
        batch_first: bool,
        training: bool,
        lengths: Any,
        reset: Any,
        reset_h: Any,
        reset_c: Any,
        return_states: bool,
        dropout: float,
        seed: int,
        call: int,
        output: Any = None,
        hn: Any = None,
        cn: Any = None,
        packed: Packed | None = None,
        lean: bool = False,
        checkpoint_every: int = 0,
        running_c: Any = None,
    ) -> tuple[Any, ...]:
        """(output, hn, cn, h_all, c_all, context); what was not asked for, or does not exist, is None.

        `running_c` [L, B, H], in at least float32, is read in the place of c0 and takes the place of cn.
        """
        if lean or checkpoint_every:
            raise ValueError("lean, checkpoint_every: expected neither on a CUDA device, which has no lean mode yet")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        if not self.has_cell_state and not (c0 is None and reset_c is None):
            raise ValueError("hx, reset_state: this cell has no cell state, expected one array")
        given = packed.weights if packed is not None else weights
        if isinstance(given, Packed):
            if training:
                raise ValueError("weights: expected arrays in training, got packed weights")
            given = given.weights
        arguments = Arguments(self.dtype, given[0] if len(given) else None)
        x = arguments.array("x", x, (None, None, self.input_size))
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        outer = (batch, steps) if batch_first else (steps, batch)
        matrices = self._weights(arguments, given)
        output = arguments.target("output", output, (*outer, self.directions * self.P))
        hn = arguments.target("hn", hn, (self.states, batch, self.P))
        if self.has_cell_state and running_c is None:
            cn = arguments.target("cn", cn, (self.states, batch, self.H))
        h_all = arguments.empty((steps, self.states, batch, self.P)) if return_states else None
        c_all = arguments.empty((steps, self.states, batch, self.H)) if return_states and self.has_cell_state else None
        views = {
            "x": arguments.sequence(x, batch_first),
            "output": arguments.sequence(output, batch_first),
            "h0": arguments.state(self._state(arguments, "hx", h0, batch, self.P)),
            "c0": arguments.state(self._state(arguments, "hx", c0, batch, self.H)),
            "reset_h": arguments.state(self._state(arguments, "reset_state", reset_h, batch, self.P, True)),
            "reset_c": arguments.state(self._state(arguments, "reset_state", reset_c, batch, self.H, True)),
            "hn": arguments.view(hn),
            "cn": arguments.view(cn),
            "running_c": arguments.view(arguments.keep(running_c)),
            "h_all": arguments.view(h_all),
            "c_all": arguments.view(c_all),
        }
        if lengths is not None:
            views["lengths"] = arguments.view(arguments.integers("lengths", lengths, (batch,), "int64", steps))
        if reset is not None:
            flags = arguments.integers("reset", reset, outer, "bool", 1)
            views["reset"] = arguments.sequence(flags, batch_first)
        engine_call = _extension().Call(
            cell=self.cell,
            dtype=self.dtype,
            sizes=self.sizes,
            bias=self.bias,
            parameters=self.parameters,
            steps=steps,
            batch=batch,
            training=training,
            views=views,
            weights=[arguments.view(matrix) for matrix in self.each(matrices)],
            dropout=dropout if self.dropping else 0.0,
            seed=seed,
            call=call,
            tf32=get_tf32(),
        )
        with arguments.library.current(x):  # whose device the engine plans for
            sizes = engine_call.forward_bytes()
            reserve, workspace = arguments.memory(sizes[0]), arguments.memory(sizes[1])
            stream = arguments.library.stream(x)
            engine_call.forward(arguments.aligned(reserve), arguments.aligned(workspace), stream)
        arguments.kept = [array for array in arguments.kept if array is not workspace]
        context = None
        if training:
            resets = (reset_h is not None, reset_c is not None)
            context = Context(self, arguments, engine_call, reserve, matrices, (steps, batch), batch_first, resets)
        return output, hn, cn, h_all, c_all, context

    def _weights(self, arguments: Arguments, weights: Sequence[Any]) -> list[Any]:
        if len(weights) != len(self.weight_shapes):
            raise ValueError(f"weights: expected {len(self.weight_shapes)} arrays, got {len(weights)}")
        named = zip(self.weight_shapes.items(), weights, strict=True)
        return [arguments.weight(name, weight, shape) for (name, shape), weight in named]

    def _state(
        self, arguments: Arguments, name: str, array: Any, batch: int, width: int, broadcast: bool = False
    ) -> Any:
        if array is None:
            return None
        one = broadcast and len(array.shape) == 3 and array.shape[1] == 1
        return arguments.array(name, array, (self.states, 1 if one else batch, width))


class Stream:
    """One step after another, with pinned weights and the state inside: the interface of ``_core.Stream``.

    c is kept as it is computed, in at least float32, whatever the dtype of the layers.
    """

    def __init__(self, layers: Stack, packed: Packed, batch_size: int) -> None:
        self.closed = False
        self._layers, self._packed, self._batch = layers, packed, batch_size
        self._arguments = Arguments(layers.dtype, packed.weights[0])
        self._state = self._zeros()

    def step(self, x_t: Any, reset: Any = None, out: Any = None) -> Any:
        self._require_open()
        if len(getattr(x_t, "shape", ())) != 2 or x_t.shape[0] != self._batch:
            raise ValueError(f"x_t: expected shape [{self._batch}, {self._layers.input_size}], got {x_t!r:.80}")
        if reset is not None and not owns(reset):
            reset = np.asarray(reset)
        h0, c = self._state
        output, h = self._layers.forward(
            x=x_t[None],
            h0=h0,
            c0=None,
            weights=self._packed,
            batch_first=False,
            training=False,
            lengths=None,
            reset=None if reset is None else reset[None],
            reset_h=None,
            reset_c=None,
            return_states=False,
            dropout=0.0,
            seed=0,
            call=0,
            output=None if out is None else out[None],
            running_c=c,
        )[:2]
        self._state = [h, c]
        return output[0] if out is None else out

    def get_state(self) -> Any:
        self._require_open()
        library = self._arguments.library
        h, c = (None if s is None else library.astype(library.copy(s), self._layers.dtype) for s in self._state)
        return (h, c) if self._layers.has_cell_state else h

    def set_state(self, h: Any, c: Any = None) -> None:
        self._require_open()
        if c is not None and not self._layers.has_cell_state:
            raise ValueError("state: this cell has no cell state, expected one array")
        arguments = Arguments(self._layers.dtype, self._arguments.like)
        state = self._zeros()
        for i, given in enumerate((h, c)):
            if given is not None:
                checked = arguments.array("state", given, tuple(state[i].shape))
                state[i] = arguments.library.copy(arguments.library.astype(checked, arguments.library.dtype(state[i])))
        self._state = state

    def reorder(self, rows: Any) -> None:
        self._require_open()
        rows = self._arguments.library.from_host(np.asarray(rows), self._arguments.like) if not owns(rows) else rows
        self._state = [None if s is None else self._arguments.library.contiguous(s[:, rows]) for s in self._state]

    def fork(self) -> Stream:
        self._require_open()
        other = Stream(self._layers, self._packed, self._batch)
        other._state = [None if s is None else self._arguments.library.copy(s) for s in self._state]
        return other

    def set_packed(self, packed: Packed) -> None:
        self._require_open()
        self._packed = packed

    def close(self) -> None:
        self.closed, self._state = True, []

    def _zeros(self) -> list[Any]:
        layers, like = self._layers, self._arguments.like
        h = Arguments(layers.dtype, like).zeros((layers.states, self._batch, layers.P))
        if not layers.has_cell_state:
            return [h, None]
        c_dtype = "float64" if layers.dtype == "float64" else "float32"
        return [h, Arguments(c_dtype, like).zeros((layers.states, self._batch, layers.H))]

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("stream: this stream is closed")


class Context:
    """What a training-mode forward keeps for its backward, with the interface of ``_core.Context``."""

    def __init__(
        self,
        layers: Stack,
        arguments: Arguments,
        call: Any,
        reserve: Any,
        weights: list[Any],
        sizes: tuple[int, int],
        batch_first: bool,
        resets: tuple[bool, bool],
    ) -> None:
        self._layers, self._arguments, self._call, self._reserve = layers, arguments, call, reserve
        self._weights, self._sizes, self._batch_first, self._resets = weights, sizes, batch_first, resets
        self.consumed = False

    @property
    def nbytes(self) -> int:
        return int(self._reserve.shape[0])

    @property
    def plan(self) -> str:
        return str(self._call.plan())

    def backward(
        self,
        grad_output: Any,
        grad_hn: Any,
        grad_cn: Any,
        grad_h_all: Any,
        grad_c_all: Any,
        need_grad_x: bool,
        need_grad_weights: bool,
        retain: bool,
        record: bool,
        grad_x: Any = None,
        need_grad_state: bool = True,
    ) -> tuple[Any, ...]:
        """(grad_x, grad_h0, grad_c0, [grad_weights], grad_reset_h, grad_reset_c, grad_h)

        The gradients of the initial states are made even where they are not needed.
        """
        if self.consumed:
            raise RuntimeError(
                "backward: this forward's reserve has been used up by an earlier backward; give that one retain=True"
            )
        layers, (steps, batch) = self._layers, self._sizes
        if not layers.has_cell_state and not (grad_cn is None and grad_c_all is None):
            raise ValueError("grad_state: this cell has no cell state, expected one array")
        arguments = Arguments(layers.dtype, self._arguments.like)
        outer = (batch, steps) if self._batch_first else (steps, batch)
        given: dict[str, Any] = {}

        def read(name: str, key: str, array: Any, shape: Sequence[int]) -> None:
            if array is not None:
                whole = len(shape) == 4  # its layout is fixed
                array = arguments.library.adopt(array)
                array = arguments.library.contiguous(array) if whole and arguments.library.owns(array) else array
                given[key] = arguments.array(name, array, shape)

        state_h, state_c = (layers.states, batch, layers.P), (layers.states, batch, layers.H)
        read("grad_output", "grad_output", grad_output, (*outer, layers.directions * layers.P))
        read("grad_state", "grad_hn", grad_hn, state_h)
        read("grad_state", "grad_cn", grad_cn, state_c)
        read("grad_states", "grad_h_all", grad_h_all, (steps, *state_h))
        read("grad_states", "grad_c_all", grad_c_all, (steps, *state_c))
        made: dict[str, Any] = {"grad_h0": arguments.empty(state_h)}
        if need_grad_x:
            made["grad_x"] = arguments.target("grad_x", grad_x, (*outer, layers.input_size))
        if layers.has_cell_state:
            made["grad_c0"] = arguments.empty(state_c)
        if self._resets[0]:
            made["grad_reset_h"] = arguments.empty(state_h)
        if self._resets[1]:
            made["grad_reset_c"] = arguments.empty(state_c)
        if record:
            made["record_h"] = arguments.empty((steps, *state_h))
        views = {key: arguments.view(array) for key, array in (given | made).items()}
        for key in ("grad_output", "grad_x"):
            views[key] = arguments.sequence((given | made).get(key), self._batch_first)
        grad_weights = [arguments.empty(tuple(w.shape)) for w in self._weights] if need_grad_weights else []
        targets = [arguments.view(g) for g in layers.each(grad_weights)] if need_grad_weights else []
        self._run(arguments, views, targets, retain)
        names = ("grad_x", "grad_h0", "grad_c0", None, "grad_reset_h", "grad_reset_c", "record_h")
        return tuple(grad_weights if name is None else made.get(name) for name in names)

    def _run(self, arguments: Arguments, views: dict[str, Any], targets: list[Any], retain: bool) -> None:
        library, like = arguments.library, arguments.like
        with library.current(like):
            workspace = arguments.memory(self._call.backward_bytes(views, targets, retain))
            self.consumed = not retain
            self._call.backward(
                views,
                targets,
                retain,
                arguments.aligned(self._reserve),
                arguments.aligned(workspace),
                library.stream(like),
            )
