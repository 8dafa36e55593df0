"""The time that no program can beat on this machine: useful flops over the FMA peak, or the bytes that every step must
read again over the bandwidth of the cache that can hold them, whichever takes longer; and a barrier a step, where there
are fewer sequences, directions and layers than threads, unless one thread alone is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row, recurrent_weights, useful_flops

ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_RESIDENT_BYTES = 32 * 1024  # a core's share below this stays in registers and first-level cache: reading it is free


@dataclass(frozen=True)
class Level:
    """A cache or the memory: what it holds for each thread, and the bytes a second that all threads read together."""

    name: str
    bytes_per_thread: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """What the floors are computed from. Peaks in GFLOP/s by dtype; levels from the nearest to memory."""

    threads: int
    peak_gflops: dict[str, float]
    levels: Sequence[Level]
    barrier: float = 0.0  # seconds


def floor_seconds(row: Row, row_steps: int, machine: Machine) -> float | None:
    """The floor of one timed call, None where the peak for the row's dtype is not known."""
    peak = machine.peak_gflops.get(row.dtype)
    if not peak:
        return None
    computing = useful_flops(row, row_steps) / (peak * 1e9)
    together = max(computing, _reading_seconds(row, machine, machine.threads))
    if row.B * row.directions * row.layers >= machine.threads:
        return together
    alone = max(computing * machine.threads, _reading_seconds(row, machine, 1))
    return min(alone, together + row.T * _passes(row) * machine.barrier)


def _passes(row: Row) -> int:
    return 2 if row.mode == "train" else 1


def _reading_seconds(row: Row, machine: Machine, threads: int) -> float:
    """Weights split over the threads, read at each step in each pass (training has two: forward and backward)."""
    total = recurrent_weights(row) * ITEM_SIZES[row.dtype]
    share = total / threads
    if share <= _RESIDENT_BYTES or not machine.levels:
        return 0.0
    level = next((level for level in machine.levels if share <= level.bytes_per_thread), machine.levels[-1])
    return row.T * total * _passes(row) / (level.bandwidth * threads / machine.threads)
