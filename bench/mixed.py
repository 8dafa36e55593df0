"""Programs in which rnnfast is not alone: each against the same program with PyTorch's own layer.

    python bench/mixed.py [--seconds S] [--json FILE]

- model: convolution, two LSTM layers, a linear layer; forward, backward and an optimiser's step.
- blas: a step of NumPy's matrix product (OpenBLAS, threads of its own) after every call.
- two processes: the model, with another process that does the same at the same time.
- threads: twice as many threads as the machine has cores.

Every program runs in a process of its own, for so many seconds, both libraries in turn; the figure is PyTorch's time of a call
(the mean: with busy cores a few calls take most of the time) over rnnfast's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

PROGRAMS = ("model", "blas", "two processes", "threads")
LIBRARIES = ("torch", "rnnfast")
SHAPES = ((64, 16, 64), (100, 1, 128), (32, 32, 256))  # T, B, H


def build(library: str, hidden_size: int) -> tuple[Any, Any, Callable[..., Any]]:
    import torch

    import rnnfast.torch

    torch.manual_seed(0)
    lstm = (torch.nn if library == "torch" else rnnfast.torch).LSTM(hidden_size, hidden_size, 2)
    convolution, linear = torch.nn.Conv1d(hidden_size, hidden_size, 3, padding=1), torch.nn.Linear(hidden_size, 10)
    parameters = [*lstm.parameters(), *convolution.parameters(), *linear.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def train(x: Any) -> None:
        optimizer.zero_grad()
        y = convolution(x.permute(1, 2, 0)).permute(2, 0, 1)
        linear(torch.relu(lstm(y)[0])).square().mean().backward()
        optimizer.step()

    return torch, lstm, train


def run_program(program: str, library: str, shape: tuple[int, int, int], seconds: float) -> None:
    """In a process of its own: says that it is ready, waits for a line, and prints the mean time of a call."""
    import numpy as np

    steps, batch_size, hidden_size = shape
    torch, lstm, train = build(library, hidden_size)
    if program == "threads":
        torch.set_num_threads(2 * (os.cpu_count() or 1))
    x = torch.randn(steps, batch_size, hidden_size)
    matrix = np.ones((512, 512), np.float32)

    def blas() -> None:
        with torch.inference_mode():
            lstm(x)
        matrix @ matrix

    call = blas if program == "blas" else lambda: train(x)
    for _ in range(3):
        call()
    print("ready", flush=True)
    sys.stdin.readline()
    calls, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        call()
        calls += 1
    print((time.perf_counter() - begin) / calls, flush=True)


def start(program: str, library: str, shape: tuple[int, int, int], seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--task", json.dumps([program, library, shape, seconds])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def measure(program: str, library: str, shape: tuple[int, int, int], seconds: float) -> float:
    """The slower one's time of a call, where there are two."""
    processes = [start(program, library, shape, seconds) for _ in range(2 if program == "two processes" else 1)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
    return max(float(process.communicate()[0]) for process in processes)


@click.command(help=__doc__)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=2.0, show_default=True, help="For which a process calls."
)
@click.option(
    "--program", "programs", type=click.Choice(PROGRAMS), multiple=True, default=PROGRAMS, help="All by default."
)
@click.option("--shape", "shapes", multiple=True, help="T,B,H; three by default.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each library.")
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
@click.option("--task", hidden=True)
def main(
    seconds: float,
    programs: tuple[str, ...],
    shapes: tuple[str, ...],
    repeats: int,
    target: Path | None,
    task: str | None,
) -> None:
    if task:
        return run_program(*json.loads(task))
    from rnnfast import _core, get_num_threads
    from rnnfast.bench import machine, records

    table, found = Table("program", "T,B,H", "torch, ms", "rnnfast, ms", "torch / rnnfast"), []
    for program in programs:
        for shape in [tuple(map(int, shape.split(","))) for shape in shapes] or SHAPES:
            times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
            for _ in range(repeats):
                for library in LIBRARIES:
                    times[library].append(measure(program, library, shape, seconds))
            torch_s, own_s = (statistics.median(times[library]) for library in LIBRARIES)
            row = {
                "program": program,
                "T": shape[0],
                "B": shape[1],
                "H": shape[2],
                "torch_s": torch_s,
                "rnnfast_s": own_s,
            }
            found.append(row)
            name = ",".join(map(str, shape))
            table.add_row(program, name, f"{1e3 * torch_s:.2f}", f"{1e3 * own_s:.2f}", f"{torch_s / own_s:.2f}")
    Console().print(table)
    if target:
        records.write_json(target, found, machine.provenance(get_num_threads(), _core.isa()))
    return None


if __name__ == "__main__":
    main()
