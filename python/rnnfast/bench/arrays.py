"""The inputs of a row, drawn from a seed of its own so that every process has the same ones, and the index arithmetic
of ragged and reversed sequences that several rivals share.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import reference
from .rows import Row

Array = np.ndarray[Any, Any]
STREAM_STEPS = 16  # so many streamed steps are checked against the truth


@dataclass
class Arrays:
    """x [T,B,I] ([STREAM_STEPS,B,I] when streaming), hx of [L*D,B,H] each, weights in PyTorch's flat order,
    grad_output [T,B,D*H]; lengths [B] and reset [T,B] or None.
    """

    x: Array
    hx: tuple[Array, ...]
    weights: dict[str, Array]
    grad_output: Array
    lengths: Array | None
    reset: Array | None

    @property
    def row_steps(self) -> int:
        """Valid row-steps of the checked sequence."""
        return int(self.lengths.sum()) if self.lengths is not None else self.x.shape[0] * self.x.shape[1]

    def astype(self, dtype: str) -> Arrays:
        return Arrays(
            self.x.astype(dtype),
            tuple(state.astype(dtype) for state in self.hx),
            {name: weight.astype(dtype) for name, weight in self.weights.items()},
            self.grad_output.astype(dtype),
            self.lengths,
            self.reset,
        )


def make_arrays(row: Row) -> Arrays:
    """Draw the inputs of `row`, in float64 for float64, else in float32 (rounded to the narrower type first)."""
    rng = np.random.default_rng(zlib.crc32(repr(row.with_(suite="", name="", device="cpu")).encode()))
    seq_len = STREAM_STEPS if row.mode == "step" else row.T
    draw = _Draw(rng, row.dtype)
    states = 2 if row.cell == "lstm" else 1
    return Arrays(
        x=draw.normal(seq_len, row.B, row.I),
        hx=tuple(0.5 * draw.normal(row.layers * row.directions, row.B, row.H) for _ in range(states)),
        weights={name: draw.uniform(row.H**-0.5, *shape) for name, shape in weight_shapes(row).items()},
        grad_output=draw.normal(seq_len, row.B, row.directions * row.H),
        lengths=make_lengths(row, rng),
        reset=rng.random((seq_len, row.B)) < row.reset if row.reset else None,
    )


def weight_shapes(row: Row) -> dict[str, tuple[int, ...]]:
    """PyTorch's names and shapes, in its flat order."""
    return reference.weight_shapes(
        row.engine_cell, row.I, row.H, num_layers=row.layers, bidirectional=row.bidirectional
    )


def make_lengths(row: Row, rng: np.random.Generator) -> Array | None:
    """Lengths [B] with a mean of about ragged*T, the longest T, none zero, in random order; None for a dense batch.

    They are the quantiles of T*u**(1/ragged - 1), u uniform, so that the mean does not depend on the draw.
    """
    if not row.ragged:
        return None
    quantiles = (np.arange(row.B) + 0.5) / row.B
    lengths = np.ceil(row.T * quantiles ** (1.0 / row.ragged - 1.0)).astype(np.int64)
    lengths[-1] = row.T
    return rng.permutation(lengths)


def row_steps(row: Row) -> int:
    """Valid row-steps of one timed call."""
    lengths = make_lengths(row, np.random.default_rng(0))
    return int(lengths.sum()) if lengths is not None else row.T * row.B


def valid_steps(lengths: Array | None, seq_len: int) -> Array | None:
    """Mask [T,B] of the steps before each row's end, None for a dense batch."""
    return None if lengths is None else np.arange(seq_len)[:, None] < lengths


def reversal(lengths: Array | None, seq_len: int, batch_size: int) -> tuple[Array, Array]:
    """Index (time [T,B], row [1,B]) that turns each row round about its own end: `x[reversal(...)]`, an involution."""
    ends = np.full(batch_size, seq_len) if lengths is None else lengths
    time = np.arange(seq_len)[:, None]
    return np.where(time < ends, ends - 1 - time, time), np.arange(batch_size)[None, :]


def reversed_resets(reset: Array | None, index: tuple[Array, Array]) -> Array | None:
    """The resets [T,B] that the turned sequence sees: a cut between t-1 and t lies before the step that was t-1."""
    if reset is None:
        return None
    cut = np.zeros_like(reset)
    cut[1:] = reset[index][:-1]
    return cut


class _Draw:
    def __init__(self, rng: np.random.Generator, dtype: str) -> None:
        self.rng, self.dtype = rng, dtype

    def normal(self, *shape: int) -> Array:
        return self._rounded(self.rng.standard_normal(shape, dtype=np.float32))

    def uniform(self, limit: float, *shape: int) -> Array:
        return self._rounded((self.rng.random(shape, dtype=np.float32) * 2 - 1) * np.float32(limit))

    def _rounded(self, values: Array) -> Array:
        """Values that the row's dtype holds exactly, so that no contender is charged for rounding its inputs."""
        if self.dtype == "bfloat16":
            return ((values.view(np.uint32) + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        if self.dtype == "float16":
            return values.astype(np.float16).astype(np.float32)
        return values.astype(self.dtype)
