"""The measurements of `bench/gpu.sh`: rows on the GPU within a budget of time, and the CPU engine over the machine's cores.

    python bench/gpu.py rows --json FILE [--seconds N] [--full]
    python bench/gpu.py scaling --json FILE [--seconds N]
    python bench/gpu.py table FILE...

FILE grows: records that are there stay unless their row is measured again, each with its own date and commit. Rows that it
lacks come first, one of each region of cuDNN in turn, then those that were measured longest ago, and at last those that
failed: a row is noted as such before it runs, so that one that hangs is known to the next run. The time that is spent is
looked at between rows.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rnnfast.bench import machine, records, report, suites, summary
from rnnfast.bench.gpu import cudnn_region
from rnnfast.bench.rows import Row
from rnnfast.bench.session import OWN, Session

THREADS = (1, 2, 4, 8, 16)
ROUNDS, SCALING_ROUNDS = 5, 3
CONTENDERS = (OWN, "torch", "rnnfast-tf32", "torch-tf32")
PAIRS = ((OWN, "torch"), ("rnnfast-tf32", "torch-tf32"))

# (cell, (T, B, I, H)): latency, batches of each size class, and what is split over hidden units.
SCALING = (
    ("lstm", (100, 1, 128, 128)), ("lstm", (100, 1, 512, 512)), ("lstm", (50, 16, 128, 128)), ("lstm", (50, 32, 256, 256)),
    ("lstm", (25, 64, 512, 512)), ("lstm", (10, 16, 1024, 1024)), ("lstm", (10, 64, 1024, 1024)), ("gru", (50, 32, 256, 256)),
    ("gru", (25, 64, 512, 512)), ("rnn", (50, 32, 256, 256)), ("rnn", (25, 64, 512, 512)), ("lstm", (77, 7, 97, 97)),
)  # fmt: skip


class Growing:
    """The file of records that runs add to."""

    def __init__(self, path: Path, key: Any = records.row_key) -> None:
        self.path, self.key = path, key
        self.new: list[records.Record] = []
        self.earlier = records.read_json(path)[0] if path.exists() else []
        self.failed = {records.row_key(r): r for r in (records.read_failed(path) if path.exists() else [])}
        here = next((name for name, _ in machine.gpus()), None)
        if any(record["device"] == "cuda" and record.get("gpu") != here for record in self.earlier):
            aside = path.replace(path.with_suffix(".other.json"))
            print(f"the earlier records are another GPU's: set aside as {aside.name}")
            self.earlier, self.failed = [], {}

    def begin(self, row: Row, provenance: dict[str, Any]) -> None:
        """The row has failed until `add` says otherwise."""
        self.add([], provenance, row, "it did not come to an end")

    def add(self, found: Sequence[records.Record], provenance: dict[str, Any], row: Row, why: str) -> None:
        """What was measured of a row, and what went wrong: nothing, if `why` is empty."""
        self.new += found
        self.failed.pop(records.key_of(row), None)
        if why:
            self.failed[records.key_of(row)] = records.failure(row, why, provenance["date"])
        merged = records.merge(self.earlier, self.new, provenance, self.key)
        records.write_json(self.path, merged, provenance, list(self.failed.values()))

    def in_order(self, rows: Sequence[Row]) -> list[Row]:
        """Those never measured before the oldest; those that failed last."""
        dates = {records.row_key(record): record["date"] for record in self.earlier}

        def place(row: Row) -> tuple[bool, str]:
            key = records.key_of(row)
            return (True, self.failed[key]["date"]) if key in self.failed else (False, dates.get(key, ""))

        return sorted(rows, key=place)


def spread(rows: Sequence[Row]) -> list[Row]:
    """One row of each region, cell and mode in turn: a run that is cut short has seen a bit of everything."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[cudnn_region(row), row.family, row.mode].append(row)
    return [row for row in chain.from_iterable(zip_longest(*groups.values())) if row is not None]


def run_rows(rows: Sequence[Row], session: Session, end: float, growing: Growing, extra: dict[str, Any]) -> list[str]:
    """Measure until `end`; what went wrong, in words."""
    problems: list[str] = []
    provenance = session.provenance()
    for number, row in enumerate(rows):
        if time.monotonic() > end:
            print(f"the time is spent: {len(rows) - number} of {len(rows)} rows wait for another run", flush=True)
            break
        growing.begin(row, provenance)
        outcome = session.run(row)
        why = "; ".join(f"{name}: {reason}" for name, reason in outcome.failures.items())
        growing.add([{**record, **extra} for record in outcome.records], provenance, row, why)
        times = ", ".join(f"{r['library']} {report.seconds_text(r['median_s'])}" for r in outcome.records)
        print(f"{row.name} {row.mode} {row.dtype}: {times}", flush=True)
        for name, why in outcome.failures.items():
            problems.append(f"{row.name} ({row.mode}, {row.dtype}), {name}: {why}")
            print(f"FAILED {problems[-1]}", flush=True)
    return problems


def finish(problems: Sequence[str], measured: Growing) -> None:
    if problems or not measured.new:
        raise click.ClickException(f"{len(problems)} failures, {len(measured.new)} records")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("rows")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--seconds", type=float, default=300.0, show_default=True)
@click.option("--full", is_flag=True, help="The grid of all sizes too.")
def measure_rows(path: Path, seconds: float, full: bool) -> None:
    """The rows of the suite "gpu", beside PyTorch's cuDNN layers, both without and with TF32."""
    end, growing = time.monotonic() + seconds, Growing(path)
    rows = growing.in_order(spread([*suites.rows_of("gpu"), *(suites.gpu_grid() if full else ())]))
    with Session(CONTENDERS, machine.usable_cores(), "cuda", ROUNDS) as session:
        missing = session.open()
        if missing:
            raise click.ClickException("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
        problems = run_rows(rows, session, end, growing, {})
    finish(problems, growing)


@main.command("scaling")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--seconds", type=float, default=60.0, show_default=True)
def measure_scaling(path: Path, seconds: float) -> None:
    """The CPU engine in training with 1 to 16 threads, as many as there are cores."""
    begin, growing = time.monotonic(), Growing(path, lambda r: (*records.row_key(r), r["threads"], r["cpu"]))
    rows = [row for cell, shape in SCALING for row in suites.rows_of_shapes([shape], [cell], ["train"])]
    counts = [n for n in THREADS if n <= machine.usable_cores()]
    problems: list[str] = []
    for number, threads in enumerate(counts):
        with Session((OWN,), threads, "cpu", SCALING_ROUNDS) as session:
            session.open()
            end = begin + seconds * (number + 1) / len(counts)
            extra = {"threads": threads, "cpu": machine.cpu_model()}
            problems += run_rows(rows, session, end, growing, extra)
    finish(problems, growing)


@main.command("table")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
def table(paths: Sequence[Path]) -> None:
    """What the files say, in short: ratios by region, and speed by the number of threads."""
    console = Console(width=120)
    for path in filter(Path.exists, paths):
        found, provenance = records.read_json(path)
        if any("threads" in record for record in found):
            console.print(scaling_table(found, provenance))
        elif found:
            console.print(region_table(found, provenance))


def region_table(found: Sequence[records.Record], provenance: dict[str, Any]) -> Table:
    """Times faster than cuDNN, by its region, dtype and mode; with TF32 against cuDNN with TF32."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in summary.by_row(found):
        times = {record["library"]: record["median_s"] for record in row}
        for own, rival in PAIRS:
            if own in times and rival in times:
                groups[row[0]["region"], row[0]["dtype"], row[0]["mode"], rival].append(times[rival] / times[own])
    shown = Table(title=f"{provenance['gpu']}: times faster than cuDNN (below 1: slower)", title_justify="left")
    for heading in ("cuDNN's region", "dtype", "mode", "rival", "rows", "mean", "least", "most"):
        shown.add_column(heading)
    for key, values in sorted(groups.items()):
        numbers = (summary.geometric_mean(values), min(values), max(values))
        shown.add_row(*key, str(len(values)), *(f"{number:.2f}" for number in numbers))
    return shown


def scaling_table(found: Sequence[records.Record], provenance: dict[str, Any]) -> Table:
    """Speed relative to one thread."""
    counts = sorted({record["threads"] for record in found})
    shown = Table(title=f"{provenance['cpu']}: times faster than one thread, training", title_justify="left")
    for heading in ("row", "one thread", *map(str, counts)):
        shown.add_column(heading)
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for record in (r for r in found if r["cpu"] == provenance["cpu"]):
        times[record["name"]][record["threads"]] = record["median_s"]
    for name, each in times.items():
        one = each.get(1)
        ratios = [f"{one / each[n]:.2f}" if one and n in each else "" for n in counts]
        shown.add_row(name, report.seconds_text(one) if one else "", *ratios)
    return shown


if __name__ == "__main__":
    main()
