"""The arguments that come in: which module an array belongs to, and checks of type, dtype, shape and range.

The same Python runs over the array's own module: NumPy, or CuPy where the array is one of CuPy's. Every message names
the argument, what was expected and what came. No check converts: two float dtypes that differ are a TypeError.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from . import _device

__all__ = [
    "check_array",
    "check_choice",
    "check_device",
    "check_dtype",
    "check_flag",
    "check_float",
    "check_index",
    "check_int",
    "check_number",
    "check_seed",
    "check_shape",
    "check_size",
    "check_writable",
    "detached",
    "float_dtype",
    "fresh_seed",
    "module_of",
    "new_array",
    "new_weight",
    "quiet",
]

Function = TypeVar("Function", bound=Callable[..., Any])

FLOATS = ("float32", "float64")

# Sizes are 32-bit in the engine's index arithmetic, and weights larger than any address space in use are a mistake:
# both are refused by name before NumPy refuses them without one.
MAX_SIZE = 2**31 - 1
MAX_BYTES = 2**47


def module_of(value: Any) -> Any:
    """The module that `value` is an array of (numpy, cupy), or None."""
    if isinstance(value, np.ndarray):
        return np
    if type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "__cuda_array_interface__"):
        return sys.modules["cupy"]
    return None


def check_array(name: str, value: Any, like: Any = None) -> Any:
    """The module that `value` is an array of; TypeError where it is none, or not that of `like` (a module)."""
    xp = module_of(value)
    if xp is None or (like is not None and xp is not like):
        wanted = f"a {like.__name__} array" if like is not None else "an array"
        kind = type(value)
        raise TypeError(f"{name}: expected {wanted}, got {kind.__module__}.{kind.__qualname__}")
    return xp


def check_dtype(name: str, value: Any, expected: Any) -> None:
    """TypeError unless the dtype of `value` is exactly `expected`."""
    if value.dtype != expected:
        raise TypeError(f"{name}: expected dtype {np.dtype(expected)}, got {value.dtype}")


def check_float(name: str, value: Any) -> None:
    """TypeError unless the dtype of `value` is float32 or float64."""
    if str(value.dtype) not in FLOATS:  # the name, because a byte-swapped float32 is another dtype
        raise TypeError(f"{name}: expected dtype float32 or float64, got {value.dtype}")


def check_index(name: str, value: Any, size: int, unless: int | None = None) -> None:
    """TypeError unless `value` is of an integer dtype, ValueError unless each value is in [0, size) or is `unless`."""
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    chosen = value if unless is None else value[value != unless]
    if chosen.size == 0:
        return
    lowest, highest = int(chosen.min()), int(chosen.max())
    if lowest < 0 or highest >= size:
        other = "" if unless is None else f" or {unless}"
        raise ValueError(f"{name}: expected values in [0, {size}){other}, got {lowest if lowest < 0 else highest}")


def check_shape(name: str, value: Any, expected: Sequence[Any]) -> None:
    """ValueError unless the shape is `expected`: None stands for any size, a leading Ellipsis for any dimensions."""
    shape, wanted = tuple(value.shape), tuple(expected)
    if wanted[:1] == (...,):
        tail = wanted[1:]
        sizes = shape[max(len(shape) - len(tail), 0) :]
    else:
        tail, sizes = wanted, shape
    if len(sizes) != len(tail) or any(t is not None and t != s for t, s in zip(tail, sizes, strict=True)):
        raise ValueError(f"{name}: expected shape {_shape_text(wanted)}, got {_shape_text(shape)}")


def _shape_text(shape: tuple[Any, ...]) -> str:
    words = ["..." if s is ... else "*" if s is None else str(s) for s in shape]
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def check_writable(name: str, value: Any) -> None:
    """ValueError where `value` cannot be written, as the parameters of a module in eval() cannot."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:  # CuPy's arrays are always writable
        raise ValueError(
            f"{name}: expected a writable array, got a read-only one (call train() if its module is in eval())"
        )


def _is_array(value: Any) -> bool:
    """Whether it has dimensions; a zero-dimensional array is a number."""
    return not isinstance(value, type) and bool(getattr(value, "shape", ()))


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    """`value` as an int; TypeError where it is not integral, ValueError below `minimum`."""
    try:
        result = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:  # arrays have __index__, too, and most refuse it
        result = None
    if result is None or _is_array(value):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if result < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {result}")
    return result


def check_size(name: str, value: Any, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
    """A size of a layer: an integer from `minimum` to `maximum`."""
    size = check_int(name, value, minimum)
    if size > maximum:
        raise ValueError(f"{name}: expected at most {maximum}, got {size}")
    return size


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool. Numbers are refused: they are most often an argument in the wrong position."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return bool(value)


def check_number(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    below: bool = False,
    infinite: bool = False,
) -> float:
    """`value` as a float; TypeError where it is no real number, ValueError outside [minimum, maximum] or where NaN.

    below: the maximum itself is outside too. infinite: infinities are allowed.
    """
    number = not isinstance(value, (bool, np.bool_, str, bytes, type)) and not _is_array(value)
    if not number or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf if value > 0 else -math.inf
    inside = minimum <= result <= maximum and not (below and result == maximum)
    if not inside or (math.isinf(result) and not infinite):
        limits = [f"at least {minimum:g}"] if minimum > -math.inf else []
        limits += [f"{'below' if below else 'at most'} {maximum:g}"] if maximum < math.inf else []
        wanted = " and ".join(limits)
        kind = "a number" if infinite else "a finite number"
        raise ValueError(f"{name}: expected {f'{kind}, {wanted}' if wanted else kind}, got {value}")
    return result


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, or ValueError where it is none of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(repr(c) for c in choices)}, got {value!r}")
    return value


def check_device(device: Any) -> str:
    """Where parameters are: "cpu", which None means, or "cuda", the current device: with rnnfast._cuda and CuPy."""
    name = "cpu" if device is None else str(device)
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdecimal()):
        raise ValueError(f"device: expected None, 'cpu' or 'cuda', got {device!r}")
    if kind == "cuda":
        why = _device.unavailable() or _device.no_array_module()
        if index and not why:
            why = f"expected 'cuda', the current device; cupy.cuda.Device({index}).use() chooses it"
        if why:
            raise RuntimeError(f"device: {name!r} is not available: {why}")
    return kind


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
    """An array, not yet filled, where `check_device` said."""
    return (np if device == "cpu" else _device.array_module()).empty(shape, dtype)


def new_weight(names: str, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
    """An array for a weight, not yet filled; ValueError naming `names` where no memory could hold it."""
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"{names}: expected a weight that fits the memory, got {_shape_text(shape)}: {size} bytes")
    return new_array(shape, dtype, device)


def quiet(function: Function) -> Function:
    """Decorator: infinities and NaN go through `function` as IEEE says, and NumPy does not warn about each."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return function(*args, **kwargs)

    return cast(Function, wrapper)


def detached(value: Any) -> Any:
    """A NumPy view (from a device, a copy) of a PyTorch tensor; anything else comes back as it is, to be checked."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """`dtype` as a NumPy dtype, None meaning float32; TypeError unless it is float32 or float64."""
    try:
        result = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError:
        result = None
    if result is None or str(result) not in FLOATS:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    return result


def check_seed(seed: Any) -> int:
    """`seed` as an int in [0, 2**64)."""
    result = check_int("seed", seed, minimum=0)
    if result >= 2**64:
        raise ValueError(f"seed: expected below 2**64, got {result}")
    return result


def fresh_seed() -> int:
    """A seed nobody chose, from the operating system."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
