"""Run the accuracy checks, keep what was measured, fill README's table.

    python bench/accuracy/run.py                                 # the names of all tasks, and what is measured already
    python bench/accuracy/run.py "chorales, GRU 46" --seed 0 --seed 1 --layer rnnfast --layer torch
    python bench/accuracy/run.py prompts --layer torch --limit 60     # its time, reckoned from what it did in a minute
    python bench/accuracy/run.py --all                           # everything that is not measured yet
    python bench/accuracy/run.py --table                         # README's table from the records, nothing else

Each run has a process of its own, so that one library's threads do not disturb the other's, and its record goes into
bench/results/accuracy.json at once. What is between ``<!-- accuracy -->`` and ``<!-- /accuracy -->`` in README.md is made
from that file and from nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "bench" / "results" / "accuracy.json"
MODULES = ("numpy_examples", "torch_examples")  # each has TASKS: a name to a function of seed and layer
MARKED = re.compile(r"(<!-- accuracy -->\n).*?(<!-- /accuracy -->)", re.DOTALL)

Record = dict[str, Any]

# What a task has to reach: by its name's beginning. Lower and upper bound; None: no bound.
WANTED: dict[str, tuple[float | None, float | None]] = {
    "chorales, tanh RNN 100": (None, 9.25),  # the published figures + 0.15
    "chorales, GRU 46": (None, 8.69),
    "chorales, LSTM 36": (None, 8.82),
    "ETTh1": (None, 0.424),  # repeating the last day
    "adding, T = 200, GRU": (None, 0.001),
    "adding, T = 200, LSTM": (None, 0.001),
    "adding, T = 200, tanh": (0.15, 0.18),  # near the guess, 0.167
    "copy, T = 20, GRU": (None, 0.0520),  # a tenth of the guess
    "copy, T = 20, LSTM": (None, 0.0520),
    "copy, T = 1000": (None, 0.0214),  # the guess, 0.0204, or better
    "digits, random": (0.97, None),
    "addition": (0.99, None),
}


def wanted(name: str) -> tuple[float | None, float | None]:
    return next((bounds for start, bounds in WANTED.items() if name.startswith(start)), (None, None))


def find_tasks() -> dict[str, tuple[str, Callable[..., Record]]]:
    """All tasks by name, each with its module's name."""
    sys.path.insert(0, str(HERE))
    present = [module for module in MODULES if (HERE / f"{module}.py").exists()]
    found = {module: importlib.import_module(module).TASKS for module in present}
    return {name: (module, task) for module, tasks in found.items() for name, task in tasks.items()}


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(module: str, name: str, seed: int, layer: str, threads: int, limit: float | None = None) -> Record:
    """The record of one run, made by a process of its own; `limit` seconds of training at most."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"import json, {module} as m\n"
        + (
            f"import torch; torch.set_num_threads({threads})\n"
            if layer == "torch" or module == "torch_examples"
            else ""
        )
        + f"print(json.dumps(m.TASKS[{name!r}]({seed}, {layer!r}, {limit})))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"{name}, seed {seed}, {layer}: {done.stderr.strip().splitlines()[-1]}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "task": name,
        **record,
        "layer": layer,
        "threads": threads,
        "date": when,
        "load_average": os.getloadavg()[1],
    }


def key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["layer"], record["threads"]


def read_records() -> list[Record]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def keep(record: Record, threads: int) -> None:
    """Add the record, or put it in place of an older one of the same run."""
    from rnnfast import _core
    from rnnfast.bench import machine, records

    provenance = machine.provenance(threads, _core.isa()) | {"cores": os.cpu_count()}
    record |= {name: provenance[name] for name in ("commit", "cpu", "isa")}
    rows = [row for row in read_records() if key(row) != key(record)]
    records.write_json(RESULTS, [*rows, record], provenance)


# The table -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Record], provenance: Record) -> str:
    """A line a task: published, wanted, ours (mean, and the range of several seeds), seconds with either layer."""
    lines = [
        "| task | published | wanted | ours | | seeds | seconds | with torch.nn's layer |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    machines = sorted({machine_of(row) for row in rows})
    for name in sorted({row["task"] for row in rows}, key=str.lower):
        ours = [row for row in rows if row["task"] == name and row["layer"] == "rnnfast"]
        if ours:
            torch = [row for row in rows if row["task"] == name and row["layer"] == "torch"]
            lines.append(line(name, ours, torch, machines))
    return "\n".join(lines) + f"\n\n{note(rows, provenance, machines)}\n"


def machine_of(row: Record) -> str:
    return f"{row['cpu']}, {row['isa']}"


def note(rows: Sequence[Record], provenance: Record, machines: list[str]) -> str:
    """Below the table: what its numbers are, and where they were measured."""
    low, high = (f(row["load_average"] for row in rows) for f in (min, max))
    text = (
        "Test figures, looked at once a run; mean over the seeds and their range. Seconds: training, all of a grid of "
        "learning rates together, on the seeds that both have on one machine; it was not idle (load average "
        f"{low:.1f} to {high:.1f})."
    )
    if any(row.get("stopped") for row in rows):
        text += " ≈: stopped before its end, and all steps of ours reckoned at the pace of those that were made."
    threads = " or ".join(map(str, sorted({row["threads"] for row in rows})))
    places = " ".join(f"{mark(place, machines)} {place};".lstrip() for place in machines)
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{text} {places} {threads} of {provenance['cores']} cores; {versions}; {when}."


def mark(place: str, machines: list[str]) -> str:
    """What stands behind seconds, where there are several machines to tell apart."""
    return "¹²³⁴⁵⁶⁷⁸⁹"[machines.index(place)] if len(machines) > 1 else ""


def line(name: str, ours: list[Record], torch: list[Record], machines: list[str]) -> str:
    values = [row["ours"] for row in ours]
    mean = sum(values) / len(values)
    low, high = wanted(name)
    met = (low is None or mean >= low) and (high is None or mean <= high)
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
    published = "" if ours[0]["published"] is None else f"{ours[0]['published']:g}"
    verdict = "" if not bounds else "yes" if met else "**no**"
    cells = [name, published, ", ".join(bounds), f"{mean:.4g}{spread}", verdict, str(len(values))]
    return f"| {' | '.join([*cells, *times(ours, torch, machines)])} |"


def times(ours: list[Record], torch: list[Record], machines: list[str]) -> list[str]:
    """Seconds with either layer, of the same seeds on the same machine; where there are none, ours alone."""

    def run_of(row: Record) -> tuple[Any, ...]:
        return row["seed"], machine_of(row)

    runs = {run_of(row) for row in torch} & {run_of(row) for row in ours}
    place = max(ours, key=lambda row: (run_of(row) in runs, row["date"]))
    ours = [row for row in ours if machine_of(row) == machine_of(place) and (not runs or run_of(row) in runs)]
    steps = {run_of(row): row.get("steps") for row in ours}
    theirs = [row for row in torch if run_of(row) in steps]
    sign = mark(machine_of(place), machines)
    mean = sum(row["seconds"] for row in ours) / len(ours)
    cells = [f"{mean:.0f}{sign}", ""]
    if theirs:
        whole = [row["seconds"] * (steps[run_of(row)] / row["steps"] if row.get("stopped") else 1) for row in theirs]
        about = "≈ " if any(row.get("stopped") for row in theirs) else ""
        cells[1] = f"{about}{sum(whole) / len(whole):.0f}{sign}"
    return cells


def filled() -> str:
    """README.md with the table of the records."""
    content = json.loads(RESULTS.read_text())
    text = table(content["rows"], content["provenance"])
    return MARKED.sub(lambda match: match[1] + text + match[2], (ROOT / "README.md").read_text())


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seed", "seeds", type=int, multiple=True, default=[0], show_default=True)
@click.option("--layer", "layers", type=click.Choice(["rnnfast", "torch"]), multiple=True, default=["rnnfast"])
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--all", "everything", is_flag=True, help="Every task that has no record yet.")
@click.option("--limit", type=click.FloatRange(1), help="Stop torch.nn's layer after that many seconds of training.")
@click.option("--again", is_flag=True, help="Measure also what is measured already.")
@click.option("--table", "only_table", is_flag=True, help="Fill README's table and do nothing else.")
def main(
    names: Sequence[str],
    seeds: Sequence[int],
    layers: Sequence[str],
    threads: int,
    everything: bool,
    limit: float | None,
    again: bool,
    only_table: bool,
) -> None:
    """Measure the accuracy of the examples."""
    if only_table:
        (ROOT / "README.md").write_text(filled())
        return
    tasks = find_tasks()
    measured = {key(row) for row in read_records()}
    unknown = [name for name in names if name not in tasks]
    if unknown:
        raise click.BadParameter(f"expected some of {', '.join(tasks)}, got {unknown[0]!r}", param_hint="NAMES")
    for name in tasks if everything else names:
        for layer in layers:
            for seed in seeds:
                if again or (name, seed, layer, threads) not in measured:
                    record = measure(tasks[name][0], name, seed, layer, threads, limit if layer == "torch" else None)
                    keep(record, threads)
                    figure = f"{record['steps']} steps" if record.get("stopped") else f"{record['ours']:.5g}"
                    click.echo(f"{name}, seed {seed}, {layer}: {figure} in {record['seconds']:.0f} s")
                    (ROOT / "README.md").write_text(filled())
    if not names and not everything:
        for name in tasks:
            click.echo(f"{name}: {sum(row[0] == name for row in measured)} records")


if __name__ == "__main__":
    main()
