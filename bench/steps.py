"""Single steps through the PyTorch drop-in beside torch.nn: what a call costs where the kernels take next to nothing.

    python bench/steps.py [--calls N] [--json FILE]

T = 1, 128 inputs and units, one thread: layers and cells of both libraries in turn, in inference mode (without a state
and with the state of the call before) and in training (forward, backward with a given gradient, gradients dropped).
Medians of single calls, as Python's clock tells them; `ratio` is torch.nn's time over rnnfast's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import rnnfast.torch
from rnnfast import _core
from rnnfast.bench import machine, records

SIZE = 128
KINDS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
MODES = ("inference", "inference with a state", "training")
ROUNDS = 5


def make_call(library: Any, kind: str, batch_size: int, mode: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    module = getattr(library, kind)(SIZE, SIZE)
    parameters = list(module.parameters())
    lead = () if kind.endswith("Cell") else (1,)
    x, h, c = (torch.randn(*lead, batch_size, SIZE) for _ in range(3))
    state = (h, c) if kind.startswith("LSTM") else h
    gradient = torch.ones_like(x)

    def infer() -> Any:
        return module(x)

    def infer_on() -> Any:
        return module(x, state)

    def train() -> None:
        result = module(x)
        torch.autograd.backward(result if isinstance(result, torch.Tensor) else result[0], gradient)
        for parameter in parameters:
            parameter.grad = None

    return {"inference": infer, "inference with a state": infer_on, "training": train}[mode]


def time_calls(call: Callable[[], Any], calls: int, mode: str) -> list[int]:
    clock, durations = time.perf_counter_ns, []
    with torch.inference_mode(mode != "training"):
        for n in range(-(calls // 10) - 1, calls):
            begin = clock()
            call()
            if n >= 0:
                durations.append(clock() - begin)
    return durations


def measure(kind: str, batch_size: int, mode: str, calls: int) -> dict[str, Any]:
    contenders = {"rnnfast": rnnfast.torch, "torch": torch.nn}
    runs = {name: make_call(library, kind, batch_size, mode) for name, library in contenders.items()}
    durations: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, call in runs.items():
            durations[name] += time_calls(call, calls // ROUNDS + 1, mode)
    medians = {name: statistics.median(values) / 1000 for name, values in durations.items()}
    row = {"kind": kind, "B": batch_size, "H": SIZE, "mode": mode, "calls": len(durations["torch"])}
    return {**row, **{f"{name}_us": us for name, us in medians.items()}, "ratio": medians["torch"] / medians["rnnfast"]}


def all_rows(calls: int) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for batch_size in (1, 8):
            for mode in MODES:
                yield measure(kind, batch_size, mode, calls)


@click.command(help=__doc__)
@click.option("--calls", type=click.IntRange(min=10), default=5000, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
def main(calls: int, target: Path | None) -> None:
    torch.set_num_threads(1)  # rnnfast.torch follows
    table = Table("module", "B", "mode", "rnnfast, us", "torch.nn, us", "ratio")
    found = list(all_rows(calls))
    for row in found:
        numbers = (f"{row[name]:.1f}" for name in ("rnnfast_us", "torch_us"))
        table.add_row(row["kind"], str(row["B"]), row["mode"], *numbers, f"{row['ratio']:.2f}")
    Console().print(table)
    if target:
        records.write_json(target, found, machine.provenance(1, _core.isa()))


if __name__ == "__main__":
    main()
