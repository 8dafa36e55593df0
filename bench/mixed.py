"""Programs in which rnnfast is not alone: each against the same program with PyTorch's own layer.

    python bench/mixed.py [--rounds N] [--json FILE]

- model: convolution, two LSTM layers, a linear layer; forward, backward and an optimiser's step.
- blas: a step of NumPy's matrix product (OpenBLAS, threads of its own) after every call.
- two processes: the model, with another process that does the same.
- threads: twice as many threads as the machine has cores.

Every program runs in a process of its own, both libraries in turn; the figure is PyTorch's median time over rnnfast's.
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


def run_program(program: str, library: str, shape: tuple[int, int, int], rounds: int) -> None:
    """In a process of its own: prints the median time of a call."""
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
    times = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    print(json.dumps(statistics.median(times[2:])))


def start(program: str, library: str, shape: tuple[int, int, int], rounds: int) -> subprocess.Popen[str]:
    task = json.dumps([program, library, shape, rounds])
    return subprocess.Popen([sys.executable, __file__, "--task", task], stdout=subprocess.PIPE, text=True)


def measure(program: str, library: str, shape: tuple[int, int, int], rounds: int) -> float:
    processes = [start(program, library, shape, rounds) for _ in range(2 if program == "two processes" else 1)]
    return max(float(process.communicate()[0]) for process in processes)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True, help="Timed calls of a process.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each library.")
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
@click.option("--task", hidden=True)
def main(rounds: int, repeats: int, target: Path | None, task: str | None) -> None:
    if task:
        return run_program(*json.loads(task))
    from rnnfast import _core, get_num_threads
    from rnnfast.bench import machine, records

    table, found = Table("program", "T,B,H", "torch, ms", "rnnfast, ms", "torch / rnnfast"), []
    for program in PROGRAMS:
        for shape in SHAPES:
            times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
            for _ in range(repeats):
                for library in LIBRARIES:
                    times[library].append(measure(program, library, shape, rounds))
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
