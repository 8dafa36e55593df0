"""One benchmark row: what is run, how much useful work it is, and in which size class it is reported.

Field names are those of the JSON records: T time, B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..reference import CELLS as CELL_RECORDS

CELLS = ("lstm", "gru", "rnn")
MODES = ("infer", "train", "step")
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEVICES = ("cpu", "cuda")
SIZE_CLASSES = ("small", "middle", "large")

_ENGINE_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}
# Multiply-adds of one gate and step, B*H*(I+H): below the first a call is bound by latency, above the second by flops.
_SIZE_LIMITS = (2**19, 2**23)
_TRAIN_FACTOR = 3  # forward, the gradient of the inputs and the gradient of the weights cost one product each


@dataclass(frozen=True)
class Row:
    """A shape with everything that changes its cost.

    `cell` is "lstm", "gru", "rnn" (tanh) or "rnn_relu"; `mode` is "infer", "train" or "step" (a streamed step, T = 1).
    `ragged` is the mean length over T and `reset` the probability of a reset for each row and step; 0 means neither.
    """

    suite: str
    name: str
    cell: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: float = 0.0
    reset: float = 0.0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.cell not in _ENGINE_CELLS:
            raise ValueError(f"cell: expected one of {sorted(_ENGINE_CELLS)}, got {self.cell!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {self.mode!r}")
        for field in ("T", "B", "I", "H", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("ragged", "reset"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field}: expected a fraction from 0 to 1, got {getattr(self, field)}")
        if self.mode == "step" and (self.T != 1 or self.bidirectional or self.ragged or self.reset):
            raise ValueError("mode: a streamed step has T = 1, one direction, no ragged batch and no resets")

    @property
    def engine_cell(self) -> str:
        """The cell's name in the engine and in the reference."""
        return _ENGINE_CELLS[self.cell]

    @property
    def gates(self) -> int:
        return CELL_RECORDS[self.engine_cell].gates

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def family(self) -> str:
        """The cell as it is chosen by --cell and grouped in the summary: both RNN nonlinearities are "rnn"."""
        return "rnn" if self.cell.startswith("rnn") else self.cell

    @property
    def size_class(self) -> str:
        work = self.B * self.H * (self.I + self.H)
        return SIZE_CLASSES[sum(work >= limit for limit in _SIZE_LIMITS)]

    def layer_inputs(self) -> list[int]:
        """The input size of each layer: I, then D*H."""
        return [self.I] + [self.directions * self.H] * (self.layers - 1)

    def with_(self, **changes: Any) -> Row:
        return replace(self, **changes)


def useful_flops(row: Row, row_steps: int) -> float:
    """Flops that the result needs: 2*G*H*(I+P) a valid row and step forward, three times that for training.

    Pointwise work and padding are not counted. `row_steps` is the sum of the lengths (T*B for a dense batch).
    """
    a_row_step = sum(2 * row.gates * row.H * (inputs + row.H) for inputs in row.layer_inputs()) * row.directions
    return float(a_row_step) * row_steps * (_TRAIN_FACTOR if row.mode == "train" else 1)


def least_bytes(row: Row) -> int:
    """Memory that the check of a row needs at least: x, output and weights, drawn in float32 and held in float64."""
    sequence = row.T * row.B * (row.I + row.directions * row.H)
    weights = sum(row.gates * row.H * (inputs + row.H) for inputs in row.layer_inputs()) * row.directions
    return (4 + 8) * (sequence + weights)


def recurrent_weights(row: Row) -> int:
    """The number of weights that one step reads again: W_hh, and W_ih too where there is no time to batch it over."""
    inputs = row.layer_inputs() if row.T == 1 else [0] * row.layers
    return sum(row.gates * row.H * (size + row.H) for size in inputs) * row.directions


def shape_name(row: Row) -> str:
    """The name of a row that has no better one, e.g. "LSTM 100,32,256,256 x2 bi"."""
    extras = [f"x{row.layers}"] if row.layers > 1 else []
    extras += ["bi"] if row.bidirectional else []
    extras += [f"ragged {row.ragged:g}"] if row.ragged else []
    extras += [f"reset {row.reset:g}"] if row.reset else []
    return " ".join([row.cell.upper(), f"{row.T},{row.B},{row.I},{row.H}", *extras])
