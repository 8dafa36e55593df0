"""Run the accuracy checks, keep what was measured, fill README's table.

    python bench/accuracy/run.py                                 # the names of all tasks, and what is measured already
    python bench/accuracy/run.py "chorales, GRU 46" --seed 0 --seed 1 --layer rnnfast --layer torch
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


def measure(module: str, name: str, seed: int, layer: str, threads: int) -> Record:
    """The record of one run, made by a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"import json, {module} as m\n"
        + (
            f"import torch; torch.set_num_threads({threads})\n"
            if layer == "torch" or module == "torch_examples"
            else ""
        )
        + f"print(json.dumps(m.TASKS[{name!r}]({seed}, {layer!r})))"
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
    from rnnfast.bench import machine

    provenance = machine.provenance(threads, _core.isa())
    record["commit"] = provenance["commit"]
    rows = [row for row in read_records() if key(row) != key(record)]
    content = {"provenance": provenance, "rows": [*rows, record]}
    partial = RESULTS.with_name(RESULTS.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, RESULTS)


# The table -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Record], provenance: Record) -> str:
    """A line a task: published, wanted, ours (mean, and the range of several seeds), seconds with either layer."""
    lines = [
        "| task | published | wanted | ours | | seeds | seconds | with torch.nn's layer |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name in sorted({row["task"] for row in rows}, key=str.lower):
        ours = [row for row in rows if row["task"] == name and row["layer"] == "rnnfast"]
        if ours:
            lines.append(line(name, ours, [row for row in rows if row["task"] == name and row["layer"] == "torch"]))
    threads = sorted({row["threads"] for row in rows})
    place = f"{provenance['cpu']}, {'or '.join(map(str, threads))} of {provenance['cores']} cores, {provenance['isa']}"
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    low, high = (f(row["load_average"] for row in rows) for f in (min, max))
    note = (
        "Test figures, looked at once a run; mean over the seeds and their range. Seconds: training, all of a grid of learning "
        "rates together, on the seeds that both have; the machine was not idle (load average "
        f"{low:.1f} to {high:.1f})."
    )
    return "\n".join(lines) + f"\n\n{note} {place}; {versions}; {provenance['date'][:10]}.\n"


def line(name: str, ours: list[Record], torch: list[Record]) -> str:
    values = [row["ours"] for row in ours]
    mean = sum(values) / len(values)
    low, high = wanted(name)
    met = (low is None or mean >= low) and (high is None or mean <= high)
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
    published = "" if ours[0]["published"] is None else f"{ours[0]['published']:g}"
    mark = "" if not bounds else "yes" if met else "**no**"
    both = {row["seed"] for row in ours} & {row["seed"] for row in torch}
    timed = [[row["seconds"] for row in some if not both or row["seed"] in both] for some in (ours, torch)]
    seconds = [f"{sum(some) / len(some):.0f}" if some else "" for some in timed]
    cells = [name, published, ", ".join(bounds), f"{mean:.4g}{spread}", mark, str(len(values)), *seconds]
    return f"| {' | '.join(cells)} |"


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
@click.option("--again", is_flag=True, help="Measure also what is measured already.")
@click.option("--table", "only_table", is_flag=True, help="Fill README's table and do nothing else.")
def main(
    names: Sequence[str],
    seeds: Sequence[int],
    layers: Sequence[str],
    threads: int,
    everything: bool,
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
                    record = measure(tasks[name][0], name, seed, layer, threads)
                    keep(record, threads)
                    click.echo(f"{name}, seed {seed}, {layer}: {record['ours']:.5g} in {record['seconds']:.0f} s")
                    (ROOT / "README.md").write_text(filled())
    if not names and not everything:
        for name in tasks:
            click.echo(f"{name}: {sum(row[0] == name for row in measured)} records")


if __name__ == "__main__":
    main()
