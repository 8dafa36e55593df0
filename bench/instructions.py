"""Instructions of small calls, counted by valgrind's callgrind: where times are noisy, these are not.

    python bench/instructions.py [--cell lstm] [--json FILE]

A process makes N calls, another 3 N; the difference belongs to 2 N calls, start-up and imports cancel. valgrind knows no
AVX-512, so the kernels are those for AVX2, on one thread. The figure is a call's, Python and all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

SHAPES = ((1, 1, 128, 128), (100, 1, 32, 32), (24, 32, 1, 25), (61, 16, 88, 46))  # T, B, I, H
CELLS = ("lstm", "gru", "rnn")
MODES = ("step", "infer", "train")
PROGRAM = """
import sys
import numpy as np, rnnfast
cell, mode, *numbers = sys.argv[1:]
T, B, I, H, calls = map(int, numbers)
rnnfast.set_num_threads(1)
layer = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}[cell](I, H, seed=0)
x, gradient = np.ones((T, B, I), np.float32), np.ones((T, B, H), np.float32)
if mode != "train":
    layer.eval()
stream = layer.stream(B)
for _ in range(calls + 2):
    if mode == "step":
        stream.step(x[0])
    else:
        layer(x)
        if mode == "train":
            layer.backward(gradient)
            layer.zero_grad()
"""


def count(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, "-c", PROGRAM]
        environment = {**os.environ, "RNNFAST_ISA": "avx2", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(f"callgrind: expected a total, got\n{done.stderr}")
    return int(found[1])


def measure(cell: str, mode: str, shape: tuple[int, ...], calls: int) -> dict[str, Any]:
    arguments = [cell, mode, *map(str, shape)]
    instructions = (count([*arguments, str(3 * calls)]) - count([*arguments, str(calls)])) / (2 * calls)
    return {"cell": cell, "mode": mode, **dict(zip("TBIH", shape, strict=True)), "instructions": round(instructions)}


@click.command(help=__doc__)
@click.option("--calls", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--cell", "cells", type=click.Choice(CELLS), multiple=True, default=CELLS, help="All by default.")
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Where the rows are written.")
def main(calls: int, cells: tuple[str, ...], target: Path | None) -> None:
    from rnnfast.bench import machine, records

    table, found = Table("cell", "mode", "T,B,I,H", "instructions a call", "a step"), []
    for cell in cells:
        for shape in SHAPES:
            for mode in MODES if shape[0] == 1 else MODES[1:]:
                row = measure(cell, mode, shape, calls)
                found.append(row)
                each = row["instructions"]
                table.add_row(cell, mode, ",".join(map(str, shape)), f"{each:,}", f"{each / shape[0]:,.0f}")
    Console().print(table)
    if target:
        records.write_json(target, found, machine.provenance(1, "avx2"))


if __name__ == "__main__":
    main()
