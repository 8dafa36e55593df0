"""What ragged batches and resets cost: their time over their share of the dense batch's.

    python bench/ragged.py [--rounds N] [--json FILE]

A ragged batch would take `sum of lengths / (T B)` of the dense batch's time if no tile were ever half full and nothing had to
be looked up; a batch with resets as long as one without. All variants of a row are timed in turn, on all threads; the figures
are medians.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import rnnfast
from rnnfast import _core
from rnnfast.bench import machine, records

# T, B, I, H; with the mean lengths of real batches (sentences, utterances) as parts of T.
SHAPES = ((128, 32, 128, 128), (60, 32, 300, 256), (200, 64, 64, 64), (61, 16, 88, 46), (100, 64, 512, 512), (300, 16, 80, 320),
          (128, 2, 512, 128))  # fmt: skip
LENGTHS = {"ragged 0.37": (0.0, 0.74), "ragged 0.70": (0.4, 1.0)}  # from, to: parts of T
RESETS = 0.02  # of all rows and steps
CLASSES = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
BATCH_SECONDS = 0.01  # a timed batch of calls takes so long at least


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call by name, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, round(BATCH_SECONDS / (time.perf_counter() - begin)))
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        call()
        begin = time.perf_counter()
        for _ in range(repeats[name]):
            call()
        times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def rows(cell: str, shape: tuple[int, int, int, int], rounds: int) -> Iterator[dict[str, Any]]:
    steps, batch, inputs, units = shape
    rng = np.random.default_rng(0)
    layer = CLASSES[cell](inputs, units, seed=0)
    x, gradient = (rng.standard_normal((steps, batch, n), dtype=np.float32) for n in (inputs, units))
    options: dict[str, dict[str, Any]] = {"dense": {}}
    share = {"dense": 1.0, "resets": 1.0}
    for name, (low, high) in LENGTHS.items():
        lengths = rng.integers(max(1, int(low * steps)), int(high * steps) + 1, batch)
        options[name], share[name] = {"lengths": lengths}, lengths.sum() / (steps * batch)
    options["resets"] = {"reset": rng.random((steps, batch)) < RESETS}

    def call(given: dict[str, Any]) -> None:
        layer(x, **given)
        if layer.training:
            layer.backward(gradient)
            layer.zero_grad()

    for mode in ("train", "infer"):
        layer.train(mode == "train")
        found = timed({name: functools.partial(call, given) for name, given in options.items()}, rounds)
        ratios = {name: value / (share[name] * found["dense"]) for name, value in found.items() if name != "dense"}
        yield {
            "cell": cell,
            "mode": mode,
            **dict(zip("TBIH", shape, strict=True)),
            "seconds": found,
            "over_share": ratios,
        }


def report(found: list[dict[str, Any]], console: Console) -> None:
    names = [*LENGTHS, "resets"]
    table = Table("cell", "mode", "T,B,I,H", "dense, ms", *names, title="time over its share of the dense batch's")
    for row in found:
        shape = ",".join(str(row[name]) for name in "TBIH")
        shown = (f"{row['over_share'][name]:.2f}" for name in names)
        table.add_row(row["cell"], row["mode"], shape, f"{1e3 * row['seconds']['dense']:.3f}", *shown)
    console.print(table)
    for name, most in (*((name, 1.2) for name in LENGTHS), ("resets", 1.05)):
        ratios = [row["over_share"][name] for row in found]
        within = sum(ratio <= most for ratio in ratios)
        mean = statistics.geometric_mean(ratios)
        console.print(
            f"{name}: mean {mean:.3f}, worst {max(ratios):.2f}; at most {most}: {within} of {len(ratios)} rows"
        )


@click.command(help=__doc__)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed batches of each variant."
)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
def main(rounds: int, target: Path | None) -> None:
    console = Console()
    grid = list(itertools.product(CLASSES, SHAPES))
    found = [row for cell, shape in track(grid, "ragged", console=console) for row in rows(cell, shape, rounds)]
    report(found, console)
    if target:
        records.write_json(target, found, machine.provenance(rnnfast.get_num_threads(), _core.isa()))


if __name__ == "__main__":
    main()
