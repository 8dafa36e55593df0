"""One step after another."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import Arguments
from .libraries import owns
from .stack import Packed, Stack


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
