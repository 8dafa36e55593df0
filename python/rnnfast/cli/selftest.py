"""`rnnfast selftest`: every kernel that this machine can run against the reference in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Line = dict[str, Any]

# NumPy's products are small here, and its waiting threads would only take the cores from the kernels' own.
_ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_WORKER = ["-m", "rnnfast.cli.selftest_worker"]
CUDA = "cuda"  # in the place of an instruction set


@click.command("selftest")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Check every kernel on this machine against the reference.

    Each instruction set in a process of its own, and the CUDA engine where CuPy sees a GPU: every cell and dtype, odd sizes,
    lengths, resets, layers, directions, projection, dropout, all results and all gradients. Exit status 1 on a failure.
    """
    from .. import _core, reference
    from .console import make_console, progress_bar
    from .selftest_cases import DTYPES

    isas = [*_core.isas(), *([CUDA] if can_run_cuda() else [])]
    console = make_console()
    lines: list[Line] = []
    with progress_bar(console, len(isas) * len(reference.CELLS) * len(DTYPES)) as (tell, advance):
        for isa in isas:
            tell(isa)
            lines += with_tolerances(run_isa(isa, advance))
    failed = not all(passes(line) for line in lines)
    if as_json:
        click.echo(json.dumps({"passed": not failed, "results": lines}, indent=1))
    else:
        _print(console, lines)
    sys.exit(int(failed))


def can_run_cuda() -> bool:
    from .. import _device

    return _device.unavailable() is None and _device.no_array_module() is None


def run_isa(isa: str, advance: Callable[[], None]) -> list[Line]:
    """The results on one ISA; a line with "error" where its process failed or ran another ISA."""
    lines: list[Line] = []
    with _worker(isa) as process:
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            if "cell" in line:
                lines.append({"isa": isa, **line})
                advance()
            elif line["isa"] != isa:
                return [{"isa": isa, "error": f"RNNFAST_ISA={isa} ran {line['isa']}"}]
        status = process.wait()
        if status:
            assert process.stderr is not None
            words = process.stderr.read().strip().splitlines() or [""]
            lines.append({"isa": isa, "error": f"the process ended with status {status}: {words[-1]}"})
    return lines


def with_tolerances(lines: list[Line]) -> list[Line]:
    """The lines of one ISA, each with the "tolerance" of its dtype."""
    from .selftest_cases import tolerances

    for dtype in {line["dtype"] for line in lines if "error" not in line}:
        members = [line for line in lines if line.get("dtype") == dtype]
        forward, gradients = (max(line["peer"][kind] for line in members) for kind in (0, 1))
        for line in members:
            line["tolerance"] = tolerances(dtype, (forward, gradients))
    return lines


def passes(line: Line) -> bool:
    if "error" in line:
        return False
    return all(worst <= allowed for worst, allowed in zip(line["worst"], line["tolerance"], strict=True))


@contextmanager
def _worker(isa: str) -> Iterator[subprocess.Popen[str]]:
    paths = os.pathsep.join(path for path in sys.path if path)
    chosen = {} if isa == CUDA else {"RNNFAST_ISA": isa}
    process = subprocess.Popen(
        [sys.executable, *_WORKER, *([CUDA] if isa == CUDA else [])],
        env={**os.environ, **_ONE_BLAS_THREAD, **chosen, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _print(console: Any, lines: list[Line]) -> None:
    from rich import box
    from rich.table import Table

    title = "worst |y - y64|max / |y64|max over all cases, and what it may be"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("ISA", "cell", "dtype", "cases", "output, states", "gradients", ""):
        table.add_column(heading, justify="right" if heading in ("cases", "output, states", "gradients") else "left")
    for line in lines:
        verdict = "[green]ok[/]" if passes(line) else "[red]FAILED[/]"
        if "error" in line:
            table.add_row(line["isa"], "", "", "", line["error"], "", verdict)
            continue
        pairs = zip(line["worst"], line["tolerance"], strict=True)
        errors = [
            f"{worst:.1e} ≤ {allowed:.1e}" if worst <= allowed else f"{worst:.1e} > {allowed:.1e}"
            for worst, allowed in pairs
        ]
        table.add_row(line["isa"], line["cell"], line["dtype"], str(line["cases"]), *errors, verdict)
    console.print(table)
    failures = sum(not passes(line) for line in lines)
    console.print(f"[red]{failures} of {len(lines)} failed" if failures else f"[green]all {len(lines)} passed")
