"""Hold the cost model's choice of split against every possible one, timed: how much slower the choice is than the best.

    python bench/splits.py [--rounds N] [--cells lstm,gru] [--json FILE]

The grid: H from 32 to 512, B from 1 to 64, one layer, two, or two directions. All splits of a shape are timed in turn, in
inference and in training. The last lines give the distribution of choice / best, and the worst rows by name.
"""

from __future__ import annotations

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

import rnnfast
from rnnfast import _core
from rnnfast.bench import machine, records

SPLITS = ("one", "batch", "hidden", "layers")
WORDS = {
    "one": "one thread",
    "batch": "the batch is split",
    "hidden": "the hidden units",
    "layers": "a thread for each layer",
}
CLASSES = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
STEPS = 64


def shapes(cells: list[str]) -> Iterator[dict[str, Any]]:
    for cell, hidden_size, batch_size, (layers, bidirectional) in itertools.product(
        cells, (32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32, 64), ((1, False), (2, False), (1, True))
    ):
        yield {
            "cell": cell, "T": STEPS, "B": batch_size, "I": hidden_size, "H": hidden_size,
            "layers": layers, "bidirectional": bidirectional,
        }  # fmt: skip


def chosen(module: Any, x: np.ndarray) -> str:
    """The split that the cost model takes."""
    _core.set_split("")
    plan = rnnfast.explain(module, x).partition("; ")[2]
    found = [name for name, words in WORDS.items() if plan.startswith(words)]
    return found[0] if found else "batch"  # "a thread for each direction" is a batch split of one slice


def possible(module: Any, x: np.ndarray) -> list[str]:
    """The splits that are not silently one thread."""
    found = []
    for split in SPLITS:
        _core.set_split(split)
        plan = rnnfast.explain(module, x).partition(f"RNNFAST_SPLIT={split}: ")[2]
        if split == "one" or not plan.startswith("one thread"):
            found.append(split)
    return found


def seconds(call: Callable[[], Any], splits: list[str], rounds: int) -> dict[str, float]:
    """Median time by split, all in turn."""
    times: dict[str, list[float]] = {split: [] for split in splits}
    for number, split in itertools.product(range(rounds + 1), splits):
        _core.set_split(split)
        begin = time.perf_counter()
        call()
        if number:
            times[split].append(time.perf_counter() - begin)
    return {split: statistics.median(values) for split, values in times.items()}


def rows(shape: dict[str, Any], rounds: int) -> Iterator[dict[str, Any]]:
    options = {"num_layers": shape["layers"], "bidirectional": shape["bidirectional"], "seed": 0}
    module = CLASSES[shape["cell"]](shape["I"], shape["H"], **options)
    x = np.random.default_rng(0).standard_normal((shape["T"], shape["B"], shape["I"]), dtype=np.float32)
    gradient = np.ones((shape["T"], shape["B"], shape["H"] * (1 + shape["bidirectional"])), np.float32)

    def train() -> None:
        module(x)
        module.backward(gradient)
        module.zero_grad()

    choice, splits = chosen(module, x), possible(module, x)
    for mode, call in (("train", train), ("infer", lambda: module.eval()(x))):
        found = seconds(call, splits, rounds)
        best = min(found, key=lambda split: found[split])
        ratio = found[choice] / found[best]
        yield {**shape, "mode": mode, "choice": choice, "best": best, "ratio": ratio, "seconds": found}


def report(found: list[dict[str, Any]], console: Console) -> None:
    for mode in ("infer", "train"):
        ratios = sorted(row["ratio"] for row in found if row["mode"] == mode)
        within = sum(ratio <= 1.1 for ratio in ratios) / len(ratios)
        mean, worst = statistics.geometric_mean(ratios), ratios[-1]
        console.print(
            f"{mode}: {len(ratios)} rows; chosen over best: mean {mean:.3f}, worst {worst:.2f}; within 10 %: {within:.1%}"
        )
    for row in sorted(found, key=lambda row: -row["ratio"])[:12]:
        times = ", ".join(f"{split} {1e6 * value:.0f}" for split, value in row["seconds"].items())
        name = f"{row['cell']} B {row['B']} H {row['H']} x{row['layers']}{' bi' if row['bidirectional'] else ''}"
        console.print(f"  {row['ratio']:.2f}  {row['mode']} {name}: {row['choice']}, best {row['best']} (us: {times})")


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Timed calls of each split.")
@click.option("--cells", default="lstm,gru,rnn", show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
def main(rounds: int, cells: str, target: Path | None) -> None:
    console = Console()
    grid = list(shapes(cells.split(",")))
    found = [row for shape in track(grid, "splits", console=console) for row in rows(shape, rounds)]
    report(found, console)
    if target:
        records.write_json(target, found, machine.provenance(rnnfast.get_num_threads(), _core.isa()))


if __name__ == "__main__":
    main()
