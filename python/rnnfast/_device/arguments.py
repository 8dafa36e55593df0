"""Arrays of a call: checked, and as addresses and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._strict import get_strict
from .libraries import library_of


class Given(NamedTuple):
    """The arrays that a call reads, without those that it writes."""

    x: Any
    h0: Any
    c0: Any
    weights: Sequence[Any]
    lengths: Any
    reset: Any
    reset_h: Any
    reset_c: Any


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
        """`array` itself, or a copy where its last axis is not contiguous, or its elements lie at odd addresses."""
        array = self.adopt(name, array)
        self._check(name, array, shape, dtype)
        rows = array.shape[-1] <= 1 or self.library.strides(array)[-1] == 1
        return self.keep(self._aligned(array if rows else self.library.contiguous(array)))

    def weight(self, name: str, array: Any, shape: Sequence[int]) -> Any:
        """Any strides will do."""
        self._check(name, array, shape, None)
        return self.keep(self._aligned(array))

    def adopt(self, name: str, array: Any) -> Any:
        """As `Library.adopt`, on the device and the stream of the call."""
        try:
            with self.library.current(self.like):
                return self.library.adopt(array)
        except Exception as error:  # whatever a foreign object raises
            kind = f"{type(array).__module__}.{type(array).__qualname__}"
            raise TypeError(
                f"{name}: expected an array that {self.library.name} can take, got {kind} ({error})"
            ) from error

    def target(self, name: str, array: Any, shape: Sequence[int]) -> Any:
        """The caller's memory where it is given, else fresh."""
        if array is None:
            return self.empty(shape)
        self._check(name, array, shape, None)
        if array.shape[-1] > 1 and self.library.strides(array)[-1] != 1:
            raise ValueError(f"{name}: expected a contiguous last axis, got other strides")
        if not self.library.aligned(array):
            raise ValueError(f"{name}: expected elements at multiples of their size, got others")
        return self.keep(array)

    def integers(self, name: str, values: Any, shape: Sequence[int], dtype: str, most: int | None) -> Any:
        """On the device, whatever they are; values on the host are checked, those on the device are clamped there.

        In strict mode those are checked too, for which the host waits.
        """
        values = self.adopt(name, values)
        if self.library.owns(values) and not isinstance(values, np.ndarray):
            if self.library.dtype(values)[:3] not in ("int", "uin", "boo"):
                raise TypeError(f"{name}: expected integers, got dtype {self.library.dtype(values)}")
            self._check(name, values, shape, self.library.dtype(values))
            if get_strict() and self.library.dtype(values) != "bool":
                self._check_range(name, values, most)
        else:
            values = np.asarray(values)
            if values.dtype.kind not in "iub" and values.size:
                raise TypeError(f"{name}: expected integers, got dtype {values.dtype}")
            if tuple(values.shape) != tuple(shape):
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}")
            self._check_range(name, values, most)
            values = self.library.from_host(np.ascontiguousarray(values.astype(dtype)), self.like)
        if self.library.dtype(values) != dtype:
            values = self.library.astype(values, dtype)
        flat = len(shape) == 1  # its layout is fixed
        return self.keep(self._aligned(self.library.contiguous(values) if flat else values))

    def _aligned(self, array: Any) -> Any:
        return array if self.library.aligned(array) else self.library.copy(array)

    def _check_range(self, name: str, values: Any, most: int | None) -> None:
        if most is not None and math.prod(values.shape) and not 0 <= int(values.min()) <= int(values.max()) <= most:
            raise ValueError(f"{name}: expected values within [0, {most}], got {values.tolist()}")

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
