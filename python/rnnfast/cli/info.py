"""`rnnfast info`: what this installation can do on this machine."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import click

_PEAK_SECONDS = 0.2


def collect() -> dict[str, Any]:
    """Everything that the command shows, as plain values. Peaks are measured: GFLOP/s of float32 multiply-adds."""
    from .. import _core
    from ..bench import machine

    threads = _core.get_num_threads()
    return {
        "version": _core.version,
        "compiler": _core.compiler,
        "isa": _core.isa(),
        "isas": list(_core.isas()),
        "compiled_isas": list(_core.compiled_isas()),
        "threads": threads,
        "cores": machine.usable_cores(),
        "cpu": machine.cpu_model(),
        "fma_peak_gflops": {n: round(_core.fma_peak(n, _PEAK_SECONDS), 1) for n in sorted({1, threads})},
        "cuda_built": importlib.util.find_spec("rnnfast._cuda") is not None,
        "cuda": _cuda_facts(),
        "devices": [f"{name} (driver {driver})" for name, driver in machine.gpus()],
        "versions": machine.versions(),
    }


def _cuda_facts() -> dict[str, str] | None:
    """What rnnfast._cuda says: the architectures it was compiled for, and the current device, or why there is none."""
    try:
        engine = importlib.import_module("rnnfast._cuda")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        return {"architectures": "?", "device": f"none: {error}"}
    return {"architectures": engine.architectures, "device": engine.device_description()}


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """What this installation can do on this machine."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from .console import make_console

    table = Table(show_header=False)
    for name, value in _lines(facts).items():
        table.add_row(name, value)
    make_console().print(table)


def _lines(facts: dict[str, Any]) -> dict[str, str]:
    peaks = ", ".join(f"{gflops:.0f} GFLOP/s on {n}" for n, gflops in facts["fma_peak_gflops"].items())
    if facts["cuda"]:
        cuda = f"compiled for {facts['cuda']['architectures']}; device: {facts['cuda']['device']}"
    else:
        cuda = "not built (RNNFAST_CUDA=ON pip install . does)"
        cuda += f"; this machine has {'; '.join(facts['devices'])}" if facts["devices"] else ""
    return {
        "rnnfast": f"{facts['version']}, compiled by {facts['compiler']}",
        "CPU": f"{facts['cpu']}, {facts['cores']} cores usable",
        "instruction set": f"{facts['isa']} chosen; possible here: {', '.join(facts['isas'])}; "
        f"compiled: {', '.join(facts['compiled_isas'])}",
        "threads": str(facts["threads"]),
        "FMA peak, float32": peaks + " threads",
        "CUDA": cuda,
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name != "rnnfast"),
    }
