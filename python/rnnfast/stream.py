"""Streams: a recurrent layer one step at a time, for sequences that never end.

A step costs microseconds, so `Stream.step` is the engine's own, which checks the arrays. The weights are
those of the moment when the stream was made; training goes on beside it without effect until `refresh`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import functional
from ._arrays import check_int

if TYPE_CHECKING:
    from .modules import RecurrentLayer

__all__ = ["Stream"]


class Stream:
    """The state of `batch_size` running sequences and the weights, pinned, that move it; from ``layer.stream(B)``.

    Inference: no dropout, no gradient, whatever the mode of the layer. It starts from zero, and is a context manager
    that closes itself. One stream belongs to one thread at a time; `fork` makes another.

    Parameters
    ----------
    module : RecurrentLayer
        In one direction, any number of layers.
    batch_size : int

    Raises
    ------
    ValueError
        The layer is bidirectional: its reverse direction would start at the end.
    """

    def __init__(self, module: RecurrentLayer, batch_size: int) -> None:
        if module.bidirectional:
            raise ValueError("stream: expected a layer of one direction, got a bidirectional one")
        size, packed = check_int("batch_size", batch_size), module.pack()
        self._open(module, size, packed, functional.Stream(module.cell, packed, size, num_layers=module.num_layers))

    def _open(self, module: RecurrentLayer, batch_size: int, packed: Any, engine: Any) -> None:
        self.module, self.batch_size = module, batch_size
        self._packed = packed
        self._engine: Any = engine
        self._step = self._engine.step
        if type(self).step is Stream.step:  # nothing stands between the caller and the engine
            self.__dict__["step"] = self._step

    def step(self, x_t: Any, reset: Any = None, out: Any = None) -> Any:
        """One step of every row.

        Parameters
        ----------
        x_t : ndarray [B, I]
        reset : bool or 0/1 [B], optional
            Where True, the row's state is zero before the step.
        out : ndarray [B, P], optional
            Written and returned.

        Returns
        -------
        y_t : ndarray [B, P]
            The last layer's output; a new array unless `out` was given.
        """
        return self._step(x_t, reset, out)

    @property
    def state(self) -> Any:
        """The state, a copy: h [L, B, P], for the LSTM (h, c [L, B, H]). May be set; None sets zero."""
        return self._live().get_state()

    @state.setter
    def state(self, value: Any) -> None:
        engine = self._live()
        if value is None:
            zero = engine.get_state()
            value = tuple(np.zeros_like(s) for s in zero) if isinstance(zero, tuple) else np.zeros_like(zero)
        engine.set_state(value)

    def fork(self) -> Stream:
        """A stream that goes on from here on its own, with the same weights."""
        engine = self._live().fork()
        other = object.__new__(type(self))
        other._open(self.module, self.batch_size, self._packed, engine)
        return other

    def reorder(self, rows: Any) -> None:
        """Row i takes the state of row ``rows[i]``, as beam search needs it after it chose the survivors.

        rows : integers [B], from 0 to B - 1; a row may be taken many times.
        """
        engine, rows = self._live(), functional.integers("rows", rows)
        if rows is None:
            raise TypeError("rows: expected integers, got None")
        if rows.dtype.kind not in "iu":
            raise TypeError(f"rows: expected integers, got dtype {rows.dtype}")
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows: expected shape ({self.batch_size},), got {rows.shape}")
        if rows.min() < 0 or rows.max() >= self.batch_size:
            wrong = rows[(rows < 0) | (rows >= self.batch_size)][0]
            raise ValueError(f"rows: expected numbers from 0 to {self.batch_size - 1}, got {wrong}")
        engine.reorder(np.ascontiguousarray(rows, dtype=np.int64))

    def refresh(self) -> None:
        """Go on with the layer's weights as they are now; the state stays."""
        engine, packed = self._live(), self.module.pack()
        engine.set_packed(packed)
        self._packed = packed

    def close(self) -> None:
        """Free what the stream holds; everything but a second `close` raises RuntimeError from now on."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._packed = None
        self._step = _closed
        self.__dict__.pop("step", None)

    @property
    def closed(self) -> bool:
        return self._engine is None

    def _live(self) -> Any:
        if self._engine is None:
            _closed()
        return self._engine

    def __enter__(self) -> Stream:
        self._live()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("Stream: cannot be copied or pickled; use fork(), or keep its state")

    def __repr__(self) -> str:
        return f"Stream({self.module!r}, batch_size={self.batch_size}{', closed' if self.closed else ''})"


def _closed(*arguments: Any) -> NoReturn:
    raise RuntimeError("stream: closed")
