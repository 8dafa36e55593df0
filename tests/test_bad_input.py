"""Ten thousand bad inputs: argument × defect, drawn from a table with a fixed seed.

Every one must raise ValueError, TypeError or RuntimeError with a message that names the argument, and leave everything
as it was: the other arguments, weights, gradients, modes, contexts, streams and optimisers. All run in one process
beside the tests', which may neither die nor hang; the case that killed it is known from a file.

A `Subject` is something to call and the valid values of its arguments; a kind of argument has a list of defects.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import resource
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnfast
from conftest import RunPython, run_process
from rnnfast import functional

CASES = int(os.environ.get("RNNFAST_BAD_INPUTS", "10000"))  # 40000 come by every combination
MEMORY = 2**33
ALLOWED = (ValueError, TypeError, RuntimeError)
T, B, I, H, L = 3, 2, 4, 5, 2  # noqa: E741

Defect = Callable[[Any, random.Random], Any]


class Unfit(Exception):
    """The defect cannot be made from this value."""


# ---- objects that are no NumPy arrays --------------------------------------------------------------------------------


class DeviceArray:
    """An array elsewhere, like CuPy's: it looks like one and refuses to become NumPy's."""

    __module__ = "elsewhere"

    def __init__(self, like: Any) -> None:
        self.shape, self.dtype = np.shape(like), np.asarray(like).dtype
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (0xDEAD0000, False), "version": 3}

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, key: Any) -> Any:
        return self

    def __len__(self) -> int:
        return self.shape[0]


class DLPackArray:
    """Something that only says how to share device memory."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("the data is on another device")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no data")

    def __len__(self) -> int:
        raise OSError("no length")

    def __bool__(self) -> bool:
        raise OSError("neither")


NOT_ARRAYS: dict[str, Defect] = {
    "string": lambda a, r: "x",
    "number": lambda a, r: 3.0,
    "dict": lambda a, r: {"data": a},
    "class": lambda a, r: np.ndarray,
    "bytes": lambda a, r: np.asarray(a).tobytes(),
    "buffer": lambda a, r: memoryview(np.ascontiguousarray(a)),
    "device": lambda a, r: DeviceArray(a),
    "dlpack": lambda a, r: DLPackArray(),
    "hostile": lambda a, r: Hostile(),
}
MISSING: dict[str, Defect] = {"none": lambda a, r: None}


# ---- defects of arrays -----------------------------------------------------------------------------------------------


def astype(dtype: Any) -> Defect:
    def convert(a: Any, r: random.Random) -> Any:
        if a.dtype == np.dtype(dtype):
            raise Unfit
        with np.errstate(all="ignore"):
            return a.astype(dtype)

    return convert


def another_float(a: Any, r: random.Random) -> Any:
    return a.astype("float64" if a.dtype == np.float32 else "float32")


def records(a: Any, r: random.Random) -> Any:
    return np.zeros(a.shape, dtype=[("value", a.dtype)])


def rank_down(a: Any, r: random.Random) -> Any:
    if a.ndim == 0:
        raise Unfit
    return a.sum(axis=r.randrange(a.ndim), dtype=a.dtype)


def resized(change: Callable[[int], int]) -> Callable[..., Any]:
    """Another size of one axis; `axes` are those whose size is fixed by other arguments."""

    def resize(a: Any, r: random.Random, axes: tuple[int, ...]) -> Any:
        axis = r.choice(axes)
        size = change(a.shape[axis])
        if size in (a.shape[axis], -1):
            raise Unfit
        return np.resize(a, [size if k == axis else n for k, n in enumerate(a.shape)])

    return resize


def giant(a: Any, r: random.Random, axes: tuple[int, ...]) -> Any:
    """A view of one element, far larger than any memory."""
    axis = r.choice(axes)
    shape = [2 ** r.choice((34, 40, 50)) if k == axis else n for k, n in enumerate(a.shape)]
    return np.broadcast_to(a.reshape(-1)[:1].reshape([1] * a.ndim), shape)


DTYPES: dict[str, Defect] = {
    "another_float": another_float,
    "float16": astype("float16"),
    "longdouble": astype("longdouble"),
    "int64": astype("int64"),
    "uint8": astype("uint8"),
    "bool": astype("bool"),
    "complex": astype("complex64"),
    "object": astype("object"),
    "text": astype("U8"),
    "records": records,
    "byte_order": lambda a, r: a.astype(a.dtype.newbyteorder()),
    "dates": lambda a, r: np.zeros(a.shape, "datetime64[s]"),
}
RANKS: dict[str, Defect] = {
    "rank_up": lambda a, r: a[None],
    "rank_up_last": lambda a, r: a[..., None],
    "rank_down": rank_down,
    "scalar": lambda a, r: np.array(1, a.dtype),
}
LISTS: dict[str, Defect] = {"list": lambda a, r: a.tolist()}
SIZES: dict[str, Callable[..., Any]] = {
    "longer": resized(lambda n: n + 1),
    "shorter": resized(lambda n: n - 1),
    "much_longer": resized(lambda n: 7 * n + 3),
    "no_size": resized(lambda n: 0 if n else -1),
    "giant": giant,
}
ARRAY = {**NOT_ARRAYS, **MISSING, **LISTS, **DTYPES, **RANKS}


def read_only(a: Any, r: random.Random) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def overlapping_itself(a: Any, r: random.Random) -> Any:
    return np.lib.stride_tricks.as_strided(a.copy(), a.shape, (0, *a.strides[1:]))


def gaps_in_last_axis(a: Any, r: random.Random) -> Any:
    return np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2]


OUT = {**ARRAY, "read_only": read_only, "self_overlap": overlapping_itself, "gaps": gaps_in_last_axis}
OUT.pop("none")
GRAD = {**{k: v for k, v in ARRAY.items() if k != "none"}, "read_only": read_only}

# ---- defects of other arguments --------------------------------------------------------------------------------------

INTEGERS: dict[str, Defect] = {
    **{k: v for k, v in NOT_ARRAYS.items() if k not in ("bytes", "buffer")},
    **RANKS,
    "float": astype("float64"),
    "complex": astype("complex128"),
    "object": lambda a, r: np.array([2**70] * a.size, dtype=object).reshape(a.shape),
    "text": astype("U8"),
    "dates": lambda a, r: np.zeros(a.shape, "datetime64[s]"),
    "floats": lambda a, r: [0.5] * len(a),
    "nothings": lambda a, r: [None] * len(a),
    "ragged": lambda a, r: [[0], [0, 1]],
}


def one_value(value: Any, dtype: Any = np.int64) -> Defect:
    def put(a: Any, r: random.Random) -> Any:
        a = a.astype(dtype)
        a.reshape(-1)[r.randrange(a.size)] = value
        return a

    return put


RANGES: dict[str, Defect] = {
    "negative": one_value(-1),
    "very_negative": one_value(-(2**63)),
    "large": one_value(10**6),
    "very_large": one_value(2**63 - 1),
    "unsigned": one_value(2**64 - 1, np.uint64),
}
NEEDS = ("need_grad_x", "need_grad_weights", "need_grad_state", "retain", "record")
FLAGS: dict[str, Defect] = {
    **{k: v for k, v in INTEGERS.items() if k not in ("object", "float")},
    "half": one_value(0.5, np.float64),
    "ones": astype("float32"),
    "two": one_value(2),
    "minus_one": one_value(-1, np.int8),
    "wrapped": one_value(256, np.int16),
    "object": astype("object"),
}
FLAG: dict[str, Defect] = {
    "text": lambda v, r: "yes",
    "number": lambda v, r: 0.5,
    "two": lambda v, r: 2,
    "none": lambda v, r: None,
    "list": lambda v, r: [],
    "array": lambda v, r: np.array([True, False]),
    "object": lambda v, r: object(),
    "hostile": lambda v, r: Hostile(),
}
NUMBER: dict[str, Defect] = {
    "text": lambda v, r: "0.5",
    "bytes": lambda v, r: b"1",
    "none": lambda v, r: None,
    "complex": lambda v, r: 1j,
    "nan": lambda v, r: r.choice((math.nan, np.float32("nan"))),
    "array": lambda v, r: np.array([0.1, 0.2]),
    "list": lambda v, r: [0.1],
    "object": lambda v, r: object(),
    "class": lambda v, r: float,
    "hostile": lambda v, r: Hostile(),
}
INTEGER: dict[str, Defect] = {
    "text": lambda v, r: "4",
    "none": lambda v, r: None,
    "fraction": lambda v, r: 1.5,
    "whole_float": lambda v, r: 4.0,
    "nan": lambda v, r: math.nan,
    "bool": lambda v, r: r.choice((True, np.True_)),
    "array": lambda v, r: np.array([3, 4]),
    "list": lambda v, r: [4],
    "object": lambda v, r: object(),
    "hostile": lambda v, r: Hostile(),
    "negative": lambda v, r: -r.choice((1, 2**31, 2**63, 2**100)),
}
HUGE: dict[str, Defect] = {"huge": lambda v, r: r.choice((2**64, 2**100))}
SIZE: dict[str, Defect] = {
    **INTEGER,
    "zero": lambda v, r: 0,
    "huge": lambda v, r: 2 ** r.choice((31, 40, 62, 63, 64, 100)),
}
CHOICE: dict[str, Defect] = {
    "unknown": lambda v, r: "unknown",
    "upper": lambda v, r: v.upper() if isinstance(v, str) else "X",
    "bytes": lambda v, r: str(v).encode(),
    "none": lambda v, r: None,
    "number": lambda v, r: 1,
    "list": lambda v, r: [v],
    "object": lambda v, r: object(),
}
OBJECT: dict[str, Defect] = {
    "none": lambda v, r: None,
    "text": lambda v, r: "x",
    "number": lambda v, r: 7,
    "class": lambda v, r: type(v),
    "object": lambda v, r: object(),
    "array": lambda v, r: np.zeros((2, 3), np.float32),
    "tuple": lambda v, r: (v,),
}
LIST: dict[str, Defect] = {
    "none": lambda v, r: None,
    "text": lambda v, r: "weights",
    "number": lambda v, r: 7,
    "dict": lambda v, r: dict(enumerate(v)),
    "array": lambda v, r: np.zeros((2, 3, 4), np.float32),
    "generator": lambda v, r: (w for w in v),
    "set": lambda v, r: {1, 2},
    "empty": lambda v, r: [],
    "one": lambda v, r: v[:1],
    "missing": lambda v, r: v[:-1] if r.random() < 0.5 else v[1:],
    "too_many": lambda v, r: [*v, *r.choices(v, k=r.choice((1, 3)))],
    "hostile": lambda v, r: Hostile(),
}
STATE: dict[str, Defect] = {
    "number": lambda v, r: 1.0,
    "text": lambda v, r: "x",
    "dict": lambda v, r: {"h": v},
    "device": lambda v, r: DeviceArray(np.zeros(3)),
    "hostile": lambda v, r: Hostile(),
    "structure": lambda v, r: v[0] if isinstance(v, tuple) else (v, v),
    "three": lambda v, r: (*v, v[0]) if isinstance(v, tuple) else [v, v, v],
    "no_elements": lambda v, r: (),
}
DTYPE: dict[str, Defect] = {
    "float16": lambda v, r: "float16",
    "int": lambda v, r: int,
    "unknown": lambda v, r: "unknown",
    "object": lambda v, r: object(),
    "number": lambda v, r: 7,
    "byte_order": lambda v, r: np.dtype(">f4"),
    "complex": lambda v, r: np.complex64,
}
DEVICE: dict[str, Defect] = {
    "unknown": lambda v, r: "tpu",
    "cuda": lambda v, r: "cuda:7" if not functional_cuda() else "cuda:x",
    "index": lambda v, r: "cuda:-1",
    "number": lambda v, r: 3,
    "object": lambda v, r: object(),
}


def functional_cuda() -> bool:
    from importlib.util import find_spec

    return find_spec("rnnfast._cuda") is not None


def out_of(low: float = -math.inf, high: float = math.inf, infinite: bool = False) -> dict[str, Defect]:
    """A number outside [low, high]."""
    found = dict(NUMBER)
    if low > -math.inf:
        found["below"] = lambda v, r: low - r.choice((1e-3, 1.0, 1e30, math.inf))
    if high < math.inf:
        found["above"] = lambda v, r: high + r.choice((1e-3, 1.0, 1e30, math.inf))
    if not infinite:
        found["infinite"] = lambda v, r: r.choice((math.inf, -math.inf))
    return found


# ---- subjects --------------------------------------------------------------------------------------------------------


@dataclass
class Argument:
    value: Any
    defects: dict[str, Defect]
    names: tuple[str, ...] = ()  # any of which a message may use; the argument's own by default
    always: bool = True  # given to every call; else only where it is the spoilt one


@dataclass
class Subject:
    call: Callable[..., Any]
    arguments: dict[str, Argument]
    watched: list[Any] = field(default_factory=list)  # beside the arguments: what a failed call must not change


def array(
    value: Any, *names: str, axes: tuple[int, ...] | None = None, defects: Any = ARRAY, skip: str = ""
) -> Argument:
    """An array; `axes` are those whose size other arguments fix."""
    axes = tuple(range(value.ndim)) if axes is None else axes
    sized = {name: bind_axes(defect, axes) for name, defect in SIZES.items()} if axes else {}
    found = {name: defect for name, defect in {**defects, **sized}.items() if name not in skip.split()}
    return Argument(value, found, names)


def only_spoilt(argument: Argument) -> Argument:
    return replace(argument, always=False)


def bind_axes(defect: Callable[..., Any], axes: tuple[int, ...]) -> Defect:
    return lambda a, r: defect(a, r, axes)


def state(value: Any, *names: str, axes: tuple[int, ...] = (0, 1, 2), optional: bool = True) -> Argument:
    """An array, or a pair of which one is spoilt."""
    found = dict(STATE)
    for name, defect in array(next(iter_state(value)), axes=axes).defects.items():
        if not (optional and name == "none") and not (name == "list" and isinstance(value, tuple)):
            found[f"element_{name}"] = in_state(defect)
    if isinstance(value, tuple):
        found.pop("device")
    return Argument(value, found, names)


def iter_state(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple) else (value,)


def in_state(defect: Defect) -> Defect:
    def spoil(value: Any, r: random.Random) -> Any:
        if not isinstance(value, tuple):
            return defect(value, r)
        k = r.randrange(len(value))
        return tuple(defect(v, r) if j == k else v for j, v in enumerate(value))

    return spoil


def normal(rng: Any, dtype: str, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def states(rng: Any, cell: str, dtype: str, *leading: int) -> Any:
    pair = tuple(normal(rng, dtype, *leading, H) for _ in range(2))
    return pair if functional.CELLS[cell].has_cell_state else pair[0]


def parameters_of(cell: str) -> dict[str, float]:
    return dict.fromkeys(functional.CELLS[cell].parameters, 0.3)


def sequence_arguments(rng: Any, cell: str, dtype: str, runs: int) -> dict[str, Argument]:
    """The arguments that `functional.forward` and the layers share."""
    reset = rng.random((T, B)) < 0.3
    sized = {name: bind_axes(defect, (0, 1)) for name, defect in SIZES.items()}
    return {
        "x": array(normal(rng, dtype, T, B, I), axes=(2,)),
        "hx": state(states(rng, cell, dtype, runs, B)),
        "lengths": Argument(
            np.array([T, 1]), {**INTEGERS, **RANGES, **{n: bind_axes(d, (0,)) for n, d in SIZES.items()}}
        ),
        "reset": Argument(reset, {**FLAGS, **sized, "turned": lambda a, r: a.T}),
        "reset_state": state(states(rng, cell, dtype, runs, B), axes=(0, 2)),
        "return_states": Argument(False, FLAG),
        "lean": Argument(False, FLAG),
        "checkpoint_every": Argument(2, {name: defect for name, defect in SIZE.items() if name != "none"}),
    }


def weights_of(rng: Any, cell: str, dtype: str, proj: int = 0) -> dict[str, np.ndarray]:
    from rnnfast import reference

    shapes = reference.weight_shapes(cell, I, H, num_layers=L, bidirectional=True, proj_size=proj)
    return {name: 0.3 * normal(rng, dtype, *shape) for name, shape in shapes.items()}


def forward_subject(rng: Any, cell: str, dtype: str, proj: int = 0) -> Subject:
    named = weights_of(rng, cell, dtype, proj)
    arguments = {
        "cell": Argument(cell, CHOICE),
        **sequence_arguments(rng, cell, dtype, 2 * L),
        "weights": Argument(list(named.values()), LIST, ("weight", "weights")),
        "num_layers": Argument(L, SIZE),
        "bidirectional": Argument(True, FLAG),
        "batch_first": Argument(False, FLAG),
        "dropout": Argument(0.5, out_of(0, 1)),
        "training": Argument(True, FLAG),
        "seed": Argument(1, {**INTEGER, **HUGE}),
        "call": Argument(1, {**INTEGER, **HUGE}),
        **{name: Argument(value, out_of()) for name, value in parameters_of(cell).items()},
    }
    if proj:  # the states of these arguments are not projected
        for name in ("hx", "reset", "reset_state"):
            del arguments[name]
    positional = ("cell", "x", "hx", "weights")

    def call(**given: Any) -> Any:
        first = [given.pop(name, None) for name in positional]
        spoilt = {name: given.pop(name) for name in named if name in given}
        if spoilt:
            first[3] = [spoilt.get(name, w) for name, w in named.items()]
        return functional.forward(*first, **given)

    return Subject(call, arguments | {name: only_spoilt(array(w, name)) for name, w in named.items()})


def backward_subject(rng: Any, cell: str, dtype: str, consumed: bool = False) -> Subject:
    options = {"num_layers": L, "bidirectional": True, **parameters_of(cell)}
    weights = list(weights_of(rng, cell, dtype).values())
    *_, ctx = functional.forward(cell, normal(rng, dtype, T, B, I), None, weights, **options)
    if consumed:
        functional.backward(ctx)
        return Subject(functional.backward, {"ctx": Argument(ctx, {"used_up": lambda v, r: v}, ("reserve",))}, [ctx])
    arguments = {
        "ctx": Argument(ctx, OBJECT),
        "grad_output": array(normal(rng, dtype, T, B, 2 * H), skip="none"),
        "grad_state": state(states(rng, cell, dtype, 2 * L, B)),
        "grad_states": state(states(rng, cell, dtype, T, 2 * L, B), axes=(0, 1, 2, 3)),
        **{name: Argument(True, FLAG) for name in NEEDS},
    }
    return Subject(functional.backward, arguments, [ctx])


def pack_subject(rng: Any, cell: str, dtype: str) -> Subject:
    weights = list(weights_of(rng, cell, dtype).values())
    arguments = {
        "cell": Argument(cell, CHOICE),
        "weights": Argument(weights, LIST, ("weight", "weights")),
        "num_layers": Argument(L, SIZE),
        "bidirectional": Argument(True, FLAG),
        **{name: Argument(value, out_of()) for name, value in parameters_of(cell).items()},
    }
    return Subject(functional.pack, arguments)


def packed_subject(rng: Any, cell: str, dtype: str) -> Subject:
    """Packed weights meet another cell, other sizes, or a stream that has others."""
    options = parameters_of(cell)
    packed = functional.pack(cell, one_way(rng, cell, dtype), **options)
    other_cell = "gru" if cell == "lstm" else "lstm"
    others = {
        "other_cell": lambda v, r: functional.pack(other_cell, one_way(rng, other_cell, dtype)),
        "other_size": lambda v, r: functional.pack(cell, one_way(rng, cell, dtype, hidden=H + 1), **options),
        "other_dtype": lambda v, r: functional.pack(
            cell, one_way(rng, cell, "float64" if dtype == "float32" else "float32"), **options
        ),
    }
    stream = functional.Stream(cell, packed, B)
    x = normal(rng, dtype, T, B, I)

    def call(packed: Any, cell: Any, weights: Any, batch_size: Any, opened: Any) -> None:
        functional.forward(cell, x, None, weights, training=False)
        functional.Stream(cell, packed, batch_size)
        stream.set_packed(opened)

    arguments = {
        "packed": Argument(packed, {**OBJECT, "other_cell": others["other_cell"]}, ("packed", "cell")),
        "opened": Argument(packed, {**OBJECT, **others}, ("packed",)),
        "cell": Argument(cell, CHOICE),
        "weights": Argument(
            packed, {**OBJECT, **{k: v for k, v in others.items() if k != "other_size"}}, ("weights", "x", "cell")
        ),
        "batch_size": Argument(B, SIZE),
    }
    return Subject(call, arguments, [stream])


def one_way(rng: Any, cell: str, dtype: str, hidden: int = H) -> list[np.ndarray]:
    from rnnfast import reference

    return [0.3 * normal(rng, dtype, *shape) for shape in reference.weight_shapes(cell, I, hidden).values()]


def raw_stream_subject(rng: Any, cell: str, dtype: str, operation: str) -> Subject:
    stream = functional.Stream(cell, functional.pack(cell, one_way(rng, cell, dtype), **parameters_of(cell)), B)
    calls = {"step": stream.step, "state": stream.set_state, "rows": stream.reorder}
    return Subject(calls[operation], stream_arguments(rng, cell, dtype, operation), [stream])


def stream_arguments(rng: Any, cell: str, dtype: str, operation: str) -> dict[str, Argument]:
    sized = {name: bind_axes(defect, (0,)) for name, defect in SIZES.items()}
    if operation == "state":
        return {"state": state(states(rng, cell, dtype, 1, B))}
    if operation == "rows":
        return {"rows": Argument(np.array([1, 0]), {**INTEGERS, **RANGES, **MISSING, **sized})}
    return {
        "x_t": array(normal(rng, dtype, B, I)),
        "reset": Argument(np.array([True, False]), {**FLAGS, **sized}),
        "out": array(np.zeros((B, H), dtype), defects=OUT),
    }


# ---- modules ----


LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": rnnfast.RNN,
    "LSTM": rnnfast.LSTM,
    "GRU": rnnfast.GRU,
    "LeakyRNN": rnnfast.LeakyRNN,
}


CELL_MODULES = ("RNNCell", "LSTMCell", "GRUCell")


def constructor_subject(kind: Any, **extra: Argument) -> Subject:
    arguments = {
        "input_size": Argument(I, SIZE),
        "hidden_size": Argument(H, SIZE),
        "bias": Argument(True, FLAG),
        "device": Argument(None, DEVICE),
        "dtype": Argument(None, DTYPE),
        "seed": Argument(1, {**{k: v for k, v in INTEGER.items() if k != "none"}, **HUGE}),
        **extra,
    }
    return Subject(kind, arguments)


def layer_constructor(rng: Any, name: str) -> Subject:
    extra = {
        "num_layers": Argument(L, {**SIZE, "huge": lambda v, r: r.choice((4096, 2**31, 2**64))}),
        "batch_first": Argument(False, FLAG),
        "dropout": Argument(0.1, out_of(0, 1)),
        "bidirectional": Argument(True, FLAG),
    }
    if name == "LSTM":
        too_large = {"own_size": lambda v, r: r.choice((H, H + 1, 2**31))}
        extra["proj_size"] = Argument(2, {**INTEGER, **too_large})
    if name in ("RNN", "LeakyRNN"):
        extra["nonlinearity"] = Argument("tanh", CHOICE)
    if name == "LeakyRNN":
        extra["alpha"] = Argument(0.3, out_of(0, 1))
    return constructor_subject(LAYERS[name], **extra)


def cell_constructor(rng: Any, name: str) -> Subject:
    extra = {"nonlinearity": Argument("tanh", CHOICE)} if name == "RNNCell" else {}
    return constructor_subject(getattr(rnnfast, name), **extra)


@contextlib.contextmanager
def attributes(module: Any, values: dict[str, Any], attribute: str) -> Iterator[None]:
    """p.data or p.grad of some parameters replaced for a while."""
    kept = {name: getattr(module._parameters[name], attribute) for name in values}
    try:
        for name, value in values.items():
            setattr(module._parameters[name], attribute, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module._parameters[name], attribute, value)


def split(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take the arguments with this prefix out of `given`."""
    return {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}


def grads(module: Any, defects: dict[str, Defect] = GRAD) -> dict[str, Argument]:
    """Gradients that somebody put there and nothing can be added into."""
    found = {f"grad:{name}": array(p.grad, name, defects=defects) for name, p in module._parameters.items()}
    return {key: only_spoilt(argument) for key, argument in found.items()}


def data(module: Any, *names: str, defects: dict[str, Defect] = ARRAY) -> dict[str, Argument]:
    """Values that somebody put into a parameter; a message may use `names` as well."""
    found = {f"data:{n}": array(p.data, n, *names, defects=defects) for n, p in module._parameters.items()}
    return {key: only_spoilt(argument) for key, argument in found.items()}


def with_grads(rng: Any, module: Any) -> Any:
    for parameter in module.parameters():
        parameter.grad = rng.standard_normal(parameter.shape).astype(parameter.dtype)
    return module


def layer_subject(rng: Any, name: str, dtype: str, training: bool) -> Subject:
    layer = LAYERS[name](I, H, L, bidirectional=True, dtype=dtype, seed=1).train(training)
    cell = layer.cell
    arguments = sequence_arguments(rng, cell, dtype, 2 * L)
    del arguments["x"].defects["rank_down"]  # one sequence without the batch axis
    if training:
        arguments |= data(layer)

    def call(**given: Any) -> Any:
        with attributes(layer, split(given, "data:"), "data"):
            return layer(**given)

    return Subject(call, arguments, [layer])


def layer_backward_subject(rng: Any, name: str, dtype: str) -> Subject:
    layer = with_grads(rng, LAYERS[name](I, H, L, bidirectional=True, dtype=dtype, seed=1))
    layer(normal(rng, dtype, T, B, I))
    arguments = {
        "grad_output": array(normal(rng, dtype, T, B, 2 * H), skip="none"),
        "grad_state": state(states(rng, layer.cell, dtype, 2 * L, B)),
        "grad_states": state(states(rng, layer.cell, dtype, T, 2 * L, B), axes=(0, 1, 2, 3)),
        "need_grad_x": Argument(True, FLAG),
        "need_grad_state": Argument(True, FLAG),
        "retain": Argument(True, FLAG),
        **grads(layer),
    }

    def call(**given: Any) -> Any:
        with attributes(layer, split(given, "grad:"), "grad"):
            return layer.backward(**given)

    return Subject(call, arguments, [layer])


def order_subject(rng: Any, name: str, dtype: str) -> Subject:
    """Calls in a wrong order."""
    layer = with_grads(rng, LAYERS[name](I, H, dtype=dtype, seed=1))
    sealed = LAYERS[name](I, H, dtype=dtype, seed=1).eval()
    two_ways = LAYERS[name](I, H, bidirectional=True, dtype=dtype, seed=1)
    stream = sealed.stream(B)
    stream.close()
    x = normal(rng, dtype, B, I)

    def spent() -> None:
        output, _ = layer(x[None])
        layer.backward(output)
        layer.backward(output)

    calls = {
        "backward": lambda: LAYERS[name](I, H, dtype=dtype).backward(),
        "forward": spent,
        "gradient_flow": lambda: rnnfast.gradient_flow(sealed),
        "reset_parameters": lambda: sealed.reset_parameters(),
        "module": lambda: rnnfast.tbptt(two_ways, x[None], 2),
        "bidirectional": lambda: two_ways.stream(B),
        "step:stream": lambda: stream.step(x),
        "state:stream": lambda: stream.state,
        "fork:stream": lambda: stream.fork(),
        "refresh:stream": lambda: stream.refresh(),
        "reorder:stream": lambda: stream.reorder([0, 1]),
        "enter:stream": lambda: stream.__enter__(),
        "set:stream": lambda: setattr(stream, "state", None),
        "Linear": lambda: rnnfast.Linear(2, 3).backward(x),
        "Dropout": lambda: rnnfast.Dropout(0.5).backward(x),
        "Embedding": lambda: rnnfast.Embedding(4, 3).backward(x),
    }

    def call(**given: Any) -> None:
        for wrong in given.values():
            if wrong:
                wrong()

    arguments = {key: Argument(None, {"order": lambda v, r, f=f: f}, (key.split(":")[-1],)) for key, f in calls.items()}
    return Subject(call, arguments, [sealed, two_ways])


def load_subject(rng: Any, name: str, dtype: str) -> Subject:
    layer = with_grads(rng, LAYERS[name](I, H, dtype=dtype, seed=1))
    good = {key: normal(rng, dtype, *value.shape) for key, value in layer.state_dict().items()}

    def call(**entries: Any) -> None:
        layer.load_state_dict(entries.pop("state", None) or entries)

    defects: dict[str, Defect] = {
        "none_at_all": lambda v, r: [1],
        "missing": lambda v, r: dict(r.sample(sorted(good.items()), len(good) - 1)),
        "unexpected": lambda v, r: {**good, "weight_xx": good["weight_ih_l0"]},
        "text": lambda v, r: "state",
        "pairs": lambda v, r: list(good.items()),
    }
    return Subject(
        call, {"state": Argument({}, defects), **{key: array(value, key) for key, value in good.items()}}, [layer]
    )


def cell_subject(rng: Any, name: str, dtype: str) -> Subject:
    cell = with_grads(rng, getattr(rnnfast, name)(I, H, dtype=dtype, seed=1))
    arguments = {
        "x": array(normal(rng, dtype, B, I), axes=(1,), skip="rank_down"),
        "hx": state(states(rng, cell.cell, dtype, B), axes=(0, 1)),
        **data(cell),
    }

    def call(**given: Any) -> Any:
        with attributes(cell, split(given, "data:"), "data"):
            return cell(**given)

    return Subject(call, arguments, [cell])


def cell_backward_subject(rng: Any, name: str, dtype: str) -> Subject:
    cell = with_grads(rng, getattr(rnnfast, name)(I, H, dtype=dtype, seed=1))
    _, context = cell(normal(rng, dtype, B, I))
    arguments = {
        "context": Argument(context, {k: v for k, v in OBJECT.items() if k != "tuple"}),
        "grad_state": state(states(rng, cell.cell, dtype, B), axes=(0, 1)),
        "need_grad_x": Argument(True, FLAG),
        "retain": Argument(True, FLAG),
        **grads(cell),
    }

    def call(**given: Any) -> Any:
        with attributes(cell, split(given, "grad:"), "grad"):
            return cell.backward(given.pop("context"), given.pop("grad_state"), **given)

    return Subject(call, arguments, [cell, context])


def stream_subject(rng: Any, name: str, dtype: str, operation: str) -> Subject:
    layer = LAYERS[name](I, H, dtype=dtype, seed=1).eval()
    stream = layer.stream(B)
    calls = {"step": stream.step, "state": lambda state: setattr(stream, "state", state), "rows": stream.reorder}
    arguments = stream_arguments(rng, layer.cell, dtype, operation)
    return Subject(calls[operation], arguments, [layer, stream])


def open_stream_subject(rng: Any, name: str) -> Subject:
    layer = LAYERS[name](I, H, seed=1)
    return Subject(layer.stream, {"batch_size": Argument(B, SIZE)}, [layer])


# ---- what is around the recurrence ----


NOT_GRADIENTS = {k: v for k, v in GRAD.items() if k in {*NOT_ARRAYS, "int64", "bool", "text", "list", "dates"}}


def norm_subject(rng: Any, dtype: str) -> Subject:
    second = normal(rng, dtype, 5)
    arguments = {
        "tensors": Argument(normal(rng, dtype, 3, 4), NOT_GRADIENTS),
        "norm_type": Argument(2.0, out_of(infinite=True)),
    }
    return Subject(lambda tensors, norm_type: rnnfast.get_total_norm([second, tensors], norm_type), arguments, [second])


def clip_norm_subject(rng: Any, dtype: str) -> Subject:
    second = normal(rng, dtype, 5)
    arguments = {
        "parameters": Argument(normal(rng, dtype, 3, 4), {**NOT_GRADIENTS, "read_only": read_only}),
        "max_norm": Argument(1.0, out_of(0, infinite=True)),
        "norm_type": Argument(2.0, out_of(infinite=True)),
    }

    def call(parameters: Any, max_norm: Any, norm_type: Any) -> None:
        rnnfast.clip_grad_norm_([second, parameters], max_norm, norm_type)

    return Subject(call, arguments, [second])


def clip_value_subject(rng: Any, dtype: str) -> Subject:
    second = normal(rng, dtype, 5)
    arguments = {
        "parameters": Argument(normal(rng, dtype, 3, 4), {**NOT_GRADIENTS, "read_only": read_only}),
        "clip_value": Argument(1.0, out_of(0, infinite=True)),
    }

    def call(parameters: Any, clip_value: Any) -> None:
        rnnfast.clip_grad_value_([second, parameters], clip_value)

    return Subject(call, arguments, [second])


def loss_subject(rng: Any, dtype: str) -> Subject:
    logits, target = normal(rng, dtype, T, B, I), rng.integers(0, I, (T, B))
    x, y = normal(rng, dtype, T, B, H), normal(rng, dtype, T, B, H)
    others = {k: v for k, v in ARRAY.items() if k not in ("another_float",)}  # either float is a valid first array
    integer_array = {k: v for k, v in INTEGERS.items() if k not in ("floats", "nothings", "ragged", "rank_up_last")}

    def call(logits: Any, target: Any, input: Any, goal: Any, scores: Any, mask: Any, weight: Any, **rest: Any) -> None:
        rnnfast.cross_entropy(
            logits,
            target,
            ignore_index=rest["ignore_index"],
            reduction=rest["reduction"],
            label_smoothing=rest["label_smoothing"],
        )
        rnnfast.mse_loss(input, goal, mask=mask, reduction=rest["other_reduction"])
        rnnfast.bce_with_logits(scores, goal, mask=mask, weight=weight, pos_weight=rest["pos_weight"])

    pair = ("target", "input")
    return Subject(
        call,
        {
            "logits": array(logits, "logits", "target", axes=(0, 1), defects=others),
            "target": Argument(target, {**integer_array, **MISSING, **LISTS, **RANGES}),
            "input": array(x, *pair),
            "goal": array(y, "target", axes=(0, 1, 2)),
            "scores": array(x, "logits", "target"),
            "mask": array(x > 0, "mask", axes=(0, 1), defects=MASK, skip="giant"),
            "weight": array(y[0], "weight", axes=(1,), defects=FACTOR),
            "pos_weight": array(y[0], "pos_weight", axes=(1,), defects=FACTOR),
            "ignore_index": Argument(-100, INTEGER_NEGATIVE),
            "reduction": Argument("mean", CHOICE),
            "other_reduction": Argument("mean", CHOICE, ("reduction",)),
            "label_smoothing": Argument(0.1, out_of(0, 1)),
        },
    )


MASK = {
    **NOT_ARRAYS,
    **LISTS,
    **{k: v for k, v in DTYPES.items() if k in ("int64", "uint8", "float16", "object", "text", "complex")},
    **{k: v for k, v in RANKS.items() if k != "rank_down"},
}
FACTOR = {**NOT_ARRAYS, **LISTS, **DTYPES}
INTEGER_NEGATIVE = {k: v for k, v in INTEGER.items() if k != "negative"}


def linear_subject(rng: Any, dtype: str) -> Subject:
    linear = with_grads(rng, rnnfast.Linear(I, H, dtype=dtype, seed=1))
    x = normal(rng, dtype, T, B, I)
    linear(x)

    def call(**given: Any) -> None:
        data, grad = split(given, "data:"), split(given, "grad:")
        with attributes(linear, data, "data"):
            linear(given["x"])
        with attributes(linear, grad, "grad"):
            linear.backward(given["grad_output"], need_grad_x=given["need_grad_x"], retain=given["retain"])

    free = "rank_up rank_down"  # any leading dimensions will do
    arguments = {
        "x": array(x, axes=(2,), skip=free),
        "grad_output": array(normal(rng, dtype, T, B, H)),
        "need_grad_x": Argument(True, FLAG),
        "retain": Argument(True, FLAG),
        # A weight of the other float disagrees with x, which may be named instead.
        **data(linear, "x"),
        **grads(linear),
    }
    return Subject(call, arguments, [linear])


def embedding_subject(rng: Any, dtype: str) -> Subject:
    table = with_grads(rng, rnnfast.Embedding(6, H, dtype=dtype, seed=1))
    indices = rng.integers(0, 6, (T, B))
    table(indices)
    bad = {**INTEGERS, **RANGES, **MISSING, **LISTS, "first_beyond": one_value(6)}
    for fine in ("rank_up", "rank_up_last", "rank_down", "scalar"):
        bad.pop(fine)

    def call(indices: Any, grad_output: Any, **rest: Any) -> None:
        table(indices)
        with attributes(table, split(rest, "grad:"), "grad"):
            table.backward(grad_output, retain=rest["retain"])

    arguments = {
        "indices": Argument(indices, bad),
        "grad_output": array(normal(rng, dtype, T, B, H)),
        "retain": Argument(True, FLAG),
        **grads(table),
    }
    return Subject(call, arguments, [table])


def around_constructors(rng: Any) -> Subject:
    def call(in_features: Any, out_features: Any, num_embeddings: Any, embedding_dim: Any, **rest: Any) -> None:
        rnnfast.Linear(in_features, out_features, rest["bias"], rest["device"], rest["dtype"])
        rnnfast.Embedding(num_embeddings, embedding_dim, rest["padding_idx"])
        rnnfast.Dropout(rest["p"], seed=rest["seed"])
        rnnfast.Sequential(rnnfast.Linear(2, 2), rest["modules"])
        rnnfast.set_num_threads(rest["n"])

    index = {**{k: v for k, v in INTEGER.items() if k != "none"}, "beyond": lambda v, r: r.choice((6, -7, 2**100))}
    arguments = {
        **{name: Argument(6, SIZE) for name in ("in_features", "out_features", "num_embeddings", "embedding_dim")},
        "bias": Argument(True, FLAG),
        "device": Argument(None, DEVICE),
        "dtype": Argument(None, DTYPE),
        "padding_idx": Argument(1, {k: v for k, v in index.items() if k != "negative"}),
        "p": Argument(0.5, out_of(0, 1)),
        "seed": Argument(1, {**{k: v for k, v in INTEGER.items() if k != "none"}, **HUGE}),
        "modules": Argument(rnnfast.Linear(2, 2), OBJECT),
        "n": Argument(rnnfast.get_num_threads(), SIZE),
    }
    return Subject(call, arguments)


OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": out_of(0), "dampening": out_of(), "nesterov": FLAG},
    "RMSprop": {"alpha": out_of(0), "eps": out_of(0), "momentum": out_of(0), "centered": FLAG},
    "Adam": {"eps": out_of(0), "amsgrad": FLAG},
    "AdamW": {"eps": out_of(0), "amsgrad": FLAG},
}
VALID = {"momentum": 0.9, "dampening": 0.0, "alpha": 0.9, "eps": 1e-8}


def optimiser_subject(rng: Any, name: str, dtype: str) -> Subject:
    kind = getattr(rnnfast.optim, name)
    linear = with_grads(rng, rnnfast.Linear(3, 2, dtype=dtype, seed=1))
    hyper = {"lr": out_of(0), "weight_decay": out_of(0), **OPTIMISERS[name]}
    arguments = {key: Argument(VALID.get(key, False if d is FLAG else 0.01), d) for key, d in hyper.items()}
    if name.startswith("Adam"):
        arguments["betas"] = Argument((0.9, 0.99), BETAS, ("betas", "beta1", "beta2"))
    arguments["parameters"] = Argument(list(linear.parameters()), PARAMETERS)

    def call(**given: Any) -> None:
        kind(given.pop("parameters"), **given)

    return Subject(call, arguments, [linear])


BETAS: dict[str, Defect] = {
    "number": lambda v, r: 0.9,
    "three": lambda v, r: (0.9, 0.9, 0.9),
    "above": lambda v, r: r.choice(((1.0, 0.9), (0.9, 1.0), (0.9, 2.0))),
    "below": lambda v, r: (0.9, -0.1),
    "text": lambda v, r: ("0.9", 0.9),
    "nan": lambda v, r: (math.nan, 0.9),
    "none": lambda v, r: None,
}
PARAMETERS: dict[str, Defect] = {
    "none": lambda v, r: None,
    "empty": lambda v, r: [],
    "one": lambda v, r: v[0],
    "arrays": lambda v, r: [v[0], v[1].data],
    "number": lambda v, r: 7,
    "text": lambda v, r: "parameters",
    "integers": lambda v, r: [rnnfast.Parameter(np.zeros(3, int), "p")],
    "lists": lambda v, r: [rnnfast.Parameter([1.0, 2.0], "p")],
}


def step_subject(rng: Any, name: str, dtype: str) -> Subject:
    linear = with_grads(rng, rnnfast.Linear(3, 2, dtype=dtype, seed=1))
    kind = getattr(rnnfast.optim, name)
    optimiser = kind(linear.parameters(), lr=1e-9)
    optimiser.step()
    saved = optimiser.state_dict()
    entries: dict[str, Defect] = {
        "none": lambda v, r: None,
        "list": lambda v, r: [1],
        "missing": lambda v, r: dict(r.sample(sorted(v.items()), len(v) - 1)),
        "another": lambda v, r: {**v, "optimizer": "Another"},
        "count": lambda v, r: {**v, "num_parameters": 3},
        "unexpected": lambda v, r: {**v, "9.step": 1},
        "shape": lambda v, r: {k: x[..., None] if isinstance(x, np.ndarray) else x for k, x in v.items()},
        "lr": lambda v, r: {**v, "lr": r.choice((-1.0, math.nan, "1", None))},
    }
    if name == "SGD":
        del entries["shape"]  # without momentum it has no arrays

    def call(**given: Any) -> None:
        if given["state"] is not saved:
            optimiser.load_state_dict(given["state"])
        with attributes(linear, split(given, "data:"), "data"), attributes(linear, split(given, "grad:"), "grad"):
            optimiser.step(given["lr"])

    arguments = {
        "lr": Argument(0.0, {k: v for k, v in out_of(0).items() if k != "none"}),
        "state": Argument(saved, entries, ("state", "lr")),
        **data(linear, "parameters", defects=GRAD),
        **grads(linear, {name: defect for name, defect in GRAD.items() if name != "read_only"}),
    }
    return Subject(call, arguments, [linear, optimiser])


def tbptt_subject(rng: Any, name: str, dtype: str) -> Subject:
    layer = with_grads(rng, LAYERS[name](I, H, dtype=dtype, seed=1))
    sized = {name: bind_axes(defect, (0,)) for name, defect in SIZES.items()}
    arguments = {
        "module": Argument(layer, OBJECT),
        "x": array(normal(rng, dtype, T, B, I), "x", "lengths", axes=(2,), skip="rank_down"),
        "window": Argument(2, SIZE_UNBOUNDED),
        "burn_in": Argument(0, INTEGER),
        "state": state(states(rng, layer.cell, dtype, 1, B), "state", "hx"),
        "lengths": Argument(np.array([T, 1]), {**INTEGERS, **RANGES, **sized}),
    }
    return Subject(lambda **given: list(rnnfast.tbptt(**given)), arguments, [layer])


def flow_subject(rng: Any, name: str, dtype: str) -> Subject:
    layer = with_grads(rng, LAYERS[name](I, H, dtype=dtype, seed=1))
    layer(normal(rng, dtype, T, B, I))
    arguments = {
        "module": Argument(layer, OBJECT),
        "grad_output": array(normal(rng, dtype, T, B, H), skip="none"),
        "grad_state": state(states(rng, layer.cell, dtype, 1, B)),
        "per_row": Argument(True, FLAG),
    }
    return Subject(rnnfast.gradient_flow, arguments, [layer])


def explain_subject(rng: Any, name: str, dtype: str) -> Subject:
    layer = LAYERS[name](I, H, L, dtype=dtype, seed=1)
    sized = {name: bind_axes(defect, (0,)) for name, defect in SIZES.items()}
    arguments = {
        "module": Argument(layer, OBJECT),
        "x": array(normal(rng, dtype, T, B, I), axes=(2,), skip="rank_down"),
        "lengths": Argument(np.array([T, 1]), {**INTEGERS, **RANGES, **sized}),
    }
    return Subject(rnnfast.explain, arguments, [layer])


def init_subject(rng: Any, dtype: str) -> Subject:
    def call(target: Any, gain: Any, low: Any, mean: Any, seed: Any) -> None:
        scratch = target.copy() if isinstance(target, np.ndarray) and target.flags.writeable else target
        rnnfast.init.orthogonal_(scratch, gain, seed=seed)
        rnnfast.init.uniform_(scratch, low, seed=seed)
        rnnfast.init.normal_(scratch, mean, seed=seed)

    arguments = {
        "target": Argument(normal(rng, dtype, 6, 3), {**NOT_GRADIENTS, **MISSING, "read_only": read_only}),
        "gain": Argument(1.0, out_of()),
        "low": Argument(0.0, out_of()),
        "mean": Argument(0.0, out_of()),
        "seed": Argument(1, {**{k: v for k, v in INTEGER.items() if k not in ("none", "list", "array")}, **HUGE}),
    }
    return Subject(call, arguments)


def named_subject(rng: Any, dtype: str) -> Subject:
    """What is left: the named function of the vanilla RNN, and the strict mode."""
    weights, x = one_way(rng, "rnn_relu", dtype), normal(rng, dtype, T, B, I)

    def call(nonlinearity: Any, flag: Any) -> None:
        functional.rnn(x, None, weights, nonlinearity=nonlinearity)
        rnnfast.set_strict(flag)

    arguments = {"nonlinearity": Argument("relu", CHOICE), "flag": Argument(False, FLAG)}
    return Subject(call, arguments, [weights, x])


SIZE_UNBOUNDED = {k: v for k, v in SIZE.items() if k != "huge"}


def subjects() -> dict[str, Callable[[], Subject]]:
    """How to make each of them, by name."""
    found: dict[str, Callable[[], Subject]] = {}

    def add(name: str, build: Callable[..., Subject], *arguments: Any) -> None:
        found[name] = lambda: build(np.random.default_rng(len(name)), *arguments)

    for dtype in ("float32", "float64"):
        for cell, info in functional.CELLS.items():
            add(f"forward {cell} {dtype}", forward_subject, cell, dtype)
            add(f"backward {cell} {dtype}", backward_subject, cell, dtype)
            add(f"consumed {cell} {dtype}", backward_subject, cell, dtype, True)
            add(f"pack {cell} {dtype}", pack_subject, cell, dtype)
            add(f"packed {cell} {dtype}", packed_subject, cell, dtype)
            for operation in ("step", "state", "rows"):
                add(f"raw stream {operation} {cell} {dtype}", raw_stream_subject, cell, dtype, operation)
            if info.has_cell_state:
                add(f"forward projected {cell} {dtype}", forward_subject, cell, dtype, 3)
        for name in LAYERS:
            add(f"{name} {dtype}", layer_subject, name, dtype, True)
            add(f"{name} eval {dtype}", layer_subject, name, dtype, False)
            add(f"{name} backward {dtype}", layer_backward_subject, name, dtype)
            add(f"{name} order {dtype}", order_subject, name, dtype)
            add(f"{name} load {dtype}", load_subject, name, dtype)
            for operation in ("step", "state", "rows"):
                add(f"{name} stream {operation} {dtype}", stream_subject, name, dtype, operation)
            add(f"{name} tbptt {dtype}", tbptt_subject, name, dtype)
            add(f"{name} gradient_flow {dtype}", flow_subject, name, dtype)
            add(f"{name} explain {dtype}", explain_subject, name, dtype)
        for name in CELL_MODULES:
            add(f"{name} {dtype}", cell_subject, name, dtype)
            add(f"{name} backward {dtype}", cell_backward_subject, name, dtype)
        for name in OPTIMISERS:
            add(f"{name} {dtype}", optimiser_subject, name, dtype)
            add(f"{name} step {dtype}", step_subject, name, dtype)
        add(f"get_total_norm {dtype}", norm_subject, dtype)
        add(f"clip_grad_norm_ {dtype}", clip_norm_subject, dtype)
        add(f"clip_grad_value_ {dtype}", clip_value_subject, dtype)
        add(f"losses {dtype}", loss_subject, dtype)
        add(f"Linear {dtype}", linear_subject, dtype)
        add(f"Embedding {dtype}", embedding_subject, dtype)
        add(f"init {dtype}", init_subject, dtype)
        add(f"named {dtype}", named_subject, dtype)
    for name in LAYERS:
        add(f"{name} constructor", layer_constructor, name)
        add(f"{name} open stream", open_stream_subject, name)
    for name in CELL_MODULES:
        add(f"{name} constructor", cell_constructor, name)
    add("constructors around", around_constructors)
    return found


# ---- what must not change --------------------------------------------------------------------------------------------


def frozen(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A value that is equal as long as nothing in `value` has changed."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.flags.writeable, value.tobytes()
    if isinstance(value, rnnfast.Parameter):
        return id(value.data), frozen(value.data), id(value.grad), frozen(value.grad)
    if id(value) in seen:
        return "again"
    seen |= {id(value)}
    if isinstance(value, dict):
        return [(key, frozen(v, seen)) for key, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [frozen(v, seen) for v in value]
    if isinstance(value, functional.Context):
        return value._core.consumed, id(value.grad_h), id(value.grad_reset_state)
    if isinstance(value, functional.Stream):
        return frozen(value.get_state())
    if isinstance(value, (rnnfast.Module, rnnfast.optim.Optimizer)):
        return [(key, frozen(v, seen)) for key, v in vars(value).items() if key not in ("_pack", "_modules")]
    if type(value).__name__ == "Stream":
        return value.closed or frozen(value.state), value.batch_size
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else id(value)


# ---- the run ---------------------------------------------------------------------------------------------------------


def names_it(message: str, names: tuple[str, ...]) -> bool:
    """One letter may stand anywhere in a message by chance, so such a name must begin it."""
    patterns = (rf"(?<![A-Za-z_]){re.escape(n)}(?![A-Za-z])" if len(n) > 1 else rf"\A{n}\b" for n in names)
    return any(re.search(pattern, message) for pattern in patterns)


def attempt(subject: Subject, key: str, defect: str, r: random.Random) -> str | None:
    """One bad call; what was wrong with how it was refused, or None."""
    argument = subject.arguments[key]
    spoilt = argument.defects[defect](argument.value, r)
    others = {name: a.value for name, a in subject.arguments.items() if a.always and name != key}
    before = frozen(others), frozen(subject.watched)
    problem = refusal(subject.call, {**others, key: spoilt}, argument.names or (key.split(":")[-1],), defect)
    if problem is None and (frozen(others), frozen(subject.watched)) != before:
        return "something has changed"
    return problem


def refusal(call: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...], defect: str) -> str | None:
    """How a call that must be refused was: None where as it should be."""
    try:
        call(**given)
    except ALLOWED as error:
        kind, message = type(error).__name__, str(error)
        if "incompatible function arguments" in message or not names_it(message, names):
            return f"{kind} that does not name {' or '.join(names)}: {message[:200]}"
        return None
    except KeyError as error:
        return None if defect in ("missing", "unexpected") else f"KeyError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "nothing was raised"


def run(progress: str, cases: int = CASES, seed: int = 0) -> dict[str, Any]:
    """All cases; the file `progress` always holds the name of the present one."""
    warnings.simplefilter("ignore")
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limit))  # who copies a giant is refused, and harms nobody
    r, builders = random.Random(seed), subjects()
    table = {name: build() for name, build in builders.items()}
    combinations = [(n, key, d) for n, s in table.items() for key, a in s.arguments.items() for d in a.defects]
    r.shuffle(combinations)
    problems: dict[str, str] = {}
    done = 0
    with open(progress, "wb", buffering=0) as file:
        for name, key, defect in cycle(combinations):
            case = f"{name}: {key}: {defect}"
            os.pwrite(file.fileno(), case.encode().ljust(200), 0)
            try:
                problem = attempt(table[name], key, defect, r)
            except Unfit:
                continue
            if problem:
                problems[case] = problem
                table[name] = builders[name]()
            done += 1
            if done == cases:
                return {"cases": done, "combinations": len(combinations), "problems": problems}
    raise AssertionError


def test_valid_arguments_are_accepted() -> None:
    """Else every refusal below would mean nothing."""
    for name, build in subjects().items():
        subject = build()
        if not name.startswith("consumed"):
            subject.call(**{key: a.value for key, a in subject.arguments.items() if a.always})


def test_ten_thousand_bad_inputs(tmp_path: Path) -> None:
    progress = tmp_path / "case"
    code = f"import json, test_bad_input; print(json.dumps(test_bad_input.run({str(progress)!r})))"
    try:
        found = run_process(code, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs at {progress.read_text().strip()}")
    if found.returncode:
        case = progress.read_text().strip() if progress.exists() else "the start"
        pytest.fail(f"exit status {found.returncode} at {case}\n{found.stderr[-2000:]}")
    result = json.loads(found.stdout)
    assert result["cases"] == CASES
    problems = [f"{case}: {problem}" for case, problem in sorted(result["problems"].items())]
    assert not problems, f"{len(problems)} of {result['combinations']} combinations\n" + "\n".join(problems[:100])


NO_MEMORY = """
import resource
import numpy as np, rnnfast
x = np.broadcast_to(np.float32(0), (40_000, 20_000, 4))  # 13 GB, had it memory of its own
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for layer in (rnnfast.LSTM(4, 6, seed=0), rnnfast.LSTM(4, 6, seed=0).eval()):
    try:
        layer(x)
    except MemoryError as error:
        print(error)
"""


def test_no_memory_for_a_copy_is_said(run_python: RunPython) -> None:
    """Of an input whose strides the kernels do not take."""
    pytest.importorskip("resource")  # not everywhere
    said = run_python(NO_MEMORY, OPENBLAS_NUM_THREADS="1").splitlines()
    assert said == ["x: expected memory for a contiguous copy of 3200000000 values, found none"] * 2
