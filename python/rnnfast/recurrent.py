"""What recurrent layers and cells share: the weights, their packed form, their state's structure.

`Recurrent` owns the weights of a cell, once or in a stack, and knows nothing of sequences; `modules` and `cells` build
on it. A *state* here is an array, or for the LSTM a pair of arrays, of which either may be None.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import functional
from ._arrays import (
    MAX_BYTES,
    check_array,
    check_device,
    check_dtype,
    check_flag,
    check_seed,
    check_shape,
    check_size,
    float_dtype,
    fresh_seed,
    module_of,
    new_array,
)
from .base import Module, Parameter

__all__ = [
    "Recurrent",
    "cell_weight_shapes",
    "is_missing",
    "map_state",
    "with_batch_axis",
]


class Recurrent(Module):
    """The weights of a recurrent cell, once or in a stack, and their packed form.

    In training mode the weights are handed to the engine as they are. `eval` makes every ``p.data`` read-only, and the
    first call after it packs the weights for all later ones. Weights that are found writeable in eval all the same
    (``p.data`` was replaced, or a tied layer trains them) are packed at every call: slower, never stale.
    A write through another view of the same memory is the one change that is not seen.

    A subclass sets its sizes after `__init__`, then calls `_make_weights`.
    """

    # Counts the transitions from read-only to writeable in the process: a tied weight that was unsealed, changed and
    # sealed again through another module is the same read-only array as before, and only this tells.
    _generation = 0

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: Any,
        seed: Any,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.bias = check_flag("bias", bias)
        self.device = check_device(device)
        self.dtype = float_dtype(dtype)
        self.seed = fresh_seed() if seed is None else check_seed(seed)
        for name, value in parameters.items():  # numbers of the cell itself, such as the leak of a leaky RNN
            setattr(self, name, value)
        self._pack: _Pack | None = None

    def _make_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Register one `Parameter` a name, in this order, which is the engine's, and draw the values."""
        size = sum(math.prod(shape) for shape in shapes.values()) * self.dtype.itemsize
        try:
            arrays = [new_array(shape, self.dtype, self.device) for shape in shapes.values() if size <= MAX_BYTES]
        except MemoryError:
            arrays = []
        if not arrays:
            raise ValueError(
                f"hidden_size, input_size: expected weights that fit the memory, got {self.hidden_size} and "
                f"{self.input_size}, which take {size} bytes"
            )
        self._shapes = dict(shapes)
        for name, array in zip(shapes, arrays, strict=True):
            setattr(self, name, Parameter(array, name))
        self.reset_parameters(self.seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw all weights anew, uniform in ±1/sqrt(H) as PyTorch does; not the same numbers as PyTorch's.

        The draws are made in float64, so that the layers of one seed agree over dtypes up to rounding. A forward that
        waits for its `backward` is dropped.
        """
        if not self.training:
            raise RuntimeError("reset_parameters: the weights are read-only in eval mode; call train() first")
        rng = np.random.default_rng(seed)
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self._weight_parameters():
            draws = rng.uniform(-bound, bound, parameter.shape)
            parameter.data[...] = check_array(parameter.name, parameter.data).asarray(draws)
        self._weights_changed()

    def _weight_parameters(self) -> list[Parameter]:
        parameters = self._parameters
        return [parameters[name] for name in self._shapes]

    def _check_weights(self, refused: Exception) -> None:
        """Where x or a weight was `refused` for what another weight is, name the one that is not as it was made."""
        if not str(refused).startswith(("x:", "weight_", "bias_")):
            return
        for (name, shape), parameter in zip(self._shapes.items(), self._weight_parameters(), strict=True):
            check_array(name, parameter.data)
            check_dtype(name, parameter.data, self.dtype)
            check_shape(name, parameter.data, shape)

    def _cell_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in functional.CELLS[self.cell].parameters}

    def _pack_options(self) -> dict[str, Any]:
        """What `functional.pack` is told beside cell and weights."""
        return self._cell_options()

    def pack(self) -> Any:
        """The present weights in the engine's layout; opaque, and independent of later changes. Cached in eval mode."""
        arrays = [p.data for p in self._weight_parameters()]
        packed = self._cached_pack(arrays)
        return functional.pack(self.cell, arrays, **self._pack_options()) if packed is None else packed

    def _inference_weights(self) -> Any:
        """The cached pack; the bare weights while they may change under it."""
        arrays = [p.data for p in self._weight_parameters()]
        packed = self._cached_pack(arrays)
        return arrays if packed is None else packed

    def _cached_pack(self, arrays: list[Any]) -> Any:
        """The pack of `arrays`, made once for as long as they are read-only; None where they are not."""
        if self.training or any(not isinstance(a, np.ndarray) or a.flags.writeable for a in arrays):
            return None
        options = self._pack_options()
        pack = self._pack
        if pack is None or not pack.is_current(arrays, options):
            generation = Recurrent._generation
            pack = _Pack(functional.pack(self.cell, arrays, **options), arrays, options, generation)
            object.__setattr__(self, "_pack", pack)  # one assignment: two threads may do this at once
        return pack.packed

    def _mode_changed(self) -> None:
        self._pack = None
        for parameter in self._weight_parameters():
            _set_writeable(parameter.data, self.training)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, fit for JSON; the device stays behind."""
        names = [name for name in inspect.signature(type(self)).parameters if name != "device"]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(f"{type(self).__name__}.config: expected an attribute for each argument, missing {missing}")
        values = {name: getattr(self, name) for name in names}
        return {name: value.name if isinstance(value, np.dtype) else value for name, value in values.items()}

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, as PyTorch shows them."""
        shown = [str(self.input_size), str(self.hidden_size)]
        for name, parameter in inspect.signature(type(self)).parameters.items():
            if name in ("input_size", "hidden_size", "device", "dtype", "seed"):
                continue
            value = getattr(self, name, parameter.default)  # a subclass need not keep its arguments
            if value != parameter.default:
                shown.append(f"{name}={value}")
        if self.dtype != np.float32:
            shown.append(f"dtype={self.dtype}")
        return ", ".join(shown)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_shapes", ()) and not isinstance(value, Parameter):
            raise TypeError(
                f"{name}: expected a Parameter (a new value goes to {name}.data), got {type(value).__name__}"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without packed weights, which are made anew."""
        return {**self.__dict__, "_pack": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.training:
            self._mode_changed()  # a copied array is writeable again

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The weights are attributes whose names depend on the sizes."""


class _Pack(NamedTuple):
    """Packed weights and what they were made from."""

    packed: Any
    arrays: list[np.ndarray]
    options: dict[str, Any]
    generation: int

    def is_current(self, arrays: list[np.ndarray], options: dict[str, Any]) -> bool:
        return (
            self.generation == Recurrent._generation
            and self.options == options
            and all(a is b for a, b in zip(self.arrays, arrays, strict=True))
        )


def cell_weight_shapes(
    cell: str, inputs: int, hidden: int, proj: int, bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights of one cell (a layer in one direction), in the engine's order."""
    rows = functional.CELLS[cell].gates * hidden
    yield "weight_ih", (rows, inputs)
    yield "weight_hh", (rows, proj or hidden)
    if bias:
        yield "bias_ih", (rows,)
        yield "bias_hh", (rows,)
    if proj:
        yield "weight_hr", (proj, hidden)


def map_state(function: Callable[[Any], Any], state: Any) -> Any:
    """Apply `function` to a state: to both elements of a pair; None stays None."""
    if isinstance(state, (tuple, list)):
        return tuple(None if element is None else function(element) for element in state)
    return None if state is None else function(state)


def is_missing(state: Any) -> bool:
    """Whether a state, or the gradient of one, is None altogether."""
    elements = state if isinstance(state, (tuple, list)) else (state,)
    return all(element is None for element in elements)


def with_batch_axis(name: str, rank: int, axis: int = 1) -> Callable[[Any], Any]:
    """A function that gives an array of `rank` dimensions one more at `axis`, as x got one."""

    def insert(array: Any) -> Any:
        if module_of(array) is None:  # None, or no array: the engine refuses that
            return array
        shape = array.shape
        if len(shape) != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, as x has no more, got shape {tuple(shape)}")
        return array[(slice(None),) * axis + (None,)]

    return insert


def _set_writeable(array: Any, writeable: bool) -> None:
    if not isinstance(array, np.ndarray) or array.flags.writeable == writeable:
        return
    try:
        array.flags.writeable = writeable
    except ValueError:  # a view of read-only memory: it was not this library that sealed it
        return
    if writeable:
        Recurrent._generation += 1
