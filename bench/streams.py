"""One step at a time, as a program that must keep up sees it: the median, the 99th percentile and the longest step.

    python bench/streams.py [--steps N] [--json FILE]

A stream alone, and a hundred of one layer in one process that take turns; one thread. Each step's own duration is kept,
as Python's clock tells it. Beside it the bytes that Python and the engine hold more after ten thousand steps than
before; some dozen of them are the measurement's own.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import rnnfast
from rnnfast import _core
from rnnfast.bench import machine, records

CLASSES = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
SIZES = (64, 128, 256)


def measure(cell: str, size: int, streams: int, steps: int) -> dict[str, Any]:
    layer = CLASSES[cell](size, size, seed=0).eval()  # whose streams share one pack of weights
    running = [layer.stream(1) for _ in range(streams)]
    inputs = np.random.default_rng(0).standard_normal((64, 1, size), dtype=np.float32)
    out = np.empty((1, size), np.float32)
    durations = np.empty(steps, np.int64)
    clock = time.perf_counter_ns
    for n in range(-min(steps, 2000), steps):
        stream, x = running[n % streams], inputs[n % 64]
        begin = clock()
        stream.step(x, None, out)
        if n >= 0:
            durations[n] = clock() - begin
    p50, p99 = np.percentile(durations, (50, 99)) / 1000
    return {
        "cell": cell, "H": size, "streams": streams, "steps": steps, "p50_us": p50, "p99_us": p99,
        "max_us": durations.max() / 1000, "memory_bytes": growth(running[0], inputs[0], out),
    }  # fmt: skip


def growth(stream: Any, x: np.ndarray, out: np.ndarray) -> int:
    """Bytes that Python holds, and that the engine's pool holds, more after many steps than before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] + _core.pooled_bytes()
    for _ in range(10_000):
        stream.step(x, None, out)
    after = tracemalloc.get_traced_memory()[0] + _core.pooled_bytes()
    tracemalloc.stop()
    return after - before


def all_rows(steps: int) -> Iterator[dict[str, Any]]:
    for cell in CLASSES:
        for size in SIZES:
            yield measure(cell, size, 1, steps)
        yield measure(cell, 128, 100, steps)


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(min=100), default=200_000, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
def main(steps: int, target: Path | None) -> None:
    console = Console()
    rnnfast.set_num_threads(1)
    table = Table("cell", "H", "streams", "p50, us", "p99, us", "longest, us", "bytes more")
    found = list(all_rows(steps))
    for row in found:
        durations = (f"{row[name]:.2f}" for name in ("p50_us", "p99_us", "max_us"))
        table.add_row(row["cell"], str(row["H"]), str(row["streams"]), *durations, str(row["memory_bytes"]))
    console.print(table)
    if target:
        records.write_json(target, found, machine.provenance(1, _core.isa()))


if __name__ == "__main__":
    main()
